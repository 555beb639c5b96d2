"""A line of text for every epoch and every evaluation.

Example:
    >>> import tnt_func as tnt
    >>> metrics = {"loss": tnt.metrics.mean("loss")}
    >>> unit = tnt.TrainUnit(train_step=lambda state, batch: (state, {"loss": batch}), metrics=metrics)
    >>> _ = tnt.train(unit, tnt.State(params=0, key=tnt.key(0)), [1.0, 2.0], max_epochs=2, observers=[console()])
    train epoch 1, step 2: loss 1.5
    train epoch 2, step 4: loss 1.5
"""

import sys
from typing import Any

from tnt_func.events import Event, Observer
from tnt_func.observers.rows import metrics_of
from tnt_func.types import typed


@typed
def console(*, file: Any = None) -> Observer:
    """An observer that prints a line when an epoch of training, an evaluation or a prediction is over.

    The line has the epoch of the phase and the train steps, of the lifetime, and the unit's metrics in six digits.

    Args:
        file: written to; None is the standard output of the moment.

    Example:
        >>> observers = [console(file=sys.stderr)]
    """

    def printing(event: Event) -> None:
        if event.point != "epoch_end":
            return
        found, progress = metrics_of(event, members=False), event.state.progress
        metrics = ": " + ", ".join(f"{name} {value:.6g}" for name, value in found.items()) if found else ""
        where = f"{event.phase} epoch {progress.of(event.phase).epochs}, step {progress.train.steps}"
        print(where + metrics, file=sys.stdout if file is None else file)

    return printing

"""Callbacks, all pure: they decide from the state, and what they remember is in `state.memory`, so it resumes.

A second one of a kind in a run takes a name of its own: `early_stopping("accuracy", mode="max", name="accuracy_stop")`.

Example:
    >>> from tnt_func import metrics, rng
    >>> from tnt_func.runs import train
    >>> from tnt_func.state import State
    >>> from tnt_func.unit import TrainUnit
    >>> unit = TrainUnit(train_step=lambda state, x: (state, {"loss": x}), metrics={"loss": metrics.mean("loss")})
    >>> stop = early_stopping("loss", phase="train", patience=2)
    >>> state = train(unit, State(params=0.0, key=rng.key(0)), [0.5, 1.5], max_epochs=100, callbacks=[stop])
    >>> state.progress.train.epochs, state.memory["early_stopping"]
    (3, {'best': 1.0, 'wait': 2})
"""

from tnt_func.callbacks.best_model import best as best
from tnt_func.callbacks.best_model import keep_best as keep_best
from tnt_func.callbacks.plain import lambda_callback as lambda_callback
from tnt_func.callbacks.plateau import reduce_lr_on_plateau as reduce_lr_on_plateau
from tnt_func.callbacks.stopping import early_stopping as early_stopping
from tnt_func.callbacks.stopping import stop_on_nonfinite as stop_on_nonfinite
from tnt_func.callbacks.unfreezing import unfreeze_at as unfreeze_at

"""Whether a model can learn a few batches by heart: one that cannot will learn no data set."""

from collections.abc import Sequence
from itertools import cycle, islice
from typing import Any

from tnt_func import optim, rng
from tnt_func.arguments import expects
from tnt_func.errors import UsageError
from tnt_func.events import Event
from tnt_func.progress import Progress
from tnt_func.rehearsal.feeds import Held, copied, read, unclean
from tnt_func.rehearsal.findings import Rehearsal, change, counted, metrics, several, shapes, spoilt, unchanged
from tnt_func.rehearsal.watching import Gradients, Outputs
from tnt_func.runs import evaluate, train
from tnt_func.state import State
from tnt_func.types import typed
from tnt_func.unit import Callback, FitUnit, TrainUnit, attach


@expects(TrainUnit, FitUnit)
@typed
def overfit_batches(
    unit: TrainUnit | FitUnit,
    state: State,
    train_data: Any,
    *,
    batches: int = 1,
    steps: int = 100,
    loss: str = "loss",
    to: float = 0.1,
    callbacks: Sequence[Callback] = (),
) -> Rehearsal:
    """Train on the first few batches again and again, in one epoch, and see whether the loss falls far enough.

    A model that cannot learn them by heart has a bug that no data mends: labels that do not belong to the inputs, a
    detached part, a loss with the wrong sign, a learning rate that is far off. A FitUnit also evaluates on these
    batches before and after, which finds models that evaluate as another function than they train.

    Args:
        unit, state, callbacks: as the run will be given them; a schedule runs as it would at its beginning.
        train_data: likewise; not an iterator.
        batches: how many to learn, the first ones of the epoch.
        steps: to take on them, in turns.
        loss: the entry of the step's output that has to fall.
        to: the fraction of the loss at first that it has to reach; of a loss that is not positive, that it falls.

    Returns:
        What was found. Its numbers: `loss_before`, `loss_after` (means over the batches), the metrics of the
        evaluation, as in "eval loss before" and "eval loss after".

    Raises:
        UsageError: a number is out of range, the output has no such entry, the data is an iterator or has no batch.
        Whatever the unit, the callbacks and the data raise.

    Example:
        >>> import torch
        >>> from tnt_func.recipes import supervised
        >>> from torch import nn
        >>> unit, state = supervised(nn.Linear(2, 1), nn.functional.mse_loss, optim.sgd(0.1), key=rng.key(0))
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> found = overfit_batches(unit.train_unit, state, [(x, torch.tensor([[3.0], [-2.0]]))], steps=200)
        >>> found.ok, found.numbers["loss_after"] < 1e-3
        (True, True)

    References:
        Trainer(overfit_batches=...) of Lightning; Karpathy, A Recipe for Training Neural Networks, 2019.
    """
    if batches < 1 or steps < batches or not 0 < to < 1:
        raise UsageError(
            f"overfit_batches(batches={batches}, steps={steps}, to={to}) was given; there is at least one batch, a "
            "step for each, and a fraction between 0 and 1 to reach. Write batches=1, steps=100, to=0.1."
        )
    done, whole, losses, gradients = state.progress.train, attach(unit, *callbacks), Losses(loss), Gradients()
    state = state.replace(progress=state.progress.put("train", Progress(done.epochs, done.steps)), stop=None)
    with rng.preserved():
        feed = read(train_data, state, "train", batches)
        turns = Held(tuple(islice(cycle(feed.held.held), steps)))
        before = _evaluated(whole, state, feed.held)
        trained = whole.train_unit if isinstance(whole, FitUnit) else whole
        end = train(gradients.watched(trained), copied(state), turns, max_epochs=done.epochs + 1, observers=[losses])
        after = _evaluated(whole, end, feed.held)
    if not losses.values:
        raise UsageError(f"no step was taken: the run stopped at once, for {losses.reason!r}. Leave that callback out.")
    count, values = len(feed.reads), losses.values
    first, last = (sum(some) / len(some) for some in (values[:count], values[-count:]))
    taken = f"{counted(len(losses.values), 'step')} on {counted(len(feed.reads), 'batch', 'es')}"
    found = unclean(feed) + losses.findings + unchanged(state, end, taken, gradients.missing)
    found += spoilt(state, end, taken) + _judged(first, last, after.get(f"eval {loss}"), to, taken)
    rates = [_rate(at) for at in (state, end)]
    facts = {
        "ran": f"{taken}{f', stopped early for {losses.reason!r}' if losses.reason else ''}",
        "batch": shapes(feed.reads[0].batch),
        loss: change(first, last),
        "evaluated": several([f"{name} {change(value, after[name])}" for name, value in before.items()]),
        "lr": change(*rates) if None not in rates else "",
    }
    measured = {"loss_before": first, "loss_after": last}
    measured |= {
        f"{name} {when}": value for when, its in (("before", before), ("after", after)) for name, value in its.items()
    }
    return Rehearsal("overfit_batches", {name: text for name, text in facts.items() if text}, tuple(found), measured)


def _judged(first: float, last: float, evaluated: float | None, to: float, taken: str) -> list[str]:
    """What is to be said of how far a loss fell."""
    if not (last <= to * first if first > 0 else last < first):
        wanted = f"at most {to * first:.4g} ({to:g} of it)" if first > 0 else "lower"
        return [
            f"The loss went from {first:.4g} to {last:.4g} in {taken}, and should be {wanted}. Are the targets those "
            "of the inputs, is the learning rate far off, is the schedule still warming up, is there too much noise "
            "(dropout)? If it only needs longer, write steps=... or to=...."
        ]
    if evaluated is not None and first > 0 and not evaluated <= to * first:
        return [
            f"The loss fell to {last:.4g} in training, and an evaluation of the same batches gives {evaluated:.4g}: "
            "the model is another function there. Has BatchNorm seen too few batches, or does eval_step prepare its "
            "inputs in another way?"
        ]
    return []


def _evaluated(unit: TrainUnit | FitUnit, state: State, held: Held) -> dict[str, float]:
    """The metrics of an evaluation on the batches; none of a unit that does not evaluate."""
    return metrics(evaluate(unit.eval_unit, copied(state), held), "eval") if isinstance(unit, FitUnit) else {}


def _rate(state: State) -> float | None:
    """The learning rate, where there is one."""
    held = [values["lr"] for values in optim.hyperparameters(state.opt_state) if "lr" in values]
    return float(held[0]) if len(held) == 1 else None


class Losses(Outputs):
    """An observer that keeps one number of every step.

    Args:
        name: of an entry of the output.

    Raises:
        UsageError: when called with a step's output that has no such number.
    """

    def __init__(self, name: str):
        super().__init__()
        self._name = name

    def __call__(self, event: Event) -> None:
        """Keep what a step put out."""
        super().__call__(event)
        if event.point == "step_end" and self._name not in self.numbers[-1]:
            raise UsageError(
                f"overfit_batches(loss={self._name!r}) was given, and the numbers in the output of train_step are "
                f"{list(self.numbers[-1])}; the loss is one of them. Write loss='...', and return it from the step."
            )

    @property
    def values(self) -> list[float]:
        """The number, step by step."""
        return [float(numbers[self._name]) for numbers in self.numbers]

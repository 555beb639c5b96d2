"""A few steps through everything that a run goes through, and what they cost."""

from collections.abc import Sequence
from typing import Any

import torch

from tnt_func import pytree as trees
from tnt_func import rng
from tnt_func.arguments import expects
from tnt_func.events import Observer
from tnt_func.loop import limit
from tnt_func.rehearsal.costs import ahead, held, measured, pace
from tnt_func.rehearsal.feeds import Feed, Held, copied, last_batch, looked_at, read_each
from tnt_func.rehearsal.findings import Rehearsal, counted, course, metrics, said, shapes, spoilt, unchanged
from tnt_func.rehearsal.watching import Gradients, Watch
from tnt_func.runs import fit, train
from tnt_func.state import State
from tnt_func.transitions import prepare, start_epoch, step
from tnt_func.types import Limit, Phase, typed
from tnt_func.unit import Callback, EvalUnit, FitUnit, TrainUnit, attach


@expects(TrainUnit, FitUnit)
@typed
def fast_dev_run(
    unit: TrainUnit | FitUnit,
    state: State,
    train_data: Any,
    eval_data: Any = None,
    *,
    steps: int = 5,
    callbacks: Sequence[Callback] = (),
    observers: Sequence[Observer] = (),
    max_epochs: Limit = None,
    max_steps: Limit = None,
) -> Rehearsal:
    """The run in small: a few steps from where it would begin, and all that follows them, the epoch's end included.

    Every hook of the unit and the callbacks runs, and the evaluation of a FitUnit; then one step on the last batch of
    an epoch, where that is smaller than the others. Errors are raised as they would be in the run.

    Tells what a step, an epoch and the run take, shapes and dtypes, losses and metrics; finds parameters that got no
    gradient or did not change, what is not finite, batches that differ when drawn again or are all the same, a last
    batch that no step can take, and loaders on which the run could not be resumed.

    Args:
        unit, state, callbacks: as the run will be given them.
        train_data, eval_data: likewise; not an iterator, whose batches the run would miss. Read twice, for `steps`
            batches.
        steps: of training, and of the evaluation.
        observers: called as in the run. They have effects: give those of the run files of their own here.
        max_epochs, max_steps: of the run, to tell how long it will take.

    Returns:
        What was found. Its numbers: `step_seconds`, `first_step_seconds`, `batch_seconds`, and the same with "eval_"
        before them; `epoch_seconds`, `run_seconds`; the metrics, as in "train loss".

    Raises:
        UsageError: steps is below 1, eval_data is there without use or not there, data is an iterator or has no batch.
        Whatever the unit, the callbacks, the data and the observers raise.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from tnt_func import optim, recipes
        >>> module = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        >>> unit, state = recipes.supervised(module, nn.functional.mse_loss, optim.adamw(1e-2), key=rng.key(0))
        >>> loader = DataLoader(TensorDataset(torch.randn(97, 2), torch.ones(97, 1)), batch_size=16, shuffle=True)
        >>> found = fast_dev_run(unit.train_unit, state, loader, max_epochs=90)
        >>> print(found)
        fast_dev_run: 1 finding
          ran: 5 train steps, every hook of an epoch
          train batch: [0] float32[16, 2], [1] float32[16, 1]
          ...
        - The last batch of an epoch has 1 of 16 rows, and train_step fails on it: ValueError: Expected more than 1 ...

    References:
        Trainer(fast_dev_run=...) of Lightning.
    """
    done, state = state.progress.train, state.replace(stop=None)
    epochs, steps_left = limit("max_epochs", max_epochs) - done.epochs, limit("max_steps", max_steps) - done.steps
    whole = attach(unit, *callbacks)
    waits = torch.accelerator.is_available() and any(not leaf.is_cpu for leaf in trees.tensors(state))
    gradients, watch = Gradients(), Watch(waits)
    with rng.preserved():
        feeds = read_each("fast_dev_run", whole, state, train_data, eval_data, steps)
        observed = (watch.arrived, *observers, watch.left)
        end = _run(gradients.watched(whole), copied(state), [feed.held for feed in feeds], observed)
        found = [one for feed in feeds for one in looked_at(feed) + watch.outputs[feed.name].findings]
        smaller = [one for feed in feeds for one in _tried_last(whole, end, feed)]
    taken = counted(len(watch.seconds["train"]), "step")
    found += unchanged(state, end, taken, gradients.missing) + spoilt(state, end, taken) + smaller
    ran = [counted(len(watch.seconds[feed.name]), f"{feed.name} step") for feed in feeds]
    reason = watch.outputs["train"].reason
    ran += ["every hook of an epoch", *([f"stopped early for {reason!r}"] if reason else [])]
    phases: list[Phase] = [feed.name for feed in feeds]
    facts, values = {"ran": ", ".join(ran)}, metrics(end, *phases)
    for feed in feeds:
        facts[f"{feed.name} batch"] = shapes(feed.reads[0].batch)
        facts[f"{feed.name} output"] = course(watch.outputs[feed.name].numbers) or watch.outputs[feed.name].shapes
    facts |= {"metrics": said(values)} if values else {}
    paces = {feed.name: pace(feed, watch.seconds[feed.name]) for feed in feeds if watch.seconds[feed.name]}
    if "train" in paces:
        for times, words in (measured(paces), ahead(paces, epochs=epochs, steps=steps_left)):
            values, facts = {**values, **times}, {**facts, **words}
    return Rehearsal("fast_dev_run", {**facts, **held(end)}, tuple(found), values)


def _run(unit: TrainUnit | FitUnit, state: State, feeds: Sequence[Held], observers: Sequence[Observer]) -> State:
    """The epoch that the state is in or before, as long as its batches last, and an evaluation."""
    options: dict[str, Any] = {"max_epochs": state.progress.train.epochs + 1, "allow_inexact_resume": True}
    if isinstance(unit, FitUnit):
        return fit(unit, state, *feeds, observers=observers, **options)
    return train(unit, state, *feeds, observers=observers, **options)


def _tried_last(unit: Any, state: State, feed: Feed) -> list[str]:
    """What is to be said of a smaller last batch, after a step on it."""
    found = last_batch(feed)
    if found is None:
        return []
    batch, which = found
    part: TrainUnit | EvalUnit = getattr(unit, f"{feed.name}_unit", unit)
    try:
        after = step(part, start_epoch(part, prepare(unit, state)), copied(batch))
    except Exception as error:
        advice = "Write drop_last=True, or make the step ready for it."
        failed = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return [f"{which}, and {feed.name}_step fails on it: {failed}. {advice}"]
    return [f"{which}. {one}" for one in spoilt(state, after, "a step on it")]

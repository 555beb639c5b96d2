"""Evaluation before training, and the cheap laws on the real model."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from tnt_func import pytree as trees
from tnt_func import rng
from tnt_func.arguments import expects
from tnt_func.donation import donates
from tnt_func.events import Event, Observer, fold
from tnt_func.rehearsal.feeds import Feed, copied, looked_at, read_each
from tnt_func.rehearsal.findings import Rehearsal, counted, course, metrics, said, several, shapes, spoilt, tree_of
from tnt_func.rehearsal.watching import Outputs
from tnt_func.replay.marks import mark, mark_of_batch
from tnt_func.runs import evaluate_events, train_events
from tnt_func.state import State
from tnt_func.transitions import prepare
from tnt_func.types import typed
from tnt_func.unit import RESERVED, Callback, EvalUnit, FitUnit, TrainUnit, attach, step_of

KEPT = ("params", "buffers", "opt_state", "memory")


@expects(TrainUnit, EvalUnit, FitUnit)
@typed
def sanity_check(
    unit: TrainUnit | EvalUnit | FitUnit,
    state: State,
    data: Any,
    eval_data: Any = None,
    *,
    steps: int = 2,
    callbacks: Sequence[Callback] = (),
) -> Rehearsal:
    """A few steps of evaluation, before hours of training lead to the first one; then as many of training.

    Each is taken twice, from copies of one state and with the global generators elsewhere. Found is what is not finite;
    what a step or hook wrote in place into a state or batch it was given (law 1); what differs between the two (law 2);
    what changed its shape or dtype (law 3); and what `fast_dev_run` finds of the data. The laws are held against the
    real model at the price of reading its state a few times a step, about a second for some gigabytes; all of them, on
    a small model, are `tnt_func.testing.check_unit`.

    Args:
        unit: a FitUnit, or a unit that trains or evaluates only.
        state, callbacks: as the run will be given them.
        data: of the unit; of a FitUnit what it trains on.
        eval_data: what a FitUnit evaluates on.
        steps: of evaluation, and of training.

    Returns:
        What was found. Its numbers are the metrics, as in "eval loss".

    Raises:
        UsageError: steps is below 1, eval_data is there without use or not there, data is an iterator or has no batch.
        Whatever the unit, the callbacks and the data raise.

    Example:
        >>> calls = []
        >>> def train_step(state, batch):
        ...     calls.append(batch)
        ...     return state.replace(params=state.params - 0.1 * len(calls)), {"loss": batch}
        >>> state = State(params=torch.zeros(2), key=rng.key(0))
        >>> print(sanity_check(TrainUnit(train_step=train_step), state, [1.0, 2.0, 4.0]))
        sanity_check: 1 finding
          train: 2 steps, loss 1 -> 2
          train batch: float
        - Two runs of 2 train steps from one state differ: state.params: 2 of 2 elements differ, by at most 0.4. So...

    References:
        Trainer(num_sanity_val_steps=...) of Lightning.
    """
    whole = attach(unit, *callbacks)
    facts: dict[str, str] = {}
    values: dict[str, float] = {}
    found: list[str] = []
    with rng.preserved():
        for feed in reversed(read_each("sanity_check", whole, state, data, eval_data, steps)):
            part: Any = getattr(whole, f"{feed.name}_unit", whole)
            first, end, unlawful = _lawful(part, state.replace(stop=None), feed)
            found += looked_at(feed) + unlawful
            taken = [counted(len(first.numbers), "step"), course(first.numbers)]
            facts |= {feed.name: ", ".join(filter(None, taken)), f"{feed.name} batch": shapes(feed.reads[0].batch)}
            values |= metrics(end, feed.name)
    facts |= {"metrics": said(values)} if values else {}
    return Rehearsal("sanity_check", facts, tuple(found), values)


def _lawful(unit: TrainUnit | EvalUnit, state: State, feed: Feed) -> "tuple[Ledger, State, list[str]]":
    """The first of two runs from one state: what it put out, its last state, and what is to be said of both."""
    # A step that donates writes over what it is given, as it should.
    first, second = Ledger(marking=not donates(step_of(unit))), Ledger(marking=False)
    end = _run(unit, state, feed, first)
    # Only what is not in the state can differ now.
    rng.seed(rng.fold_in(state.key, "elsewhere"))
    again = _run(unit, state, feed, second)
    taken = counted(len(first.numbers), f"{unit.phase} step")
    findings = first.findings + first.written + spoilt(state, end, taken)
    if lines := trees.diff(end, again, "state") or trees.diff(first.numbers, second.numbers, "outputs"):
        findings.append(
            f"Two runs of {taken} from one state differ: {several(lines)}. Something is kept outside the state, drawn "
            "from a generator that the unit does not declare, or added up in another order on a GPU: "
            "tnt.testing.check_determinism names who does it, torch.use_deterministic_algorithms(True) orders sums."
        )
    was, now = _kinds(prepare(unit, copied(state))), _kinds(end)
    changed = [
        f"{path} from {was.get(path)} to {now.get(path)}" for path in {**was, **now} if was.get(path) != now.get(path)
    ]
    if changed:
        findings.append(
            f"{taken} changed {several(changed)}. A step keeps structure, shapes and dtypes: cast the update, and put "
            "what appears into the first state."
        )
    return first, end, findings


def _run(unit: TrainUnit | EvalUnit, state: State, feed: Feed, ledger: Observer) -> State:
    """The epoch that a copy of the state is in or before, as long as its batches last."""
    # The generators that evaluate and train seed between steps would hide a draw that the unit does not declare.
    if isinstance(unit, EvalUnit):
        return fold(evaluate_events(unit, copied(state), feed.held), [ledger])
    max_epochs = state.progress.train.epochs + 1
    events = train_events(unit, copied(state), feed.held, max_epochs=max_epochs, allow_inexact_resume=True)
    return fold(events, [ledger])


class Ledger(Outputs):
    """An observer that also finds what was written into a state or a batch after it was handed out.

    Args:
        marking: whether to look for that; it costs the reading of every state.
    """

    def __init__(self, marking: bool):
        super().__init__()
        self.written: list[str] = []
        self._marking = marking
        self._kept: State | None = None
        self._marks: dict[str, Any] = {}
        self._batch: str | None = None

    def __call__(self, event: Event) -> None:
        """Keep what an event shows."""
        super().__call__(event)
        if self._marking:
            self._compare(event)

    def _compare(self, event: Event) -> None:
        who = f"{event.phase}_step" if event.point == "step_end" else f"an on_{event.phase}_{event.point} hook"
        if self._kept is not None and not self.written:
            now = _marks(self._kept)
            paths = [path for path in {**now, **self._marks} if now.get(path) != self._marks.get(path)]
            if event.point == "step_end" and mark_of_batch(tree_of(event.batch)) != self._batch:
                paths.append("its batch")
            if paths:
                self.written.append(
                    f"{who} wrote in place into {several(paths)}. What a step or hook is given stays as it was: write "
                    "params - lr * grads, not params.sub_(lr * grads); tnt.testing.check_purity shows where."
                )
        if event.point == "fetched":
            self._batch = mark_of_batch(tree_of(event.batch))
        if event.state is not self._kept:
            self._kept, self._marks = event.state, _marks(event.state)


def _marks(state: State) -> dict[str, Any]:
    """What can be told of every leaf that a write in place would change."""
    return {f"{part}{path}": (mark(leaf), _has_gradient(leaf)) for part, path, leaf in _leaves(state)}


def _has_gradient(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_leaf and leaf.grad is not None


def _kinds(state: State) -> dict[str, str]:
    state = state.replace(memory={name: slot for name, slot in state.memory.items() if name != RESERVED})
    return {
        f"{part}{path}": trees.describe(leaf) if isinstance(leaf, torch.Tensor) else type(leaf).__name__
        for part, path, leaf in _leaves(state)
    }


def _leaves(state: State) -> Iterator[tuple[str, str, Any]]:
    for part in KEPT:
        yield from ((part, path, leaf) for path, leaf in trees.named_leaves(getattr(state, part)))

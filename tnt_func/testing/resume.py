"""Law 5: a run may be split anywhere, any number of times, and continued, and no bit and no event differs."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from tnt_func.arguments import expects
from tnt_func.state import State
from tnt_func.testing.case import Case, law_error
from tnt_func.testing.snapshot import changes, freeze, thaw
from tnt_func.testing.tape import Moment, compare, difference, record
from tnt_func.transitions import prepare
from tnt_func.unit import Callback, FitUnit, TrainUnit


@expects(TrainUnit, FitUnit)
def check_resume(
    unit: TrainUnit | FitUnit,
    state: State,
    batches: Any,
    *,
    eval_batches: Any = None,
    callbacks: Sequence[Callback] = (),
    places: int = 32,
    seed: int = 0,
    **options: Any,
) -> None:
    """Law 5. From every resumable event the run continues with exactly the events that would have followed.

    The run is split at every resumable event, then at two and three of them one after another, then paused by
    `pause_when`, in evaluations too. Each time it goes on from a copy of the state as a checkpoint would give it, and
    every remaining event, its state to the bit, is held against the unbroken run. At last the start and end hooks run
    once more on the final state, which must stay as it is.

    Args:
        unit, state, batches, eval_batches, callbacks, options: as in `check_unit`.
        places: how many places are tried, of those to split at and of those to pause at; the cost grows with their
            number times the length of the run. Where there are more, a choice by the seed is tried.
        seed: of that choice, and of the double and triple splits.

    Raises:
        LawError: a continued run differs; the message says where it was split, where it differs first, and who did it.

    Example:
        >>> from tnt_func.rng import key
        >>> seen = []
        >>> def train_step(state, batch):
        ...     seen.append(batch)
        ...     return state.replace(params=state.params + len(seen)), {}
        >>> check_resume(TrainUnit(train_step=train_step), State(params=0, key=key(0)), [1.0])
        Traceback (most recent call last):
        tnt_func.errors.LawError: law 5 (resume) is broken at train step_end (epoch 1, step 2): ...
          state.params: int 3 became int 4
        ...
    """
    case = Case.of(unit, state, batches, eval_batches, callbacks, options)
    tape = list(record(case))
    cuts = [index for index, moment in enumerate(tape) if moment.event.resumable]
    choice = torch.Generator().manual_seed(seed)
    for cut in _chosen(cuts, places, choice):
        _split(case, tape, [cut])
    for count in (2, 3):
        if len(cuts) >= count:
            _split(case, tape, sorted(_chosen(cuts, count, choice)))
    _check_pauses(case, tape, places, choice)
    _check_ends(case, tape[-1])


def _chosen(places: Sequence[int], count: int, choice: torch.Generator) -> list[int]:
    if len(places) <= count:
        return list(places)
    return [places[index] for index in torch.randperm(len(places), generator=choice)[:count].tolist()]


def _split(case: Case, tape: Sequence[Moment], cuts: Sequence[int]) -> None:
    """Split a run at the given moments of its tape, in order, and hold every continuation against the tape."""
    state = tape[cuts[0]].resumption()
    for cut, until in itertools.pairwise([*cuts, len(tape) - 1]):
        places = " and then ".join(f"after {tape[c].place}" for c in cuts if c <= cut)
        state = _continue(case, tape, cut, until, state, f"the run split {places} and continued")


def _continue(case: Case, tape: Sequence[Moment], cut: int, until: int, state: State, said: str) -> State:
    """Continue from the moment of a cut as far as another; the state there, as a checkpoint gives it."""
    rest = record(case, state=state)
    _check_start(tape[cut].state, next(rest), said)
    if until == len(tape) - 1:
        compare(tape[cut + 1 :], rest, "resume", said, _advice)
        return state
    part = list(itertools.islice(rest, until - cut))
    compare(tape[cut + 1 : until + 1], iter(part), "resume", said, _advice)
    return part[-1].resumption()


def _check_start(before: Any, start: Moment, said: str) -> None:
    """The start hooks of a continued run leave its state as it is."""
    if start.state == before:
        return
    owner, lines = _first_change(before, start)
    advice = (
        "Start hooks run again at every call that continues the run, so they change nothing that is there already: "
        "initialise in a memory function, or set a value only where the state shows that it was never set."
    )
    raise law_error(
        "resume", f"at {start.place}", f"{said}, {owner} changes the state that it continues from", lines, advice
    )


def _first_change(before: Any, moment: Moment) -> tuple[str, list[str]]:
    for call, result in moment.calls:
        if isinstance(result, State) and (lines := changes(before, freeze(result), "state")):
            return call.owner, lines
    return "preparing the state", changes(before, moment.state, "state")


def _check_pauses(case: Case, tape: Sequence[Moment], places: int, choice: torch.Generator) -> None:
    """`pause_when` may say so wherever it is asked, and changes nothing."""
    asked = 0

    def counts() -> bool:
        nonlocal asked
        asked += 1
        return False

    compare(tape, record(case, pause_when=counts), "resume", "the run with a pause_when that says False", _advice)
    for turn in _chosen(range(asked), max(1, places // 4), choice):
        asks = itertools.count()
        moments = list(record(case, pause_when=lambda asks=asks, turn=turn: next(asks) == turn))
        paused = moments.pop()
        said = f"the run paused at {moments[-1].place}"
        compare(tape[: len(moments)], iter(moments), "resume", said, _advice)
        cut = max((i for i, moment in enumerate(moments) if moment.event.resumable), default=None)
        last = freeze(prepare(case.whole, case.state)) if cut is None else tape[cut].state
        if paused.event.point != "paused" or paused.state != last:
            lines = changes(last, paused.state, "state")
            raise law_error("resume", f"at {paused.place}", f"{said} is not at its last resumable state", lines, _OURS)
        start = next(record(case, state=paused.resumption()))
        if cut is not None:
            _check_start(last, start, said)
        elif start.state != tape[0].state:
            raise difference(tape[0], start, "resume", f"{said} and continued", _advice)


def _check_ends(case: Case, last: Moment) -> None:
    """Start and end hooks, run once more on the final state, leave it as it is."""
    final = last.state
    resumed = thaw(final)
    done = {"max_epochs": resumed.progress.train.epochs}
    for moment in record(case, state=resumed, **done):
        if moment.state != final:
            owner, lines = _first_change(final, moment)
            said = f"a call on the final state, with nothing left to do, changes it, and {owner} is where it begins"
            advice = (
                "Start and end hooks bracket a call, and a run is any number of calls: applied twice they do what they "
                "do applied once. Write what they compute, not what they add: remember(name, value), not value + 1."
            )
            raise law_error("resume", f"at {moment.place}", said, lines, advice)


_OURS = "The loop alone pauses: where the run came from tnt.train or tnt.fit, this is a bug of tnt_func."


def _advice(ours: Moment, theirs: Moment) -> str:
    if ours.batch != theirs.batch:
        return (
            "The data of an epoch is a function of the epoch and the run's key. Let it draw from the global "
            "generators, which are seeded for it, or from the epoch number, and keep no position of its own."
        )
    return (
        "What a step or hook knows comes from its state: a counter, cache or best value in a closure, an object or a "
        "module is not there when the run is continued elsewhere. Keep it in state.memory, with a memory function for "
        "its first value."
    )

"""A run written down event by event, so that another run can be held against it, bit for bit.

Example:
    >>> from tnt_func.rng import key
    >>> from tnt_func.state import State
    >>> from tnt_func.unit import TrainUnit
    >>> unit = TrainUnit(train_step=lambda state, batch: (state.replace(params=state.params + batch), {}))
    >>> case = Case.of(unit, State(params=0, key=key(0)), [1, 2])
    >>> tape = list(record(case))
    >>> compare(tape, record(case), "determinism", "a second run", "Keep nothing outside the state.")
    >>> sum(moment.event.resumable for moment in tape)
    6
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from tnt_func.errors import LawError
from tnt_func.events import Event
from tnt_func.state import State
from tnt_func.testing.case import Call, Case, law_error, where
from tnt_func.testing.snapshot import changes, freeze, thaw


class Made(NamedTuple):
    """A call of a step or hook, and what it returned."""

    call: Call
    result: Any


class Moment(NamedTuple):
    """An event, what it held at the time, and the calls that led to it.

    Args:
        event: as the loop gave it.
        state: its state, frozen.
        batch: its batch, frozen where the event is `fetched`.
        calls: the steps and hooks called since the event before.
    """

    event: Event
    state: Any
    batch: Any
    calls: tuple[Made, ...]

    @property
    def place(self) -> str:
        """The event in words."""
        return where(self.event.phase, self.event.point, self.event.state)

    def resumption(self) -> State:
        """The event's state, as it comes out of a checkpoint: no memory is shared."""
        return thaw(self.state)


def record(case: Case, **changed: Any) -> Iterator[Moment]:
    """The moments of a run of a case, lazily. Arguments are those of `case.events`, a watch excepted."""
    calls: list[Made] = []

    def watch(call: Call) -> Any:
        result = call.make()
        calls.append(Made(call, result))
        return result

    for event in case.events(watch, **changed):
        batch = freeze(event.batch) if event.point == "fetched" else None
        yield Moment(event, freeze(event.state), batch, tuple(calls))
        calls.clear()


def compare(
    tape: Sequence[Moment],
    other: Iterator[Moment],
    law: str,
    said: str,
    advice: str | Callable[[Moment, Moment], str],
) -> None:
    """Hold another run against a tape.

    Args:
        tape: the moments that the other run should have.
        other: the moments it has.
        law: the law that is broken if they differ.
        said: the other run, in words.
        advice: what to write instead; or what finds that out from the two moments that differ.

    Raises:
        LawError: they differ; the message says where first, who did it, and on which leaves.
    """
    for ours, theirs in itertools.zip_longest(tape, other):
        if ours is None or theirs is None or not _same(ours, theirs):
            raise difference(ours, theirs, law, said, advice)


def difference(
    ours: Moment | None,
    theirs: Moment | None,
    law: str,
    said: str,
    advice: str | Callable[[Moment, Moment], str],
) -> LawError:
    """The error that says how two moments differ, that should be the same."""
    if ours is None or theirs is None:
        raised = theirs or ours
        assert raised is not None
        longer = "goes on to" if theirs else "ends before"
        text = advice if isinstance(advice, str) else advice(raised, raised)
        return law_error(law, f"at {raised.place}", f"{said} {longer} that event, and the first run does not", [], text)
    text = advice if isinstance(advice, str) else advice(ours, theirs)
    if (ours.event.phase, ours.event.point) != (theirs.event.phase, theirs.event.point):
        return law_error(law, f"at {ours.place}", f"{said} goes to {theirs.place} instead", [], text)
    owner, lines = culprit(ours, theirs)
    return law_error(
        law, f"at {ours.place}", f"{said} differs from the first, and {owner} is where it begins", lines, text
    )


def culprit(ours: Moment, theirs: Moment) -> tuple[str, list[str]]:
    """Who first did another thing on the way to two moments, and how the leaves differ."""
    if lines := changes(ours.batch, theirs.batch, "batch"):
        return f"the {ours.event.phase} data", lines
    for a, b in zip(ours.calls, theirs.calls, strict=False):
        if a.call.owner != b.call.owner:
            return f"the call of {a.call.owner}, which is one of {b.call.owner} there,", []
        names = ("state", "output") if a.call.point == "step" else ("state",)
        results = (a.result, b.result) if a.call.point == "step" else ((a.result,), (b.result,))
        for name, x, y in zip(names, *results, strict=True):
            if lines := changes(freeze(x), freeze(y), name):
                return a.call.owner, lines
    lines = changes(ours.state, theirs.state, "state")
    for part, owner in ((".metrics", "a metric"), (".memory", "a memory function")):
        if lines and all(part in line for line in lines):
            return owner, lines
    return "what the loop does between the hooks" if lines else f"the reason {theirs.event.reason!r}", lines


def _same(a: Moment, b: Moment) -> bool:
    x, y = a.event, b.event
    return (
        x.point == y.point
        and x.phase == y.phase
        and x.resumable == y.resumable
        and x.reason == y.reason
        and a.state == b.state
        and a.batch == b.batch
    )

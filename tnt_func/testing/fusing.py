"""Law 12 of fused steps: a block is its steps, one after another."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

from tnt_func.arguments import expects
from tnt_func.asserts import assert_trees_close
from tnt_func.errors import LawError, TreeError
from tnt_func.events import Event
from tnt_func.state import State
from tnt_func.testing.case import Case, where
from tnt_func.testing.snapshot import changes, freeze, thaw
from tnt_func.unit import Callback, FitUnit, TrainUnit, attach, hook_of, identity

Differ: TypeAlias = Callable[[Any, Any], list[str]]
"""Lines that say how one frozen tree differs from another."""


@expects(TrainUnit, FitUnit)
def check_fused(
    unit: TrainUnit | FitUnit,
    state: State,
    batches: Any,
    *,
    fuse: int,
    eval_batches: Any = None,
    callbacks: Sequence[Callback] = (),
    rtol: float = 1e-5,
    atol: float = 1e-6,
    **options: Any,
) -> None:
    """Law 12. A fused run tells of every step what the run of the same compiled steps one by one tells.

    Bitwise where no hook is around a step; hooks that are inside its graph may round otherwise, as may whatever is
    compiled. Of a step inside a block that is its counters, batch, output and metrics; of every other event, the whole
    state. From the first and the middle of the fused run's resumable states, the run that is not fused goes on to that
    end.

    Args:
        unit, state, batches, eval_batches, callbacks, options: as in `check_unit`. The unit is compiled.
        fuse: as in `train`.
        rtol, atol: how far floating leaves may differ where there are hooks, as in `check_compiled`.

    Raises:
        LawError: the law is broken; the message says where first, and on which leaves.
        UsageError, ContractError: the unit cannot be fused.

    Example:
        >>> import torch
        >>> from tnt_func.compiling import compiled
        >>> from tnt_func.rng import key
        >>> seen = []
        >>> def count(state):
        ...     seen.append(1)
        ...     return state.replace(params=state.params + len(seen))
        >>> unit = TrainUnit(train_step=lambda state, batch: (state, {}), on_train_step_end=count)
        >>> fast = compiled(unit, backend="aot_eager")
        >>> check_fused(fast, State(params=torch.zeros(2), key=key(0)), [torch.ones(2)] * 4, fuse=2)
        Traceback (most recent call last):
        tnt_func.errors.LawError: law 12 (fused) is broken at train step_end (epoch 0, step 2): ...
        ...
    """
    case = Case.of(unit, state, batches, eval_batches, callbacks, options)
    attached = attach(unit, *callbacks)
    train_unit = attached.train_unit if isinstance(attached, FitUnit) else attached
    hooked = any(hook_of(train_unit, "train", point) is not identity for point in ("step_start", "step_end"))

    def differ(ours: Any, theirs: Any) -> list[str]:
        lines = changes(ours, theirs, "state")
        if not lines or not hooked:
            return lines
        try:
            assert_trees_close(thaw(theirs), thaw(ours), rtol=rtol, atol=atol, name="state")
        except TreeError as error:
            return str(error).splitlines()[:-1]
        return []

    tape = dict(_told(case.events()))
    resumable = list[State]()
    _compare(differ, tape, _told(case.events(fuse=fuse), resumable), f"the run with fuse={fuse}")
    end = [*tape.values()][-1]
    for middle in resumable[:1] + resumable[len(resumable) // 2 :][:1]:
        *_, (place, rest) = _told(case.events(state=middle))
        _raise(place, f"the run that went on from within the run with fuse={fuse}", differ(end, rest))


def _told(events: Iterator[Event], resumable: list[State] | None = None) -> Iterator[tuple[str, Any]]:
    """What an event holds, by its place."""
    for event in events:
        if event.resumable and resumable is not None:
            resumable.append(event.state)
        place = where(event.phase, event.point, event.state)
        if event.point in ("fetched", "step_start", "step_end", "step_done") and event.phase == "train":
            known = ("progress", "metrics", "output", "stop", "key")
            held: Any = {name: getattr(event.state, name) for name in known}
            if event.point == "fetched":
                continue
            if "params" in vars(event.state) and event.point != "step_start":
                held |= {name: getattr(event.state, name) for name in ("params", "buffers", "opt_state", "memory")}
            yield place, freeze({**held, "batch": event.batch})
        else:
            yield place, freeze(event.state)


def _compare(differ: Differ, tape: dict[str, Any], other: Iterator[tuple[str, Any]], said: str) -> None:
    seen = set[str]()
    for place, theirs in other:
        seen.add(place)
        ours = tape.get(place)
        if ours is None:
            raise _broken(place, f"{said} comes to an event that the one that is not fused has not", [])
        if isinstance(theirs, dict):
            ours = {name: ours[name] for name in theirs}
        _raise(place, said, differ(ours, theirs))
    if missing := [place for place in tape if place not in seen and " step_done " not in place]:
        raise _broken(missing[0], f"{said} never comes there", [])


def _raise(place: str, said: str, lines: Sequence[str]) -> None:
    if lines:
        raise _broken(place, f"{said} goes another way than the one that is not fused", lines)


def _broken(at: str, said: str, lines: Sequence[str]) -> LawError:
    return LawError("\n  ".join([f"law 12 (fused) is broken at {at}: {said}", *lines]) + _ADVICE)


_ADVICE = (
    "\nA step and the hooks around it are traced once. Let them be functions of the state: what they count, or read "
    "elsewhere, is a tensor in a slot of memory. Raise rtol and atol where hooks differ by rounding."
)

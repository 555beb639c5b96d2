"""Law 12, its second half: donated equals not donated, bitwise."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from tnt_func.arguments import expects
from tnt_func.errors import ConsumedError, LawError
from tnt_func.events import Event
from tnt_func.runs import Donation
from tnt_func.state import State
from tnt_func.testing.case import Case, where
from tnt_func.testing.snapshot import changes, freeze, thaw
from tnt_func.unit import Callback, FitUnit, TrainUnit


class _Moment(NamedTuple):
    """An event, and what it held at the time."""

    place: str
    what: tuple[Any, ...]
    resumable: bool
    state: Any


@expects(TrainUnit, FitUnit)
def check_donation(
    unit: TrainUnit | FitUnit,
    state: State,
    batches: Any,
    *,
    eval_batches: Any = None,
    callbacks: Sequence[Callback] = (),
    **options: Any,
) -> None:
    """Law 12. A run that donates tells the same events, with the same bits, as one that does not; from the middle too.

    It is run with a copy of the first state, with that state itself given up, and in debug mode, where whoever uses a
    tensor of a consumed state is found; then once more from resumable states. The caller's state is left as it was.

    Args:
        unit, state, batches, eval_batches, callbacks, options: as in `check_unit`. The unit does not donate yet.

    Raises:
        LawError: the law is broken; the message says where first, and on which leaves.
        UsageError: the step cannot donate.

    Example:
        >>> import torch
        >>> from tnt_func import optim, rng
        >>> from tnt_func.descent import minimize
        >>> def objective(params, state, batch): return (params * batch).sum(), (state.buffers, {})
        >>> def update(grads, opt_state, params): return params - 0.5 * grads, opt_state
        >>> def consume(grads, opt_state, params): return params.sub_(grads), opt_state
        >>> careless = optim.Optimizer(lambda params: (), update, consume=consume)
        >>> unit = TrainUnit(train_step=minimize(objective, careless))
        >>> check_donation(unit, State(params=torch.ones(2), key=rng.key(0)), [torch.ones(2)])
        Traceback (most recent call last):
        tnt_func.errors.LawError: law 12 (donation) is broken at train step_end (epoch 0, step 1): the run with ...
          state.params: 2 of 2 elements differ, by at most 0.5
        ...
    """
    case = Case.of(unit, state, batches, eval_batches, callbacks, options)
    tape = list(_told(case.events()))
    for mode in (True, "given", "debug"):
        given = thaw(case.first)
        _compare(tape, _donated(case, given, mode), f"the run with donate={mode!r}")
        if mode != "given" and (lines := changes(case.first, freeze(given), "state")):
            raise _broken("after the run", "it wrote into the state of its caller", lines)
    cuts = [index for index, moment in enumerate(tape) if moment.resumable]
    for cut in {cuts[0], cuts[len(cuts) // 2]} if cuts else ():
        rest = _donated(case, thaw(tape[cut].state), "given")
        next(rest)
        _compare(tape[cut + 1 :], rest, f"the donated run continued after {tape[cut].place}")


def _told(events: Iterator[Event]) -> Iterator[_Moment]:
    for event in events:
        what = (event.phase, event.point, event.resumable, event.reason, freeze(event.batch))
        yield _Moment(where(event.phase, event.point, event.state), what, event.resumable, freeze(event.state))


def _donated(case: Case, state: State, mode: Donation) -> Iterator[_Moment]:
    last = "at the start"
    try:
        for moment in _told(case.events(state=state, donate=mode)):
            yield moment
            last = f"after {moment.place}"
    except ConsumedError as error:
        raise _broken(last, f"in the run with donate={mode!r}, {error}", []) from error


def _compare(tape: Sequence[_Moment], other: Iterator[_Moment], said: str) -> None:
    count = 0
    for ours, theirs in zip(tape, other, strict=False):
        lines = changes(ours.state, theirs.state, "state")
        if lines or ours.what != theirs.what:
            raise _broken(f"at {ours.place}", f"{said} goes another way than the one that is not donated", lines)
        count += 1
    if count < len(tape) or next(other, None) is not None:
        raise _broken(f"at event {count}", f"{said} has not as many events as the one that is not donated", [])


def _broken(at: str, said: str, lines: Sequence[str]) -> LawError:
    return LawError("\n  ".join([f"law 12 (donation) is broken {at}: {said}", *lines]) + _ADVICE)


_ADVICE = (
    "\nA donating step writes over the params and opt_state that it is given, and gives the bits of the step that does "
    "not. Let an optimizer's `consume` compute what its `update` computes, in place; and let nothing outside of the "
    "state hold on to a tensor of it: remember it in state.memory, or keep a copy, tnt.keep(tensor)."
)

"""Law 11: the members of an ensemble are what they would be alone."""

from collections.abc import Sequence
from typing import Any

import torch

from tnt_func import treemath
from tnt_func.ensembles import ensemble, member, stack
from tnt_func.ensembles.members import taken
from tnt_func.errors import LawError
from tnt_func.events import Event
from tnt_func.state import State
from tnt_func.testing.accumulation import differences
from tnt_func.testing.case import Case, where
from tnt_func.unit import Callback, FitUnit, TrainUnit, attach


def check_ensemble(
    unit: TrainUnit | FitUnit,
    states: Sequence[State],
    batches: Sequence[Any],
    *,
    eval_batches: Sequence[Any] | None = None,
    callbacks: Sequence[Callback] = (),
    batch: Any = "shared",
    chunk_size: int | None = None,
    loop: bool | None = None,
    tolerance: float = 1e-10,
    **options: Any,
) -> None:
    """Law 11. Every member of an ensemble takes the steps that it takes alone, and ends where it ends alone.

    Floating leaves of the states and the batches are cast to float64. After every train step and epoch, each member
    that still runs is compared with the run of its state and the plain unit. A step that draws, dropout say, breaks
    the law: give its noise as data. So does Adam with a parameter whose gradient is zero but for rounding, a bias
    before BatchNorm, since Adam amplifies rounding to steps.

    Args:
        unit: of one member.
        states: of the members, as `tnt.stack` takes them.
        batches: a list; with batch="own" each is [members, batch, ...].
        eval_batches: likewise, of a FitUnit's evaluations; `batches`, if not given.
        callbacks: attached to the unit of one member.
        batch, chunk_size, loop: as in `tnt.ensemble`.
        tolerance: how far a leaf may differ, as a part of its largest element, or of 1 where that is less.
        options: what else `train` or `fit` takes: `max_epochs`, `max_steps` and so on; without a limit, two epochs.

    Raises:
        LawError: the law is broken; the message says where, for which member, and on which leaves.

    Example:
        >>> from tnt_func.rng import key
        >>> def train_step(state, batch):
        ...     return state.replace(params=state.params - torch.rand(2)), {}
        >>> states = [State(params=torch.zeros(2), key=key(0))] * 2
        >>> check_ensemble(TrainUnit(train_step=train_step), states, [1.0])
        Traceback (most recent call last):
        tnt_func.errors.LawError: law 11 (ensemble) is broken after train step_done (epoch 0, step 1): member 1 of ...
          params: 2 of 2 elements differ, by at most ...
        ...
    """
    unit = attach(unit, *callbacks)
    states = [treemath.cast(state, torch.float64) for state in states]
    data, eval_data = ([*treemath.cast(given, torch.float64)] for given in (batches, eval_batches or batches))
    size, own = len(states), batch == "own"
    alone: list[dict[Any, State]] = []
    for index, state in enumerate(states):
        feeds = [[taken(one, index) if own else one for one in given] for given in (data, eval_data)]
        events = Case.of(unit, state, *feeds, options=options).events()
        alone.append({place: event.state for event in events if (place := _place(event)) is not None})
    whole = ensemble(unit, size, batch=batch, chunk_size=chunk_size, loop=loop)
    for event in Case.of(whole, stack(states), data, eval_data, options=options).events():
        place = _place(event)
        for index, states_alone in enumerate(alone):
            # A member that has stopped has no such place alone; it is compared at the end.
            if place not in states_alone:
                continue
            lines = _differences(member(event.state, index), states_alone[place], place, tolerance)
            if lines:
                at = where(event.phase, event.point, event.state)
                said = f"law 11 (ensemble) is broken after {at}: member {index} of {size} is not what it is alone"
                raise LawError("\n  ".join([said, *lines]) + _ADVICE)


_ADVICE = (
    "\nA member's step reads its own state and its batch, and draws nothing. Give noise as data, and write what looks "
    "at all members, or at their number, as a callback of the whole run."
)


def _place(event: Event) -> Any:
    """What a member's place alone is found by: everything due at the counters is done there."""
    if event.phase != "train" or not (event.resumable or event.point == "end"):
        return None
    progress = event.state.progress.train
    return "end" if event.point == "end" else (event.point, progress.steps, progress.epochs)


def _differences(one: State, alone: State, place: Any, tolerance: float) -> list[str]:
    # The metrics of a member that has stopped go on to measure it.
    parts = ("params", "buffers", "opt_state", "memory", *["metrics"] * (place != "end"))
    return [line for part in parts for line in differences(getattr(alone, part), getattr(one, part), part, tolerance)]

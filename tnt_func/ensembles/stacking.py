"""States of several members as one State, which an ensemble's unit trains.

Params, buffers, opt_state (hyper-parameters too), slots of memory and accumulators are stacked; key, progress and stop
are one for all. The members' slots have names that begin with "ensemble/". The slot "ensemble" says who has stopped:
`stopped`, bool [members], whose params no step changes any more, and `closed`, bool [members], who had when the epoch
opened, whose hooks no longer run. Both are on the CPU, where looking at them waits for nothing.

Laws:
    `unstack(stack(states))` are the states.

Example:
    >>> from tnt_func.rng import key
    >>> state = stack([State(params={"w": torch.tensor(x)}, key=key(0)) for x in (1.0, 2.0)])
    >>> state.params, member(state, 1).params
    ({'w': tensor([1., 2.])}, {'w': tensor(2.)})
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tnt_func import pytree as trees
from tnt_func.ensembles.members import stacked, taken
from tnt_func.ensembles.metrics import PerMember, named
from tnt_func.errors import UsageError
from tnt_func.rng import Key
from tnt_func.state import State
from tnt_func.types import Output, PyTree, typed
from tnt_func.unit import RESERVED

SLOT = "ensemble"
PREFIX = f"{SLOT}/"


@typed
def stack(states: Sequence[State], *, key: Key | None = None) -> State:
    """The State of an ensemble, out of its members' States.

    Args:
        states: of one structure, and with the same counters; none of them is stopping.
        key: the key of the ensemble; that of the states, if they have one.

    Raises:
        UsageError: there is no state, it is an ensemble's, they have different counters, or keys and none was given.
        StructureError: they differ in structure, shapes, dtypes or devices.

    Example:
        >>> from tnt_func.rng import key
        >>> stack([State(params=torch.zeros(2), key=key(seed)) for seed in range(3)], key=key(0)).params.shape
        torch.Size([3, 2])
    """
    if not states:
        raise UsageError(
            "stack was given no state; an ensemble has at least one member. Write tnt.stack([state, ...])."
        )
    first = states[0]
    for index, state in enumerate(states):
        if SLOT in state.memory:
            raise UsageError(
                f"stack was given a state that is an ensemble's, as number {index}; ensembles are not nested. Write "
                "tnt.stack([*tnt.unstack(a), *tnt.unstack(b)])."
            )
        if state.progress != first.progress or state.stop is not None:
            found = f"stop={state.stop!r}" if state.stop is not None else f"{state.progress}, not {first.progress}"
            raise UsageError(
                f"stack was given states[{index}] with {found}; the members of an ensemble go in step. Stack states of "
                "the same counters, and train those that are behind first."
            )
        if key is None and state.key != first.key:
            raise UsageError(
                f"stack was given states with the keys {first.key} and {state.key}; an ensemble has one. Write "
                "tnt.stack(states, key=tnt.key(0))."
            )
    fields = {part: stacked([getattr(state, part) for state in states], part) for part in ("params", "buffers")}
    fields["opt_state"] = stacked([state.opt_state for state in states], "opt_state")
    slots = stacked([{n: s for n, s in state.memory.items() if n != RESERVED} for state in states], "memory")
    found = stacked([state.metrics for state in states], "metrics")
    memory = {RESERVED: first.memory[RESERVED]} if RESERVED in first.memory else {}
    going = torch.zeros(len(states), dtype=torch.bool)
    memory[SLOT] = {"stopped": going, "closed": going.clone()}
    state = first.replace(**fields, key=first.key if key is None else key, memory=memory, output=None)
    return put(state, {"memory": slots, "metrics": found})


@typed
def member(state: State, index: int) -> State:
    """The State of one member, with tensors of its own: the plain unit trains it further, alone.

    Args:
        state: an ensemble's.
        index: from 0.

    Raises:
        UsageError: the state is no ensemble's, or has no such member.

    Example:
        >>> from tnt_func.rng import key
        >>> member(stack([State(params=7, key=key(0))]), 0).params
        7
    """
    size = size_of(state)
    if not 0 <= index < size:
        raise UsageError(f"member(state, {index}) was given; the ensemble has {size} members. Write 0 to {size - 1}.")
    mine = trees.map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, taken({**inside(state)}, index))
    if RESERVED in state.memory:
        mine["memory"] = {RESERVED: state.memory[RESERVED], **mine["memory"]}
    return state.replace(**mine)


@typed
def unstack(state: State) -> list[State]:
    """The States of all members.

    Raises:
        UsageError: the state is no ensemble's.

    Example:
        >>> from tnt_func.rng import key
        >>> [state.params for state in unstack(stack([State(params=x, key=key(0)) for x in (1.0, 2.0)]))]
        [1.0, 2.0]
    """
    return [member(state, index) for index in range(size_of(state))]


def size_of(state: State) -> int:
    """How many members there are.

    Raises:
        UsageError: the state is no ensemble's.

    Example:
        >>> from tnt_func.rng import key
        >>> size_of(stack([State(params=1.0, key=key(0))] * 3))
        3
    """
    slot: Any = state.memory.get(SLOT)
    if slot is None:
        raise UsageError(
            f"the state of one run was given, whose memory has {sorted(state.memory)}; an ensemble's has the slot "
            f"{SLOT!r}. Write tnt.stack([state, ...])."
        )
    return len(slot["stopped"])


def stopped(state: State) -> Tensor:
    """Which members have stopped: bool [members].

    Example:
        >>> from tnt_func.rng import key
        >>> stopped(stack([State(params=1.0, key=key(0))] * 3))
        tensor([False, False, False])
    """
    size_of(state)
    return state.memory[SLOT]["stopped"]


@typed
def stop_members(state: State, which: Tensor, reason: str = "stop_members") -> State:
    """The state with more members stopped; where none goes on, the run is asked to stop.

    For hooks of callbacks that are given to `train`, which see all members at once. It looks at one value.

    Args:
        state: an ensemble's.
        which: bool [members]; those that have stopped stay so.
        reason: why, for the stop of the last.

    Raises:
        UsageError: `which` does not fit.

    Example:
        >>> from tnt_func.rng import key
        >>> state = stack([State(params=1.0, key=key(0))] * 2)
        >>> state = stop_members(state, torch.tensor([True, False]))
        >>> stopped(state), stop_members(state, torch.tensor([False, True]), "loss is NaN").stop
        (tensor([ True, False]), 'all 2 members have stopped: loss is NaN')
    """
    before = stopped(state)
    if which.dtype is not torch.bool or which.shape != before.shape:
        raise UsageError(
            f"stop_members was given {trees.describe(which)}; it takes a bool for each of the {len(before)} members. "
            "Write ~state.output['loss'].isfinite(), say."
        )
    after = before | which.to(before.device)
    state = state.remember(SLOT, {**state.memory[SLOT], "stopped": after})
    return state.request_stop(f"all {len(after)} members have stopped: {reason}") if bool(after.all()) else state


@typed
def revive(state: State) -> State:
    """The state with all members going on, those that had stopped too.

    Example:
        >>> from tnt_func.rng import key
        >>> stopped(revive(stop_members(stack([State(params=1.0, key=key(0))]), torch.tensor([True]))))
        tensor([False])
    """
    going = torch.zeros_like(stopped(state))
    return state.remember(SLOT, {"stopped": going, "closed": going.clone()}).replace(stop=None)


def told_apart(state: State) -> Output:
    """The output of a state; of an ensemble's, with "loss", "loss.std", "loss.0", ... for a "loss" of each member.

    Example:
        >>> from tnt_func.rng import key
        >>> state = stack([State(params=1.0, key=key(0))] * 2)
        >>> told_apart(state.replace(output={"loss": torch.tensor([1.0, 3.0]), "num_samples": 32}))
        {'loss': 2.0, 'loss.std': 1.414..., 'loss.0': 1.0, 'loss.1': 3.0, 'num_samples': 32}
    """
    output: Any = state.output
    if SLOT not in state.memory or not isinstance(output, Mapping):
        return output
    size, found = size_of(state), dict[str, Any]()
    for name, value in output.items():
        each = isinstance(value, Tensor) and value.shape == (size,) and not value.is_complex()
        found |= named(name, value) if each else {name: value}
    return found


def inside(state: State) -> dict[str, PyTree]:
    """What the members have of their own, by field of their States.

    Example:
        >>> from tnt_func.rng import key
        >>> inside(stack([State(params=torch.zeros(2), key=key(0), memory={"ema": 1.0})]))["memory"]
        {'ema': Numbers(values=tensor([1.], dtype=torch.float64))}
    """
    return {
        "params": state.params,
        "buffers": state.buffers,
        "opt_state": state.opt_state,
        "memory": {name.removeprefix(PREFIX): x for name, x in state.memory.items() if name.startswith(PREFIX)},
        "metrics": {phase: _unwrapped(accumulators) for phase, accumulators in state.metrics.items()},
    }


def put(state: State, changes: Mapping[str, PyTree]) -> State:
    """The state with some of what `inside` gives changed.

    Example:
        >>> from tnt_func.rng import key
        >>> state = stack([State(params=torch.zeros(2), key=key(0), memory={"ema": 1.0})])
        >>> sorted(put(state, {"memory": {"ema": 2.0}}).memory)
        ['ensemble', 'ensemble/ema']
    """
    changed = dict(changes)
    if "memory" in changed:
        outer = {name: slot for name, slot in state.memory.items() if not name.startswith(PREFIX)}
        changed["memory"] = outer | {f"{PREFIX}{name}": slot for name, slot in changed["memory"].items()}
    if "metrics" in changed:
        changed["metrics"] = {
            phase: {**state.metrics.get(phase, {}), **{name: PerMember(x) for name, x in found.items()}}
            for phase, found in changed["metrics"].items()
        }
    return state.replace(**changed)


def _unwrapped(accumulators: Mapping[str, Any]) -> dict[str, Any]:
    return {name: x.accumulators for name, x in accumulators.items() if isinstance(x, PerMember)}

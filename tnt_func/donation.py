"""States that a step may consume: which steps do, what they may write over, and what is left of a consumed state.

A donating step gives the same bits as any other, and may make the new state in the memory of the one that it is given.
What else in the state shares that memory is copied first, so no value of the state changes that should not.

Laws:
    Donated equals not donated, bitwise. What a state is, and not where its tensors lie, decides how a run goes on.

Example:
    >>> state = State(params={"w": torch.ones(2)}, key=key(0))
    >>> state = separated(state.remember("first", state.params))[0]
    >>> _ = state.params["w"].zero_()
    >>> state.memory["first"]
    {'w': tensor([1., 1.])}
"""

import operator
from collections.abc import Iterable, Set
from typing import Any, Protocol, Self, cast, runtime_checkable

import torch
from torch import Tensor

from tnt_func import pytree as trees
from tnt_func.errors import ConsumedError, UsageError
from tnt_func.meshes import here
from tnt_func.rng import key
from tnt_func.state import State
from tnt_func.types import PyTree

__all__ = [
    "Donating",
    "Storages",
    "Unchanged",
    "between",
    "consumed",
    "copied_from",
    "donates",
    "donating",
    "key",
    "noted",
    "separated",
    "spend",
    "storage",
    "take",
]

TAKEN = ("params", "opt_state", "buffers", "metrics", "memory")


@runtime_checkable
class Donating(Protocol):
    """A step that can donate: its `donates` says whether it does, its `donating()` is the same step that does.

    Example:
        >>> isinstance(max, Donating)
        False
    """

    donates: Any

    def donating(self) -> Self:
        """The step that consumes the states that it is given."""
        ...


def donates(step: Any) -> bool:
    """Whether a step consumes the states that it is given.

    Example:
        >>> donates(max)
        False
    """
    return isinstance(step, Donating) and step.donates


def donating(step: Any) -> Any:
    """The same step, consuming the states that it is given.

    Raises:
        UsageError: it cannot.

    Example:
        >>> donating(max)
        Traceback (most recent call last):
        tnt_func.errors.UsageError: donate was given the step <built-in function max>; a step that can donate ...
    """
    if not isinstance(step, Donating):
        raise UsageError(
            f"donate was given the step {step!r}; a step that can donate says so by `donates` and `donating()`, as "
            "those of tnt.minimize, tnt.supervised and tnt.compiled do, and a function cannot. Write "
            "train_step=tnt.minimize(objective, optimizer)."
        )
    return step.donating()


def take(state: State) -> None:
    """Take from a consumed state what it must not be read for any more; counters and key stay.

    Example:
        >>> state = State(params=1.0, key=key(0))
        >>> take(state)
        >>> state.params
        Traceback (most recent call last):
        tnt_func.errors.ConsumedError: state.params was read after a donating step had consumed the state; ...
    """
    for name in (*TAKEN, "_storages"):
        state.__dict__.pop(name, None)


def take_consumed(given: State, *others: State) -> None:
    """`take` from a state that a step was given, if it has consumed it, and from others that hold the same tensors.

    Example:
        >>> state, same = State(params=1.0, key=key(0)), State(params=1.0, key=key(0))
        >>> take_consumed(state, same)
        >>> spend(state)
        >>> take_consumed(state, same)
        >>> "params" in same.__dict__
        False
    """
    if consumed(given):
        for state in (given, *others):
            take(state)


def between(state: State, **changes: Any) -> State:
    """What is there of a state between two steps that run as one block: counters, metrics, output; the rest raises.

    Example:
        >>> state = between(State(params=1.0, key=key(0)), output=2.0)
        >>> state.output
        2.0
        >>> state.params
        Traceback (most recent call last):
        tnt_func.errors.ConsumedError: state.params was read between two fused steps; it is there where a block ...
    """
    new = object.__new__(State)
    known = state.__dict__
    new.__dict__.update(key=known["key"], progress=known["progress"], metrics=known["metrics"], stop=known["stop"])
    new.__dict__.update(output=None, _between=True)
    new.__dict__.update(changes)
    return new


class Unchanged(dict[str, PyTree]):
    """The slots of memory that a block leaves alone; of the others it is known at its end what is in them.

    Example:
        >>> Unchanged(data=1)["data"]
        1
    """

    def __missing__(self, name: str) -> Any:
        raise ConsumedError(
            f"state.memory[{name!r}] was read between two fused steps; it is there where a block ends. Read it at "
            "step_done, or every so many steps that are a multiple of fuse."
        )


def spend(state: State) -> None:
    """Mark a state as one whose tensors a step has begun to write over; `consumed` says so of it.

    Example:
        >>> state = State(params=1.0, key=key(0))
        >>> spend(state)
        >>> consumed(state)
        True
    """
    state.__dict__["_spent"] = True


def consumed(state: Any) -> bool:
    """Whether a step has begun to write over a state's tensors.

    Example:
        >>> consumed(State(params=1.0, key=key(0)))
        False
    """
    return isinstance(state, State) and "_spent" in state.__dict__


class Storages:
    """Where the tensors lie that a step consumes, and the trees of a state that are known to lie elsewhere.

    It goes with a state, beside its fields, so that a run looks at a tree once and not at every step. A copy of the
    state has other memory, and begins anew.

    Args:
        state: what was looked at; its params and opt_state are what is consumed.
        pointers: of their storages.
    """

    __slots__ = ("buffers", "memory", "opt_state", "params", "pointers")

    def __init__(self, state: State | None = None, pointers: Set[int] = frozenset()):
        self.pointers = pointers
        if state is not None:
            self.params, self.opt_state = state.params, state.opt_state
            self.buffers, self.memory = state.buffers, state.memory

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def are_of(self, state: State) -> bool:
        """Whether they are those of a state."""
        return self.params is state.params and self.opt_state is state.opt_state

    def hold(self, leaf: Any) -> bool:
        """Whether a tensor lies in the memory that is consumed."""
        return isinstance(leaf, Tensor) and storage(leaf) in self.pointers


def copied_from(tree: PyTree, storages: Storages) -> PyTree:
    """The tree with copies of those tensors that lie where a step will write; the very tree, where none does.

    Example:
        >>> w = torch.ones(2)
        >>> copied_from({"w": w, "v": 1}, separated(State(params=w, key=key(0)))[1])["w"] is w
        False
    """

    def own(leaf: Any) -> Any:
        return leaf.clone() if storages.hold(leaf) else leaf

    return trees.map(own, tree) if any(map(storages.hold, _leaves(tree))) else tree


def separated(state: State) -> tuple[State, Storages]:
    """The state with every tensor of its params and opt_state in memory of its own, and where that is.

    Example:
        >>> w = torch.ones(2)
        >>> state, storages = separated(State(params={"w": w, "v": w}, key=key(0)))
        >>> state.params["w"] is w, state.params["v"] is w, len(storages.pointers)
        (True, False, 2)
    """
    known: Storages | None = state.__dict__.get("_storages")
    if known is not None and known.are_of(state):
        if known.memory is state.memory and known.buffers is state.buffers:
            return state, known
        before, pointers = known.memory, known.pointers
        params, opt_state = state.params, state.opt_state
    else:
        before, pointers = dict[str, PyTree](), set[int]()
        params, opt_state = (_in_own_memory(tree, pointers) for tree in (state.params, state.opt_state))
    found = Storages(None, pointers)
    memory = {
        name: slot if before.get(name, found) is slot else copied_from(slot, found)
        for name, slot in state.memory.items()
    }
    if all(map(operator.is_, memory.values(), state.memory.values())):
        memory = state.memory
    buffers = copied_from(state.buffers, found)
    state = state.replace(params=params, opt_state=opt_state, buffers=buffers, memory=memory)
    return state, noted(state, pointers)


def noted(state: State, pointers: Set[int]) -> Storages:
    """What is known of a separated state, or of a part of one: it is not looked at again.

    Example:
        >>> state, storages = separated(State(params={"w": torch.ones(2)}, key=key(0)))
        >>> part = state.replace(params=state.params["w"])
        >>> known = noted(part, storages.pointers)
        >>> separated(part)[1] is known
        True
    """
    storages = Storages(state, pointers)
    state.__dict__["_storages"] = storages
    return storages


def _in_own_memory(tree: PyTree, taken: set[int]) -> PyTree:
    """The tree with a copy of each tensor whose storage is taken, or which cannot be written to; the rest are noted."""

    def own(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if storage(leaf) in taken or _overlaps(leaf):
            leaf = leaf.clone()
        taken.add(storage(leaf))
        taken.discard(0)
        return leaf

    new = trees.map(own, tree)
    return tree if all(map(operator.is_, _leaves(new), _leaves(tree))) else new


def _overlaps(leaf: Tensor) -> bool:
    """Whether elements share memory among themselves, as after `expand`."""
    leaf = here(leaf)
    return leaf.layout is torch.strided and 0 in leaf.stride() and leaf.numel() > 1


def storage(leaf: Tensor) -> int:
    """Where the memory of a tensor begins; 0 where it has none, or shares none that could be told.

    Example:
        >>> w = torch.ones(4)
        >>> storage(w) == storage(w[2:])
        True
    """
    leaf = here(leaf)
    return leaf.untyped_storage().data_ptr() if leaf.layout is torch.strided else 0


def _leaves(tree: PyTree) -> Iterable[Any]:
    """`pytree.leaves`, at a tenth of its price for the flat dicts that outputs and buffers mostly are."""
    if type(tree) is not dict:
        return trees.leaves(tree)
    flat = cast(dict[Any, Any], tree).values()
    return flat if _PLAIN.issuperset(map(type, flat)) else trees.leaves(tree)


_PLAIN = {Tensor, torch.nn.Parameter, *trees.LEAVES}

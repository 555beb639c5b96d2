"""A step or a hook of one member, called for all members of a state: in one vmapped call, or one after another.

Example:
    >>> from tnt_func.ensembles.stacking import stack
    >>> from tnt_func.rng import key
    >>> state = stack([State(params=torch.tensor(x), key=key(0)) for x in (1.0, 2.0)])
    >>> call = vmapped(lambda state, batch: (state.replace(params=state.params * batch), {}), state, Batches(3.0))
    >>> call.merged(state).params
    tensor([3., 6.])
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tnt_func import pytree as trees
from tnt_func.ensembles.members import DTYPES, Numbers, stacked, take
from tnt_func.ensembles.stacking import inside, put, size_of
from tnt_func.errors import ContractError, StructureError, UsageError, kind_of
from tnt_func.state import State
from tnt_func.types import Batch, Output, PyTree
from tnt_func.unit import Step


class Apart(NamedTuple):
    """A stacked tree taken apart.

    Args:
        leaves: tensors [members, ...], `Numbers`, and what is one for all members.
        structure: that of one member's tree.
    """

    leaves: list[Any]
    structure: Any


@dataclass(frozen=True)
class Batches:
    """What the step is given: one batch for all members, or one for each, stacked.

    Args:
        batch: in the latter case, its tensors have an axis of members, the first.
        own: which of both.
    """

    batch: Batch
    own: bool = False

    def apart(self, size: int) -> Apart:
        """The leaves that there is one of for each member, none where they share."""
        if not self.own:
            return Apart([], None)
        leaves, structure = trees.flatten(self.batch)
        for path, leaf in zip(trees.paths(self.batch), leaves, strict=True):
            if isinstance(leaf, Tensor) and (leaf.dim() == 0 or len(leaf) != size):
                raise StructureError(
                    f"batch{path} is {trees.describe(leaf)}, and the ensemble has {size} members with a batch of their "
                    "own each: [members, batch, ...]. Stack their batches, or write ensemble(unit, size)."
                )
        return Apart(leaves, structure)


@dataclass(frozen=True)
class Call:
    """What came of a call for all members.

    Args:
        after: the state that the last member's call returned: of it count key, progress and stop alone.
        stops: why each member asks to stop, or None.
        before: what was given, by field.
        changed: what was changed, stacked, by field.
        output: stacked; what is no tensor is one for all.
    """

    after: State
    stops: list[str | None]
    before: dict[str, Apart]
    changed: dict[str, Apart]
    output: Output

    def merged(self, state: State, still: Tensor | None = None) -> State:
        """The state with what was changed.

        Args:
            state: the one that the call was for.
            still: which members stay as they were, bool [members]; none if not given.
        """
        if not self.changed:
            return state
        return put(state, {name: _kept(self.before[name], apart, still) for name, apart in self.changed.items()})


def vmapped(step: Step, state: State, batches: Batches, *, chunk_size: int | None = None, agreed: bool = False) -> Call:
    """A step called once for all members, by torch.func.vmap.

    Args:
        step: of one member.
        state, batches: of all.
        chunk_size: members in a call; all, if not given.
        agreed: whether numbers of Python's that all members agree on are given as such, and not as tensors.
    """
    size, before = size_of(state), _apart(state)
    own = batches.apart(size)
    slots = [_presented(leaf, agreed) for apart in (*before.values(), own) for leaf in apart.leaves]
    mapped = [leaf for leaf in slots if isinstance(leaf, Tensor)]
    seen: dict[str, Any] = {}

    def one(index: Tensor, tensors: list[Tensor]) -> list[Tensor]:
        found = iter(tensors)
        given = iter([next(found) if isinstance(leaf, Tensor) else leaf for leaf in slots])
        here = _viewed(state, before, given)
        batch = trees.unflatten(given, own.structure) if batches.own else batches.batch
        after, output = _checked(step(here, batch))
        changed = _changed(here, after, before)
        places = {id(tensor): place for place, tensor in enumerate(tensors)}
        out = {name: Apart(*trees.flatten(tree)) for name, tree in changed.items()}
        returned = Apart(*trees.flatten(output))
        new: list[Tensor] = []
        for apart in (*out.values(), returned):
            for n, leaf in enumerate(apart.leaves):
                if isinstance(leaf, Tensor):
                    place = places.get(id(leaf))
                    apart.leaves[n] = _Place(len(mapped) + len(new) if place is None else place)
                    if place is None:
                        new.append(leaf)
        seen.update(after=after, changed=out, output=returned)
        return new

    # Without anything to map there would be no members.
    fresh = torch.func.vmap(one, randomness="different", chunk_size=chunk_size)(torch.arange(size), mapped)
    tensors = [*mapped, *fresh]
    changed = {name: _filled(apart, tensors) for name, apart in seen["changed"].items()}
    changed = {name: _wrapped(apart, before[name], size) for name, apart in changed.items()}
    after, output = seen["after"], trees.unflatten(*_filled(seen["output"], tensors))
    return Call(after, [None if after.stop is state.stop else after.stop] * size, before, changed, output)


def looped(step: Step, state: State, batches: Batches, *, runs: Sequence[bool] | None = None) -> Call:
    """A step called for one member after another.

    Args:
        step: of one member.
        state, batches: of all.
        runs: of which members; of all, if not given.
    """
    size, before = size_of(state), _apart(state)
    own = batches.apart(size)
    here, afters, outputs = [], [], []
    for index in range(size):
        given = iter([take(leaf, index) for apart in (*before.values(), own) for leaf in apart.leaves])
        mine = _viewed(state, before, given)
        batch = trees.unflatten(given, own.structure) if batches.own else batches.batch
        after, output = _checked(step(mine, batch)) if runs is None or runs[index] else (mine, None)
        here.append(mine)
        afters.append(after)
        outputs.append(output)
    names = {name for pair in zip(here, afters, strict=True) for name in _changed(*pair, before)}
    changed = {
        name: _restacked(name, apart, [getattr(one, name) for one in here], [getattr(one, name) for one in afters])
        for name, apart in before.items()
        if name in names
    }
    stops = [None if after.stop is state.stop else after.stop for after in afters]
    output = None if runs is not None else trees.map(_outputs_joined, *outputs)
    return Call(afters[-1], stops, before, changed, output)


class _Place(NamedTuple):
    """Where a tensor is that a call was given, or returned."""

    place: int


def _apart(state: State) -> dict[str, Apart]:
    fields = inside(state)
    if state.output is not None:
        fields["output"] = state.output
    return {name: Apart(*trees.flatten(tree, Numbers)) for name, tree in fields.items()}


def _viewed(state: State, before: dict[str, Apart], leaves: Any) -> State:
    """One member's state; takes as many leaves as it has."""
    return state.replace(
        **{name: trees.unflatten([next(leaves) for _ in x.leaves], x.structure) for name, x in before.items()}
    )


def _changed(here: State, after: State, fields: Any) -> dict[str, PyTree]:
    return {name: getattr(after, name) for name in fields if getattr(after, name) is not getattr(here, name)}


def _checked(result: Any) -> tuple[State, Output]:
    if type(result) is not tuple or len(result) != 2 or not isinstance(result[0], State):
        raise ContractError(
            f"a member's step returned {kind_of(result)}; a step returns the new state and its output. "
            "Write return state.replace(...), {'loss': loss}."
        )
    return result


def _presented(leaf: Any, agreed: bool) -> Any:
    """What a leaf is to a vmapped call: a tensor, to be mapped, or what is one for all members."""
    if not isinstance(leaf, Numbers):
        return leaf
    first = leaf.values[0]
    return first.item() if agreed and bool((leaf.values == first).all()) else leaf.values


def _filled(apart: Apart, tensors: list[Tensor]) -> Apart:
    return Apart([tensors[leaf.place] if isinstance(leaf, _Place) else leaf for leaf in apart.leaves], apart.structure)


def _wrapped(new: Apart, old: Apart, size: int) -> Apart:
    """What a vmapped call changed, as `members.stacked` would have it."""
    alike, leaves = new.structure == old.structure, list(new.leaves)
    for place, leaf in enumerate(leaves):
        was = old.leaves[place] if alike else None
        if isinstance(was, Numbers) and isinstance(leaf, Tensor):
            leaves[place] = was if leaf is was.values else Numbers(leaf)
        elif type(leaf) in DTYPES:
            leaves[place] = Numbers(torch.full((size,), leaf, dtype=DTYPES[type(leaf)]))
        elif isinstance(leaf, Tensor) and size > 1 and leaf.stride(0) == 0:
            # What depends on no member comes once, expanded; a state's leaf is written to a checkpoint.
            leaves[place] = leaf.clone(memory_format=torch.contiguous_format)
    return Apart(leaves, new.structure)


def _restacked(name: str, old: Apart, here: list[PyTree], afters: list[PyTree]) -> Apart:
    """What was changed member by member; a leaf that was not is the very same as before."""
    new = Apart(*trees.flatten(stacked(afters, f"state.{name}"), Numbers))
    if new.structure != old.structure:
        return new
    columns = zip(zip(*map(trees.leaves, here), strict=True), zip(*map(trees.leaves, afters), strict=True), strict=True)
    leaves = [
        was if all(a is b for a, b in zip(*column, strict=True)) else leaf
        for was, leaf, column in zip(old.leaves, new.leaves, columns, strict=True)
    ]
    return Apart(leaves, new.structure)


def _kept(old: Apart, new: Apart, still: Tensor | None) -> PyTree:
    """The new tree; as it was for the members that stay as they were."""
    if still is None or old.structure != new.structure:
        return trees.unflatten(*new)
    pairs = zip(old.leaves, new.leaves, strict=True)
    return trees.unflatten([_leaf_kept(was, leaf, still) for was, leaf in pairs], new.structure)


def _leaf_kept(was: Any, leaf: Any, still: Tensor) -> Any:
    if was is leaf:
        return leaf
    if isinstance(was, Numbers) and isinstance(leaf, Numbers):
        return Numbers(_leaf_kept(was.values, leaf.values, still))
    # Other shapes and dtypes are for the loop to refuse, which names the step.
    if not (isinstance(was, Tensor) and isinstance(leaf, Tensor)) or (was.shape, was.dtype) != (leaf.shape, leaf.dtype):
        return leaf
    return torch.where(still.to(leaf.device).view(-1, *[1] * (leaf.dim() - 1)), was, leaf)


def _outputs_joined(*leaves: Any) -> Any:
    first = leaves[0]
    if isinstance(first, Tensor):
        return torch.stack(leaves)
    if all(trees.same_leaf(first, leaf) for leaf in leaves):
        return first
    dtype = DTYPES.get(type(first))
    if dtype is None or any(type(leaf) is not type(first) for leaf in leaves):
        raise UsageError(
            f"the members' outputs have {trees.describe(first)} and others in one place; what is no number is the same "
            "in all. Return tensors."
        )
    return torch.tensor(leaves, dtype=dtype)

"""States of which every rank holds a part: how they are laid out, and put together where a step needs the whole.

Parameters are then DTensors: one dimension is cut over the last axis of a mesh, or none is. Everybody sees the whole
shape, and whatever computes with them computes with the whole: clipping by a global norm is that of one process.
Optimizer state and averages lie as the parameters that they belong to. What reads the bytes of a State, `tnt.digest`,
`tnt.checkpoint` and `tnt.replay`, takes a whole one: `gather` it before.

Laws:
    `gather(shard(state, mesh))` is the state, to the bit.

Example:
    >>> from tnt_func import rng
    >>> from tnt_func.distributed.world import init, mesh
    >>> state = State(params={"w": torch.arange(3.0), "b": torch.ones(1)}, key=rng.key(0))
    >>> with init() as world:
    ...     cut = shard(state, mesh(world), lambda name: None if name == "b" else 0)
    ...     cut.params["w"].placements, cut.params["b"].placements, gather(cut).params["w"]
    ((Shard(dim=0),), (Replicate(),), tensor([0., 1., 2.]))
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from tnt_func import pytree as trees
from tnt_func.distributed.collectives import Sums
from tnt_func.distributed.cuts import PartSums, wholes
from tnt_func.distributed.world import Ranks
from tnt_func.errors import UsageError
from tnt_func.meshes import here, is_laid_out, placed
from tnt_func.state import State
from tnt_func.types import PyTree, typed

S = TypeVar("S")
Rule: TypeAlias = Callable[[str], int | None]
"""Of the name of a parameter, as `pytree.names` spells it: which dimension is cut, or None, for the whole of it on
every rank."""


@functools.cache
def _dtensor() -> Any:
    """The module of DTensor, which takes a while to import and is not always needed."""
    import torch.distributed.tensor as module

    return module


def lies_out(tree: PyTree) -> bool:
    """Whether a leaf of a tree lies on a mesh.

    Example:
        >>> lies_out({"w": torch.ones(1)})
        False
    """
    return any(map(is_laid_out, _taken_apart(tree)[0]))


def _taken_apart(tree: PyTree) -> tuple[list[Any], Any]:
    """The leaves, and the keys of a flat dict, which most trees that a step looks at are, or another's structure."""
    if type(tree) is dict and all(isinstance(leaf, _LEAVES) for leaf in tree.values()):
        return list(tree.values()), tuple(tree)
    return trees.flatten(tree)


def _put_together(leaves: list[Any], structure: Any) -> PyTree:
    return dict(zip(structure, leaves, strict=True)) if type(structure) is tuple else trees.unflatten(leaves, structure)


_LEAVES = (Tensor, float, int)


def dimension_of(leaf: Any) -> int | None:
    """Which dimension of a leaf is cut; None where every rank has the whole.

    Example:
        >>> dimension_of(torch.ones(1)) is None
        True
    """
    return getattr(leaf.placements[-1], "dim", None) if is_laid_out(leaf) else None


@typed
def shard(state: State, mesh: DeviceMesh, rule: Rule = lambda name: 0) -> State:
    """The State with its parameters cut into parts, one for each rank, and what is laid out like them likewise.

    A leaf of the optimizer's state or of memory follows the parameter whose path ends its own, where shapes agree.
    Nothing is sent: ranks have the same State, by `replicate`.

    Args:
        state: the same on every rank.
        mesh: with one axis; or several, the last of which cuts, while ranks along the others have the same parts.
        rule: `name of a parameter, "body.0.bias" say -> dimension`, or None to leave it whole. Of dimension 0, if not
            given. A dimension that ranks do not divide is cut as `torch.chunk` does; where a rank would have nothing,
            all have the whole.

    Raises:
        UsageError: a parameter has no such dimension.

    Example:
        >>> from tnt_func import rng
        >>> from tnt_func.distributed.world import init, mesh
        >>> with init() as world:
        ...     shard(State(params={"w": torch.ones(4, 2)}, key=rng.key(0)), mesh(world)).params["w"].placements
        (Shard(dim=0),)

    References:
        torch.distributed.fsdp.fully_shard; Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054.
    """
    found: dict[str, tuple[torch.Size, int | None]] = {}
    for name, (path, leaf) in zip(trees.names(state.params), trees.named_leaves(state.params), strict=True):
        if not isinstance(leaf, Tensor) or is_laid_out(leaf):
            continue
        dimension = rule(name) if leaf.dim() else None
        if dimension is not None and not -leaf.dim() <= dimension < leaf.dim():
            raise UsageError(
                f"shard was given a rule that cuts params{path}, {trees.describe(leaf)}, in dimension {dimension}; it "
                f"has {leaf.dim()}. Return one of them, or None to leave it whole."
            )
        if dimension is not None and not _reaches(leaf.shape[dimension], mesh.size(mesh.ndim - 1)):
            dimension = None
        found[path] = leaf.shape, None if dimension is None else dimension % leaf.dim()

    def follow(path: str, leaf: Any) -> Any:
        # The longest of the parameters' paths that ends this one.
        owner = max((own for own in found if path.endswith(own)), key=len, default=None)
        if owner is None or not isinstance(leaf, Tensor) or is_laid_out(leaf) or found[owner][0] != leaf.shape:
            return leaf
        return laid(leaf, mesh, found[owner][1])

    def each(tree: PyTree) -> PyTree:
        leaves, structure = trees.flatten(tree)
        return trees.unflatten([follow(*pair) for pair in zip(trees.paths(tree), leaves, strict=True)], structure)

    return state.replace(params=each(state.params), opt_state=each(state.opt_state), memory=each(state.memory))


def _reaches(length: int, count: int) -> bool:
    """Whether every rank gets something of a dimension."""
    return -(-length // count) * (count - 1) < length


def laid(tensor: Tensor, mesh: DeviceMesh, dimension: int | None) -> Tensor:
    """A tensor that every rank has, as a DTensor, of which each has a part, or the whole."""
    if dimension is None:
        return on_mesh(tensor.detach(), mesh, None, tensor.shape)
    count, index = mesh.size(mesh.ndim - 1), mesh.get_local_rank(mesh.ndim - 1)
    size = -(-tensor.shape[dimension] // count)
    start = min(index * size, tensor.shape[dimension])
    own = tensor.detach().narrow(dimension, start, min(size, tensor.shape[dimension] - start)).clone()
    return on_mesh(own, mesh, dimension, tensor.shape)


def on_mesh(own: Tensor, mesh: DeviceMesh, dimension: int | None, shape: torch.Size) -> Tensor:
    """The DTensor of which this is this rank's part."""
    module = _dtensor()
    last = module.Replicate() if dimension is None else module.Shard(dimension)
    placements = [module.Replicate()] * (mesh.ndim - 1) + [last]
    stride = torch.empty(shape, device="meta").stride()
    return module.DTensor.from_local(own.contiguous(), mesh, placements, run_check=False, shape=shape, stride=stride)


@torch.no_grad()
def gather(state: S) -> S:
    """The tree with whole tensors in place of parts, on every rank; a State, or any other. All ranks call it.

    Example:
        >>> gather({"w": torch.ones(1)})
        {'w': tensor([1.])}
    """
    leaves, structure = _taken_apart(state)
    if not any(map(is_laid_out, leaves)):
        return state
    cut = [place for place, leaf in enumerate(leaves) if dimension_of(leaf) is not None]
    found = dict(zip(cut, wholes([leaves[place] for place in cut]), strict=True))
    leaves = [found[place] if place in found else here(leaf) for place, leaf in enumerate(leaves)]
    return _put_together(leaves, structure)  # pyright: ignore[reportReturnType]


def summed(ranks: Ranks, tensors: list[Any], like: Sequence[Any], share: Any) -> list[Tensor]:
    """Weighted sums of tensors over the ranks, each of which lies as what it is like.

    Args:
        ranks: who takes part.
        tensors: of this rank; None counts for nothing. They leave the list as they are sent, to make room.
        like: what they are like, tensors and DTensors.
        share: of this rank, by which its tensors are multiplied, a number or a 0-d tensor.

    Example:
        >>> from tnt_func.distributed.world import init, mesh
        >>> with init() as world:
        ...     summed(Ranks.of(mesh(world)), [torch.ones(2)], [torch.ones(2)], 0.5)
        [tensor([0.5000, 0.5000])]
    """
    if not any(map(is_laid_out, like)):
        return Sums(ranks, tensors, like, share).wait()
    cut = [dimension_of(leaf) is not None for leaf in like]
    whole, parted = ([place for place, each in enumerate(cut) if each is which] for which in (False, True))
    own = [[tensors[place] for place in places] for places in (whole, parted)]
    tensors.clear()
    local = [here(like[place]) for place in whole]
    sums, parts = Sums(ranks, own[0], local, share), PartSums(own[1], [like[place] for place in parted], share)
    found = dict(zip(parted, parts.wait(), strict=True))
    found |= {place: placed(x, like[place]) for place, x in zip(whole, sums.wait(), strict=True)}
    return [found[place] for place in range(len(like))]


def laid_like(tree: PyTree, like: PyTree) -> PyTree:
    """A tree of whole tensors, the same on every rank, as another one lies."""

    def follow(leaf: Any, other: Any) -> Any:
        return leaf if leaf is None or not is_laid_out(other) else laid(leaf, other.device_mesh, dimension_of(other))

    return trees.map(follow, tree, like)


def settled(after: State, before: State) -> State:
    """A state that lies as another one does, wherever arithmetic has put it."""
    changed: dict[str, Any] = {}
    for name in ("params", "opt_state", "buffers", "memory", "output"):
        new, old = getattr(after, name), getattr(before, name)
        if new is not old:
            changed[name] = settled_like(new, old if name != "output" else None)
    return after.replace(**changed)


def settled_like(new: PyTree, old: PyTree) -> PyTree:
    """A tree whose leaves lie as those of another do, and are plain tensors elsewhere."""
    leaves, structure = _taken_apart(new)
    laid_out = [place for place, leaf in enumerate(leaves) if is_laid_out(leaf)]
    if not laid_out:
        return new
    before, its = _taken_apart(old)
    if its == structure and all(_lie_alike(leaves[place], before[place]) for place in laid_out):
        return new
    same, paths = dict(trees.named_leaves(old)), trees.paths(new)
    for place in laid_out:
        leaf: Any = leaves[place]
        other: Any = same.get(paths[place])
        if not is_laid_out(other):
            leaves[place] = leaf.full_tensor()
        elif not _lie_alike(leaf, other):
            leaves[place] = leaf.redistribute(leaf.device_mesh, other.placements)
    return _put_together(leaves, structure)


def _lie_alike(leaf: Any, other: Any) -> bool:
    return is_laid_out(other) and leaf.placements == other.placements

"""Tensors that lie on a mesh of ranks, in parts or whole: what of them is here, and the whole that a part belongs to.

They are torch's DTensors, whose every operation finds out anew how its result lies. What treats each element alone can
be done to the parts instead, at the price of plain tensors.

Example:
    >>> is_laid_out(torch.ones(1)), here(torch.ones(1)), parts_of([torch.ones(1)])
    (False, tensor([1.]), None)
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_all_reduce: Any = dist.all_reduce  # pyright: ignore


def is_laid_out(leaf: Any) -> bool:
    """Whether a leaf lies on a mesh, in parts or whole: a DTensor.

    Example:
        >>> is_laid_out(torch.ones(1))
        False
    """
    return type(leaf) is not Tensor and isinstance(leaf, Tensor) and hasattr(leaf, "device_mesh")


def here(leaf: Any) -> Any:
    """What this rank has of a leaf: of one that lies on a mesh, the tensor that is here, and else the leaf.

    Example:
        >>> here(torch.ones(1))
        tensor([1.])
    """
    if not is_laid_out(leaf):
        return leaf
    if not torch.is_grad_enabled():
        return leaf.to_local()
    with torch.no_grad():
        return leaf.to_local()


def parts_of(*columns: list[Any]) -> list[list[Any]] | None:
    """What this rank has of the tensors in each column, the first of which says how its row lies on a mesh.

    Returns:
        The columns; tensors that lie on no mesh as they are. None where none lies on one, one lies in another way than
        the first of its row, or gradients flow back.

    Example:
        >>> parts_of([torch.ones(1)], [torch.ones(1)]) is None
        True
    """
    first, tracks = columns[0], torch.is_grad_enabled()
    if not any(map(is_laid_out, first)):
        return None
    for column in columns:
        for leaf, like in zip(column, first, strict=True):
            if leaf is not None and ((tracks and leaf.requires_grad) or not _lies_as(leaf, like)):
                return None
    with torch.no_grad():
        return [[*map(here, column)] for column in columns]


def _lies_as(leaf: Any, like: Any) -> bool:
    if leaf is like:
        return True
    if not is_laid_out(like) or not is_laid_out(leaf):
        return not is_laid_out(like) and not is_laid_out(leaf)
    # Most are put where another one lies, and know the same of it.
    same = leaf._spec is like._spec
    return same or (leaf.placements == like.placements and leaf.device_mesh == like.device_mesh)


def placed(own: Any, like: Any) -> Any:
    """The tensor of which this is the part of this rank, on the mesh as another one of its shape and dtype lies.

    What lies on a mesh, or is like what lies on none, stays as it is.

    Example:
        >>> placed(torch.ones(1), torch.zeros(1))
        tensor([1.])
    """
    # What from_local does takes fifteen times as long, most of it to find out what is known of the other one.
    return type(like)(own, like._spec, requires_grad=False) if is_laid_out(like) and not is_laid_out(own) else own


def norms(leaves: list[Any]) -> list[Tensor]:
    """The 2-norm of each tensor that lies on a mesh: 0-d, of the whole, by one message for all that are cut alike.

    Example:
        >>> norms([])
        []
    """
    if not leaves:
        return []
    open_sums = [any(each.is_partial() for each in leaf.placements) for leaf in leaves]
    own = [leaf.full_tensor() if is_open else here(leaf) for leaf, is_open in zip(leaves, open_sums, strict=True)]
    found: list[Any] = [part.norm() for part in own]
    groups: dict[Any, list[int]] = {}
    for place, (leaf, is_open) in enumerate(zip(leaves, open_sums, strict=True)):
        if not is_open and any(each.is_shard() for each in leaf.placements):
            groups.setdefault((leaf.device_mesh, leaf.placements, found[place].dtype), []).append(place)
    for (mesh, placements, dtype), places in groups.items():
        squares = torch.stack([found[place] for place in places]).to(torch.promote_types(dtype, torch.float32)).square()
        for axis, each in enumerate(placements):
            if each.is_shard():
                _all_reduce(squares, group=mesh.get_group(axis))
        for place, norm in zip(places, squares.sqrt().to(dtype).unbind(), strict=True):
            found[place] = norm
    return found

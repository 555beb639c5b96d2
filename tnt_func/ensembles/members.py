"""Trees of several members as one tree, and back: every tensor gets an axis of members, the first.

Numbers of Python's become a tensor too, which remembers that they were numbers. What is neither (a string, None) is one
for all members.

Laws:
    `taken(stacked(members), i)` is `members[i]`, to the bit.

Example:
    >>> both = stacked([{"w": torch.zeros(2), "n": 3}, {"w": torch.ones(2), "n": 4}])
    >>> both["w"].shape, taken(both, 1)
    (torch.Size([2, 2]), {'w': tensor([1., 1.]), 'n': 4})
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tnt_func import pytree as trees
from tnt_func.errors import StructureError
from tnt_func.pytree import pytree
from tnt_func.types import PyTree

DTYPES: dict[type, torch.dtype] = {bool: torch.bool, int: torch.int64, float: torch.float64}


@pytree
@dataclass(frozen=True)
class Numbers:
    """A number of Python's of each member: a bool, an int of 64 bits or a float.

    Args:
        values: bool, int64 or float64 [members], on the CPU.

    Example:
        >>> Numbers(torch.tensor([3, 4]))
        Numbers(values=tensor([3, 4]))
    """

    values: Tensor


def stacked(members: Sequence[PyTree], name: str = "tree") -> PyTree:
    """The trees of several members as one.

    Args:
        members: trees of one structure, shapes, dtypes and devices; strings and None are the same in all.
        name: what the messages call them.

    Raises:
        StructureError: they differ; the leaves are named.

    Example:
        >>> stacked(["a", "b"])
        Traceback (most recent call last):
        tnt_func.errors.StructureError: the members differ in tree: str 'a' and str 'b'. ...
    """
    try:
        joined = trees.map(_joined, *members)
        leaves = trees.flatten(joined, Numbers)[0]
        if all(leaf is not NotImplemented for leaf in leaves):
            return joined
        for member in members:
            trees.map(lambda *pair: None, member, members[0])
    except StructureError as error:
        raise StructureError(f"the members differ in the structure of {name}. {error}") from error
    columns = zip(trees.paths(members[0]), leaves, *map(trees.leaves, members), strict=True)
    bad = [
        f"{name}{path}: {trees.describe(first)} and {trees.describe(other)}"
        for path, leaf, first, *others in columns
        if leaf is NotImplemented
        for other in [next(one for one in others if _joined(first, one) is NotImplemented)]
    ]
    raise StructureError(
        f"the members differ in {'; '.join(bad)}. Their leaves have one shape, dtype and device, and what is no number "
        "is the same in all. Make the members by one function, and a value that differs a tensor."
    )


def taken(tree: PyTree, index: int) -> PyTree:
    """The tree of one member, out of a stacked one; its tensors are views.

    Example:
        >>> taken((torch.arange(3), Numbers(torch.tensor([True, False, True])), None), 2)
        (tensor(2), True, None)
    """
    leaves, structure = trees.flatten(tree, Numbers)
    return trees.unflatten([take(leaf, index) for leaf in leaves], structure)


def take(leaf: Any, index: int) -> Any:
    """A leaf of one member.

    Example:
        >>> take("the same", 1)
        'the same'
    """
    if isinstance(leaf, Tensor):
        return leaf[index]
    return leaf.values[index].item() if isinstance(leaf, Numbers) else leaf


def _joined(*leaves: Any) -> Any:
    first = leaves[0]
    if isinstance(first, Tensor):
        kind = (first.shape, first.dtype, first.device)
        same = all(isinstance(leaf, Tensor) and (leaf.shape, leaf.dtype, leaf.device) == kind for leaf in leaves)
        return torch.stack(leaves) if same else NotImplemented
    dtype = DTYPES.get(type(first))
    if dtype is not None and all(type(leaf) is type(first) for leaf in leaves):
        return Numbers(torch.tensor(leaves, dtype=dtype))
    return first if all(trees.same_leaf(first, leaf) for leaf in leaves) else NotImplemented

"""Trees as values that nothing can write to: what the laws compare, and what they resume from.

`freeze` copies every bit out of a tree, `thaw` makes a tree of them that shares no memory with the first. Frozen trees
compare with ==, bit for bit: NaN equals NaN, 0.0 differs from -0.0, 1 from True. The order of dict keys does not count.

Example:
    >>> w = torch.zeros(2)
    >>> before = freeze({"w": w})
    >>> _ = w.add_(1)
    >>> before == freeze({"w": w}), thaw(before)
    (False, {'w': tensor([0., 0.])})
"""

import ctypes
import inspect
import re
import struct
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch

from tnt_func import pytree as trees
from tnt_func.state import FIELDS, State

SHOWN = 8
"""How many differing leaves a message lists."""


class Bits(NamedTuple):
    """A plain tensor: strided and contiguous, on a device that has memory."""

    dtype: torch.dtype
    shape: torch.Size
    device: torch.device
    requires_grad: bool
    data: bytes


class Scalar(NamedTuple):
    """A number, string, boolean or None, with its type, since 1 == True; floats as text, since NaN != NaN."""

    kind: type
    value: Any


class Node(NamedTuple):
    """A State, or another container that is no plain dict, list or tuple."""

    kind: Any
    children: Any
    static: Any


@dataclass(frozen=True, eq=False)
class Kept:
    """A tensor of any other kind: sparse, transposed, quantized, meta, a subclass."""

    tensor: torch.Tensor

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Kept):
            return False
        a, b = self.tensor, other.tensor
        if a.is_meta or b.is_meta:
            return trees.describe(a) == trees.describe(b)
        return a.stride() == b.stride() and a.requires_grad == b.requires_grad and trees.same_leaf(a, b)


def freeze(tree: Any) -> Any:
    """Every bit of a tree, copied. Objects that are no trees, as batches may hold, are read through their attributes.

    Example:
        >>> freeze([0.0]) == freeze([-0.0]), freeze({"a": 1, "b": 2}) == freeze({"b": 2, "a": 1})
        (False, True)
    """
    kind: Any = type(tree)
    if isinstance(tree, torch.Tensor):
        return _freeze_tensor(tree)
    if kind is int or kind is str or kind is bool or tree is None:
        return Scalar(kind, tree)
    if kind is float:
        return Scalar(float, struct.pack("<d", tree))
    if kind is dict:
        return {name: freeze(child) for name, child in tree.items()}
    if kind is list:
        return [freeze(child) for child in tree]
    if kind is tuple:
        return tuple([freeze(child) for child in tree])
    if kind is State:
        children = {name: freeze(getattr(tree, name)) for name in _CHILDREN}
        return Node(State, children, (tree.key, tree.progress, tree.stop))
    leaves, structure = trees.flatten(tree)
    if len(leaves) == 1 and leaves[0] is tree:
        return freeze(_plain(tree, ()))
    return Node(structure, [freeze(leaf) for leaf in leaves], list(trees.static_fields(structure)))


def thaw(frozen: Any) -> Any:
    """A tree of these bits, in memory of its own: what comes out of a checkpoint.

    Example:
        >>> thaw(freeze((1, [torch.ones(1)])))
        (1, [tensor([1.])])
    """
    kind: Any = type(frozen)
    if kind is Bits:
        return _thaw_tensor(frozen)
    if kind is Scalar:
        return struct.unpack("<d", frozen.value)[0] if frozen.kind is float else frozen.value
    if kind is dict:
        return {name: thaw(child) for name, child in frozen.items()}
    if kind is list:
        return [thaw(child) for child in frozen]
    if kind is tuple:
        return tuple(thaw(child) for child in frozen)
    if kind is Kept:
        return _copied(frozen.tensor)
    if frozen.kind is State:
        key, progress, stop = frozen.static
        return State(key=key, progress=progress, stop=stop, **{n: thaw(child) for n, child in frozen.children.items()})
    return trees.unflatten([thaw(child) for child in frozen.children], frozen.kind)


def changes(before: Any, after: Any, name: str) -> list[str]:
    """How one frozen tree differs from another, a line a leaf; at most eight lines, and how many more there are.

    Example:
        >>> changes(freeze({"w": torch.zeros(2)}), freeze({"w": torch.ones(2)}), "params")
        ["params['w']: 2 of 2 elements differ, by at most 1"]
    """
    if before == after:
        return []
    a, b = thaw(before), thaw(after)
    lines = trees.diff(a, b, name) or _marks(a, b, name)
    return lines if len(lines) <= SHOWN else [*lines[:SHOWN], f"and {len(lines) - SHOWN} more"]


_CHILDREN = sorted(FIELDS - {"key", "progress", "stop"})


def _freeze_tensor(tensor: torch.Tensor) -> Bits | Kept:
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout is torch.strided
    if not plain or tensor.is_meta or tensor.is_quantized:
        return Kept(_copied(tensor))
    here = tensor if tensor.is_cpu else tensor.detach().cpu()
    if here.is_conj() or here.is_neg() or not here.is_contiguous():
        here = _copied(here.resolve_conj().resolve_neg())
        if not here.is_contiguous():
            return Kept(_copied(tensor))
    data = ctypes.string_at(here.data_ptr(), here.nbytes) if here.nbytes else b""
    return Bits(tensor.dtype, tensor.shape, tensor.device, tensor.requires_grad, data)


def _thaw_tensor(bits: Bits) -> torch.Tensor:
    flat = torch.frombuffer(bytearray(bits.data), dtype=bits.dtype) if bits.data else torch.empty(0, dtype=bits.dtype)
    # A clone, since the buffer's memory is aligned to no more than Python aligns it.
    return flat.reshape(bits.shape).clone().to(bits.device).requires_grad_(bits.requires_grad)


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def _marks(a: Any, b: Any, name: str) -> list[str]:
    """Leaves of equal bits that differ all the same."""
    pairs = zip(trees.named_leaves(a), trees.leaves(b), strict=True)
    return [
        f"{name}{path}: requires_grad={x.requires_grad}, stride={x.stride()} became requires_grad={y.requires_grad}, "
        f"stride={y.stride()}"
        for (path, x), y in pairs
        if isinstance(x, torch.Tensor) and (x.requires_grad, x.stride()) != (y.requires_grad, y.stride())
    ]


def _plain(value: Any, above: tuple[int, ...]) -> Any:
    """An object that is no tree as a tree of what it holds; one that holds nothing as what it says of itself."""
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic)):
        numbers = value.dtype.char in "?bBhHiIlLqQefdFD" and value.dtype.isnative
        return torch.tensor(value) if numbers else repr(value.tolist())
    held = (
        None if isinstance(value, type | ModuleType) or inspect.isroutine(value) else getattr(value, "__dict__", None)
    )
    if not held or id(value) in above:
        return re.sub(r" at 0x\w+", "", repr(value)) if not held else "..."
    below = (*above, id(value))
    inside = {
        name: trees.map(lambda leaf: leaf if isinstance(leaf, trees.LEAVES) else _plain(leaf, below), child)
        for name, child in held.items()
    }
    return {f"a {type(value).__name__}": inside}

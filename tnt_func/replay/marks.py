"""What a record holds of trees: numbers of an output, marks of leaves and batches.

A mark is a CRC-32, which takes a third of the time of a digest. The digest says whether two states differ, the marks
say where.
"""

import math
import zlib
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

import torch

from tnt_func import pytree as trees
from tnt_func.checkpoint.saving import numbers as metrics_of
from tnt_func.state import State, content
from tnt_func.types import Batch, Output

DIGITS = 8
"""Hexadecimal digits of a mark."""
_NUMBERS = {bool, int, float}


def mark(leaf: Any, start: int = 0) -> int:
    """The mark of a leaf: of its kind and its bytes.

    Args:
        leaf: a tensor, a number, a string, None, or what has a buffer, an array say.
        start: the mark of what comes before it.

    Raises:
        TypeError: it is nothing of these.

    Example:
        >>> a = torch.ones(2)
        >>> mark(a) == mark(a.clone()), mark(a) == mark(a[None]), mark(1) == mark(1.0)
        (True, False, False)
    """
    if isinstance(leaf, torch.Tensor):
        # Every call of torch's costs a few microseconds within a step, so a plain tensor is only looked at.
        if (
            not (leaf.is_cpu and leaf.layout is torch.strided and leaf.is_contiguous())
            or leaf.is_conj()
            or leaf.is_neg()
        ):
            dense = leaf.detach() if leaf.layout is torch.strided else leaf.detach().to_dense()
            leaf = dense.to("cpu").resolve_conj().resolve_neg().contiguous()
        start = zlib.crc32(f"{leaf.dtype}{tuple(leaf.shape)}".encode(), start)
        return zlib.crc32(content(leaf), start) if leaf.nbytes else start
    if isinstance(leaf, trees.LEAVES):
        return zlib.crc32(f"{type(leaf).__name__} {leaf!a}".encode(), start)
    view = memoryview(leaf)
    if "O" in view.format:
        raise TypeError("an array of objects holds addresses, which are others in every process")
    return zlib.crc32(view.tobytes(), zlib.crc32(f"{view.format}{view.shape}".encode(), start))


def mark_of_batch(batch: Batch) -> str | None:
    """The mark of a batch; None where a leaf of it is an object that has no bytes.

    Example:
        >>> mark_of_batch((torch.ones(2), [1])) == mark_of_batch((torch.ones(2), [2])), mark_of_batch(object()) is None
        (False, True)
    """
    found = 0

    def add(leaf: Any) -> None:
        nonlocal found
        found = mark(leaf, found)

    try:
        trees.map(add, batch)
    except (TypeError, ValueError, RuntimeError):
        return None
    return f"{found:0{DIGITS}x}"


def marks(state: State) -> tuple[dict[str, str], str]:
    """The kind of every leaf by path, and all their marks as one string.

    Example:
        >>> from tnt_func.rng import key
        >>> kinds, found = marks(State(params={"w": torch.ones(2), "n": 1}, key=key(0)))
        >>> kinds, len(found)
        ({".params['w']": 'float32[2]', ".params['n']": 'int', '.output': 'NoneType'}, 24)
    """
    leaves = trees.named_leaves(state)
    kinds = {
        path: trees.describe(leaf) if isinstance(leaf, torch.Tensor) else type(leaf).__name__ for path, leaf in leaves
    }
    return kinds, "".join(f"{mark(leaf):0{DIGITS}x}" for _, leaf in leaves)


def row_numbers(
    state: State, output: Mapping[str, Any] | None, *, stepped: bool, evaluated: bool
) -> dict[str, Any] | None:
    """The numbers of a row: of a step its output's, and the evaluation's that followed; of an epoch its metrics.

    Args:
        state: of the row.
        output: the numbers of the step's output, or None where none are due.
        stepped: whether the row is a step's.
        evaluated: whether an evaluation came before it.

    Example:
        >>> from tnt_func.metrics import mean
        >>> from tnt_func.rng import key
        >>> state = State(params={}, key=key(0), metrics={"train": {"loss": mean("loss").of({"loss": 0.5})}})
        >>> row_numbers(state, {"x": 1}, stepped=True, evaluated=False)
        {'x': 1}
        >>> row_numbers(state, None, stepped=False, evaluated=False)
        {'train.loss': 0.5}
    """
    if stepped and not evaluated:
        return None if output is None else dict(output)
    phases = {phase: found for phase, found in metrics_of(state).items() if not stepped or phase == "eval"}
    metrics = {f"{phase}.{name}": value for phase, found in phases.items() for name, value in found.items()}
    return {**(output or {}), **numbers(metrics)}


def numbers(output: Output) -> dict[str, Any]:
    """The entries of a step's output that are one number each; what is not finite as text, which `float` reads.

    Example:
        >>> import numpy
        >>> numbers({"loss": torch.tensor(0.5), "norm": float("nan"), "of_each": torch.ones(2), "lr": numpy.float32(2)})
        {'loss': 0.5, 'norm': 'nan', 'lr': 2.0}
    """
    if not isinstance(output, Mapping):
        return {}
    found: dict[str, Any] = {}
    for name, value in output.items():
        if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_complex():
            value = value.item()
        elif isinstance(value, Real) and type(value) not in _NUMBERS:
            value = int(value) if isinstance(value, Integral) else float(value)  # One of NumPy's.
        if type(value) in _NUMBERS:
            found[str(name)] = value if math.isfinite(value) else repr(value)
    return found

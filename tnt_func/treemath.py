"""Arithmetic on trees of tensors: what optimizers, clipping and averages are written in.

Everything is pure and out of place, and runs as it stands under `torch.func.vmap`, `torch.func.grad` and
`torch.compile(fullgraph=True)`. Leaves are tensors and numbers; None, a gradient that is not there, stays None and
counts for nothing; any other leaf is an error that names its path. dtypes promote as in torch. Where a function does
otherwise, it says so.

Laws:
    For finite leaves lerp(a, b, 0) == a and lerp(a, b, 1) == b, exactly; subtract(add(a, b), b) == a and
    dot(a, a) == global_norm(a) ** 2, but for rounding.

Example:
    >>> grads = {"w": torch.tensor([3.0, 4.0]), "b": None}
    >>> scale(grads, 1 / global_norm(grads))
    {'w': tensor([0.6000, 0.8000]), 'b': None}
"""

import inspect
import math
import operator
from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from tnt_func import meshes
from tnt_func import pytree as trees
from tnt_func.errors import UsageError, UsageTypeError
from tnt_func.types import PyTree, typed

Number: TypeAlias = int | float | torch.Tensor

# Without its no_grad, under which a gradient through the norm would silently be zero.
_total_norm: Callable[..., torch.Tensor] = inspect.unwrap(torch.nn.utils.get_total_norm)
_is_transformed: Callable[[torch.Tensor], bool] = torch._C._functorch.is_functorch_wrapped_tensor  # pyright: ignore


def add(a: PyTree, b: PyTree) -> PyTree:
    """a + b.

    Example:
        >>> add({"w": torch.ones(2), "n": 1}, {"w": torch.ones(2), "n": 2})
        {'w': tensor([2., 2.]), 'n': 3}
    """
    return _arithmetic("add", operator.add, a, b)


def subtract(a: PyTree, b: PyTree) -> PyTree:
    """a - b.

    Example:
        >>> subtract([torch.ones(2)], [torch.ones(2)])
        [tensor([0., 0.])]
    """
    return _arithmetic("subtract", operator.sub, a, b)


@typed
def scale(tree: PyTree, factor: Number) -> PyTree:
    """factor * tree. Floating and complex leaves keep their dtype, as in `leaf.mul_(factor)`.

    Args:
        tree: any tree.
        factor: a number, or a tensor that broadcasts to every leaf, mostly 0-d.

    Example:
        >>> scale([torch.ones(2, dtype=torch.bfloat16)], torch.tensor(0.5, dtype=torch.float64))
        [tensor([0.5000, 0.5000], dtype=torch.bfloat16)]
    """

    def times(leaf: Any) -> Any:
        product = leaf * factor
        return product.to(leaf.dtype) if _is_inexact(leaf) else product

    return _arithmetic("scale", times, tree)


@typed
def lerp(a: PyTree, b: PyTree, weight: Number) -> PyTree:
    """a + weight * (b - a), in the dtypes of a, so that a float32 average may follow bfloat16 parameters.

    Args:
        a: a tree of floating or complex tensors, and numbers.
        b: the same, of the same structure.
        weight: 0 gives a, 1 gives b; a number, or a tensor that broadcasts to every leaf, mostly 0-d.

    Raises:
        UsageTypeError: a leaf is a tensor of integers or booleans.

    Example:
        >>> lerp([torch.zeros(2)], [torch.ones(2)], 0.25)
        [tensor([0.2500, 0.2500])]

    References:
        torch.lerp; with weight = 1 - decay, the bits of torch.optim.swa_utils.get_ema_multi_avg_fn.
    """

    def between(x: Any, y: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x * (1 - weight) + y * weight
        end = torch.as_tensor(y, dtype=x.dtype)
        if not isinstance(weight, torch.Tensor):
            return torch.lerp(x, end, weight)
        # 0.999 is 1 in bfloat16: the weight needs the digits that torch.lerp lets a number have.
        wide = torch.promote_types(x.dtype, torch.float32)
        return torch.lerp(x.to(wide), end.to(wide), weight.to(wide)).to(x.dtype)

    return _arithmetic("lerp", between, a, b, takes=_is_real_or_inexact)


def dot(a: PyTree, b: PyTree) -> torch.Tensor:
    """The inner product, the sum of conj(a) * b over all elements: 0-d, on the device of the first leaf.

    Sums in the leaves' dtypes: `cast` to a wider one first for more digits.

    Example:
        >>> dot({"w": torch.tensor([1.0, 2.0]), "b": 3.0}, {"w": torch.tensor([4.0, 5.0]), "b": 2.0})
        tensor(20.)

    References:
        torch.vdot, of all leaves as one vector.
    """

    def inner(x: Any, y: Any) -> torch.Tensor:
        return (torch.as_tensor(x).conj() * y).sum()

    terms = trees.tensors(_arithmetic("dot", inner, a, b))
    return torch.stack([term.to(terms[0].device) for term in terms]).sum() if terms else torch.tensor(0.0)


def global_norm(tree: PyTree) -> torch.Tensor:
    """The 2-norm of all leaves as one vector: 0-d, on the device of the first leaf.

    It is the norm of the leaves' norms, each in its leaf's dtype: `cast` to a wider one first for more digits, or where
    a square may overflow.

    Args:
        tree: a tree of floating or complex tensors, and numbers.

    Raises:
        UsageTypeError: a leaf is a tensor of integers or booleans.

    Example:
        >>> global_norm({"w": torch.tensor([3.0]), "b": torch.tensor([4.0]), "frozen": None})
        tensor(5.)

    References:
        torch.nn.utils.get_total_norm, and the norm in clip_grad_norm_: the same bits, eager.
    """

    def vector(leaf: Any) -> torch.Tensor:
        return leaf if isinstance(leaf, torch.Tensor) else torch.tensor(float(leaf))

    vectors = trees.tensors(_arithmetic("global_norm", vector, tree, takes=_is_real_or_inexact))
    spread = [place for place, x in enumerate(vectors) if meshes.is_laid_out(x) and not x.requires_grad]
    for place, norm in zip(spread, meshes.norms([vectors[place] for place in spread]), strict=True):
        vectors[place] = norm
    # Eager, torch chooses foreach kernels, whose bits differ on CUDA; they do not run under vmap and jvp.
    plain = torch.compiler.is_compiling() or any(_is_transformed(x) for x in vectors)
    return _total_norm(vectors, foreach=False if plain else None)


def where(condition: PyTree, a: PyTree, b: PyTree) -> PyTree:
    """a where the condition holds, else b.

    Leaves that are no tensors, of whatever type, are kept where a and b agree on them.

    Args:
        condition: a bool tensor that broadcasts to every leaf, mostly 0-d; or a tree of such with the structure of a.
        a: any tree.
        b: a tree of the same structure.

    Raises:
        UsageTypeError: the condition is no bool tensor, or leaves that are no tensors differ.

    Example:
        >>> where(torch.tensor(False), {"w": torch.ones(2), "n": 3}, {"w": torch.zeros(2), "n": 3})
        {'w': tensor([0., 0.]), 'n': 3}
    """

    def choose(holds: Any, x: Any, y: Any) -> Any:
        if not (isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor)):
            return x if trees.same_leaf(x, y) else NotImplemented
        is_condition = isinstance(holds, torch.Tensor) and holds.dtype is torch.bool
        return torch.where(holds, x, y) if is_condition else NotImplemented

    if isinstance(condition, torch.Tensor):
        leaves, structure = trees.flatten(a)
        condition = trees.unflatten([condition] * len(leaves), structure)
    takes = (
        "a bool tensor, and leaves that are tensors or agree. Make a number that differs a tensor: torch.tensor(...)"
    )
    return _leafwise("where", takes, choose, condition, a, b)


@typed
def cast(tree: PyTree, dtype: torch.dtype) -> PyTree:
    """The tree with its floating leaves in a dtype; every other leaf, of whatever type, is kept.

    Args:
        tree: any tree.
        dtype: a floating dtype.

    Raises:
        UsageError: the dtype is not floating.

    Example:
        >>> cast({"w": torch.ones(2), "steps": torch.tensor(3)}, torch.bfloat16)
        {'w': tensor([1., 1.], dtype=torch.bfloat16), 'steps': tensor(3)}
    """
    if not dtype.is_floating_point:
        raise UsageError(
            f"treemath.cast was given {dtype}; it casts floating leaves to a floating dtype. "
            "Write pytree.map(lambda leaf: leaf.to(dtype), tree) to cast every leaf."
        )

    def to_dtype(leaf: Any) -> Any:
        return leaf.to(dtype) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf

    return trees.map(to_dtype, tree)


def zeros_like(tree: PyTree) -> PyTree:
    """Zeros of the same structure, shapes, dtypes and devices; a number becomes the zero of its type.

    Example:
        >>> zeros_like({"w": torch.ones(2), "n": 3})
        {'w': tensor([0., 0.]), 'n': 0}
    """

    def zero(leaf: Any) -> Any:
        return torch.zeros_like(leaf) if isinstance(leaf, torch.Tensor) else type(leaf)(0)

    return _arithmetic("zeros_like", zero, tree)


def all_finite(tree: PyTree) -> torch.Tensor:
    """Whether no element is NaN or infinite: a 0-d bool tensor on the device of the first leaf that could be.

    Leaves that hold no floating or complex numbers, of whatever type, are finite. Nothing waits for the device.

    Example:
        >>> all_finite({"w": torch.ones(2), "b": torch.tensor(float("nan"))})
        tensor(False)
    """
    verdicts = [_finite(leaf) for leaf in trees.leaves(tree) if isinstance(leaf, float) or _is_inexact(leaf)]
    return (
        torch.stack([verdict.to(verdicts[0].device) for verdict in verdicts]).all() if verdicts else torch.tensor(True)
    )


def _finite(leaf: Any) -> torch.Tensor:
    if isinstance(leaf, float) or leaf.numel() == 0:
        return torch.tensor(not isinstance(leaf, float) or math.isfinite(leaf))
    # Five times as fast as isfinite().all(). amax hands NaN on; abs of a complex number may overflow.
    return (torch.view_as_real(leaf.resolve_conj()) if leaf.is_complex() else leaf).abs().amax() < math.inf


def _is_inexact(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def _is_number(leaf: Any) -> bool:
    return isinstance(leaf, (torch.Tensor, int, float))


def _is_real_or_inexact(leaf: Any) -> bool:
    return isinstance(leaf, (int, float)) or _is_inexact(leaf)


def _arithmetic(
    name: str, function: Callable[..., Any], *given: PyTree, takes: Callable[[Any], bool] = _is_number
) -> PyTree:
    def on_leaves(*leaves: Any) -> Any:
        for leaf in leaves:  # not all(...): Dynamo takes twice as long to trace a generator, at every leaf
            if not takes(leaf):
                return None if all(leaf is None for leaf in leaves) else NotImplemented
        return function(*leaves)

    kinds = "tensors" if takes is _is_number else "floating or complex tensors"
    advice = f"{kinds} and numbers, or None on every side. Take other leaves out, or cast them, before"
    return _leafwise(name, advice, on_leaves, *given)


def _leafwise(name: str, takes: str, function: Callable[..., Any], *given: PyTree) -> PyTree:
    """Map; leaves for which the function gives NotImplemented are refused, all in one message."""

    def checked(*leaves: Any) -> Any:
        result = function(*leaves)
        if result is not NotImplemented:
            return result
        paths = trees.unflatten(trees.paths(given[0]), trees.structure(given[0]))
        refused = "\n".join(filter(None, trees.leaves(trees.map(line, paths, *given))))
        raise UsageTypeError(f"{refused}\ntreemath.{name} takes {takes}.")

    def line(path: str, *leaves: Any) -> str | None:
        refused = function(*leaves) is NotImplemented
        return f"tree{path}: {', '.join(trees.describe(leaf) for leaf in leaves)}" if refused else None

    return trees.map(checked, *given)

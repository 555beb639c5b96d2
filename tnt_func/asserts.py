"""Assertions about trees, and one about compilation, after chex.

Static ones (`assert_shape`, `assert_rank`, `assert_dtype`, `assert_trees_same_structure`) look at no value: they wait
for no device and run inside `torch.func.vmap`, where a shape is one example's, and `torch.compile(fullgraph=True)`,
where they are checked while tracing. Value ones (`assert_trees_equal`, `assert_trees_close`, `assert_tree_finite`)
fetch the leaves, wait for the device, and run in neither.

A failure is a TreeError whose one message lists every offending leaf by its path; under fullgraph=True Dynamo quotes it
in an error of its own.

Example:
    >>> params = {"fc.weight": torch.ones(2, 3), "fc.bias": torch.ones(2)}
    >>> assert_shape(params, (2, ...))
    >>> assert_rank(params, 2, name="params")
    Traceback (most recent call last):
    tnt_func.errors.TreeError: params['fc.bias']: float32[2], expected rank 2
    assert_rank takes a tree of one rank, a number's being 0. Reshape, or assert the parts one by one.

References:
    chex, https://chex.readthedocs.io
"""

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from types import EllipsisType
from typing import Any, NoReturn

import torch

from tnt_func import pytree as trees
from tnt_func import treemath
from tnt_func.errors import TreeError, UsageError
from tnt_func.types import PyTree, typed


@typed
def assert_shape(tree: PyTree, shape: Sequence[int | None | EllipsisType], *, name: str = "tree") -> None:
    """Every leaf has the shape. Static.

    Args:
        tree: tensors, and numbers, whose shape is ().
        shape: an int for an axis of that size, None for an axis of any, and at most one `...` for any number of axes.
        name: what the message calls the tree.

    Raises:
        TreeError: a leaf has another shape, or is neither tensor nor number.
        UsageError: there is more than one `...`.

    Example:
        >>> assert_shape(torch.ones(4, 2, 3), (4, None, 3))
        >>> assert_shape({"w": torch.ones(2, 3)}, (..., 4), name="params")
        Traceback (most recent call last):
        tnt_func.errors.TreeError: params['w']: float32[2, 3], expected shape (..., 4)
        assert_shape takes a tree of one shape, ...
    """
    spelled = str(tuple(shape)).replace("Ellipsis", "...")
    dots = [axis for axis, size in enumerate(shape) if size is ...]
    if len(dots) > 1:
        raise UsageError(
            f"assert_shape was given {spelled}; one ... stands for all the axes. Write None for the others."
        )
    head, tail = (shape[: dots[0]], shape[dots[0] + 1 :]) if dots else (shape, ())

    def fits(leaf: Any) -> bool:
        if not isinstance(leaf, (torch.Tensor, int, float)):
            return False
        sizes = leaf.shape if isinstance(leaf, torch.Tensor) else ()
        between = [None] * (len(sizes) - len(head) - len(tail)) if dots else []
        wanted = [*head, *between, *tail]
        return len(wanted) == len(sizes) and all(w is None or w == s for w, s in zip(wanted, sizes, strict=True))

    _assert_leaves(
        tree,
        name,
        fits,
        f"expected shape {spelled}",
        "assert_shape takes a tree of one shape, a number's being (). "
        "Reshape, or write None for an axis of any size and ... for any number of axes.",
    )


@typed
def assert_rank(tree: PyTree, rank: int, *, name: str = "tree") -> None:
    """Every leaf has so many axes; a number has none. Static.

    Args:
        tree: tensors and numbers.
        rank: axes.
        name: what the message calls the tree.

    Raises:
        TreeError: a leaf has another rank, or is neither tensor nor number.

    Example:
        >>> assert_rank({"loss": torch.tensor(0.5), "steps": 3}, 0)
    """

    def fits(leaf: Any) -> bool:
        return leaf.ndim == rank if isinstance(leaf, torch.Tensor) else isinstance(leaf, (int, float)) and rank == 0

    _assert_leaves(
        tree,
        name,
        fits,
        f"expected rank {rank}",
        "assert_rank takes a tree of one rank, a number's being 0. Reshape, or assert the parts one by one.",
    )


@typed
def assert_dtype(tree: PyTree, dtype: torch.dtype, *, name: str = "tree") -> None:
    """Every leaf is a tensor of the dtype. Static.

    Args:
        tree: tensors.
        dtype: the dtype.
        name: what the message calls the tree.

    Raises:
        TreeError: a leaf has another dtype, or is no tensor.

    Example:
        >>> assert_dtype([torch.ones(2), 1.0], torch.float32)
        Traceback (most recent call last):
        tnt_func.errors.TreeError: tree[1]: float 1.0, expected float32
        assert_dtype takes ...
    """
    _assert_leaves(
        tree,
        name,
        lambda leaf: isinstance(leaf, torch.Tensor) and leaf.dtype is dtype,
        f"expected {str(dtype).removeprefix('torch.')}",
        f"assert_dtype takes tensors of one dtype. Write treemath.cast(tree, {dtype}), and torch.tensor for a number.",
    )


@typed
def assert_trees_same_structure(
    a: PyTree, b: PyTree, *, shapes: bool = False, dtypes: bool = False, name: str = "tree"
) -> None:
    """Two trees have the same containers and paths, whatever their static fields. Static.

    Args:
        a: the tree in question.
        b: the tree that it should be like.
        shapes: whether tensors must have the same shapes too, and other leaves the same types.
        dtypes: whether tensors must have the same dtypes too, and other leaves the same types.
        name: what the message calls the tree.

    Raises:
        TreeError: the trees differ.

    Example:
        >>> assert_trees_same_structure({"w": torch.ones(2)}, {"w": torch.zeros(3)})
        >>> assert_trees_same_structure({"w": torch.ones(2)}, {"w": torch.zeros(3)}, shapes=True, name="params")
        Traceback (most recent call last):
        tnt_func.errors.TreeError: params['w']: float32[2], expected float32[3]
        assert_trees_same_structure takes ...
    """
    leaves_a, structure_a = trees.flatten(a)
    leaves_b, structure_b = trees.flatten(b)

    def alike(x: Any, y: Any) -> bool:
        if not (isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor)):
            return type(x) is type(y) or not (shapes or dtypes)
        return (not shapes or x.shape == y.shape) and (not dtypes or x.dtype == y.dtype)

    if structure_a == structure_b and all(alike(x, y) for x, y in zip(leaves_a, leaves_b, strict=True)):
        return
    here, there = dict(trees.named_leaves(a)), dict(trees.named_leaves(b))
    lines = [
        f"{name}{path}: missing, expected {trees.describe(leaf)}" for path, leaf in there.items() if path not in here
    ]
    lines += [
        f"{name}{path}: {trees.describe(leaf)}, expected no leaf here"
        for path, leaf in here.items()
        if path not in there
    ]
    if not lines and structure_a != structure_b:
        lines.append(f"{name}: {structure_a}, expected {structure_b}")
    lines += [
        f"{name}{path}: {trees.describe(leaf)}, expected {trees.describe(there[path])}"
        for path, leaf in here.items()
        if path in there and not alike(leaf, there[path])
    ]
    same = "containers and paths" + ", shapes" * shapes + ", dtypes" * dtypes
    advice = "Build both the same way; dict keys count in their order."
    _fail(lines, f"assert_trees_same_structure takes trees of the same {same}. {advice}")


def assert_trees_equal(a: PyTree, b: PyTree, *, name: str = "tree") -> None:
    """Two trees are the same: structure, static fields and every leaf to the bit, NaN being NaN. Waits for the device.

    Args:
        a: the tree before.
        b: the tree after.
        name: what the message calls the tree.

    Raises:
        TreeError: the trees differ.

    Example:
        >>> assert_trees_equal({"w": torch.zeros(2)}, {"w": torch.zeros(2)})
        >>> assert_trees_equal({"w": torch.zeros(2)}, {"w": torch.tensor([0.0, 0.5])}, name="params")
        Traceback (most recent call last):
        tnt_func.errors.TreeError: params['w']: 1 of 2 elements differ, by at most 0.5
        assert_trees_equal takes ...
    """
    if lines := trees.diff(a, b, name):
        advice = "Write assert_trees_close where rounding may differ."
        _fail(lines, f"assert_trees_equal takes trees that are the same to the bit. {advice}")


@typed
def assert_trees_close(a: PyTree, b: PyTree, *, rtol: int | float, atol: int | float, name: str = "tree") -> None:
    """Two trees have the same structure, static fields, shapes and dtypes, and |a - b| <= atol + rtol * |b| everywhere.

    Computed in float64 on the CPU, on whatever devices the leaves are. NaN is close to NaN, an infinity to itself.
    Integers, booleans and other leaves must be equal. Waits for the device.

    Args:
        a: the tree in question.
        b: the reference.
        rtol: relative tolerance.
        atol: absolute tolerance.
        name: what the message calls the tree.

    Raises:
        TreeError: the trees differ by more.

    Example:
        >>> assert_trees_close([torch.tensor(1.0)], [torch.tensor(1.0001)], rtol=1e-3, atol=0.0)
        >>> assert_trees_close([torch.tensor(1.0)], [torch.tensor(1.5)], rtol=1e-3, atol=0.0)
        Traceback (most recent call last):
        tnt_func.errors.TreeError: tree[0]: 1 of 1 elements differ by more than atol=0 + rtol=0.001, by at most 0.5
        assert_trees_close takes ...
    """
    assert_trees_same_structure(a, b, shapes=True, dtypes=True, name=name)
    pairs = zip(*(trees.static_fields(trees.structure(tree)) for tree in (a, b)), strict=True)
    lines = [f"{name}: static fields {x}, expected {y}" for x, y in pairs if x != y]
    for (path, x), y in zip(trees.named_leaves(a), trees.leaves(b), strict=True):
        if difference := _beyond(x, y, rtol, atol):
            lines.append(f"{name}{path}: {difference}")
    if lines:
        advice = "Widen the tolerance where this much is rounding."
        _fail(lines, f"assert_trees_close takes trees that differ by rounding, in floating leaves alone. {advice}")


def _beyond(x: Any, y: Any, rtol: float, atol: float) -> str | None:
    if not isinstance(x, (torch.Tensor, float)):
        return None if trees.same_leaf(x, y) else f"{trees.describe(x)}, expected {trees.describe(y)}"
    x, y = (
        leaf.detach().cpu().to_dense() if isinstance(leaf, torch.Tensor) else torch.tensor(leaf, dtype=torch.float64)
        for leaf in (x, y)
    )
    inexact = x.is_floating_point() or x.is_complex()
    wide_x, wide_y = (leaf.to(torch.complex128 if leaf.is_complex() else torch.float64) for leaf in (x, y))
    far = ~torch.isclose(wide_x, wide_y, rtol=rtol, atol=atol, equal_nan=True) if inexact else x != y
    if not far.any():
        return None
    count, largest = int(far.sum()), float((wide_x - wide_y).abs()[far].max())
    allowed = f" by more than atol={atol:g} + rtol={rtol:g}" if inexact else ""
    return f"{count} of {x.numel()} elements differ{allowed}, by at most {largest:.3g}"


def assert_tree_finite(tree: PyTree, *, name: str = "tree") -> None:
    """No element is NaN or infinite. Waits for the device once where all is well.

    Args:
        tree: any tree; leaves that hold no floating or complex numbers are finite.
        name: what the message calls the tree.

    Raises:
        TreeError: an element is not finite.

    Example:
        >>> assert_tree_finite({"w": torch.tensor([[1.0, float("nan")]])}, name="grads")
        Traceback (most recent call last):
        tnt_func.errors.TreeError: grads['w']: 1 of 2 elements are not finite, the first is nan at [0, 1]
        assert_tree_finite takes ...
    """
    if bool(treemath.all_finite(tree)):
        return
    lines: list[str] = []
    for path, leaf in trees.named_leaves(tree):
        if not bool(treemath.all_finite(leaf)):
            values = torch.as_tensor(leaf).detach().cpu()
            bad = ~values.isfinite()
            place = [int(index) for index in bad.nonzero()[0]]
            lines.append(
                f"{name}{path}: {int(bad.sum())} of {values.numel()} elements are not finite, "
                f"the first is {values[bad][0].item()} at {place}"
            )
    advice = "Lower the lr, clip the gradients, or find the operation with torch.autograd.set_detect_anomaly(True)."
    _fail(lines, f"assert_tree_finite takes finite trees. {advice}")


@contextmanager
def assert_max_compilations(n: int) -> Generator[None]:
    """At most n graphs are compiled in the block; as a decorator, in each call. After chex.assert_max_traces.

    Counts every graph that Dynamo hands to a backend in this process (the first compilation, recompilations, and the
    parts that a graph break leaves; the backward pass of a graph is not counted again), and every graph that
    `tnt.compiled` makes.

    Args:
        n: graphs.

    Raises:
        TreeError: there were more; the message says of which functions, and why they were compiled again.

    Example:
        >>> double = torch.compile(lambda x: 2 * x, backend="eager")
        >>> with assert_max_compilations(1):
        ...     for _ in range(3):
        ...         _ = double(torch.ones(2))
    """
    # Here, not above: importing Dynamo takes a second.
    from torch._dynamo.utils import counters, get_compilation_metrics  # pyright: ignore

    graphs, earlier = counters["stats"]["unique_graphs"], get_compilation_metrics()
    own: list[str] = []
    _watching.append(own)
    try:
        yield
    finally:
        _watching.remove(own)
    count = counters["stats"]["unique_graphs"] - graphs + len(own)
    if count <= n:
        return
    lines = own + [
        f"{made.co_name} ({made.co_filename}:{made.co_firstlineno}): "
        + (made.recompile_reason or "compiled for the first time").splitlines()[0].strip()
        for made in get_compilation_metrics()
        if made.has_guarded_code and not any(made is other for other in earlier)
    ]
    advice = "Keep structure, shapes and dtypes the same, give what varies as a tensor, or compile with dynamic=True."
    _fail(lines, f"{count} graphs were compiled, expected at most {n}. {advice}")


_watching: list[list[str]] = []


def record_compilation(line: str) -> None:
    """Tell every `assert_max_compilations` around that a graph was compiled.

    Args:
        line: of what, and why.

    Example:
        >>> with assert_max_compilations(0):
        ...     record_compilation("train_step: compiled for the first time")
        Traceback (most recent call last):
        tnt_func.errors.TreeError: train_step: compiled for the first time
        1 graphs were compiled, expected at most 0. ...
    """
    for lines in _watching:
        lines.append(line)


def _assert_leaves(tree: PyTree, name: str, fits: Callable[[Any], bool], expected: str, advice: str) -> None:
    if all(fits(leaf) for leaf in trees.leaves(tree)):
        return
    lines = [
        f"{name}{path}: {trees.describe(leaf)}, {expected}" for path, leaf in trees.named_leaves(tree) if not fits(leaf)
    ]
    _fail(lines, advice)


def _fail(lines: Iterable[str], advice: str) -> NoReturn:
    message = ""
    # Neither str.join nor +, which Dynamo does not trace where a size may vary.
    for line in lines:
        message = f"{message}{line}\n"
    raise TreeError(f"{message}{advice}")

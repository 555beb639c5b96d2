"""Arithmetic on trees: one body under every transform, torch's own bits, and what the leaves may be."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from tnt_func import pytree as trees
from tnt_func import treemath
from tnt_func.asserts import assert_trees_close, assert_trees_equal
from tnt_func.errors import StructureError, UsageError, UsageTypeError
from tnt_func.pytree import pytree

NAN, INF = float("nan"), float("inf")


@pytree(static=("name",))
@dataclass(frozen=True)
class Layer:
    weight: Any
    bias: Any
    name: str = "fc"


def tree(seed: int, dtype: torch.dtype = torch.float32) -> Any:
    draw = torch.Generator().manual_seed(seed)
    weight, bias, scalar = (torch.randn(shape, generator=draw).to(dtype) for shape in ([3, 2], [3], []))
    return {"layers": [Layer(weight, bias), Layer(bias.expand(2, 3).t(), None)], "scalar": scalar}


A, B = tree(0), tree(1)
FUNCTIONS: dict[str, Callable[[Any, Any], Any]] = {
    "add": treemath.add,
    "subtract": treemath.subtract,
    "scale by a number": lambda a, b: treemath.scale(a, 0.3),
    "scale by a tensor": lambda a, b: treemath.scale(a, b["scalar"].double()),
    "lerp by a number": lambda a, b: treemath.lerp(a, b, 0.3),
    "lerp by a tensor": lambda a, b: treemath.lerp(a, b, b["scalar"].double()),
    "dot": treemath.dot,
    "global_norm": lambda a, b: treemath.global_norm(a),
    "where": lambda a, b: treemath.where(a["scalar"] > b["scalar"], a, b),
    "where per leaf": lambda a, b: treemath.where(trees.map(lambda x: None if x is None else x > 0, a), a, b),
    "cast": lambda a, b: treemath.cast(a, torch.bfloat16),
    "zeros_like": lambda a, b: treemath.zeros_like(a),
    "all_finite": lambda a, b: treemath.all_finite(a),
}
EXPECTED: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda x, y: x + y,
    "subtract": lambda x, y: x - y,
    "scale by a number": lambda x, y: x * 0.3,
    "scale by a tensor": lambda x, y: x * float(B["scalar"]),
    "lerp by a number": lambda x, y: x + 0.3 * (y - x),
    "lerp by a tensor": lambda x, y: x + float(B["scalar"]) * (y - x),
    "where": lambda x, y: x if A["scalar"] > B["scalar"] else y,
    "zeros_like": lambda x, y: 0 * x,
    "cast": lambda x, y: x.bfloat16(),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_each_leaf_is_what_the_formula_says(name: str):
    def formula(x: Any, y: Any) -> Any:
        return None if x is None else EXPECTED[name](x, y)

    assert_trees_close(FUNCTIONS[name](A, B), trees.map(formula, A, B), rtol=1e-6, atol=1e-7)


def everything(a: Any, b: Any) -> dict[str, Any]:
    return {name: function(a, b) for name, function in FUNCTIONS.items()}


def test_nothing_given_is_changed():
    a, b = tree(0), tree(1)
    everything(a, b)
    assert_trees_equal([a, b], [A, B])


def test_compiled_is_eager():
    assert_trees_equal(torch.compile(everything, fullgraph=True, backend="eager")(A, B), everything(A, B))


@pytest.mark.parametrize("compile", [False, True])
def test_vmapped_is_the_loop(compile: bool):
    # A vmapped function returns tensors only: None, the absent gradient, becomes a bias.
    def member(seed: int) -> Any:
        return trees.map(lambda leaf: torch.ones(2) if leaf is None else leaf, tree(seed))

    def vmapped(a: Any, b: Any) -> Any:
        return torch.func.vmap(everything)(a, b)

    members = [(member(2), member(3)), (member(4), member(5))]
    a, b = trees.map(lambda *leaves: torch.stack(leaves), *members)
    mapped = (torch.compile(vmapped, fullgraph=True, backend="eager") if compile else vmapped)(a, b)
    for index, (one, other) in enumerate(members):
        found = trees.map(lambda leaf, i=index: leaf[i], mapped)
        assert_trees_close(found, everything(one, other), rtol=1e-6, atol=1e-7)


def halved(tree: Any) -> Any:
    return treemath.lerp(tree, treemath.zeros_like(tree), 0.5)


def same(tree: Any) -> Any:
    return treemath.where(treemath.all_finite(tree), treemath.subtract(treemath.add(tree, tree), tree), tree)


ENERGIES: dict[str, tuple[Callable[[Any], torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]] = {
    "global_norm": (treemath.global_norm, lambda x: x / torch.linalg.vector_norm(x)),
    "dot": (lambda tree: treemath.dot(tree, tree), lambda x: 2 * x),
    "lerp": (lambda tree: treemath.dot(halved(tree), tree), lambda x: x),
    "scale": (lambda tree: treemath.global_norm(treemath.scale(tree, treemath.global_norm(tree))), lambda x: 2 * x),
    "add, subtract, where": (lambda tree: treemath.dot(same(tree), tree), lambda x: 2 * x),
    "cast": (lambda tree: treemath.dot(tree, treemath.cast(tree, torch.float64)), lambda x: 2 * x),
}


POINT = torch.tensor([3.0, -4.0, 12.0])


@pytest.mark.parametrize("name", ENERGIES)
def test_gradients(name: str):
    function, gradient = ENERGIES[name]
    torch.testing.assert_close(torch.func.grad(function)({"x": POINT})["x"], gradient(POINT))
    x = POINT.clone().requires_grad_()
    function({"x": x}).backward()
    torch.testing.assert_close(x.grad, gradient(POINT))


def test_compiled_and_vmapped_gradients():
    def gradients(x: torch.Tensor) -> Any:
        return {name: torch.func.grad(function)({"x": x})["x"] for name, (function, _) in ENERGIES.items()}

    expected = {name: torch.stack([gradient(POINT)] * 2) for name, (_, gradient) in ENERGIES.items()}
    compiled = torch.compile(lambda x: torch.func.vmap(gradients)(x), fullgraph=True, backend="eager")
    assert_trees_close(compiled(torch.stack([POINT] * 2)), expected, rtol=1e-6, atol=0.0)


# torch's rules for forward mode are still TorchScript.
@pytest.mark.filterwarnings(r"ignore:.torch\.jit\.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", ENERGIES)
def test_forward_gradients(name: str):
    function, gradient = ENERGIES[name]
    tangent = torch.tensor([1.0, 2.0, 3.0])
    found = torch.func.jvp(function, ({"x": POINT},), ({"x": tangent},))[1]
    torch.testing.assert_close(found, (gradient(POINT) * tangent).sum().to(found.dtype))


# The bits of torch


def clipped_by_torch(grads: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    params = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone()
    norm = torch.nn.utils.clip_grad_norm_(params, max_norm=1.0)
    return norm, [param.grad for param in params if param.grad is not None]


@pytest.mark.parametrize(
    "dtypes",
    [
        [torch.float32],
        [torch.float64],
        [torch.bfloat16],
        [torch.float16],
        [torch.complex64],
        [torch.float32, torch.bfloat16, torch.float64],
    ],
    ids=str,
)
def test_the_norm_and_clipping_by_it_have_the_bits_of_clip_grad_norm(dtypes: list[torch.dtype]):
    draw = torch.Generator().manual_seed(0)
    shapes = ((7, 5), (), (0, 3), (1000,), (3, 1, 2), (64, 64), (11,))
    grads = [torch.randn(s, generator=draw).to(dtypes[i % len(dtypes)]) for i, s in enumerate(shapes)]
    norm, clipped = clipped_by_torch(grads)
    found = treemath.global_norm({"grads": grads, "frozen": None})
    assert_trees_equal(found, norm)
    assert_trees_equal(found, torch.nn.utils.get_total_norm(grads))
    coefficient = torch.clamp(1.0 / (found + 1e-6), max=1.0)
    assert_trees_equal(treemath.scale(grads, coefficient), clipped)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_lerp_has_the_bits_of_torchs_ema(dtype: torch.dtype):
    averaged, current = [x.clone() for x in trees.tensors(tree(0, dtype))], trees.tensors(tree(1, dtype))
    expected = treemath.lerp(averaged, current, 1 - 0.999)
    get_ema_multi_avg_fn(0.999)(averaged, current, 0)
    assert_trees_equal(expected, averaged)


# dtypes and edges


def test_scale_and_lerp_keep_the_dtype_of_floating_leaves_whatever_the_factor():
    leaves = [torch.ones((), dtype=torch.float32), torch.ones(2).bfloat16(), torch.ones(1, dtype=torch.complex64)]
    half = torch.tensor(0.5, dtype=torch.float64)
    for found in (treemath.scale(leaves, half), treemath.lerp(leaves, treemath.scale(leaves, 2.0), half)):
        assert [leaf.dtype for leaf in found] == [leaf.dtype for leaf in leaves]
    assert treemath.scale([torch.ones(1, dtype=torch.int64)], half)[0].dtype == torch.float64
    wide = treemath.lerp([torch.zeros(2)], [torch.ones(2).bfloat16()], 0.25)
    assert_trees_equal(wide, [torch.full((2,), 0.25)])


def test_a_tensor_weight_keeps_its_digits_over_bfloat16():
    a, b = [torch.tensor([256.0], dtype=torch.bfloat16)], [torch.tensor([0.0], dtype=torch.bfloat16)]
    weight = torch.tensor(0.999, dtype=torch.float64)
    assert_trees_equal(treemath.lerp(a, b, weight), treemath.lerp(a, b, 0.999))
    assert float(treemath.lerp(a, b, weight)[0]) == pytest.approx(0.256, rel=1e-2)


@pytest.mark.parametrize("weight", [0, 0.0, torch.tensor(0.0, dtype=torch.float64)], ids=repr)
def test_lerp_is_exact_at_both_ends(weight: Any):
    a, b = {"x": torch.tensor([0.1, 1e8]), "n": 1e16}, {"x": torch.tensor([0.7, -3.0]), "n": 1.0}
    at_a, at_b = treemath.lerp(a, b, weight), treemath.lerp(a, b, weight + 1)
    assert torch.equal(at_a["x"], a["x"]) and torch.equal(at_b["x"], b["x"])
    assert float(at_a["n"]) == 1e16 and float(at_b["n"]) == 1.0


def test_numbers_count_and_none_does_not():
    assert treemath.add({"a": 1, "b": None, "c": True}, {"a": 2.5, "b": None, "c": 1}) == {"a": 3.5, "b": None, "c": 2}
    assert treemath.scale([3, 0.5, None], 2) == [6, 1.0, None]
    assert treemath.lerp([1.0, None], [3.0, None], 0.25) == [1.5, None]
    assert float(treemath.global_norm([3, 4.0, None])) == 5.0
    assert float(treemath.dot([3, torch.tensor([1.0, 2.0]), None], [2.0, 4, None])) == 18.0
    zeros = treemath.zeros_like({"n": 3, "x": 1.5, "b": True, "none": None})
    assert_trees_equal(zeros, {"n": 0, "x": 0.0, "b": False, "none": None})


def test_the_empty_tree():
    assert_trees_equal([treemath.dot({}, {}), treemath.global_norm([None])], [torch.tensor(0.0)] * 2)
    assert_trees_equal(treemath.all_finite({}), torch.tensor(True))


def test_dot_conjugates_its_first_tree():
    x, y = torch.tensor([1 + 2j, 3j]), torch.tensor([2 - 1j, 1 + 1j])
    torch.testing.assert_close(treemath.dot([x], [y]), torch.vdot(x, y))


def test_cast_touches_floating_leaves_only():
    kept = {
        "steps": torch.tensor(3),
        "mask": torch.tensor(True),
        "z": torch.ones(1, dtype=torch.complex64),
        "s": "a",
        "x": 1.5,
    }
    found = treemath.cast({"w": torch.ones(2), **kept}, torch.float16)
    assert found["w"].dtype == torch.float16
    assert all(found[name] is leaf for name, leaf in kept.items())


def test_zeros_like_keeps_shape_dtype_and_asks_for_no_gradient():
    zeros = treemath.zeros_like([torch.nn.Parameter(torch.ones(2, 3)), torch.ones(1, dtype=torch.int8)])
    assert_trees_equal(zeros, [torch.zeros(2, 3), torch.zeros(1, dtype=torch.int8)])
    assert not zeros[0].requires_grad


@pytest.mark.parametrize(
    ("leaf", "finite"),
    [
        (torch.tensor([1.0, NAN]), False),
        (torch.tensor([INF, 1.0]), False),
        (torch.tensor(-INF), False),
        (torch.tensor([1.0, -INF], dtype=torch.bfloat16), False),
        (torch.tensor([complex(1, NAN)]), False),
        (torch.tensor([complex(INF, 0)]).conj(), False),
        (NAN, False),
        (-INF, False),
        (torch.tensor([3e38, -3e38]), True),
        (torch.tensor([complex(3e38, 3e38)]).conj(), True),
        (torch.tensor([60000.0], dtype=torch.float16), True),
        (torch.zeros(0), True),
        (torch.tensor([2**62]), True),
        (1.0, True),
        ("nan", True),
        (None, True),
    ],
    ids=repr,
)
def test_all_finite(leaf: Any, finite: bool):
    assert_trees_equal(treemath.all_finite({"fine": torch.ones(2), "leaf": leaf}), torch.tensor(finite))
    assert_trees_equal(treemath.all_finite([leaf]), torch.tensor(finite))


def test_where_keeps_what_agrees_and_passes_over_the_bad_side():
    good, bad = (
        {"w": torch.ones(2), "n": 3, "s": "a", "none": None},
        {"w": torch.full((2,), NAN), "n": 3, "s": "a", "none": None},
    )
    assert_trees_equal(treemath.where(treemath.all_finite(bad), bad, good), good)
    chosen = treemath.where(
        [torch.tensor(True), torch.tensor([True, False])],
        [torch.ones(1), torch.ones(2)],
        [torch.zeros(1), torch.zeros(2)],
    )
    assert_trees_equal(chosen, [torch.ones(1), torch.tensor([1.0, 0.0])])


# Errors

X = torch.ones(2)


REFUSED: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "strings": (
        lambda: treemath.add({"w": X, "s": "a", "t": "b"}, {"w": X, "s": "c", "t": 1}),
        ("tree['s']: str 'a', str 'c'\ntree['t']: str 'b', int 1\n", "treemath.add takes tensors and numbers, or None"),
    ),
    "None on one side": (lambda: treemath.dot([X], [None]), ("tree[0]: float32[2], NoneType None", "treemath.dot")),
    "a subtree for a leaf": (lambda: treemath.subtract([X], [[X]]), ("tree[0]: float32[2], list", "treemath.subtract")),
    "a bare leaf": (lambda: treemath.scale("a", 2.0), ("tree: str 'a'", "treemath.scale takes tensors")),
    "a factor": (lambda: treemath.scale([X], "2"), ("factor", "violates")),  # pyright: ignore[reportArgumentType]
    "integers to lerp": (
        lambda: treemath.lerp([torch.tensor(1)], [X], 0.5),
        ("tree[0]: int64[], float32[2]", "treemath.lerp takes floating or complex tensors and numbers"),
    ),
    "booleans for a norm": (
        lambda: treemath.global_norm({"a": X, "b": torch.tensor([True])}),
        ("tree['b']: bool[1]", "treemath.global_norm takes floating or complex tensors and numbers"),
    ),
    "zeros like a string": (lambda: treemath.zeros_like(["a"]), ("tree[0]: str 'a'", "treemath.zeros_like takes")),
    "a condition of numbers": (
        lambda: treemath.where(X, {"w": X}, {"w": X}),
        ("tree['w']: float32[2], float32[2], float32[2]", "treemath.where takes a bool tensor"),
    ),
    "a condition that is no tensor": (lambda: treemath.where([True], [X], [X]), ("tree[0]: bool True",)),
    "numbers to choose from": (
        lambda: treemath.where(X > 0, [X, 1], [X, 2]),
        ("tree[1]: bool[2], int 1, int 2", "torch.tensor("),
    ),
    "a tensor or a number": (lambda: treemath.where(X > 0, [X], [1.0]), ("tree[0]: bool[2], float32[2], float 1.0",)),
    "a dtype": (lambda: treemath.cast([X], "float16"), ("dtype", "violates")),  # pyright: ignore[reportArgumentType]
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_leaves_are_refused_by_path(name: str):
    call, words = REFUSED[name]
    with pytest.raises(UsageTypeError) as caught:
        call()
    assert all(word in str(caught.value) for word in words), caught.value


def test_only_the_offending_leaves_are_named():
    with pytest.raises(UsageTypeError) as caught:
        treemath.add({"w": X, "s": "a"}, {"w": X, "s": "a"})
    assert "'w'" not in str(caught.value)


def test_cast_wants_a_floating_dtype():
    with pytest.raises(
        UsageError, match=r"treemath\.cast was given torch\.int64; it casts floating .* Write pytree\.map"
    ):
        treemath.cast([X], torch.int64)


def test_trees_must_have_one_structure():
    with pytest.raises(StructureError, match="different structure"):
        treemath.add({"w": X}, {"v": X})
    with pytest.raises(StructureError, match="different structure"):
        treemath.where([torch.tensor(True)], {"w": X}, {"w": X})

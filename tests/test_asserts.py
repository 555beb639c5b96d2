"""Assertions: what passes, what fails and with which words, and where they run."""

from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import pytest
import torch

from tnt_func.asserts import (
    assert_dtype,
    assert_max_compilations,
    assert_rank,
    assert_shape,
    assert_tree_finite,
    assert_trees_close,
    assert_trees_equal,
    assert_trees_same_structure,
)
from tnt_func.errors import TreeError, UsageError, UsageTypeError
from tnt_func.pytree import pytree

NAN, INF = float("nan"), float("inf")
W, B = torch.ones(2, 3), torch.ones(2)


@pytree(static=("name",))
@dataclass(frozen=True)
class Layer:
    weight: Any
    name: str = "fc"


def message(check: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    with pytest.raises(TreeError) as caught:
        check(*arguments, **options)
    return str(caught.value)


# Static ones


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ((2, 3), (2, 3)),
        ((2, 3), [2, 3]),
        ((2, 3), torch.Size([2, 3])),
        ((2, 3), (None, 3)),
        ((2, 3), (...,)),
        ((), (...,)),
        ((), ()),
        ((0, 3), (0, None)),
        ((2, 3), (2, ...)),
        ((2, 3), (..., 3)),
        ((2, 3), (2, ..., 3)),
        ((2, 7, 8, 3), (2, ..., 3)),
        ((2, 7, 8, 3), (..., None, 3)),
    ],
    ids=str,
)
def test_shapes_that_match(sizes: tuple[int, ...], shape: Any):
    assert_shape(torch.zeros(sizes), shape)


@pytest.mark.parametrize(
    ("sizes", "shape", "spelled"),
    [
        ((2, 3), (2, 4), "(2, 4)"),
        ((2, 3), (2,), "(2,)"),
        ((2, 3), (2, 3, 1), "(2, 3, 1)"),
        ((2,), (None, None), "(None, None)"),
        ((), (None,), "(None,)"),
        ((2,), (2, ..., 2), "(2, ..., 2)"),
        ((2, 7, 3), (2, ..., 4), "(2, ..., 4)"),
        ((2, 7, 3), (3, ...), "(3, ...)"),
        ((0,), (1,), "(1,)"),
    ],
    ids=str,
)
def test_shapes_that_do_not(sizes: tuple[int, ...], shape: Any, spelled: str):
    lines = message(assert_shape, torch.zeros(sizes), shape).splitlines()
    assert lines[0] == f"tree: float32{list(sizes)}, expected shape {spelled}"
    assert "None for an axis of any size and ... for any number of axes" in lines[1]


def test_all_offending_leaves_are_listed_by_path_and_no_others():
    lines = message(assert_shape, {"w": W, "b": B, "n": [1, "a"]}, (2, 3), name="params").splitlines()
    assert lines[:-1] == [
        "params['b']: float32[2], expected shape (2, 3)",
        "params['n'][0]: int 1, expected shape (2, 3)",
        "params['n'][1]: str 'a', expected shape (2, 3)",
    ]


def test_numbers_are_0_d_and_other_leaves_have_no_shape_rank_or_dtype():
    assert_shape([1, 2.0, True, torch.tensor(3)], ())
    assert_rank([1, 2.0, True, torch.tensor(3)], 0)
    assert "NoneType None" in message(assert_shape, [None], (...,))
    assert "NoneType None" in message(assert_rank, [None], 0)
    assert "float 1.0, expected float32" in message(assert_dtype, [1.0], torch.float32)


def test_a_shape_has_one_ellipsis():
    with pytest.raises(UsageError, match=r"assert_shape was given \(\.\.\., 2, \.\.\.\); one \.\.\. .* Write None"):
        assert_shape(W, (..., 2, ...))


def test_rank_and_dtype():
    assert_rank({"w": W, "v": W.t()}, 2)
    assert_dtype([B.bfloat16(), torch.zeros(0, dtype=torch.bfloat16)], torch.bfloat16)
    lines = message(assert_rank, {"w": W, "b": B, "n": 1}, 1).splitlines()
    assert lines[:-1] == ["tree['w']: float32[2, 3], expected rank 1", "tree['n']: int 1, expected rank 1"]
    lines = message(assert_dtype, [B, B.double(), B > 0], torch.float32, name="grads").splitlines()
    assert lines[:-1] == ["grads[1]: float64[2], expected float32", "grads[2]: bool[2], expected float32"]
    assert "treemath.cast(tree, torch.float32)" in lines[-1]


@pytest.mark.parametrize(
    "call",
    [
        lambda: assert_shape(W, 2),  # pyright: ignore[reportArgumentType]
        lambda: assert_shape(W, (2.0, 3)),  # pyright: ignore[reportArgumentType]
        lambda: assert_rank(W, "2"),  # pyright: ignore[reportArgumentType]
        lambda: assert_dtype(W, float),  # pyright: ignore[reportArgumentType]
    ],
    ids=["shape", "size", "rank", "dtype"],
)
def test_arguments_of_the_wrong_type(call: Callable[[], None]):
    with pytest.raises(UsageTypeError):
        call()


def test_structure_alone_passes_over_static_fields_shapes_dtypes_and_types():
    assert_trees_same_structure([Layer(W, "a"), {"n": 1}], [Layer(B.double(), "b"), {"n": "one"}])


def test_structure_differs():
    lines = message(assert_trees_same_structure, {"w": W, "x": 1}, {"w": B, "y": B}, name="params").splitlines()
    assert lines[:-1] == ["params['y']: missing, expected float32[2]", "params['x']: int 1, expected no leaf here"]
    assert "same containers and paths." in lines[-1]
    assert "tree: TreeSpec(list" in message(assert_trees_same_structure, [W], (W,))
    assert "dict keys count in their order" in message(assert_trees_same_structure, {"a": 1, "b": 2}, {"b": 2, "a": 1})
    assert "tree.weight: missing" in message(assert_trees_same_structure, [], Layer(W))


@pytest.mark.parametrize(
    ("a", "b", "shapes", "dtypes"),
    [
        (W, W.t(), True, False),
        (W, W.double(), False, True),
        (W, 1.0, True, False),
        (W, 1.0, False, True),
        (1, True, True, True),
    ],
    ids=str,
)
def test_shapes_and_dtypes_count_where_asked_for(a: Any, b: Any, shapes: bool, dtypes: bool):
    assert_trees_same_structure([a], [b])
    assert_trees_same_structure([a], [a], shapes=True, dtypes=True)
    found = message(assert_trees_same_structure, {"ok": W, "x": a}, {"ok": W, "x": b}, shapes=shapes, dtypes=dtypes)
    assert found.startswith("tree['x']: ") and ", expected " in found and "'ok'" not in found
    assert ("shapes" in found, "dtypes" in found) == (shapes, dtypes)


def test_a_missing_leaf_and_another_dtype_are_one_message():
    found = message(assert_trees_same_structure, {"w": W}, {"w": W.double(), "b": B}, dtypes=True)
    assert "tree['b']: missing" in found and "tree['w']: float32[2, 3], expected float64[2, 3]" in found


def checked(tree: Any) -> torch.Tensor:
    assert_shape(tree["w"], (2, None))
    assert_shape(tree, [2, ...], name="params")
    assert_rank(tree["b"], 1)
    assert_dtype(tree, torch.float32)
    assert_trees_same_structure(tree, {"w": tree["w"] + 1, "b": tree["b"]}, shapes=True, dtypes=True)
    return tree["w"].sum() + tree["b"].sum()


def test_static_assertions_run_in_vmap_and_see_one_examples_shapes():
    batch = {"w": torch.ones(5, 2, 3), "b": torch.ones(5, 2)}
    assert torch.func.vmap(checked)(batch).tolist() == [8.0] * 5
    assert "float32[5, 2, 3], expected shape (2, None)" in message(checked, batch)
    assert "tree: float32[3], expected shape (2, None)" in message(torch.func.vmap(checked), {"w": W, "b": B})


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    # Dynamo remembers by code object what it compiled or gave up: each test begins with one of its own.
    code = function.__code__.replace()
    return torch.compile(FunctionType(code, function.__globals__), backend="eager", **options)


def test_static_assertions_run_in_grad_and_compiled():
    tree = {"w": W, "b": B}
    assert torch.func.grad(checked)(tree)["b"].tolist() == [1.0, 1.0]
    assert float(compiled(checked, fullgraph=True)(tree)) == 8.0
    batch = {"w": torch.ones(5, 2, 3), "b": torch.ones(5, 2)}
    assert compiled(lambda batch: torch.func.vmap(checked)(batch), fullgraph=True)(batch).tolist() == [8.0] * 5


@pytest.mark.parametrize("dynamic", [False, True])
def test_failures_in_compiled_code_tell_the_same(dynamic: bool):
    bad = {"w": W, "b": torch.ones(3)}
    with pytest.raises(TreeError, match=r"^params\['b'\]: float32\[3\], expected shape \(2, \.\.\.\)\n"):
        compiled(checked, dynamic=dynamic)(bad)
    with pytest.raises(Exception, match=r"TreeError.*params\[.*'b.*float32\[.*expected shape \(2, \.\.\.\)"):
        compiled(checked, dynamic=dynamic, fullgraph=True)(bad)


def test_none_leaves_an_axis_dynamic():
    step = compiled(checked, fullgraph=True, dynamic=True)
    with assert_max_compilations(1):
        for columns in (3, 4, 5):
            step({"w": torch.ones(2, columns), "b": B})


# Value ones


def test_equal_is_to_the_bit_static_fields_included():
    tree = [Layer({"w": torch.tensor([NAN, -0.0])}), 1, "a", None]
    assert_trees_equal(tree, [Layer({"w": torch.tensor([NAN, -0.0])}), 1, "a", None])
    assert "to the bit" in message(assert_trees_equal, torch.tensor(0.0), torch.tensor(-0.0))
    found = message(assert_trees_equal, [Layer(W, "a"), 1], [Layer(W + 1, "b"), True], name="state").splitlines()
    assert found[:-1] == [
        "state[0].weight: 6 of 6 elements differ, by at most 1",
        "state[1]: int 1 became bool True",
        "state: static fields ('a',) became ('b',)",
    ]
    assert "assert_trees_close" in found[-1]


CLOSE: dict[str, tuple[Any, Any]] = {
    "absolute": (torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1e-3])),
    "relative": (torch.tensor([1000.0]), torch.tensor([1001.0])),
    "nan": (torch.tensor([NAN, INF, -INF]), torch.tensor([NAN, INF, -INF])),
    "bfloat16": (torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1.0], dtype=torch.bfloat16)),
    "complex": (torch.tensor([1 + 1j, complex(NAN, 0)]), torch.tensor([1 + 1.001j, complex(NAN, 0)])),
    "numbers": (1.0, 1.001),
    "empty": (torch.zeros(0, 2), torch.ones(0, 2)),
    "int": (torch.tensor([2**60]), torch.tensor([2**60])),
    "bool": (torch.tensor(True), torch.tensor(True)),
    "gradients": (torch.nn.Parameter(B), B.clone()),
    "sparse": (torch.eye(2).to_sparse(), 1.0005 * torch.eye(2).to_sparse()),
    "non-contiguous": (W.t(), torch.ones(3, 2)),
    "other leaves": (None, None),
}
FAR: dict[str, tuple[Any, Any, str]] = {
    "absolute": (torch.tensor([0.0, 1.0]), torch.tensor([1e-2, 1.0]), "1 of 2 elements differ by more than"),
    "relative": (torch.tensor([1000.0]), torch.tensor([1003.0]), "by more than atol=0.001 + rtol=0.001, by at most 3"),
    "relative to b": (torch.tensor([0.0]), torch.tensor([100.0]), "by at most 100"),
    "nan": (torch.tensor([NAN, 1.0]), torch.tensor([1.0, 1.0]), "1 of 2 elements differ"),
    "an infinity": (torch.tensor([INF]), torch.tensor([-INF]), "by at most inf"),
    "beside an infinity": (torch.tensor([INF, 1.0]), torch.tensor([INF, 3.0]), "by at most 2"),
    "complex": (torch.tensor([1 + 1j]), torch.tensor([1 + 2j]), "by at most 1"),
    "numbers": (1.0, 1.1, "1 of 1 elements differ"),
    "int": (torch.tensor([2**60, 5]), torch.tensor([2**60 + 1, 9]), "2 of 2 elements differ, by at most 4"),
    "int numbers": (10000, 10001, "int 10000, expected int 10001"),
    "bool": (torch.tensor([True]), torch.tensor([False]), "1 of 1 elements differ, by at most 1"),
    "strings": ("a", "b", "str 'a', expected str 'b'"),
    "dtype": (B, B.double(), "float32[2], expected float64[2]"),
    "shape": (B, B[:1], "float32[2], expected float32[1]"),
    "type": (1.0, 1, "float 1.0, expected int 1"),
}


@pytest.mark.parametrize("name", CLOSE)
def test_close(name: str):
    a, b = CLOSE[name]
    assert_trees_close([Layer(a)], [Layer(b)], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", FAR)
def test_far(name: str):
    a, b, words = FAR[name]
    found = message(assert_trees_close, {"ok": B, "x": a}, {"ok": B, "x": b}, rtol=1e-3, atol=1e-3, name="params")
    assert found.startswith("params['x']: ") and words in found and "'ok'" not in found


def test_the_tolerances_are_computed_in_float64():
    one, next_up = torch.tensor(1.0), torch.tensor(1.0 + 2.0**-23)
    assert_trees_close(one, next_up, rtol=0, atol=2.0**-23)
    message(assert_trees_close, one, next_up, rtol=0, atol=2.0**-24)
    message(assert_trees_close, 1.0, 1.0 + 2.0**-50, rtol=0, atol=2.0**-51)


def test_close_compares_structure_and_static_fields():
    assert "static fields ('a',), expected ('b',)" in message(
        assert_trees_close, Layer(W, "a"), Layer(W, "b"), rtol=1.0, atol=1.0
    )
    assert "missing" in message(assert_trees_close, [], [W], rtol=1.0, atol=1.0)


def test_finite():
    assert_tree_finite({"w": W, "empty": torch.zeros(0), "n": 3, "x": 1.0, "s": "nan", "i": torch.tensor(2)})
    bad = {"w": torch.tensor([[1.0, NAN], [INF, 1.0]]), "ok": W, "x": -INF, "z": torch.tensor([complex(0, NAN)]).conj()}
    lines = message(assert_tree_finite, bad, name="grads").splitlines()
    assert lines[:-1] == [
        "grads['w']: 2 of 4 elements are not finite, the first is nan at [0, 1]",
        "grads['x']: 1 of 1 elements are not finite, the first is -inf at []",
        "grads['z']: 1 of 1 elements are not finite, the first is nanj at [0]",
    ]
    assert "set_detect_anomaly" in lines[-1]


# Compilations


def test_compilations_are_counted_and_the_reasons_told():

    @torch.compile(backend="eager")
    def square(x: torch.Tensor) -> torch.Tensor:
        return x * x

    with assert_max_compilations(1):
        for _ in range(3):
            square(torch.ones(2))
    with assert_max_compilations(0):
        square(torch.zeros(2))
    with pytest.raises(TreeError) as caught, assert_max_compilations(0):
        square(torch.ones(2, dtype=torch.float64))
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(f"square ({__file__}:") and "dtype mismatch. expected Float, actual Double" in lines[0]
    assert lines[1].startswith("1 graphs were compiled, expected at most 0. Keep structure, shapes and dtypes")
    assert len(lines) == 2


def test_a_first_compilation_and_the_parts_of_a_graph_break_count():

    @torch.compile(backend="eager")
    def broken(x: torch.Tensor) -> torch.Tensor:
        x = x + 1
        torch._dynamo.graph_break()
        return x * 2

    with pytest.raises(
        TreeError, match=r"(?s)broken .*: compiled for the first time\n.*resume.*2 graphs were compiled"
    ):
        with assert_max_compilations(1):
            broken(torch.ones(2))


def test_a_backward_pass_does_not_count_again():
    square = torch.compile(lambda x: (x * x).sum(), backend="aot_eager")
    with assert_max_compilations(1):
        square(torch.ones(2, requires_grad=True)).backward()
    cube = torch.compile(lambda x: (x * x * x).sum(), backend="aot_eager")
    with pytest.raises(TreeError, match=r"^<lambda> \(.*\): compiled for the first time\n1 graphs were compiled"):
        with assert_max_compilations(0):
            cube(torch.ones(2, requires_grad=True)).backward()


def test_as_a_decorator_each_call_is_a_block():
    double = torch.compile(lambda x: 2 * x, backend="eager")

    @assert_max_compilations(1)
    def run(x: torch.Tensor) -> torch.Tensor:
        return double(x)

    run(torch.ones(2))
    run(torch.ones(2, dtype=torch.float64))
    with pytest.raises(TreeError):
        with assert_max_compilations(0):
            run(torch.ones(2, dtype=torch.float16))


def test_an_error_in_the_block_passes_through():
    with pytest.raises(ValueError, match="mine"), assert_max_compilations(0):
        torch.compile(lambda x: x + 3, backend="eager")(torch.ones(2))
        raise ValueError("mine")

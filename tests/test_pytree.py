"""Trees: registration, mapping, paths, and comparison to the bit. The laws are in property_tests/."""

import collections
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tnt_func import pytree as trees
from tnt_func.errors import StructureError, UsageError
from tnt_func.pytree import pytree

NAN, INF = float("nan"), float("inf")
Pair = collections.namedtuple("Pair", "left right")


@pytree(static=("name",))
@dataclass(frozen=True)
class Named:
    value: Any
    name: str = "a"


@pytree
@dataclass(frozen=True)
class Point:
    x: Any
    y: Any = 0


# Registration


def test_static_fields_are_carried_and_are_no_leaves():
    named = Named({"w": 1}, "weights")
    assert trees.leaves(named) == [1]
    assert trees.map(lambda x: x + 1, named) == Named({"w": 2}, "weights")


def test_trees_whose_static_fields_differ_map_together_and_the_first_ones_are_kept():
    assert trees.map(lambda x, y: x + y, Named(1, "a"), Named(2, "b")) == Named(3, "a")
    assert trees.structure(Named(1, "a")) == trees.structure(Named(1, "b"))
    assert trees.structure(Named(1, "a")) != trees.structure(Point(1))
    assert hash(trees.structure(Named(1, "a")).context) == hash(trees.structure(Named(1, "b")).context)
    assert trees.structure(Named(1, "a")).context != ("a",)
    assert "Static('a',)" in repr(trees.structure(Named(1, "a")))


def test_static_fields_are_listed_outermost_first():
    tree = [Named({"inner": Named(1, "inner")}, "outer"), Point(Named(2, "second"))]
    assert list(trees.static_fields(trees.structure(tree))) == [("outer",), ("inner",), (), ("second",)]


def test_a_registered_class_runs_under_vmap_grad_and_compile():
    def energy(point: Point) -> torch.Tensor:
        return (point.x * point.y).sum()

    point = Point(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))
    assert trees.equal(torch.func.grad(energy)(point), Point(point.y, point.x))
    assert torch.equal(torch.func.vmap(energy)(point), torch.tensor([3.0, 8.0]))
    double = torch.compile(lambda tree: trees.map(lambda x: 2 * x, tree), fullgraph=True, backend="eager")
    assert trees.equal(double(Named(torch.ones(1), "n")), Named(torch.full((1,), 2.0), "n"))


def test_only_frozen_dataclasses_are_registered():
    class Plain:
        pass

    @dataclass
    class Thawed:
        x: int

    for cls in (Plain, Thawed):
        with pytest.raises(UsageError, match=rf"@pytree was given {cls.__name__}; it takes frozen dataclasses: write"):
            pytree(cls)


def test_a_static_name_must_be_a_field():
    @dataclass(frozen=True)
    class Loss:
        x: int

    with pytest.raises(
        UsageError, match=r"@pytree\(static=\['label'\]\) names no field of Loss; its fields are \['x'\]"
    ):
        pytree(static=("label", "x"))(Loss)


# Mapping and paths


def test_the_first_tree_sets_the_order_of_keys():
    assert list(trees.map(lambda x, y: x + y, {"a": 1, "b": 2}, {"b": 20, "a": 10}).items()) == [("a", 11), ("b", 22)]


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        ({"w": 1}, {"v": 1}, "missing key"),
        ([1, 2], [1], "arity mismatch"),
        ([1], (1,), "type mismatch"),
        (Named(1), Point(1), "Type mismatch"),
    ],
)
def test_trees_of_different_structure_do_not_map_together(a: Any, b: Any, words: str):
    with pytest.raises(StructureError, match=rf"map was given trees of different structure: .*{words}.*pytree\.diff"):
        trees.map(lambda x, y: x, a, b)


def test_an_error_of_the_function_is_passed_through():
    def fails(x: int) -> int:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="^mine$"):
        trees.map(fails, [1])


def test_paths_read_like_the_code_that_reaches_the_leaf():
    tree = {"w": [1, (2, None)], "p": Point(Pair(3, 4), Named({5: 6}))}
    reached = ["['w'][0]", "['w'][1][0]", "['w'][1][1]", "['p'].x.left", "['p'].x.right", "['p'].y.value[5]"]
    assert trees.paths(tree) == reached
    assert [eval(f"tree{path}", {"tree": tree}) for path in reached] == trees.leaves(tree) == [1, 2, None, 3, 4, 6]
    assert trees.named_leaves(7) == [("", 7)]


def test_at_gives_the_leaf_or_says_which_there_are():
    assert trees.at({"w": [5, 6]}, "['w'][1]") == 6
    with pytest.raises(UsageError, match=r"no leaf at \"\['v'\]\"; the tree has \[\"\['w'\]\[0\]\"\]"):
        trees.at({"w": [5]}, "['v']")


def test_tensors_leaves_the_rest_out():
    x = torch.ones(1)
    assert trees.tensors({"a": 1, "b": [x, None, "c"]}) == [x]


def test_check_leaves_lists_every_leaf_that_no_checkpoint_could_hold():
    trees.check_leaves({"a": torch.ones(1), "b": [True, 1, 1.0, "s", None]}, "state")
    with pytest.raises(StructureError) as caught:
        trees.check_leaves({"f": len, "ok": 1, "z": [1j]}, "state")
    words = ("state['f'] is a builtin_function_or_method", "state['z'][0] is a complex", "@pytree", "torch.as_tensor")
    assert all(word in str(caught.value) for word in words) and "ok" not in str(caught.value)


@pytest.mark.parametrize(
    ("leaf", "words"),
    [
        (torch.zeros(2, 3), "float32[2, 3]"),
        (torch.tensor(True), "bool[]"),
        (torch.zeros(2, device="meta"), "float32[2] on meta"),
        (torch.eye(2).to_sparse(), "float32[2, 2] sparse_coo"),
        (4, "int 4"),
        (None, "NoneType None"),
        ("a", "str 'a'"),
        (len, "builtin_function_or_method"),
    ],
)
def test_describe(leaf: Any, words: str):
    assert trees.describe(leaf) == words


# Comparing

QUIET, SIGNALLING = torch.tensor([0x7FC00000, 0x7F800001], dtype=torch.int32).view(torch.float32)
SAME: dict[str, tuple[Any, Any]] = {
    "nan": (torch.tensor([NAN, 1.0]), torch.tensor([NAN, 1.0])),
    "a nan number": (NAN, float("nan")),
    "a complex nan": (torch.tensor([complex(NAN, 1)]), torch.tensor([complex(NAN, 1)])),
    "bfloat16": (torch.tensor([1.5, NAN], dtype=torch.bfloat16), torch.tensor([1.5, NAN], dtype=torch.bfloat16)),
    "float8": (torch.ones(2).to(torch.float8_e4m3fn), torch.ones(2).to(torch.float8_e4m3fn)),
    "bool": (torch.tensor([True, False]), torch.tensor([True, False])),
    "empty": (torch.zeros(0, 3), torch.ones(0, 3)),
    "0-d": (torch.tensor(2), torch.tensor(2)),
    "non-contiguous": (torch.arange(6).view(2, 3).t(), torch.tensor([[0, 3], [1, 4], [2, 5]])),
    "expanded": (torch.ones(1).expand(3), torch.ones(3)),
    "a conjugate view": (torch.tensor([1 + 2j]).conj(), torch.tensor([1 - 2j])),
    "one element of a stride": (torch.arange(4.0)[::4], torch.zeros(1)),
    "a negative view": (torch.tensor([1 + 2j]).conj().imag, torch.tensor([-2.0])),
    "a parameter": (torch.nn.Parameter(torch.ones(2)), torch.ones(2)),
    "sparse": (torch.eye(2).to_sparse(), torch.eye(2).to_sparse()),
    "strings": ("a", "a"),
    "nothing": (None, None),
}
DIFFERENT: dict[str, tuple[Any, Any, str]] = {
    "the sign of zero": (torch.tensor([0.0]), torch.tensor([-0.0]), "1 of 1 elements differ, by at most 0"),
    "the sign of a zero number": (0.0, -0.0, "float 0.0 became float -0.0"),
    "nan's payload": (QUIET, SIGNALLING, "1 of 1 elements differ, by at most nan"),
    "nan and a number": (torch.tensor([NAN, 1.0]), torch.tensor([0.0, 1.0]), "1 of 2 elements differ, by at most nan"),
    "beside an infinity": (torch.tensor([INF, 1.0]), torch.tensor([INF, 3.0]), "1 of 2 elements differ, by at most 2"),
    "an infinity": (torch.tensor([INF]), torch.tensor([1.0]), "1 of 1 elements differ, by at most inf"),
    "bfloat16": (
        torch.tensor([1.0, 2.0], dtype=torch.bfloat16),
        torch.tensor([1.0, 2.5], dtype=torch.bfloat16),
        "1 of 2 elements differ, by at most 0.5",
    ),
    "complex": (torch.tensor([3 + 4j]), torch.tensor([0j]), "1 of 1 elements differ, by at most 5"),
    "bool": (torch.tensor([True, True]), torch.tensor([True, False]), "1 of 2 elements differ, by at most 1"),
    "int": (torch.tensor([[1, 2], [3, 4]]).t(), torch.tensor([[1, 2], [3, 9]]), "3 of 4 elements differ, by at most 5"),
    "0-d": (torch.tensor(1.0), torch.tensor(1.5), "1 of 1 elements differ, by at most 0.5"),
    "sparse": (torch.eye(2).to_sparse(), 2 * torch.eye(2).to_sparse(), "2 of 4 elements differ, by at most 1"),
    "layout": (torch.eye(2), torch.eye(2).to_sparse(), "float32[2, 2] became float32[2, 2] sparse_coo"),
    "shape": (torch.zeros(2), torch.zeros(2, 1), "float32[2] became float32[2, 1]"),
    "the shape of nothing": (torch.zeros(0, 2), torch.zeros(0, 3), "float32[0, 2] became float32[0, 3]"),
    "dtype": (torch.zeros(2), torch.zeros(2).double(), "float32[2] became float64[2]"),
    "device": (torch.zeros(2), torch.zeros(2, device="meta"), "float32[2] became float32[2] on meta"),
    "a tensor and a number": (torch.tensor(1), 1, "int64[] became int 1"),
    "bool and int": (True, 1, "bool True became int 1"),
    "bool and int tensors": (torch.tensor(True), torch.tensor(1), "bool[] became int64[]"),
    "int and float": (1, 1.0, "int 1 became float 1.0"),
    "strings": ("a", "b", "str 'a' became str 'b'"),
    "nothing and zero": (None, 0, "NoneType None became int 0"),
}


@pytest.mark.parametrize("name", SAME)
def test_the_same_bits_are_the_same_leaf(name: str):
    a, b = SAME[name]
    assert trees.same_leaf(a, b) and trees.same_leaf(b, a)
    assert trees.equal({"x": a}, {"x": b})
    assert trees.diff({"x": a}, {"x": b}) == []


@pytest.mark.parametrize("name", DIFFERENT)
def test_other_bits_are_another_leaf(name: str):
    a, b, words = DIFFERENT[name]
    assert not trees.same_leaf(a, b) and not trees.same_leaf(b, a)
    assert not trees.equal({"x": a}, {"x": b})
    assert trees.diff({"x": a}, {"x": b}, "state") == [f"state['x']: {words}"]


def test_a_leaf_is_itself_unread():
    unreadable = torch.zeros(2, device="meta")
    assert trees.same_leaf(unreadable, unreadable)


@pytest.mark.parametrize(
    ("a", "b", "lines"),
    [
        ({"w": 1}, {"w": 1, "v": 2}, ["tree['v']: new, int 2"]),
        (
            {"w": 1, "v": torch.zeros(1)},
            {"w": 2},
            ["tree['v']: missing, was float32[1]", "tree['w']: int 1 became int 2"],
        ),
        ([1], (1,), ["tree: containers differ: "]),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, ["tree: containers differ: "]),
        ([], {}, ["tree: containers differ: "]),
        (Named(1, "a"), Named(1, "b"), ["tree: static fields ('a',) became ('b',)"]),
        ([Named(1, "a"), 1], [Named(1, "b"), 2], ["tree[1]: int 1 became int 2", "tree: static fields ('a',)"]),
        (Named(1), Named([1]), ["tree.value: missing", "tree.value[0]: new"]),
    ],
)
def test_structure_and_static_fields_are_compared(a: Any, b: Any, lines: list[str]):
    assert not trees.equal(a, b)
    found = trees.diff(a, b)
    assert len(found) == len(lines) and all(line.startswith(start) for line, start in zip(found, lines, strict=True)), (
        found
    )

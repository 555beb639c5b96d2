"""Frozen trees: what the checks compare, to the bit, with what came out."""

import struct
from collections import OrderedDict
from typing import Any, NamedTuple

import numpy
import pytest
import torch

from tnt_func import pytree as trees
from tnt_func import rng
from tnt_func.metrics import mean
from tnt_func.progress import Progress, RunProgress
from tnt_func.state import State
from tnt_func.testing.snapshot import changes, freeze, thaw


def first_state() -> State:
    return State(params={"w": torch.zeros(2)}, key=rng.key(0))


class Point(NamedTuple):
    x: Any
    y: Any


class Graph:
    """A batch as users write them, which is no tree."""

    def __init__(self, nodes: torch.Tensor):
        self.nodes, self.itself, self.function = nodes, self, len


TREES: list[Any] = [
    torch.tensor([float("nan"), -0.0, float("inf")]),
    torch.arange(6).reshape(2, 3).t(),
    torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last),
    torch.tensor([1 + 2j]).conj(),
    torch.tensor([True]),
    torch.zeros(0, 3),
    torch.eye(2).to_sparse(),
    torch.ones(2).expand(3, 2),
    torch.ones(2, dtype=torch.bfloat16),
    torch.nn.Parameter(torch.ones(2)),
    torch.ones(2, device="meta"),
    {"a": [1, (2.0, None)], "b": "text", "c": True},
    OrderedDict(a=1),
    Point(torch.ones(1), 2),
    mean("x").of({"x": 1.0}),
    State(params={}, key=rng.key(3), stop="why", progress=RunProgress(train=Progress(1, 2, 0))),
]


@pytest.mark.parametrize("tree", TREES, ids=str)
def test_what_is_thawed_is_what_was_frozen(tree: Any):
    frozen = freeze(tree)
    copy = thaw(frozen)
    assert freeze(copy) == frozen and type(copy) in (type(tree), torch.Tensor)
    assert [leaf.requires_grad for leaf in trees.tensors(copy)] == [leaf.requires_grad for leaf in trees.tensors(tree)]
    assert {
        t.data_ptr() for t in trees.tensors(copy) if t.numel() and not t.is_meta and t.layout is torch.strided
    }.isdisjoint(t.data_ptr() for t in trees.tensors(tree) if t.layout is torch.strided)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (0.0, -0.0),
        (1, True),
        (1, 1.0),
        (1, "1"),
        ([1], (1,)),
        ({}, []),
        (torch.tensor(0.0), torch.tensor(-0.0)),
        (torch.ones(2), torch.ones(2).double()),
        (torch.ones(2), torch.ones(1, 2)),
        (torch.ones(2), torch.ones(2).requires_grad_()),
        (torch.ones(2, 2), torch.ones(2, 2).to_sparse()),
        (torch.eye(2).to_sparse(), torch.ones(2, 2).to_sparse()),
        (torch.ones(2, device="meta"), torch.ones(3, device="meta")),
        (first_state(), first_state().replace(stop="why")),
        (first_state(), first_state().replace(key=rng.key(1))),
        (Point(1, 2), (1, 2)),
        (numpy.zeros(2), numpy.ones(2)),
        (numpy.array(["a"]), numpy.array(["b"])),
        (numpy.float32(1), numpy.float64(1)),
        (numpy.longdouble(1), numpy.longdouble(2)),
        (Graph(torch.zeros(1)), Graph(torch.ones(1))),
    ],
)
def test_what_differs_is_frozen_differently(a: Any, b: Any):
    assert freeze(a) == freeze(a) and freeze(b) == freeze(b)
    assert freeze(a) != freeze(b)
    assert changes(freeze(a), freeze(b), "tree") != []


def test_objects_in_a_batch_are_read_through():
    graph = Graph(torch.zeros(2))
    before = freeze({"graph": graph, "more": [graph]})
    graph.nodes.add_(1)
    lines = changes(before, freeze({"graph": graph, "more": [graph]}), "batch")
    assert lines[0] == "batch['graph']['a Graph']['nodes']: 2 of 2 elements differ, by at most 1"


@pytest.mark.parametrize("bits", ["000000000000f07f", "000000000000f8ff", "010000000000f8ff", "0000000000000080"])
def test_floats_keep_every_bit_the_sign_and_payload_of_nan_too(bits: str):
    number = struct.unpack("<d", bytes.fromhex(bits))[0]
    assert struct.pack("<d", thaw(freeze(number))).hex() == bits
    assert freeze(number) == freeze(thaw(freeze(number))) != freeze(float("nan"))

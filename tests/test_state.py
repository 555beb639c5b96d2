"""State: what replace shares, what is a leaf, and the digest."""

import copy
import pickle
import struct
import subprocess
import sys
from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tnt_func as tnt
from tnt_func import pytree as trees
from tnt_func.errors import UsageError
from tnt_func.progress import Progress, RunProgress
from tnt_func.pytree import pytree
from tnt_func.state import State, content, digest

PARAMS = {"w": torch.tensor([1.0, 2.0]), "b": torch.tensor(0.5)}


@pytree(static=("label",))
@dataclass(frozen=True)
class Labelled:
    value: Any
    label: str


def state(**fields: Any) -> State:
    return State(**{"params": PARAMS, "key": tnt.key(0), **fields})


def value_digest(value: Any) -> str:
    return digest(state(params=value))


# Changing


def test_replace_shares_what_it_does_not_change():
    first = state(buffers={"mean": torch.zeros(1)})
    later = first.replace(params={"w": torch.zeros(2)}, stop="done")
    assert first.params is PARAMS and first.stop is None
    assert torch.equal(later.params["w"], torch.zeros(2)) and later.stop == "done"
    rest = ["key", "buffers", "opt_state", "progress", "metrics", "memory", "output"]
    assert all(getattr(later, name) is getattr(first, name) for name in rest)


def test_replace_refuses_a_field_that_there_is_not_and_lists_those_there_are():
    with pytest.raises(UsageError, match=r"given \['param', 'step'\]; a State has \['buffers', 'key', .*'stop'\]"):
        state().replace(step=3, param={})


def test_a_state_is_frozen():
    with pytest.raises(FrozenInstanceError):
        state().params = {}  # pyright: ignore[reportAttributeAccessIssue]


def test_remember_changes_one_slot():
    first = state(memory={"best": 1.0, "patience": 3})
    later = first.remember("best", 0.5)
    assert (first.memory, later.memory) == ({"best": 1.0, "patience": 3}, {"best": 0.5, "patience": 3})
    assert later.remember("new", ()).memory["new"] == ()


def test_the_first_reason_to_stop_is_kept():
    first = state()
    once = first.request_stop("first")
    assert (first.stop, once.stop) == (None, "first")
    assert once.request_stop("second") is once


def test_states_are_compared_by_identity_for_equality_of_tensors_is_no_truth():
    assert state() != state() and len({state(), state()}) == 2
    assert trees.equal(state(), state())


def test_a_state_is_copied_and_pickled_whole():
    full = state(memory={"a": Labelled(1, "x")}, progress=RunProgress(Progress(1, 2, 3)), stop="why")
    assert digest(copy.deepcopy(full)) == digest(pickle.loads(pickle.dumps(full))) == digest(full)


# As a tree


def test_the_leaves_are_what_steps_and_callbacks_keep():
    full = state(buffers={"m": 1}, opt_state=[2], metrics={"train": {"n": 3}}, memory={"c": 4}, output={"loss": 5})
    assert trees.leaves(full.replace(params={"w": 0}, stop="why")) == [0, 1, 2, 3, 4, 5]
    assert trees.paths(full.replace(params={"w": 0}))[0] == ".params['w']"


def test_two_states_with_different_counters_map_together_and_the_first_ones_are_kept():
    a = state(progress=RunProgress(Progress(1, 2, 0)), stop="mine", output=torch.tensor(1.0))
    b = state(key=tnt.key(7), output=torch.tensor(2.0))
    total = trees.map(torch.add, a, b)
    assert torch.equal(total.params["w"], torch.tensor([2.0, 4.0]))
    assert (total.key, total.progress, total.stop) == (a.key, a.progress, "mine")
    assert not trees.equal(a, a.replace(stop="other"))


def test_vmap_over_a_stacked_state_is_a_loop_over_its_members():
    # None is a leaf to torch, and vmap takes tensors only.
    rows = torch.tensor([[0.0, 1.0], [1.0, 1.0], [2.0, 1.0]])
    members = [state(params={"w": row}, opt_state=torch.tensor(i), output=()) for i, row in enumerate(rows)]
    stacked = trees.map(lambda *leaves: torch.stack(leaves), *members)

    def grow(member: State) -> State:
        return member.replace(params={"w": member.params["w"] * (member.opt_state + 1)})

    grown = torch.func.vmap(grow)(stacked)
    assert torch.equal(grown.params["w"], torch.stack([grow(member).params["w"] for member in members]))
    assert grown.key == tnt.key(0)


def test_a_state_goes_through_torch_compile_in_one_graph():
    def grow(before: State, factor: Tensor) -> State:
        grown = trees.map(lambda leaf: leaf * factor, before.params)
        return before.replace(params=grown).remember("norm", grown["w"].norm())

    first = state(memory={"norm": torch.tensor(0.0)}, stop="why")
    compiled = torch.compile(grow, fullgraph=True, backend="eager")
    for factor in (torch.tensor(2.0), torch.tensor(3.0)):
        assert trees.equal(compiled(first, factor), grow(first, factor))
    assert trees.equal(first.params, PARAMS)


# The digest

GOLDEN = "84aea5bb83e096e4fb4a92465e50abd55d4afdea6a4241a3caea22053acd90dd"
FULL = """
import torch
import tnt_func as tnt
from tnt_func.metrics import Mean
from tnt_func.progress import Progress, RunProgress

full = tnt.State(
    params={"w": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1.5, -2.0], dtype=torch.bfloat16)},
    buffers={"seen": torch.tensor(3), "mask": torch.tensor([True, False])},
    opt_state=({"lr": torch.tensor(1e-3, dtype=torch.float64)}, [torch.zeros(0), None]),
    key=tnt.key(7),
    progress=RunProgress(train=Progress(1, 5, 2)),
    metrics={"train": {"loss": Mean(torch.tensor(1.0), torch.tensor(2.0))}},
    memory={"best": 0.25, "count": 3, "name": "\\u00e9t\\u00e9", "on": True},
    stop="enough",
)
"""


def full_state() -> State:
    names: dict[str, Any] = {}
    exec(FULL, names)
    return names["full"]


def test_the_digest_of_a_full_state_is_pinned():
    assert digest(full_state()) == GOLDEN


def test_a_fresh_process_computes_the_same_digest():
    code = f"{FULL}\nfrom tnt_func.state import digest\nprint(digest(full))"
    root = Path(__file__).parent.parent
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, timeout=600)
    assert run.stdout.strip() == GOLDEN, run.stderr


def test_the_digest_does_not_see_the_order_of_keys_memory_or_gradients():
    w, b = torch.arange(4.0), torch.ones(1)
    assert value_digest({"w": w, "b": b}) == value_digest({"b": b.clone(), "w": w.clone()})
    named = {"x": Labelled(1, "a"), "y": Labelled(2, "b")}
    assert value_digest(named) == value_digest(dict(reversed(named.items())))
    assert value_digest(w) == value_digest(w.clone().requires_grad_()) == value_digest(torch.nn.Parameter(w))
    assert value_digest(torch.arange(6).reshape(2, 3).T) == value_digest(torch.tensor([[0, 3], [1, 4], [2, 5]]))
    assert value_digest(torch.arange(8.0)[::2]) == value_digest(torch.tensor([0.0, 2.0, 4.0, 6.0]))
    assert value_digest(torch.arange(25.0).reshape(5, 5)[:1, 1]) == value_digest(torch.tensor([1.0]))
    assert value_digest(torch.tensor([1 + 2j]).conj()) == value_digest(torch.tensor([1 - 2j]))


def nan(payload: int) -> float:
    return struct.unpack("<d", struct.pack("<Q", 0x7FF8000000000000 + payload))[0]


DISTINCT: dict[str, list[Any]] = {
    "dtype": [torch.zeros(2, dtype=dtype) for dtype in (torch.float32, torch.int32, torch.float64, torch.int64)],
    "half": [torch.ones(1, dtype=dtype) for dtype in (torch.float16, torch.bfloat16)],
    "shape": [torch.zeros(shape) for shape in [(), (1,), (4,), (2, 2), (4, 1), (0,), (0, 2), (2, 0)]],
    "layout": [torch.eye(2), torch.eye(2).to_sparse()],
    "sign of zero": [torch.tensor(0.0), torch.tensor(-0.0)],
    "sign of a Python zero": [0.0, -0.0],
    "payload of NaN": [torch.tensor([nan(0)], dtype=torch.float64), torch.tensor([nan(1)], dtype=torch.float64)],
    "payload of a Python NaN": [nan(0), nan(1), -nan(0)],
    "imaginary part": [torch.tensor(1 + 0j, dtype=torch.complex128), torch.tensor(1 + 1e-300j, dtype=torch.complex128)],
    "kind of number": [1, True, 1.0, "1", torch.tensor(1), torch.tensor(True)],
    "None": [None, "None", 0, ""],
    "text": ["a\nb", "a\\nb", "a b"],
    "container": [[1, 2], (1, 2), {0: 1, 1: 2}, {"0": 1, "1": 2}, [(1, 2)], [[1], 2]],
    "empty container": [{}, [], (), {"a": {}}, {"a": ()}],
    "path": [{"a": {"b": 1}}, {"a": 1}, {"b": 1}, {"['a']['b']": 1}],
    "which value has which name": [{"a": 1, "b": 2}, {"a": 2, "b": 1}],
    "static field": [Labelled(1, "a"), Labelled(1, "b")],
    "which node has which static field": [
        {"x": Labelled(1, "a"), "y": Labelled(1, "b")},
        {"x": Labelled(1, "b"), "y": Labelled(1, "a")},
        {"y": Labelled(1, "a"), "x": Labelled(1, "b"), "z": {}},
    ],
}


@pytest.mark.parametrize("name", DISTINCT)
def test_the_digest_sees(name: str):
    digests = [value_digest(value) for value in DISTINCT[name]]
    assert len(set(digests)) == len(digests)
    assert digests == [value_digest(value) for value in DISTINCT[name]]


def test_the_digest_sees_the_order_in_which_static_fields_are_given_to_names():
    crossed = {"y": Labelled(1, "a"), "x": Labelled(1, "b")}
    assert value_digest({"x": Labelled(1, "a"), "y": Labelled(1, "b")}) != value_digest(crossed)


CHANGES: dict[str, dict[str, Any]] = {
    "key": {"key": tnt.key(1)},
    "stop": {"stop": "why"},
    "train counters": {"progress": RunProgress(train=Progress(0, 1, 0))},
    "eval counters": {"progress": RunProgress(eval=Progress(0, 1, 0))},
    "memory": {"memory": {"slot": 1}},
    "which field": {"buffers": PARAMS, "params": {}},
    "output": {"output": 0},
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_digest_sees_every_field(name: str):
    assert digest(state()) != digest(state(**CHANGES[name]))


@pytest.mark.parametrize(
    "value", [torch.zeros(()), torch.zeros(0), torch.zeros(0, 3).T, torch.zeros(2, 0, 1)], ids=repr
)
def test_the_digest_of_tensors_without_elements_or_axes(value: Tensor):
    assert value_digest(value) == value_digest(value.clone())


@pytest.mark.parametrize("dtype", [torch.int16, torch.float32, torch.bfloat16, torch.complex64])
def test_a_big_endian_machine_computes_the_same_digest(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    value = torch.tensor([1, -2, 3], dtype=dtype)
    swapped = value.clone()
    swapped.untyped_storage().byteswap(dtype)  # pyright: ignore[reportAttributeAccessIssue]
    here = value_digest(value)
    monkeypatch.setattr(sys, "byteorder", "big")
    assert value_digest(swapped) == here
    assert not torch.equal(value, swapped)


def test_what_has_no_bytes_here_is_refused():
    tensor = torch.ones(2)
    tensor.untyped_storage().resize_(0)
    with pytest.raises(UsageError, match=r"float32\[2\].*not here.*gather\(state\)"):
        content(tensor)

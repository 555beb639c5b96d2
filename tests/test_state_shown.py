"""What a State says of itself, in a terminal and in a notebook."""

import re
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import pytest
import torch

import tnt_func as tnt
from tnt_func.metrics import Mean
from tnt_func.progress import Progress, RunProgress
from tnt_func.state import CHEAP, State, digest

PARAMS = {"w": torch.tensor([1.0, 2.0]), "b": torch.tensor(0.5)}


def state(**fields: Any) -> State:
    return State(**{"params": PARAMS, "key": tnt.key(0), **fields})


class Cells(HTMLParser):
    """The rows of a table, as text; an element that is not closed, or closed twice, is an error."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag == "br":
            return
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"th", "td"} & set(self.open):
            self.rows[-1][-1] += data


def table(value: Any) -> dict[str, str]:
    return {row[0]: row[1] for row in Cells(value._repr_html_()).rows}


def test_the_repr_tells_sizes_counters_leaves_and_the_reason_to_stop():
    counted = state(progress=RunProgress(train=Progress(1, 2, 0)), memory={"best": 0.25})
    assert repr(counted) == (
        "State(2 tensors, 12 bytes, key=Key(seed=0), train=Progress(epochs=1, steps=2, steps_in_epoch=0), "
        f"digest={digest(counted)[:12]})\n"
        "  params: 2 tensors, 12 bytes: ['w'] float32[2], ['b'] float32[]\n"
        "  memory: best (1 value)"
    )
    assert """, stop="it's over", digest=""" in repr(counted.request_stop("it's over"))
    assert "eval=Progress(epochs=3, " in repr(state(progress=RunProgress(eval=Progress(3, 9, 0))))
    metrics = {"train": {"loss": Mean(torch.tensor(1.0), torch.tensor(2.0))}, "eval": {}}
    assert repr(state(metrics=metrics)).endswith("  metrics: train: loss")


def test_the_repr_of_a_big_model_is_short_and_shows_no_value():
    params = {f"layers.{i}.{'very' * 30}.weight": torch.full((1000,), 0.123) for i in range(2000)}
    slots = {f"slot {i}": torch.full((4,), 0.123) for i in range(50)}
    big = state(params=params, opt_state={"exp_avg": params}, buffers=params, memory=slots, stop="x" * 20)
    lines = repr(big).splitlines()
    assert len(lines) == 5 and max(map(len, lines)) < 400
    assert lines[1].startswith("  params: 2,000 tensors, 8,000,000 bytes: ['layers.0.")
    assert lines[1].endswith("and 1,996 more") and lines[4].endswith("slot 3 (1 tensor, 16 bytes), and 46 more")
    assert "0.123" not in repr(big) + big._repr_html_()
    assert len(big._repr_html_()) < 40_000


def test_the_digest_is_told_where_it_is_had_for_little():
    small, large = torch.zeros(CHEAP // 4), torch.zeros(CHEAP // 4 + 1)
    assert f"digest={digest(state(params=small))[:12]}" in repr(state(params=small))
    assert "digest" not in repr(state(params=large))
    assert table(state(params=large))["digest"] == digest(state(params=large))
    assert table(state(params=large.to("meta")))["digest"] == "tnt.digest(state) computes it"


def freed() -> torch.Tensor:
    tensor = torch.zeros(3)
    tensor.untyped_storage().resize_(0)
    return tensor


ODD: dict[str, Callable[[], Any]] = {
    "meta": lambda: torch.zeros(2, device="meta"),
    "sparse": lambda: torch.eye(2).to_sparse(),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)], layout=torch.jagged),
    "freed": freed,
    "a function": lambda: len,
}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("name", ODD)
def test_any_leaf_can_be_looked_at(name: str):
    leaf = ODD[name]()
    assert "params: 1 " in repr(state(params={"odd": leaf}))
    assert table(state(params={"odd": leaf}))["params"].startswith("1 ")


def test_a_state_in_vmap_can_be_looked_at():
    said = list[str]()

    def look(row: torch.Tensor) -> torch.Tensor:
        said.append(repr(state(params=row)))
        return row

    torch.func.vmap(look)(torch.ones(2, 3))
    assert "params: 1 tensor, 12 bytes: float32[3]" in said[0] and "digest" not in said[0]


def test_a_notebook_shows_a_table():
    metrics = {
        "train": {"loss": Mean(torch.tensor(1.0), torch.tensor(2.0)), "rows": Mean(torch.ones(3), torch.ones(3))},
        "eval": {"auc": 5},
    }
    shown = table(state(metrics=metrics, stop="why", progress=RunProgress(train=Progress(1, 2, 1))))
    assert shown["train"] == "Progress(epochs=1, steps=2, steps_in_epoch=1)"
    assert (shown["key"], shown["stop"], shown["digest"]) == ("Key(seed=0)", "why", shown["digest"])
    assert re.fullmatch("[0-9a-f]{64}", shown["digest"])
    assert (shown["train loss"], shown["train rows"], shown["eval auc"]) == ("0.5", "float32[3]", "no value yet")
    assert shown["params"] == "2 tensors, 12 bytes['w'] float32[2]['b'] float32[]"
    assert "buffers" not in shown and "output" not in shown


def test_html_is_escaped():
    evil = "<script>alert('&')</script>"
    metrics = {evil: {evil: Mean(torch.tensor(1.0), torch.tensor(1.0))}}
    page = state(params={evil: evil}, memory={evil: 1}, metrics=metrics, stop=evil)._repr_html_()
    assert "<script" not in page and page.count("&lt;script&gt;") == 6
    assert Cells(page).rows

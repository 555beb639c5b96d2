"""Metrics: values, weights, kinds of entries, and what is kept of a step's output."""

import collections
import types
from typing import Any

import numpy as np
import pytest
import torch

import tnt_func as tnt
from tnt_func import metrics
from tnt_func import pytree as trees
from tnt_func.errors import ContractError
from tnt_func.metrics import Metric, last, maximum, mean, minimum, total

NAN, INF = float("nan"), float("inf")
LOSSES = [{"x": 1.0, "n": 1}, {"x": 4.0, "n": 2}, {"x": -2.0, "n": 5}]
VALUES: dict[str, tuple[Metric, float, float]] = {
    "mean": (mean("x"), 1.0, NAN),
    "weighted mean": (mean("x", weight="n"), -1 / 8, NAN),
    "total": (total("x"), 3.0, 0.0),
    "weighted total": (total("x", weight="n"), -1.0, 0.0),
    "minimum": (minimum("x"), -2.0, INF),
    "maximum": (maximum("x"), 4.0, -INF),
    "last": (last("x"), -2.0, NAN),
}


def folded(metric: Metric, outputs: list[dict[str, Any]]) -> torch.Tensor:
    accumulator = metric.empty()
    for output in outputs:
        accumulator = accumulator.merge(metric.of(output))
    return accumulator.value()


def same(value: torch.Tensor, number: Any) -> bool:
    expected = torch.as_tensor(number, dtype=torch.float64)
    return (
        value.dtype is torch.float64
        and torch.equal(value.isnan(), expected.isnan())
        and torch.equal(value.nan_to_num(), expected.nan_to_num())
    )


@pytest.mark.parametrize("name", VALUES)
def test_the_value_over_an_epoch_and_over_nothing(name: str):
    metric, value, nothing = VALUES[name]
    assert same(folded(metric, LOSSES), value)
    assert same(metric.empty().value(), nothing)
    assert same(metric.of(LOSSES[0]).value(), 1.0)


@pytest.mark.parametrize("name", VALUES)
def test_empty_is_the_identity_of_merge_and_merge_is_associative(name: str):
    metric = VALUES[name][0]
    a, b, c = (metric.of(output) for output in LOSSES)
    assert trees.equal(metric.empty().merge(a), a) and trees.equal(a.merge(metric.empty()), a)
    assert trees.equal(a.merge(b).merge(c), a.merge(b.merge(c)))


@pytest.mark.parametrize("name", ["mean", "total", "minimum", "maximum"])
@pytest.mark.parametrize("at", range(3))
def test_nan_is_not_lost(name: str, at: int):
    outputs: list[dict[str, Any]] = [{"x": 1.0}, {"x": 2.0}, {"x": 3.0}]
    outputs[at] = {"x": NAN}
    assert folded(VALUES[name][0], outputs).isnan()


def test_last_is_the_latest_even_if_that_is_nan():
    assert same(folded(last("x"), [{"x": NAN}, {"x": 2.0}]), 2.0)
    assert folded(last("x"), [{"x": 2.0}, {"x": NAN}]).isnan()


KINDS: dict[str, Any] = {
    "int": 3,
    "float": 3.0,
    "NumPy number": np.float32(3),
    "NumPy array": np.array(3),
    "int64": torch.tensor(3),
    "uint8": torch.tensor(3, dtype=torch.uint8),
    "bfloat16": torch.tensor(3, dtype=torch.bfloat16),
    "float64": torch.tensor(3.0, dtype=torch.float64),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", VALUES)
def test_any_kind_of_number_is_float64_afterwards(name: str, kind: str):
    assert same(
        folded(VALUES[name][0], [{"x": KINDS[kind], "n": KINDS[kind]}]), 9.0 if name == "weighted total" else 3.0
    )


def test_truths_are_counted():
    outputs = [{"hit": torch.tensor([True, False])}, {"hit": torch.tensor([True, True])}, {"hit": False}]
    assert same(folded(mean("hit"), outputs), [2 / 3, 1 / 3])
    assert same(folded(total("hit"), outputs), [2.0, 1.0])


def test_sums_are_exact_where_float32_would_drift():
    third = torch.tensor(1 / 3, dtype=torch.float32)
    outputs = [{"x": 2**24}, *[{"x": 1.0}] * 3, {"x": third}]
    assert same(folded(total("x"), outputs), 2**24 + 3 + float(third))


@pytest.mark.parametrize("name", ["mean", "total", "minimum", "maximum", "last"])
def test_an_entry_may_have_any_shape_and_each_element_is_its_own(name: str):
    columns = [[output["x"], output["x"] + 10] for output in LOSSES]
    metric, value, _ = VALUES[name]
    shifted = {"total": value + 30}.get(name, value + 10)
    assert same(folded(metric, [{"x": torch.tensor(column)} for column in columns]), [value, shifted])


def test_a_weight_may_be_one_number_or_one_for_each_element():
    x = torch.tensor([1.0, 2.0])
    outputs = [{"x": x, "n": 1}, {"x": 3 * x, "n": torch.tensor([3.0, 0.0])}]
    assert same(folded(mean("x", weight="n"), outputs), [2.5, 2.0])


def test_a_weight_of_zero_counts_nothing_and_nothing_but_zero_is_nan():
    assert same(folded(mean("x", weight="n"), [{"x": 1.0, "n": 0}, {"x": 5.0, "n": 2}]), 5.0)
    assert folded(mean("x", weight="n"), [{"x": 1.0, "n": 0}]).isnan()


@pytest.mark.parametrize("name", VALUES)
def test_an_accumulator_keeps_no_graph_and_none_of_the_outputs_memory(name: str):
    metric = VALUES[name][0]
    x = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    leaves = trees.tensors(metric.empty().merge(metric.of({"x": x, "n": x})))
    assert not any(leaf.requires_grad for leaf in leaves)
    before = [leaf.clone() for leaf in leaves]
    with torch.no_grad():
        x.fill_(7.0)
    assert trees.equal(before, leaves)


@pytest.mark.parametrize(
    "mapping", [dict, collections.OrderedDict, types.MappingProxyType], ids=lambda kind: kind.__name__
)
def test_an_output_is_any_mapping(mapping: Any):
    assert same(mean("x").of(mapping({"x": 2.0})).value(), 2.0)


def test_a_missing_entry_is_named_with_those_that_are_there():
    for metric in (mean("los"), mean("loss", weight="los"), total("loss", weight="los"), last("los")):
        with pytest.raises(ContractError, match=r"reads output\['los'\], and the step's output has \[1, 'loss', 'n'\]"):
            metric.of({"n": 1, "loss": 2.0, 1: 0})


@pytest.mark.parametrize(("output", "kind"), [(None, "None"), (torch.tensor(1.0), "a Tensor"), ((1, 2), "a tuple")])
def test_an_output_that_is_no_mapping_is_refused(output: Any, kind: str):
    with pytest.raises(ContractError, match=rf"returned {kind} as its output.* is a mapping. Return \(state, {{'x': "):
        mean("x").of(output)


@pytest.mark.parametrize("entry", [None, "high", {"y": 1}, [1, "a"]], ids=repr)
def test_an_entry_that_is_no_number_is_refused(entry: Any):
    with pytest.raises(ContractError, match=r"output\['x'\], which is .*; it takes a number, a tensor or an array."):
        mean("x").of({"x": entry})


def test_compute_reads_a_phases_values_and_changes_nothing():
    unit = tnt.TrainUnit(
        train_step=lambda state, batch: (state, {"x": batch}), metrics={"mean": mean("x"), "worst": maximum("x")}
    )
    state = tnt.train(unit, tnt.State(params={}, key=tnt.key(0)), [1.0, 2.0, 6.0], max_epochs=2)
    before = tnt.digest(state)
    values = metrics.compute(state, "train")
    assert list(values) == ["mean", "worst"] and same(values["mean"], 3.0) and same(values["worst"], 6.0)
    assert metrics.compute(state, "eval") == {}
    assert tnt.digest(state) == before

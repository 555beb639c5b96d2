"""What micro-batches are made of, and what they refuse."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tnt_func as tnt
from tnt_func import optim
from tnt_func.errors import ContractError, UsageError, UsageTypeError
from tnt_func.transforms.microbatches import OnceAStep, split_rows
from tnt_func.unit import TrainUnit

T = tnt.transforms


def unit_of(output: Any, **options: Any) -> TrainUnit:
    def objective(params: Tensor, state: tnt.State, batch: Any) -> Any:
        return (params * batch).mean(), (state.buffers, output(batch) if callable(output) else output)

    return T.microbatch(TrainUnit(train_step=tnt.minimize(objective, optim.sgd(1.0))), 2, **options)


def first(w: Tensor) -> tnt.State:
    return tnt.State(params=w, opt_state=optim.sgd(1.0).init(w), key=tnt.key(0))


def test_rows_are_split_as_evenly_as_they_go_and_the_rest_is_shared():
    batch = {"x": torch.arange(10).reshape(5, 2), "y": (torch.arange(5), 0.5), "t": torch.tensor(3), "none": None}
    parts = split_rows(batch, 3)
    assert [part["x"][:, 0].tolist() for part in parts] == [[0, 2], [4, 6], [8]]
    assert [part["y"][0].tolist() for part in parts] == [[0, 1], [2, 3], [4]]
    assert all(part["y"][1] == 0.5 and part["t"] == 3 and part["none"] is None for part in parts)
    assert parts[0]["x"].data_ptr() == batch["x"].data_ptr()
    assert [len(split_rows(torch.ones(rows), 3)) for rows in (0, 1, 2, 9)] == [1, 1, 2, 3]
    assert split_rows(0.5, 2) == [0.5] and split_rows((), 2) == [()]


@pytest.mark.parametrize(
    ("batch", "given"),
    [
        ((torch.ones(4), torch.ones(3)), r"batch\[0\]: float32\[4\], batch\[1\]: float32\[3\]"),
        ({"text": ["a", "b"]}, r"batch\['text'\]\[0\]: str 'a'"),
        (torch.ones(4).numpy(), "batch: ndarray"),
    ],
)
def test_what_cannot_be_split_is_named(batch: Any, given: str):
    with pytest.raises(UsageTypeError, match=rf"microbatch was given {given}.*write microbatch\(unit, count, split="):
        split_rows(batch, 2)


def test_a_batch_may_be_split_by_a_function_of_ones_own():
    unit = unit_of(lambda batch: {"num_samples": len(batch)}, split=lambda batch, count: [batch[:1], batch[1:]])
    state, output = unit.train_step(first(torch.tensor(0.0)), torch.tensor([1.0, 2.0, 6.0]))
    assert state.params == -3 and output == {"num_samples": 3}


def test_outputs_are_weighted_means_and_what_is_summed_is_summed():
    def output(batch: Tensor) -> dict[str, Any]:
        mean = batch.mean()
        return {"mean": mean, "number": float(mean), "correct": (batch > 1).sum(), "num_samples": len(batch)}

    unit = unit_of(output, summed=["correct"])
    _, found = unit.train_step(first(torch.tensor(0.0)), torch.tensor([1.0, 2.0, 6.0]))
    assert found == {"mean": 3.0, "number": 3.0, "correct": 2, "num_samples": 3}
    assert list(found) == ["mean", "number", "correct", "num_samples"]


@pytest.mark.parametrize("weight", [0, 0.0, torch.tensor(0), torch.tensor(0.0)], ids=repr)
@pytest.mark.parametrize("empty", [0, 1])
def test_a_part_that_weighs_nothing_counts_for_nothing_be_it_nan(weight: Any, empty: int):
    """As a part whose tokens are all masked, the first one too."""

    def output(batch: Tensor) -> dict[str, Any]:
        nothing = bool(batch.isnan().any())
        return {"weight": weight if nothing else weight + 2, "mean": batch.mean(), "number": float(batch.mean())}

    batch = torch.tensor([float("nan"), 5.0])[[0, 1] if empty == 0 else [1, 0]]
    state, found = unit_of(output, weight="weight").train_step(first(torch.tensor(0.0)), batch)
    assert state.params == -5 and found == {"weight": 2, "mean": 5.0, "number": 5.0}


def test_tensors_with_a_row_a_sample_are_joined_so_that_metrics_may_read_them():
    unit, state = tnt.supervised(
        *(nn.Linear(2, 3), F.cross_entropy, optim.sgd(0.1)),
        key=tnt.key(0),
        metrics={"accuracy": tnt.metrics.accuracy("multiclass", num_classes=3)},
    )
    x = torch.randn(7, 2, generator=torch.Generator().manual_seed(0))
    batch = x, torch.arange(7) % 3
    whole, parts = unit.train_unit, T.microbatch(unit, 3).train_unit
    _, output = parts.train_step(state, batch)
    assert torch.equal(output["targets"], batch[1])
    torch.testing.assert_close(output["output"], whole.train_step(state, batch)[1]["output"])


def test_a_parameter_that_some_part_does_not_use_has_the_gradient_of_the_others():
    def objective(params: Any, state: tnt.State, batch: Tensor) -> Any:
        used = params["often"] if batch.sum() > 1 else params["seldom"]
        return (used * batch).mean(), (state.buffers, {"num_samples": len(batch)})

    unit = T.microbatch(TrainUnit(train_step=tnt.minimize(objective, optim.sgd(1.0))), 2)
    zeros = {name: torch.tensor(0.0) for name in ("often", "seldom", "never")}
    state = tnt.State(params=zeros, opt_state=optim.sgd(1.0).init(zeros), key=tnt.key(0))
    after = unit.train_step(state, torch.tensor([1.0, 4.0]))[0].params
    assert after == {"often": -2.0, "seldom": -0.5, "never": 0.0} and after["never"] is zeros["never"]


def test_half_precision_parameters_accumulate_in_single_precision():
    batch = torch.tensor([256.0, 1.0, 1.0], dtype=torch.bfloat16)
    unit = T.microbatch(unit_of(lambda batch: {"num_samples": len(batch)}), 3)
    w = torch.tensor(0.0, dtype=torch.bfloat16)
    assert unit.train_step(first(w), batch)[0].params == -torch.tensor(86.0, dtype=torch.bfloat16)


def test_buffers_go_from_part_to_part_and_stacks_nest():
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    unit, state = tnt.supervised(module, F.cross_entropy, optim.sgd(0.1), key=tnt.key(0))
    batch = torch.randn(12, 2, generator=torch.Generator().manual_seed(0)), torch.zeros(12, dtype=torch.int64)
    after, output = T.microbatch(T.microbatch(unit, 2), 3).train_unit.train_step(state, batch)
    assert after.buffers["1.num_batches_tracked"] == 6 and output["num_samples"] == 12


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ({"loss": 1.0}, r"output \['loss'\]; it weighs parts by 'num_samples'.*name the weight"),
        (3.0, "given the output a float; it weighs"),
        ({"num_samples": 1, "scores": [1.0]}, r"'scores': list.*; of 0-d floating tensors.*leave it out"),
        ({"num_samples": 1, "hits": 3}, r"'hits': int 3; of 0-d.*write summed=\['hits'\]"),
        ({"num_samples": torch.ones(2)}, r"'num_samples': float32\[2\]; of 0-d"),
        ({"num_samples": 1, "name": "a"}, "'name': str 'a'; of 0-d"),
    ],
)
def test_what_no_mean_can_be_taken_of_is_refused_by_name(output: Any, message: str):
    with pytest.raises(ContractError, match=message):
        unit_of(output).train_step(first(torch.tensor(0.0)), torch.ones(2))


def test_a_count_is_positive():
    with pytest.raises(UsageError, match="count=0; a batch has at least one part. Write count=1"):
        T.microbatch(unit_of({}), 0)


def test_what_waits_for_other_processes_is_refused_however_deep_it_is():
    class Everywhere(OnceAStep):
        def __call__(self, *args: Any) -> Any: ...

    step = replace(tnt.minimize(max, optim.sgd(1.0)), differentiate=Everywhere())
    unit = TrainUnit(train_step=step)
    for given in (unit, T.autocast(unit, torch.float16)):
        with pytest.raises(UsageError, match=r"Apply data_parallel last: data_parallel\(tnt.transforms.microbatch\("):
            T.microbatch(given, 2)

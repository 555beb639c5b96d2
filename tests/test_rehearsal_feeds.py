"""What rehearsals find of data, and that they leave no trace."""

import math
from collections import UserDict
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from rehearsal_units import BATCHES, X, Y, descend, linear, loader, stepping
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import tnt_func as tnt
from tnt_func.errors import UsageError, UsageTypeError
from tnt_func.rehearsal import fast_dev_run, overfit_batches, sanity_check
from tnt_func.state import State
from tnt_func.testing.generators import moved, stands
from tnt_func.testing.snapshot import freeze
from tnt_func.unit import TrainUnit

# What is found of data


class Rows(Dataset[Any]):
    """As many rows as asked for, made by a function of the index."""

    def __init__(self, make: Callable[[int], Any], length: int = 12):
        self.make, self.length = make, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        return self.make(index)


def findings(data: Any, **options: Any) -> tuple[str, ...]:
    """What is found of a unit that looks at no batch."""

    def train_step(state: State, batch: Any) -> Any:
        return state.replace(params={name: leaf - 0.1 for name, leaf in state.params.items()}), {}

    return fast_dev_run(TrainUnit(train_step=train_step), stepping(descend)[1], data, **options).findings


def test_batches_that_are_not_finite_are_named():
    (finding,) = findings([{"x": torch.ones(2)}, {"x": torch.tensor([1.0, math.nan])}])
    assert finding == "train batch 1['x'] (1 of 2 numbers) is not finite. Clean the data."
    assert findings([torch.tensor([0.0, -math.inf]), torch.ones(2)]) == ()


def test_batches_that_are_all_the_same_are_told():
    (finding,) = findings(DataLoader(Rows(lambda index: torch.ones(2)), batch_size=2))
    assert finding.startswith("All of the first 5 train batches are the same.")


def test_batches_that_differ_when_drawn_again_are_told():
    own = torch.Generator().manual_seed(0)
    (finding,) = findings(DataLoader(Rows(lambda index: torch.rand(2, generator=own)), batch_size=2))
    assert finding.startswith("train batch 0, 1, 2, 3 and 1 more is another one when it is drawn again")
    assert findings(DataLoader(Rows(lambda index: torch.rand(2)), batch_size=2, shuffle=True)) == ()


def test_data_that_is_used_up_when_read_again_is_told():
    once = iter([torch.zeros(1), torch.ones(1)])
    (finding,) = findings(lambda epoch: list(once) or [torch.ones(1)])
    assert finding.startswith("train batch 0, 1 is another one")
    once = iter([torch.zeros(1), torch.ones(1)])
    assert findings(lambda epoch: once) == (finding,)


def test_batches_of_objects_are_taken():
    batches = [UserDict(x=torch.full((2,), float(index))) for index in range(2)]
    unit, state = stepping(descend)
    unit = TrainUnit(train_step=lambda state, batch: (state.replace(params=descend(state.params, batch["x"])), {}))
    found = fast_dev_run(unit, state, batches)
    assert found.ok and found.facts["train batch"] == "['x'] float32[2]"


def norm() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


def test_a_step_is_tried_on_the_smaller_last_batch():
    unit, state = linear(norm())
    (finding,) = fast_dev_run(unit, state, loader(33), loader(33), steps=2).findings
    assert finding.startswith(
        "The last batch of an epoch has 1 of 8 rows, and train_step fails on it: ValueError: Expected more than 1 "
    )
    assert fast_dev_run(unit, state, loader(34), loader(33), steps=2).ok
    assert fast_dev_run(unit, state, loader(33, drop_last=True), loader(33), steps=2).ok


def test_the_last_batch_of_a_list_and_of_a_pipeline_is_tried():
    unit, state = linear(norm())
    batches = [(X[:8], Y[:8]), (X[8:16], Y[8:16]), (X[:1], Y[:1])]
    (finding,) = fast_dev_run(unit.train_unit, state, batches, steps=1).findings
    assert "is [0] float32[1, 2], [1] float32[1, 1], and train_step fails on it" in finding
    pipeline = tnt.data.source(list(zip(X[:17], Y[:17], strict=True))).batch(8)
    (finding,) = fast_dev_run(unit.train_unit, state, pipeline, steps=1).findings
    assert "and train_step fails on it" in finding


def test_loaders_on_which_no_run_can_be_resumed_are_told():
    unit, state = linear()
    data = loader(shuffle=True, generator=torch.Generator().manual_seed(3))
    (finding,) = fast_dev_run(unit.train_unit, state, data, steps=1).findings
    assert "could not be resumed exactly: the train DataLoader has generator=" in finding


# No trace


def test_in_place_writes_of_a_unit_reach_neither_state_nor_data():
    def step(state: State, batch: Any) -> Any:
        state.params["w"].sub_(batch.mul_(2))
        state.memory["log"].append(1.0)
        return state, {"loss": batch.sum()}

    unit = TrainUnit(train_step=step)
    state = State(params={"w": torch.ones(2)}, key=tnt.key(0), memory={"log": [0.0]})
    batches = [batch.clone() for batch in BATCHES]
    before = freeze([state, batches])
    for rehearse in (fast_dev_run, sanity_check, overfit_batches):
        rehearse(unit, state, batches)
        assert freeze([state, batches]) == before


def test_generators_of_loaders_and_samplers_stay_where_they_are():
    own = torch.Generator().manual_seed(3)
    sampler = torch.utils.data.RandomSampler(range(40), generator=own)
    unit, state = linear()
    for data in (loader(shuffle=True, generator=own), loader(sampler=sampler)):
        before, stood = own.get_state(), stands()
        for rehearse in (fast_dev_run, sanity_check, overfit_batches):
            rehearse(unit.train_unit, state, data)
        assert torch.equal(own.get_state(), before) and moved(stood) == []


def test_workers_that_stay_are_left_where_they_are():
    unit, state = linear()
    data = loader(num_workers=1, persistent_workers=True)
    begun = iter(data)
    assert len(list(islice(begun, 2))) == 2
    found = fast_dev_run(unit.train_unit, state, data, steps=1)
    assert torch.equal(next(begun)[0], X[16:24]) and data.persistent_workers
    assert any("persistent_workers=True" in finding for finding in found.findings)


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
def test_a_loader_that_counts_for_itself_stays_where_it_is():
    from torchdata.stateful_dataloader import StatefulDataLoader

    unit, state = linear()
    orders: list[Any] = []
    for looks in (False, True):
        torch.manual_seed(0)
        data = StatefulDataLoader(TensorDataset(X, Y), batch_size=8, shuffle=True)
        if looks:
            fast_dev_run(unit.train_unit, state, data)
        orders.append(freeze(list(data)))
    assert orders[0] == orders[1] != freeze(list(data))


def test_a_step_that_donates_consumes_neither_state_nor_what_is_looked_at_afterwards():
    unit, state = linear(norm())
    before = freeze(state)
    unit = tnt.donate(unit)
    (finding,) = fast_dev_run(unit, state, loader(33), loader(), steps=2).findings
    assert "has 1 of 8 rows" in finding
    assert fast_dev_run(unit, state, loader(34), loader(), steps=2).ok
    assert sanity_check(unit, state, loader(), loader()).ok
    assert overfit_batches(unit, state, loader(), steps=10, to=0.999).ok
    assert freeze(state) == before


# What is refused


@pytest.mark.parametrize("rehearse", [fast_dev_run, sanity_check, overfit_batches])
def test_an_iterator_is_refused_and_not_touched(rehearse: Any):
    unit, state = stepping(descend)
    once: Iterator[Any] = iter(BATCHES)
    with pytest.raises(UsageError, match="one-shot list_iterator; .* lambda epoch: make_batches"):
        rehearse(unit, state, once)
    assert next(once) is BATCHES[0]


@pytest.mark.parametrize("rehearse", [fast_dev_run, sanity_check, overfit_batches])
def test_data_without_a_batch_is_refused(rehearse: Any):
    unit, state = stepping(descend)
    with pytest.raises(UsageError, match="the train data gave no batch in epoch 0"):
        rehearse(unit, state, [])


def test_arguments_that_do_not_fit_are_refused():
    unit, state = linear()
    for name, rehearse in (("fast_dev_run", fast_dev_run), ("sanity_check", sanity_check)):
        with pytest.raises(UsageError, match=rf"{name} was given a FitUnit and no eval_data; .* tnt.{name}\("):
            rehearse(unit, state, loader())
        with pytest.raises(UsageError, match=f"{name} was given a TrainUnit and eval_data, which it has no use for"):
            rehearse(unit.train_unit, state, loader(), loader())
        with pytest.raises(UsageError, match=rf"{name}\(steps=0\) was given"):
            rehearse(unit.train_unit, state, loader(), steps=0)
    with pytest.raises(UsageTypeError, match="fast_dev_run was given an EvalUnit"):
        fast_dev_run(unit.eval_unit, state, loader())  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match="max_epochs=-1 was given"):
        fast_dev_run(unit.train_unit, state, loader(), max_epochs=-1)
    wrongs: list[dict[str, Any]] = [{"batches": 0}, {"batches": 3, "steps": 2}, {"to": 1.0}, {"to": 0.0}]
    for wrong in wrongs:
        with pytest.raises(UsageError, match=r"overfit_batches\(batches="):
            overfit_batches(unit, state, loader(), **wrong)
    with pytest.raises(UsageError, match=r"loss='nll'.* are \['loss', 'num_samples'\]"):
        overfit_batches(unit, state, loader(), loss="nll")

"""Averages of parameters, beside torch's."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn
from torch.optim.swa_utils import update_bn as torch_update_bn

import tnt_func as tnt
from tnt_func import optim, pytree
from tnt_func.errors import UsageError

T = tnt.transforms


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).to(dtype)


def batches(count: int, dtype: torch.dtype = torch.float32) -> list[Any]:
    noise = torch.Generator().manual_seed(1)
    return [
        (torch.randn(4, 3, generator=noise).to(dtype), torch.randint(0, 2, (4,), generator=noise)) for _ in range(count)
    ]


def supervised(dtype: torch.dtype = torch.float32, every: int = 1) -> Any:
    optimizer = optim.accumulate(optim.from_torch(torch.optim.SGD, lr=0.1), every=every)
    return tnt.supervised(network(dtype), F.cross_entropy, optimizer, key=tnt.key(0))


def tensors(module: Any) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in module.named_parameters()}


def averaged_by_torch(average: AveragedModel, module: nn.Module, data: list[Any], epochs: int, start: int) -> nn.Module:
    """The imperative loop; averages after every step, or after every epoch from one on."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for epoch in range(epochs):
        for x, y in data:
            optimizer.zero_grad()
            F.cross_entropy(module(x), y).backward()
            optimizer.step()
            if start < 0:
                average.update_parameters(module)
        if 0 <= start <= epoch:
            average.update_parameters(module)
    return average.module


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.999, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_ema_is_torchs_to_the_bit(decay: float, dtype: torch.dtype):
    module, data = network(dtype), batches(5, dtype)
    average = averaged_by_torch(AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(decay)), module, data, 2, -1)
    unit, state = supervised(dtype)
    state = tnt.train(T.ema(unit, decay).train_unit, state, data, max_epochs=2)
    assert pytree.diff(T.averaged(state, "ema").params, tensors(average)) == []
    assert pytree.diff(state.params, tensors(module)) == []
    assert pytree.diff(T.averaged(state, "ema").buffers, dict(average.named_buffers())) == []


def test_swa_is_torchs_to_the_bit_and_so_are_the_averages_of_batch_norm():
    module, data = network(), batches(3)
    average = averaged_by_torch(AveragedModel(module, multi_avg_fn=get_swa_multi_avg_fn()), module, data, 5, 2)
    unit, state = supervised()
    state = tnt.train(T.swa(unit, start_epoch=2).train_unit, state, data, max_epochs=5)
    mean = T.averaged(state, "swa")
    assert state.memory["swa"]["count"] == 3
    assert pytree.diff(mean.params, tensors(average)) == []
    torch_update_bn(data, average)
    theirs = dict(average.named_buffers())
    assert pytree.diff(T.update_bn(network(), mean, data).buffers, theirs) == []
    assert pytree.diff(T.update_bn(network().eval(), mean, [x for x, _ in data]).buffers, theirs) == []


def test_swa_counts_every_so_many_epochs_and_evaluates_the_parameters_before_the_first():
    unit, state = supervised()
    unit, data = T.swa(unit, start_epoch=2, every_n_epochs=2, evaluate=True), batches(2)
    seen = [
        (int(event.state.memory["swa"]["count"]), tnt.metrics.compute(event.state, "eval")["loss"], event.state)
        for event in tnt.fit_events(unit, state, data, data, max_epochs=5)
        if event.phase == "eval" and event.point == "end"
    ]
    assert [count for count, _, _ in seen] == [0, 0, 1, 1, 2]
    plain, _ = supervised()
    for count, loss, after in seen:
        params = after.memory["swa"]["params"] if count else after.params
        state = tnt.evaluate(plain.eval_unit, after.replace(params=params), data)
        assert tnt.metrics.compute(state, "eval")["loss"] == loss


def test_warmup_forgets_the_beginning():
    unit, state = supervised()
    run = tnt.train_events(T.ema(unit, 0.2, warmup=True).train_unit, state, batches(4), max_epochs=1)
    params = [event.state.params for event in run if event.point == "step_end"]
    expected = params[0]["2.bias"].double()
    for n, decay in ((1, 2 / 11), (2, 0.2), (3, 0.2)):
        expected = decay * expected + (1 - decay) * params[n]["2.bias"].double()
    state = tnt.train(T.ema(unit, 0.2, warmup=True).train_unit, state, batches(4), max_epochs=1)
    torch.testing.assert_close(T.averaged(state, "ema").params["2.bias"].double(), expected, rtol=1e-6, atol=0)


def test_ema_can_follow_the_windows_of_accumulation():
    data = batches(4)
    doubled = [batch for batch in data for _ in range(2)]
    normless = nn.Linear(3, 2)
    results = []
    for every, feed in ((1, data), (2, doubled)):
        optimizer = optim.accumulate(optim.sgd(0.1), every=every)
        unit, state = tnt.supervised(normless, F.cross_entropy, optimizer, key=tnt.key(0))
        state = tnt.train(T.ema(unit, 0.5, every_n_steps=every).train_unit, state, feed, max_epochs=1)
        results.append(state.memory["ema"])
    assert pytree.diff(*results) == []


def test_evaluation_and_prediction_can_be_of_the_average():
    unit, state = supervised()
    data = batches(3)
    looking = T.ema(unit, 0.9, evaluate=True)
    state = tnt.fit(looking, state, data, data, max_epochs=1)
    swapped = T.averaged(state, "ema")
    assert not pytree.equal(swapped.params, state.params)
    by_hand = tnt.evaluate(unit.eval_unit, swapped.replace(metrics={}), data)
    assert tnt.metrics.compute(state, "eval") == tnt.metrics.compute(by_hand, "eval")
    after, outputs = tnt.predict(looking.predict_unit, state, data)
    assert pytree.equal(outputs, tnt.predict(unit.predict_unit, swapped, data)[1])
    assert after.params is state.params


def test_an_average_may_be_traced():
    """As under an ensemble: the count is batched, and no value is looked at."""
    hook = T.ema(supervised()[0], 0.9, warmup=True).train_unit.on_train_step_end

    def after(count: Tensor, w: Tensor) -> Any:
        memory = {"ema": {"params": {"w": torch.zeros(2)}, "count": count}}
        return hook(tnt.State(params={"w": w}, key=tnt.key(0), memory=memory)).memory["ema"]

    counts, w = torch.tensor([0, 1, 50]), torch.ones(3, 2)
    moved = torch.func.vmap(after)(counts, w)
    assert moved["count"].tolist() == [1, 2, 51]
    torch.testing.assert_close(moved["params"]["w"][:, 0], torch.tensor([1.0, 1 - 2 / 11, 1 - 51 / 60]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda unit: T.ema(unit, 1.5), r"decay=1\.5; it is from 0 to 1"),
        (lambda unit: T.ema(unit, every_n_steps=0), "every_n_steps=0; it is 1 or more"),
        (lambda unit: T.swa(unit, start_epoch=-1), "start_epoch=-1, every_n_epochs=1; they are at least 0 and 1"),
        (
            lambda unit: T.ema(unit.train_unit, evaluate=True),
            "TrainUnit, which does not evaluate. Transform the FitUnit",
        ),
        (lambda unit: T.averaged(supervised()[1], "ema"), r"state that remembers \[\]; an average is in the slot"),
    ],
)
def test_what_cannot_be_averaged_is_refused(make: Any, message: str):
    with pytest.raises(UsageError, match=message):
        make(supervised()[0])

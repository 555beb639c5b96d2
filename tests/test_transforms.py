"""Transforms of units together: the bits of the imperative loop, the laws of units, what they refuse."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import tnt_func as tnt
from tnt_func import optim, pytree
from tnt_func.errors import UsageError
from tnt_func.testing import check_unit

T = tnt.transforms
Batch = tuple[Tensor, Tensor]
STEPS = 50
SCALE: dict[str, Any] = {"init_scale": 2.0**20, "growth_interval": 3}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2)
    )


def batches(count: int, size: int = 12) -> list[Batch]:
    noise = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 3, generator=noise), torch.randint(0, 2, (size,), generator=noise)) for _ in range(count)
    ]


@functools.cache
def imperative(dtype: torch.dtype | None, count: int) -> tuple[nn.Module, nn.Module, torch.amp.GradScaler]:
    """The loop that everybody writes: its module, the average, the scaler."""
    module = network()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    scaler = torch.amp.GradScaler("cpu", enabled=dtype is torch.float16, **SCALE)
    for x, y in batches(STEPS):
        optimizer.zero_grad()
        for inputs, targets in zip(x.chunk(count), y.chunk(count), strict=True):
            with torch.autocast("cpu", dtype=dtype) if dtype else contextlib.nullcontext():
                loss = F.cross_entropy(module(inputs), targets)
            scaler.scale(loss / count).backward()
        scaler.step(optimizer)
        scaler.update()
        average.update_parameters(module)
    return module, average.module, scaler


def tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in module.named_parameters()}


@pytest.mark.parametrize("rematerialised", [False, True], ids=["", "remat"])
@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("average", [False, True], ids=["", "ema"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"])
def test_supervised_ends_on_the_bits_of_the_imperative_loop(
    dtype: torch.dtype | None, average: bool, count: int, rematerialised: bool
):
    optimizer = optim.from_torch(torch.optim.AdamW, lr=1e-2)
    unit, state = tnt.supervised(network(), F.cross_entropy, optimizer, key=tnt.key(0))
    if rematerialised:
        unit = T.remat(unit, lambda name, part: isinstance(part, nn.Sequential | nn.BatchNorm1d))
    unit = T.microbatch(unit, count)
    if average:
        unit = T.ema(unit, 0.9)
    if dtype is not None:
        unit = T.autocast(unit, dtype, **SCALE)
    state = tnt.train(unit.train_unit, state, batches(STEPS), max_epochs=1)

    module, mean, scaler = imperative(dtype, count)
    assert pytree.diff(state.params, tensors(module)) == []
    assert pytree.diff(state.buffers, dict(module.named_buffers())) == []
    if average:
        assert pytree.diff(T.averaged(state, "ema").params, tensors(mean)) == []
    if dtype is torch.float16:
        slot = state.memory["loss_scale"]
        assert (
            float(slot["scale"]) == scaler.get_scale() and int(slot["growth_tracker"]) == scaler._get_growth_tracker()
        )
        assert 0 < int(slot["skipped"]) < STEPS


@pytest.mark.parametrize("count", [3, 5])
def test_equal_micro_batches_are_the_imperative_loop_to_the_bit_whatever_their_count(count: int):
    module, data = network(), batches(10, size=3 * count)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for x, y in data:
        optimizer.zero_grad()
        for inputs, targets in zip(x.chunk(count), y.chunk(count), strict=True):
            (F.cross_entropy(module(inputs), targets) / count).backward()
        optimizer.step()
    unit, state = tnt.supervised(network(), F.cross_entropy, optim.from_torch(torch.optim.SGD, lr=0.1), key=tnt.key(0))
    state = tnt.train(T.microbatch(unit, count).train_unit, state, data, max_epochs=1)
    assert pytree.diff(state.params, tensors(module)) == []


TRANSFORMS: dict[str, Callable[[Any], Any]] = {
    "microbatch": lambda unit: T.microbatch(unit, 2),
    "ema": lambda unit: T.ema(unit, 0.9, warmup=True, evaluate=True),
    "swa": lambda unit: T.swa(unit, start_epoch=1, evaluate=True),
    "autocast": T.autocast,
    "loss scale": lambda unit: T.autocast(unit, torch.float16, init_scale=2.0**40),
    "skip_nonfinite": T.skip_nonfinite,
    "remat": lambda unit: T.remat(unit, lambda name, part: name == "1"),
    "with_gradient_stats": T.with_gradient_stats,
    "with_gradients": T.with_gradients,
    "detect_anomaly": T.detect_anomaly,
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_every_transform_keeps_every_law(name: str):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 2), nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(0.3)))
    unit, state = tnt.supervised(module, F.cross_entropy, optim.adamw(1e-2), key=tnt.key(0))
    data = batches(2, size=5)
    data = [data[0], (data[1][0] / 0, data[1][1])] if name == "skip_nonfinite" else data
    check_unit(TRANSFORMS[name](unit), state, data, eval_batches=data[:1])


def by_hand(state: tnt.State, batch: Any) -> Any:
    return state, {}


@pytest.mark.parametrize("name", [n for n in TRANSFORMS if n not in ("ema", "swa", "detect_anomaly")])
def test_what_reaches_into_a_step_needs_minimize(name: str):
    unit = tnt.FitUnit(train_unit=tnt.TrainUnit(train_step=by_hand), eval_unit=tnt.EvalUnit(eval_step=by_hand))
    with pytest.raises(UsageError, match=r"train_step is by_hand; .*Write train_step=tnt\.minimize\(objective"):
        TRANSFORMS[name](unit)
    # Neither the weights nor the rest of the network that is inside are in the message.
    single, _ = tnt.supervised(nn.Linear(2, 1), F.mse_loss, optim.sgd(0.1), key=tnt.key(0))
    with pytest.raises(UsageError, match=r"train_step is an EnsembleStep; .* before .*ensemble or compiled"):
        TRANSFORMS[name](tnt.ensemble(single, 2))


def test_slots_have_names_of_their_own():
    unit = tnt.TrainUnit(train_step=tnt.minimize(max, optim.sgd(0.1)))
    for transform in (T.ema, T.swa, T.skip_nonfinite, lambda unit: T.autocast(unit, torch.float16)):
        with pytest.raises(UsageError, match="is taken in state.memory"):
            transform(transform(unit))
    assert T.ema(T.ema(unit, 0.9), 0.99, name="slow").memory.keys() == {"ema", "slow"}

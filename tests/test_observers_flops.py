"""Counted operations against those on paper, and the share of a device by a clock that is moved by hand."""

from typing import Any

import pytest
import torch
from torch import nn

import tnt_func as tnt
from tnt_func.errors import UsageError
from tnt_func.observers import History, count_flops, mfu, recorder
from tnt_func.state import State

BATCH, INSIDE, HIDDEN, OUT = 3, 4, 8, 2


def supervised() -> Any:
    torch.manual_seed(0)
    # Dropout draws, and BatchNorm writes averages: both must be as if the step had not been counted.
    module = nn.Sequential(nn.Linear(INSIDE, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.Dropout(), nn.Linear(HIDDEN, OUT))
    return tnt.supervised(module, nn.functional.mse_loss, tnt.optim.adamw(1e-3), key=tnt.key(0))


DATA = (torch.ones(BATCH, INSIDE), torch.ones(BATCH, OUT))


def test_forward_and_backward_are_counted():
    unit, state = supervised()
    first, second = 2 * BATCH * INSIDE * HIDDEN, 2 * BATCH * HIDDEN * OUT
    # Backward: each weight's gradient is as much again, and so is that of the second layer's input.
    assert count_flops(unit.train_unit, state, DATA) == 2 * first + 3 * second
    assert count_flops(unit.eval_unit, state, DATA) == first + second


def test_counting_touches_neither_the_state_nor_the_generators():
    unit, state = supervised()
    before, drawn = tnt.digest(state), torch.get_rng_state()
    count_flops(unit.train_unit, state, DATA)
    assert tnt.digest(state) == before and torch.equal(torch.get_rng_state(), drawn)


def test_operations_a_second_and_their_share():
    now, history = [0.0], History()

    def step(state: State, batch: Any) -> Any:
        now[0] += 2
        return state, {}

    measures = [mfu(1_000, peak_flops=10_000, clock=lambda: now[0])]
    first, observers = State(params=0, key=tnt.key(0)), [recorder(history, every_n_steps=2, measures=measures)]
    tnt.train(tnt.TrainUnit(train_step=step), first, [1, 2], max_epochs=1, observers=observers)
    assert history[0].metrics == {"throughput.flops_per_second": 500.0, "throughput.mfu": 0.05}


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA L40S", 362e12),
        ("Tesla V100-SXM2-16GB", 125e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA H100 PCIe", 756e12),
    ],
)
def test_the_peak_of_a_known_device(monkeypatch: pytest.MonkeyPatch, name: str, peak: float):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    measure, now = mfu(peak / 4, clock=iter(range(100)).__next__), History()
    tnt.evaluate(
        tnt.EvalUnit(eval_step=lambda state, batch: (state, {})),
        State(params=0, key=tnt.key(0)),
        [1],
        observers=[recorder(now, measures=[measure])],
    )
    # Of start, epoch_start, fetched, step_start, step_end and epoch_end the last is 5 seconds after the first.
    assert now[0].metrics["throughput.mfu"] == pytest.approx(1 / 4 / 5)


@pytest.mark.parametrize("name", [None, "Radeon RX 7900 XTX", "NVIDIA A10G", "NVIDIA L40"])
def test_a_device_that_is_not_known_is_an_error(monkeypatch: pytest.MonkeyPatch, name: str | None):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: name is not None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    with pytest.raises(UsageError, match=rf"runs on {name or 'the CPU'}, .*Write mfu\(flops, peak_flops=...\)"):
        mfu(1)


@pytest.mark.parametrize(("flops", "peak"), [(0, 1.0), (1, -1.0), (1, float("nan"))])
def test_numbers_are_above_zero(flops: int, peak: float):
    with pytest.raises(UsageError, match="both are above 0"):
        mfu(flops, peak_flops=peak)

"""What the banner says of a run, once, whichever it is; and that it waits for nothing where it is told not to."""

import io
import platform
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import tnt_func as tnt
from tnt_func.observers import banner, every, module_summary


def supervised() -> Any:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))
    return module, *tnt.supervised(module, nn.functional.mse_loss, tnt.optim.adamw(1e-3), key=tnt.key(7))


DATA = [(torch.ones(3, 4), torch.ones(3, 2))] * 2


def test_it_says_what_runs_on_what_from_where():
    module, unit, state = supervised()
    said = io.StringIO()
    observers = [banner("a name", module_summary(module), file=said)]
    tnt.fit(unit, state, DATA, DATA, max_epochs=2, observers=observers)
    versions, _, where, params, buffers, opt_state, *also = said.getvalue().splitlines()
    assert f"tnt_func {tnt.__version__}, torch {torch.__version__}, Python {platform.python_version()}" in versions
    first = tnt.prepare(unit, state)
    assert where == f"train from step 0, epoch 0, key 7, digest {tnt.digest(first)}"
    assert params == "params: 14 elements in 4 tensors, 56 bytes, torch.float32 on cpu"
    assert buffers == "buffers: 5 elements in 3 tensors, 24 bytes, torch.float32, torch.int64 on cpu"
    assert opt_state.startswith("opt_state: ") and also[:2] == ["a name", str(module_summary(module)).splitlines()[0]]


def test_it_is_printed_once_a_run_and_inside_a_combinator(capsys: pytest.CaptureFixture[str]):
    _, unit, state = supervised()
    observers = [every(banner(digests=False), steps=100)]
    pauses = iter([False, False, True])
    state = tnt.train(unit.train_unit, state, DATA, max_epochs=2, observers=observers, pause_when=lambda: next(pauses))
    tnt.train(unit.train_unit, state, DATA, max_epochs=2, observers=observers)
    tnt.evaluate(unit.eval_unit, state, DATA, observers=observers)
    tnt.predict(unit.predict_unit, state, DATA, observers=observers)
    wheres = [line for line in capsys.readouterr().out.splitlines() if " from step " in line]
    assert wheres == [
        "train from step 0, epoch 0, key 7",
        "train from step 2, epoch 1, key 7",
        "eval from step 0, epoch 0, key 7",
        "predict from step 0, epoch 0, key 7",
    ]


def test_an_open_epoch_and_a_state_without_tensors():
    unit = tnt.TrainUnit(train_step=lambda state, batch: (state, {}))
    said, first = io.StringIO(), tnt.State(params=0, key=tnt.key(0))
    state = tnt.train(unit, first, [1, 2], max_epochs=1, pause_when=lambda: True)
    tnt.train(unit, state, [1, 2], max_epochs=1, observers=[banner(digests=False, file=said)])
    assert said.getvalue().splitlines()[2:] == ["train from step 1, epoch 0 and 1 steps, key 0"]


def test_cuda_devices_are_named(monkeypatch: pytest.MonkeyPatch):
    """The devices are stood in for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    properties = SimpleNamespace(name="NVIDIA A100-SXM4-80GB", total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    said = io.StringIO()
    unit = tnt.EvalUnit(eval_step=lambda state, batch: (state, {}))
    tnt.evaluate(unit, tnt.State(params=0, key=tnt.key(0)), [], observers=[banner(file=said)])
    named = "NVIDIA A100-SXM4-80GB (80 GiB)"
    assert said.getvalue().splitlines()[1].endswith(f"; CUDA 12.8: {named}, {named}")

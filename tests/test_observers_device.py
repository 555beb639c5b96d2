"""What is asked of devices and ranks, and when; devices are stood in for where there are none."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch

import tnt_func as tnt
from tnt_func.errors import UsageError
from tnt_func.observers import barrier, cuda_memory_snapshots, empty_cuda_cache, every, on, synchronize

FIRST = tnt.State(params=0.0, key=tnt.key(0))


def step(state: tnt.State, batch: Any) -> Any:
    return state, {"inverse": 1 / batch}


FIT = tnt.FitUnit(train_unit=tnt.TrainUnit(train_step=step), eval_unit=tnt.EvalUnit(eval_step=step))


def fit(*observers: Any, data: Any = (1, 2, 3)) -> None:
    tnt.fit(FIT, FIRST, data, [1], max_epochs=2, observers=observers)


def test_without_cuda_devices_are_left_alone_and_snapshots_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    fit(every(synchronize, steps=1), every(barrier, steps=1), on("epoch_end", empty_cuda_cache))
    with pytest.raises(UsageError, match=r"snapshots'\) was given where torch has no CUDA device; .* Write observers="):
        cuda_memory_snapshots("snapshots")


@pytest.mark.parametrize("fails", [False, True])
def test_snapshots_are_dumped_at_their_steps_and_on_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fails: bool
):
    """The allocator's history is stood in for; when it is asked for what is tested."""
    called: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **how: called.append(how))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: called.append(Path(path).name))
    with pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext():
        snapshots = cuda_memory_snapshots(tmp_path / "snapshots", every_n_steps=4, max_entries=7)
        fit(snapshots, data=[1, 0] if fails else [1, 2, 3])
    dumped = ["failed.pickle"] if fails else ["train-step-000000000004.pickle"]
    assert called == [{"max_entries": 7}, *dumped, {"enabled": None}] and (tmp_path / "snapshots").is_dir()
    with pytest.raises(UsageError, match="both are at least 1"):
        cuda_memory_snapshots("snapshots", every_n_steps=0)


@pytest.mark.parametrize("initialised", [False, True])
def test_ranks_meet_where_there_are_ranks(monkeypatch: pytest.MonkeyPatch, initialised: bool):
    met: list[bool] = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: initialised)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: met.append(True))
    tnt.train(FIT.train_unit, FIRST, [1, 2, 3, 4], max_epochs=1, observers=[on("step_done", barrier)])
    assert len(met) == (4 if initialised else 0)


def test_the_device_is_waited_for(monkeypatch: pytest.MonkeyPatch):
    waited: list[bool] = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: waited.append(True))
    fit(every(synchronize, steps=3))
    assert len(waited) == 2

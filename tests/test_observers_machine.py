"""What psutil and the driver say, in the rows; what is missing, before a run starts."""

import sys
import time
from collections import namedtuple
from types import SimpleNamespace
from typing import Any

import psutil
import pynvml
import pytest
import torch

import tnt_func as tnt
from tnt_func.errors import MissingExtraError, UsageError
from tnt_func.events import Event
from tnt_func.observers import History, gpu, recorder, system
from tnt_func.observers.machine import System

FIRST = tnt.State(params=0, key=tnt.key(0))


def busy_step(state: tnt.State, batch: Any) -> Any:
    start = time.process_time()
    while time.process_time() - start < 0.03:
        pass
    return state, {}


def test_the_numbers_are_psutils():
    history = History()
    unit = tnt.TrainUnit(train_step=busy_step)
    observers = [recorder(history, every_n_steps=1, measures=[system()])]
    tnt.train(unit, FIRST, [1, 2], max_epochs=1, observers=observers)
    found, memory = history[-1].metrics, psutil.virtual_memory()
    assert [row.kind for row in history] == ["step", "step", "epoch"]
    assert found["system.process_memory_bytes"] == pytest.approx(psutil.Process().memory_info().rss, rel=0.2)
    # What others use may change between two looks at it.
    assert 0 < found["system.memory_used_bytes"] < memory.total
    assert found["system.memory_percent"] == pytest.approx(
        100 * found["system.memory_used_bytes"] / memory.total, abs=5
    )
    # Differences of seconds since the start of the machine round.
    assert 0 < found["system.cpu_percent"] <= 100 + 1e-3 and 0 < found["system.process_cpu_percent"]


Cpu = namedtuple("Cpu", "user system idle iowait guest guest_nice")
Own = namedtuple("Own", "user system")


class Psutil:
    """Stands in for psutil, on two cores of which one is idle, and guests take a tenth."""

    def __init__(self) -> None:
        self.seconds = self.own = 0.0

    def pass_by(self, seconds: float, own: float) -> None:
        """Seconds, of which the process has some of a CPU."""
        self.seconds, self.own = self.seconds + seconds, self.own + own

    def Process(self) -> Any:
        return SimpleNamespace(
            cpu_times=lambda: Own(0.75 * self.own, 0.25 * self.own), memory_info=lambda: SimpleNamespace(rss=7)
        )

    def cpu_times(self) -> Cpu:
        busy = self.seconds - 0.5 * self.own  # What the process does, the others leave.
        return Cpu(busy - 1, 1, 0.9 * (2 * self.seconds - busy), 0.1 * (2 * self.seconds - busy), 0.1 * self.seconds, 0)

    def virtual_memory(self) -> Any:
        return SimpleNamespace(percent=50.0, total=100, available=25)


def test_the_cpu_is_counted_since_last_read_and_over_the_epoch():
    fake = Psutil()
    measure = System(fake, lambda: fake.seconds)

    def told(phase: Any, point: Any) -> dict[str, float]:
        event = Event(phase, point, FIRST)
        measure(event)
        return measure.read(event) if point in ("step_end", "epoch_end") else {}

    told("train", "start")
    fake.pass_by(10, own=10)
    told("train", "epoch_start")
    fake.pass_by(10, own=2)
    first = told("train", "step_end")  # Since the start.
    assert first.pop("system.cpu_percent") == pytest.approx(100 * (20 - 6) / 40)
    assert first == {
        "system.process_cpu_percent": 60.0,
        "system.process_memory_bytes": 7.0,
        "system.memory_percent": 50.0,
        "system.memory_used_bytes": 75.0,
    }
    again = told("train", "step_end")  # At the same moment nothing can be told of the CPU.
    assert "system.process_cpu_percent" not in again and "system.cpu_percent" not in again
    told("eval", "start")
    fake.pass_by(10, own=5)
    assert told("eval", "epoch_end")["system.process_cpu_percent"] == 50.0
    fake.pass_by(10, own=2)
    assert told("train", "step_end")["system.process_cpu_percent"] == 35.0
    assert told("train", "epoch_end")["system.process_cpu_percent"] == 30.0


def test_without_psutil_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "psutil", None)
    with pytest.raises(MissingExtraError, match=r"system needs psutil.*pip install 'tnt-func\[system\]'"):
        system()


def test_without_nvml_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(MissingExtraError, match=r"gpu needs nvidia-ml-py.*pip install 'tnt-func\[gpu\]'"):
        gpu()


def test_without_a_gpu_it_says_so_and_what_to_write(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match=r"gpu\(1\) was given where torch has no CUDA device; .* Write measures="):
        gpu(1)


def test_the_drivers_numbers_are_of_the_device_that_torch_counts(monkeypatch: pytest.MonkeyPatch):
    """NVML and torch's allocator are stood in for; which device of NVML's is torch's is torch's own answer."""
    numbers = {2: (20, 2_000), 5: (50, 5_000)}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "_HAS_PYNVML", True)
    monkeypatch.setattr(torch.cuda, "pynvml", pynvml, raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: index)
    monkeypatch.setattr(
        pynvml, "nvmlDeviceGetUtilizationRates", lambda handle: SimpleNamespace(gpu=numbers[handle][0], memory=-1)
    )
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lambda handle: SimpleNamespace(used=numbers[handle][1]))
    for index, name in enumerate(("memory_allocated", "memory_reserved", "max_memory_allocated")):
        monkeypatch.setattr(torch.cuda, name, lambda device, index=index: 10 * device + index)
    measure, history = gpu(1), History()
    assert repr(measure) == "gpu(1)"
    unit = tnt.TrainUnit(train_step=lambda state, batch: (state, {}))
    tnt.train(unit, FIRST, [1], max_epochs=1, observers=[recorder(history, every_n_steps=1, measures=[measure])])
    assert history[0].metrics == {
        "gpu.utilization_percent": 50.0,
        "gpu.memory_used_bytes": 5_000.0,
        "gpu.memory_allocated_bytes": 10.0,
        "gpu.memory_reserved_bytes": 11.0,
        "gpu.memory_peak_bytes": 12.0,
    }

"""Measures of the machine that a run is on: CPU and memory by psutil, a GPU by NVML.

They look when they are read, at the cadence of the recorder, and where an epoch begins; a look takes less than a
millisecond, and else they cost nothing.

Example:
    >>> import tnt_func as tnt
    >>> unit = tnt.TrainUnit(train_step=lambda state, batch: (state, {}))
    >>> history = tnt.observers.History()
    >>> observers = [tnt.observers.recorder(history, measures=[system()])]
    >>> _ = tnt.train(unit, tnt.State(params=0, key=tnt.key(0)), [1], max_epochs=1, observers=observers)
    >>> 0 < history[0].metrics["system.memory_percent"] <= 100
    True
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from tnt_func.errors import UsageError, optional
from tnt_func.events import Event
from tnt_func.types import Phase, Point, typed


@typed
def system() -> "System":
    """A measure of CPU and memory, of the machine and of this process; its workers are the machine's.

    Its numbers: "system.cpu_percent", of all cores, and "system.process_cpu_percent", of one core, so above 100 where
    several are busy, both over the time since last read or, for the row of an epoch, over the epoch;
    "system.memory_percent" and "system.memory_used_bytes", what is not available to a new process;
    "system.process_memory_bytes", the resident set.

    Raises:
        MissingExtraError: psutil is not installed.

    Example:
        >>> system()
        system()
    """
    return System(optional("psutil", user="system", extra="system"), time.perf_counter)


class _Times(NamedTuple):
    """Seconds of the clock, and of the CPU: busy and all of the machine's, and the process's."""

    clock: float
    busy: float
    machine: float
    process: float


class System:
    """What `system` makes."""

    def __init__(self, psutil: Any, clock: Callable[[], float]):
        self._psutil, self._clock = psutil, clock
        self._process = psutil.Process()
        self._before: dict[tuple[Phase, Point], _Times] = {}

    def __repr__(self) -> str:
        return "system()"

    def __call__(self, event: Event) -> None:
        """Look where a run or an epoch begins."""
        if event.point in ("start", "epoch_start"):
            now = self._times()
            self._before[event.phase, "epoch_end"] = now
            if event.point == "start":
                self._before[event.phase, "step_end"] = now

    def read(self, event: Event) -> dict[str, float]:
        """The numbers of the moment; of the CPU since last read at this point of the phase."""
        memory, now = self._psutil.virtual_memory(), self._times()
        since = _Times._make(b - a for a, b in zip(self._before.get(event[:2], now), now, strict=True))
        self._before[event[:2]] = now
        found = {
            "system.memory_percent": float(memory.percent),
            "system.memory_used_bytes": float(memory.total - memory.available),
            "system.process_memory_bytes": float(self._process.memory_info().rss),
        }
        if since.machine > 0:  # The CPU is counted in hundredths of a second.
            found["system.cpu_percent"] = 100 * since.busy / since.machine
        if since.clock > 0:
            found["system.process_cpu_percent"] = 100 * since.process / since.clock
        return found

    def _times(self) -> _Times:
        times, own = self._psutil.cpu_times(), self._process.cpu_times()
        # As psutil.cpu_percent counts, which remembers the last call of anybody: a guest's time is in user and nice.
        machine = sum(times) - getattr(times, "guest", 0) - getattr(times, "guest_nice", 0)
        idle = times.idle + getattr(times, "iowait", 0)
        return _Times(self._clock(), machine - idle, machine, own.user + own.system)


@typed
def gpu(device: int | torch.device | None = None) -> "Gpu":
    """A measure of a GPU: what the driver says of it, and what torch has allocated on it. It waits for no operation.

    Its numbers: "gpu.utilization_percent", of the driver's last sample period (a sixth of a second to a second), and
    "gpu.memory_used_bytes", of all processes; "gpu.memory_allocated_bytes", in tensors of this process,
    "gpu.memory_reserved_bytes", with what torch's allocator keeps for later ones, and "gpu.memory_peak_bytes", the most
    that was allocated, since the process began or `torch.cuda.reset_peak_memory_stats`.

    Args:
        device: as torch counts them, `CUDA_VISIBLE_DEVICES` minded; the current one if not given.

    Raises:
        MissingExtraError: nvidia-ml-py is not installed.
        UsageError: torch has no CUDA device here.

    Example:
        >>> measures = [gpu()] if torch.cuda.is_available() else []

    References:
        torch.cuda.utilization, torch.cuda.device_memory_used, torch.cuda.memory_allocated.
    """
    optional("pynvml", user="gpu", extra="gpu", package="nvidia-ml-py")
    if not torch.cuda.is_available():
        raise UsageError(
            f"gpu({'' if device is None else repr(device)}) was given where torch has no CUDA device; it measures one. "
            "Write measures=[gpu()] if torch.cuda.is_available() else []."
        )
    measure = Gpu(device)
    measure.read(None)  # What the driver refuses, it refuses before training starts.
    return measure


class Gpu:
    """What `gpu` makes."""

    def __init__(self, device: int | torch.device | None):
        self._device = device

    def __repr__(self) -> str:
        return f"gpu({'' if self._device is None else repr(self._device)})"

    def __call__(self, event: Event) -> None:
        """There is nothing to note."""

    def read(self, event: Event | None) -> dict[str, float]:
        """The numbers of the moment."""
        cuda, device = torch.cuda, self._device
        return {
            "gpu.utilization_percent": float(cuda.utilization(device)),
            "gpu.memory_used_bytes": float(cuda.device_memory_used(device)),
            "gpu.memory_allocated_bytes": float(cuda.memory_allocated(device)),
            "gpu.memory_reserved_bytes": float(cuda.memory_reserved(device)),
            "gpu.memory_peak_bytes": float(cuda.max_memory_allocated(device)),
        }

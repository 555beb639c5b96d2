"""What is asked of a device, or of the other ranks, now and then: by `on` and `every`, which say when.

Example:
    >>> from tnt_func.observers import every, on
    >>> observers = [every(synchronize, steps=100), on("epoch_end", empty_cuda_cache), every(barrier, epochs=1)]
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from tnt_func.errors import UsageError
from tnt_func.events import Event, Observer
from tnt_func.lines import writable
from tnt_func.observers.combinators import every, named, needs_all, on
from tnt_func.observers.scopes import during
from tnt_func.types import typed


def synchronize(event: Event) -> None:
    """Wait for the device to have done all that was queued; where there is none, nothing.

    Example:
        >>> from tnt_func.observers import every
        >>> observers = [every(synchronize, steps=100)]

    References:
        torch.accelerator.synchronize.
    """
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def barrier(event: Event) -> None:
    """Wait for all ranks to come here; where no process group is initialised, nothing. Every rank must have it.

    Example:
        >>> from tnt_func.observers import every
        >>> observers = [every(barrier, steps=1000)]

    References:
        torch.distributed.barrier.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def empty_cuda_cache(event: Event) -> None:
    """Give the memory that no tensor is in back to the driver, for other processes; without CUDA, nothing.

    It waits for the device, and later steps allocate anew.

    Example:
        >>> from tnt_func.observers import on
        >>> observers = [on("epoch_end", empty_cuda_cache)]

    References:
        torch.cuda.empty_cache.
    """
    torch.cuda.empty_cache()


@typed
def cuda_memory_snapshots(
    directory: str | os.PathLike[str], *, every_n_steps: int | None = None, max_entries: int = 100_000
) -> Observer:
    """An observer that notes the allocations on CUDA devices, and writes them down when the run fails.

    The files, "failed.pickle" and "train-step-000000000100.pickle", are for pytorch.org/memory_viz. What was allocated
    before the run is in them without its history.

    Args:
        directory: of the files; made when the run starts.
        every_n_steps: steps of each phase's lifetime, after which they are written down as well.
        max_entries: allocations that are remembered, the latest.

    Raises:
        UsageError: torch has no CUDA device here; a number is below 1.

    Example:
        >>> observers = [cuda_memory_snapshots("snapshots")] if torch.cuda.is_available() else []

    References:
        torch.cuda.memory._record_memory_history, torch.cuda.memory._dump_snapshot.
    """
    said = f"cuda_memory_snapshots({os.fspath(directory)!r})"
    if min(1 if every_n_steps is None else every_n_steps, max_entries) < 1:
        raise UsageError(
            f"cuda_memory_snapshots(every_n_steps={every_n_steps}, max_entries={max_entries}) was given; both are at "
            "least 1, or every_n_steps=None for failures alone. Write every_n_steps=100, say."
        )
    if not torch.cuda.is_available():
        raise UsageError(
            f"{said} was given where torch has no CUDA device; it notes what is allocated on one. Write "
            "observers=[cuda_memory_snapshots(...)] if torch.cuda.is_available() else []; torch.profiler with "
            "profile_memory=True sees memory of the CPU."
        )

    @contextmanager
    def noting() -> Iterator[None]:
        with writable(Path(directory)):
            Path(directory).mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._record_memory_history(max_entries=max_entries)
        try:
            yield
        finally:
            torch.cuda.memory._record_memory_history(enabled=None)

    def dump(name: str) -> None:
        torch.cuda.memory._dump_snapshot(os.fspath(Path(directory) / f"{name}.pickle"))

    def dump_step(event: Event) -> None:
        dump(f"{event.phase}-step-{event.state.progress.of(event.phase).steps:012}")

    steps = [every(dump_step, steps=every_n_steps)] if every_n_steps else []
    return named(said, during(noting), *steps, on("failed", lambda event: dump("failed")), check_part=needs_all)

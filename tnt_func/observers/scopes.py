"""Observers around a whole run: what they switch is switched back when the run is over, however it ends.

Example:
    >>> import contextlib
    >>> import tnt_func as tnt
    >>> @contextlib.contextmanager
    ... def told():
    ...     print("before")
    ...     yield
    ...     print("after")
    >>> unit = tnt.TrainUnit(train_step=lambda state, batch: (state.replace(params=1 / batch), {}))
    >>> tnt.train(unit, tnt.State(params=0.0, key=tnt.key(0)), [1, 0], max_epochs=1, observers=[during(told)])
    Traceback (most recent call last):
    ZeroDivisionError: division by zero
"""

import gc
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from tnt_func.errors import UsageError
from tnt_func.events import Event, Observer
from tnt_func.lines import writable
from tnt_func.observers.combinators import every, named, needs_all, on
from tnt_func.types import typed

_PROFILING = threading.Lock()
"""Held while a profiler is under way: inside of another, torch's ends the process."""


@typed
def during(scope: Callable[[], AbstractContextManager[Any]]) -> Observer:
    """An observer that holds a context manager open while a run goes on: from its first event until it is closed.

    What it does must not reach the numbers of the run (law 6): no autocast, no gradient mode. An evaluation inside
    training is inside.

    Args:
        scope: makes a context manager, for every run a new one.

    Example:
        >>> during(torch.profiler.profile)
        during(<class 'torch.profiler.profiler.profile'>)
    """
    return _During(scope)


class _During:
    def __init__(self, scope: Callable[[], AbstractContextManager[Any]]):
        self._scope = scope
        self._inside: ExitStack | None = None

    def __repr__(self) -> str:
        return f"during({self._scope!r})"

    def __call__(self, event: Event) -> None:
        # Not of the start alone: a run inside of this one that has the same observer closes it, too.
        if event.point not in ("end", "paused", "failed"):
            self.open(event)

    def open(self, event: Event) -> None:
        if self._inside is None:
            inside = ExitStack()
            inside.enter_context(self._scope())
            self._inside = inside

    def close(self) -> None:
        inside, self._inside = self._inside, None
        if inside is not None:
            inside.close()


@typed
def garbage_collection(*, every_n_steps: int) -> Observer:
    """An observer that collects cyclic garbage itself, and keeps Python from doing so in between.

    Python collects whenever enough objects were made, on every rank at other steps, and all the others wait. Here it is
    at the end of every n-th step of a phase's lifetime, on all ranks alike. What is there when the run starts, modules
    and their code above all, is left out, which makes a collection a hundred times faster. Afterwards the collector is
    as it was.

    Args:
        every_n_steps: what runs out of memory in between needs fewer.

    Raises:
        UsageError: every_n_steps is below 1.

    Example:
        >>> garbage_collection(every_n_steps=1000)
        garbage_collection(every_n_steps=1000)

    References:
        gc.disable, gc.freeze, gc.collect.
    """

    @contextmanager
    def disabled() -> Iterator[None]:
        was, frozen = gc.isenabled(), gc.get_freeze_count()
        gc.disable()
        if not frozen:  # Somebody else's are not told from ours, nor thawed without them.
            gc.freeze()
        try:
            yield
        finally:
            if not frozen:
                gc.unfreeze()
            if was:
                gc.enable()

    if every_n_steps < 1:
        raise UsageError(
            f"garbage_collection(every_n_steps={every_n_steps}) was given; it is at least 1. Write every_n_steps=1000."
        )
    collecting = every(lambda event: gc.collect(), steps=every_n_steps)
    said = f"garbage_collection(every_n_steps={every_n_steps})"
    return named(said, during(disabled), collecting, check_part=needs_all)


@typed
def tf32(enabled: bool = True) -> Observer:
    """An observer that lets CUDA round the factors of float32 products to TF32 during a run, or forbids it.

    The one observer that numbers depend on, and on CUDA alone: 10 bits of a factor count instead of 23. A run resumes
    exactly with the same switch. It covers products of matrices, convolutions and recurrent networks. During the run
    torch's older switches, `allow_tf32`, cannot be read.

    Example:
        >>> tf32(False)
        tf32(False)

    References:
        torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision.
    """

    @contextmanager
    def switched() -> Iterator[None]:
        backends: Any = torch.backends
        switches = (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn)
        before = [switch.fp32_precision for switch in switches]
        try:
            for switch in switches:
                switch.fp32_precision = "tf32" if enabled else "ieee"
            yield
        finally:
            for switch, precision in zip(switches, before, strict=True):
                switch.fp32_precision = precision

    return named(f"tf32({enabled})", during(switched))


@typed
def profiler(
    directory: str | os.PathLike[str],
    *,
    wait: int = 10,
    warmup: int = 2,
    active: int = 3,
    repeat: int = 1,
    skip_first: int = 0,
    record_shapes: bool = False,
    profile_memory: bool = False,
    with_stack: bool = False,
) -> Observer:
    """An observer that profiles some steps of a run by torch's profiler, and writes a trace file for each cycle.

    The files, `*.pt.trace.json`, are for chrome://tracing, Perfetto, or TensorBoard's profiler. Steps of every phase
    count alike, from the run's start. A cycle that the end of the run, or a failure, cuts off is written as far as it
    got. While steps are recorded they are slower; CUDA's operations are in it where there are any.

    Args:
        directory: of the files; made when the run starts.
        wait, warmup, active: steps of a cycle: without profiling, with it and thrown away, and recorded.
        repeat: cycles; 0 is until the run is over.
        skip_first: steps before the first cycle.
        record_shapes, profile_memory, with_stack: as in `torch.profiler.profile`.

    Raises:
        UsageError: a number is negative; warmup or active is below 1; out of the run, where it is profiled already.
        CheckpointError: out of the run, when the directory cannot be made.

    Example:
        >>> profiler("traces", wait=100, active=5)
        profiler('traces')

    References:
        torch.profiler.schedule, torch.profiler.tensorboard_trace_handler.
    """
    if min(wait, repeat, skip_first) < 0 or min(warmup, active) < 1:
        raise UsageError(
            f"profiler(wait={wait}, warmup={warmup}, active={active}, repeat={repeat}, skip_first={skip_first}) was "
            "given; none is negative, and the first profiled step is always a warm-up. Write warmup=1, active=3, say."
        )
    profile: Any = None
    write = torch.profiler.tensorboard_trace_handler(os.fspath(directory))

    def written(cycle: Any) -> None:
        write(cycle)
        cycle.profiler = None  # What is written may go; torch drops it as well, with a warning.

    @contextmanager
    def profiling() -> Iterator[None]:
        nonlocal profile
        if _PROFILING.locked() or torch.autograd._profiler_enabled():  # pyright: ignore[reportPrivateImportUsage]
            raise UsageError(
                f"profiler({os.fspath(directory)!r}) was given where another is under way; torch has one at a time. "
                "Write one profiler(...), or let the other end first."
            )
        with writable(Path(directory)):
            Path(directory).mkdir(parents=True, exist_ok=True)
        with (
            _PROFILING,
            torch.profiler.profile(
                schedule=torch.profiler.schedule(
                    wait=wait, warmup=warmup, active=active, repeat=repeat, skip_first=skip_first
                ),
                on_trace_ready=written,
                record_shapes=record_shapes,
                profile_memory=profile_memory,
                with_stack=with_stack,
            ) as profile,
        ):
            yield

    stepping = on("step_end", lambda event: profile.step())
    return named(f"profiler({os.fspath(directory)!r})", during(profiling), stepping, check_part=needs_all)

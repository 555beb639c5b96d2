"""What a run is, printed where it starts: versions, device, where it begins, and how much it holds.

Example:
    >>> import tnt_func as tnt
    >>> unit = tnt.TrainUnit(train_step=lambda state, batch: (state, {}))
    >>> first = tnt.State(params={"w": torch.ones(3, 2)}, key=tnt.key(0))
    >>> _ = tnt.train(unit, first, [1], max_epochs=1, observers=[banner()])
    tnt_func ..., torch ..., Python ..., ...
    ...
    train from step 0, epoch 0, key 0, digest ...
    params: 6 elements in 1 tensor, 24 bytes, torch.float32 on cpu
"""

import os
import platform
import sys
from collections.abc import Iterator
from typing import Any

import torch

from tnt_func import pytree as trees
from tnt_func.events import Event, Observer
from tnt_func.observers.combinators import is_rank_zero
from tnt_func.observers.console import Text
from tnt_func.state import State, digest
from tnt_func.types import typed


@typed
def banner(*also: object, digests: bool = True, file: Text | None = None) -> Observer:
    """An observer that prints what a run is, once, where it starts.

    Args:
        also: printed after it: the optimizer, a `module_summary` say, a name, the arguments of the program.
        digests: whether the state's digest is told, for which all of it is fetched from the device.
        file: open, written to by every rank that has it; None is the standard output of the moment, of rank 0 alone.

    Example:
        >>> from tnt_func.optim import adamw
        >>> banner("fine-tuning, third attempt", adamw(1e-4))
        banner('fine-tuning, third attempt', adamw(0.0001))
    """
    return _Banner(also, digests, file)


class _Banner:
    def __init__(self, also: tuple[object, ...], digests: bool, file: Text | None):
        self._also, self._digests = also, digests
        self._file: Any = file
        self._printed = False

    def __repr__(self) -> str:
        return f"banner({', '.join(map(repr, self._also))})"

    def __call__(self, event: Event) -> None:
        if event.point == "start":
            self.open(event)

    def open(self, event: Event) -> None:
        if not self._printed and (self._file is not None or is_rank_zero()):
            self._printed = True
            lines = [*_machine(), *_run(event, self._digests), *map(str, self._also)]
            print("\n".join(lines), file=sys.stdout if self._file is None else self._file)

    def close(self) -> None:
        self._printed = False


def _machine() -> Iterator[str]:
    version = sys.modules["tnt_func"].__version__
    yield (
        f"tnt_func {version}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{platform.system()} {platform.machine()}"
    )
    threads = f"{os.cpu_count()} CPUs, {torch.get_num_threads()} of them for torch"
    if not torch.cuda.is_available():
        yield threads
        return
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    named = ", ".join(f"{device.name} ({device.total_memory / 2**30:.0f} GiB)" for device in devices)
    yield f"{threads}; CUDA {torch.version.cuda}: {named}"


def _run(event: Event, digests: bool) -> Iterator[str]:
    state = event.state
    progress = state.progress.of(event.phase)
    inside = f" and {progress.steps_in_epoch} steps" if progress.is_open else ""
    told = f", digest {digest(state)}" if digests else ""
    key = f"key {state.key.seed}"
    yield f"{event.phase} from step {progress.steps}, epoch {progress.epochs}{inside}, {key}{told}"
    for name in ("params", "buffers", "opt_state"):
        yield from _part(name, state)


def _part(name: str, state: State) -> Iterator[str]:
    tensors = trees.tensors(getattr(state, name))
    if not tensors:
        return
    dtypes = ", ".join(sorted({str(each.dtype) for each in tensors}))
    devices = ", ".join(sorted({str(each.device) for each in tensors}))
    yield (
        f"{name}: {sum(each.numel() for each in tensors):,} elements in {len(tensors)} "
        f"tensor{'s' * (len(tensors) > 1)}, {sum(each.nbytes for each in tensors):,} bytes, {dtypes} on {devices}"
    )

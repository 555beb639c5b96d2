"""A pipeline read ahead by worker processes: the same elements in the same order, however many there are.

Workers are told indices and nothing else, so they start at any position, and what they compute is what the pipeline
computes without them. They are started when the first element is asked for, and are gone when the iterator is: at the
end, after an error, and when it is dropped. User code runs in processes and never in threads, which would share
torch's default generator.

Laws:
    The elements are those of the pipeline, in its order, whatever the number of workers and what they prefetch.

Example:
    >>> from tnt_func.data.sources import source
    >>> squares = source(range(4)).map(abs, draws=()).batch(2)
    >>> list(loader(squares, num_workers=1).batches(epoch=0, start=1))
    [tensor([2, 3])]
"""

import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing.reduction import ForkingPickler
from typing import Any, Literal, TypeAlias

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from tnt_func import rng
from tnt_func.data.batching import Batch, Bucket
from tnt_func.data.pipelines import Elements
from tnt_func.data.stages import Map, lineage
from tnt_func.errors import UsageError
from tnt_func.types import typed

StartMethod: TypeAlias = Literal["fork", "spawn", "forkserver"]


@typed
def loader(
    pipeline: Elements,
    *,
    num_workers: int = 0,
    prefetch: int = 2,
    pin_memory: bool = False,
    start_method: StartMethod | None = None,
) -> "Loader":
    """A pipeline that worker processes run ahead of the loop.

    Args:
        pipeline: what they run; its last stage mostly is `batch`, for an element is what a worker sends.
        num_workers: processes, with one torch thread each; 0 computes in this one.
        prefetch: elements that each worker has ready ahead of the loop.
        pin_memory: whether tensors are copied into page-locked memory, from where they move to a GPU faster.
        start_method: of the processes; None is the platform's.

    Raises:
        UsageError: a number is out of range, or a function cannot be sent to the workers.

    Example:
        >>> from tnt_func.data.sources import source
        >>> list(loader(source([1, 2])).batches())
        [1, 2]
    """
    if num_workers < 0 or prefetch < 1:
        raise UsageError(
            f"loader(..., num_workers={num_workers}, prefetch={prefetch}) was given; workers are counted from 0, and "
            "each has at least one element ready. Write num_workers=2, prefetch=2."
        )
    if num_workers and (start_method or _default_start_method()) != "fork":
        _check_sendable(pipeline)
    return Loader(pipeline, num_workers, prefetch, pin_memory, start_method)


@dataclass(frozen=True, eq=False)
class Loader:
    """What `loader` returns: a Pipeline, as long as the one it runs.

    Example:
        >>> from tnt_func.data.sources import source
        >>> len(loader(source([1, 2, 3]).batch(2)))
        2
    """

    pipeline: Elements
    num_workers: int
    prefetch: int
    pin_memory: bool
    start_method: StartMethod | None

    def __len__(self) -> int:
        return len(self.pipeline)

    def shard(self, index: int, count: int) -> "Loader":
        """A loader of that shard of the pipeline."""
        return replace(self, pipeline=self.pipeline.shard(index, count))

    def batches(self, epoch: int = 0, start: int = 0) -> Iterator[Any]:
        """The elements of an epoch from a position on.

        Raises:
            Exception: whatever a function raised in a worker, of its own type, with a note of where.
        """
        if not self.num_workers and not self.pin_memory:
            yield from self.pipeline.batches(epoch, start)
            return
        ahead: Any = iter(
            DataLoader(
                _Indexed(self.pipeline, epoch),
                batch_size=None,
                sampler=range(start, len(self.pipeline)),
                num_workers=self.num_workers,
                prefetch_factor=self.prefetch if self.num_workers else None,
                pin_memory=self.pin_memory,
                multiprocessing_context=self.start_method if self.num_workers else None,
                collate_fn=_as_it_is,
                # Of its own, for DataLoader would draw the workers' seeds from the global one.
                generator=torch.Generator(),
            )
        )
        try:
            for element in ahead:
                if isinstance(element, _Failure):
                    raise element.error
                yield element
        finally:
            # Now, and not when the last reference goes: a traceback may keep one for as long as it is looked at.
            if self.num_workers:
                ahead._shutdown_workers()


@dataclass(frozen=True)
class _Failure:
    """What a worker sends where an element could not be computed."""

    error: Exception


@dataclass(frozen=True)
class _Indexed(Dataset[Any]):
    """A pipeline's epoch by index, as a worker reads it."""

    pipeline: Elements
    epoch: int

    def __getitem__(self, index: int) -> Any:
        try:
            # A worker has no generators to preserve.
            with rng.preserved(() if get_worker_info() else rng.ALL):
                return self.pipeline.element(self.epoch, index)
        except Exception as error:
            error.add_note("".join(traceback.format_exception(error)))
            try:
                ForkingPickler.loads(ForkingPickler.dumps(error))  # pyright: ignore[reportAttributeAccessIssue]
            except Exception:
                raise error from None  # torch then sends its text
            return _Failure(error)


def _as_it_is(element: Any) -> Any:
    return element


def _default_start_method() -> str:
    # Asked without allow_none, it would be fixed from now on.
    return torch.multiprocessing.get_start_method(allow_none=True) or torch.multiprocessing.get_all_start_methods()[0]


def _check_sendable(pipeline: Elements) -> None:
    for stage in lineage(pipeline.stage):
        function = stage.fn if isinstance(stage, Map) else stage.collate if isinstance(stage, Batch | Bucket) else None
        try:
            ForkingPickler.dumps(function)
        except Exception as error:
            raise UsageError(
                f"loader(..., num_workers=...) was given a pipeline with {function!r}, which cannot be sent to "
                f"processes that do not begin as copies of this one: {error}. Write it as a function of a module, or "
                "start_method='fork' where there is one."
            ) from error

"""The processes that train together: who is here, which device each has, and how they are laid out.

The same script is one process, or many under torchrun. Everybody joins, or an error says who has not.

Example:
    >>> with init() as world:
    ...     world.rank, world.size, mesh(world).mesh_dim_names
    (0, 1, ('ranks',))
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from tnt_func.errors import RankError, TntError, UsageError
from tnt_func.types import typed

R = TypeVar("R")


@dataclass(frozen=True)
class World:
    """The processes that train together, and this one among them. Made by `init`, left at the end of its `with`.

    Args:
        rank: of this process, from 0.
        size: how many there are.
        local_rank: of this process among those of its machine.
        device: of this process.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device

    def __enter__(self) -> "World":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leave. An error is told to torchrun, which shows the first one and ends the other processes."""
        if isinstance(error, Exception) and "TORCHELASTIC_ERROR_FILE" in os.environ:
            from torch.distributed.elastic.multiprocessing.errors import get_error_handler

            if isinstance(error, RankError):
                time.sleep(1)  # The first error is another rank's, and torchrun tells them apart by whole seconds.
            get_error_handler().record_exception(error)
        dist.destroy_process_group()


@typed
def init(*, device: str | None = None, timeout: int | float | timedelta = 600) -> World:
    """Join the other processes of a run, as torchrun's environment tells; without it, be the only one.

    Args:
        device: "cpu", whose processes talk by gloo, or "cuda", each with the GPU of its local rank, by NCCL. Without
            it, "cuda" where there is one.
        timeout: seconds to wait for the others, at the start and in whatever is done together later.

    Returns:
        The world, to be entered: `with tnt.distributed.init() as world: ...`.

    Raises:
        UsageError: this process has joined already, or the device is neither of the two, or is not there.
        RankError: some have not joined in time; they are named.

    Example:
        >>> with init(device="cpu") as world:
        ...     world
        World(rank=0, size=1, local_rank=0, device=device(type='cpu'))
    """
    if dist.is_initialized():
        raise UsageError(
            "distributed.init() was called in a process that has joined already; a process joins once. Keep what the "
            "first call gave: with tnt.distributed.init() as world: ..."
        )
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if kind not in ("cpu", "cuda") or (kind == "cuda" and local_rank >= count):
        raise UsageError(
            f"distributed.init(device={device!r}) was given to local rank {local_rank}, and the machine has {count} "
            "GPUs; a process has the CPU, or a GPU of its own. Write device='cpu', or start one process for each GPU: "
            "torchrun --nproc-per-node gpu."
        )
    own = torch.device(kind, local_rank) if kind == "cuda" else torch.device("cpu")
    patience = timeout if isinstance(timeout, timedelta) else timedelta(seconds=timeout)
    store, rank, size = _joined(patience)
    if kind == "cuda":
        torch.cuda.set_device(own)
    try:
        backend = "gloo" if kind == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience)
    except RuntimeError as error:
        raise RankError(f"rank {rank} of {size} could not connect to the others: {error}") from error
    return World(rank, size, local_rank, own)


def _joined(patience: timedelta) -> tuple[Any, int, int]:
    """A store that all processes have signed, the rank of this one and their number."""
    if "RANK" not in os.environ:
        return dist.HashStore(), 0, 1  # pyright: ignore[reportPrivateImportUsage]
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store, began = None, time.monotonic()
    try:
        store, rank, size = next(rendezvous("env://", timeout=patience))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # That store outlives the processes that torchrun starts anew, and so do the addresses that they left in it.
            # Where each attempt has a store of its own, agents that came later count attempts in another way.
            store = dist.PrefixStore(f"tnt/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)  # pyright: ignore
        store.set(f"{rank}", "here")
        left = patience - timedelta(seconds=time.monotonic() - began)
        store.wait([f"{each}" for each in range(size)], max(left, timedelta(seconds=1)))
    except dist.DistError as error:
        missing = [str(each) for each in range(size) if store is not None and not store.check([f"{each}"])]
        raise RankError(
            f"rank {rank} has waited {patience.total_seconds():g} seconds, and of {size} ranks not all have joined: "
            f"{', '.join(missing) or 'one or more'} missing; a run begins when all are there. Look why they have not "
            f"started or not reached {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}, or wait longer: "
            "init(timeout=1800)."
        ) from error
    return store, rank, size


@typed
def mesh(world: World, **sizes: int) -> DeviceMesh:
    """The processes as a grid, each axis with a name; in one line, the axis `ranks`, if no sizes are given.

    Args:
        world: as `init` gives it.
        sizes: of each axis by name, from the outermost; together they make the world.

    Raises:
        UsageError: the sizes do not multiply to the size of the world.

    Example:
        >>> with init() as world:
        ...     mesh(world, replicas=1, shards=1).mesh_dim_names
        ('replicas', 'shards')

    References:
        torch.distributed.device_mesh.init_device_mesh.
    """
    shape = sizes or {"ranks": world.size}
    count = 1
    for size in shape.values():
        count *= size
    if count != world.size:
        raise UsageError(
            f"mesh(world, {', '.join(f'{name}={size}' for name, size in shape.items())}) was given for {world.size} "
            f"processes; the product of the sizes is their number. Write mesh(world), or start {count} processes."
        )
    return init_device_mesh(world.device.type, tuple(shape.values()), mesh_dim_names=tuple(shape))


@dataclass(frozen=True)
class Ranks:
    """The processes of a mesh, or along one of its axes, and which of them this is.

    Example:
        >>> with init() as world:
        ...     Ranks.of(mesh(world)).size
        1
    """

    group: Any
    rank: int
    size: int

    @classmethod
    def of(cls, mesh: DeviceMesh, axis: int | None = None) -> "Ranks":
        """Those along an axis; of the whole mesh, if none is given.

        Raises:
            UsageError: the mesh has several axes, and is not the whole world.
        """
        if axis is not None or mesh.ndim == 1:
            axis = axis or 0
            return cls(mesh.get_group(axis), mesh.get_local_rank(axis), mesh.size(axis))
        if mesh.size() != dist.get_world_size():
            raise UsageError(
                f"a mesh of {mesh.size()} processes with the axes {mesh.mesh_dim_names} was given in a world of "
                f"{dist.get_world_size()}; one with several axes is the whole world. Write mesh(world, ...)."
            )
        return cls(dist.group.WORLD, dist.get_rank(), dist.get_world_size())


def together(what: str, function: Callable[..., R], *args: Any) -> R:
    """Call what only all ranks can do; where one of them has left, the error says so.

    Example:
        >>> together("summing", sum, [1, 2])
        3
    """
    try:
        return function(*args)
    except RuntimeError as error:
        if isinstance(error, TntError):
            raise
        raise RankError(
            f"{what} failed, because another rank has left or did not come in time: {error}\nThe first error is that "
            "rank's own; this one is its consequence."
        ) from error

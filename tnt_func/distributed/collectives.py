"""What ranks tell each other: numbers and rows of every rank, and sums over all, few messages for many tensors.

Whatever ranks do together begins with an exchange of one form that says at which point each of them is. So a rank whose
data ended early, or that took another branch, is an error with a name, and not a wait for ever.
"""

import functools
import math
import zlib
from array import array
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tnt_func.distributed.world import Ranks, together
from tnt_func.errors import RankError

POINTS = (
    "train step",
    "train epoch end",
    "eval step",
    "eval epoch end",
    "predict step",
    "predict epoch end",
    "pause_when",
    "replicate",
    "shapes of rows",
    "checkpoint",
    "check_ranks",
)
ROOM = 64
"""Numbers in the first message of an exchange."""
BUCKET, ALONE = 1 << 24, 1 << 20
"""Bytes that go in one message: the next ones are copied while these are on their way. A tensor of more than so many
goes alone, for then it need not be copied."""
_HEAD, _AXES = 3, 8

# The names that torch 2.13 gives them; the older ones warn there.
all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_copy_all: Any = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]


class Exchange:
    """Numbers of every rank, on their way.

    Args:
        ranks: who takes part.
        point: one of `POINTS`, the same on every rank.
        count: which time it is at this point, the same on every rank.
        numbers: of this rank; as many on every rank.

    Example:
        >>> from tnt_func.distributed.world import init, mesh
        >>> with init() as world:
        ...     Exchange(Ranks.of(mesh(world)), "train step", 3, [0.5, 2.0]).wait()
        [[0.5, 2.0]]
    """

    def __init__(self, ranks: Ranks, point: str, count: int, numbers: Sequence[float]):
        self._ranks, self._numbers = ranks, [float(POINTS.index(point)), float(count), float(len(numbers)), *numbers]
        first = array("d", self._numbers[:ROOM] + [0.0] * (ROOM - len(self._numbers)))
        self._work, self._rows = gathering(ranks, torch.frombuffer(first, dtype=torch.float64))

    def wait(self) -> list[list[float]]:
        """The numbers of every rank, in rank order.

        Raises:
            RankError: a rank is somewhere else, or has left.
        """
        together("an exchange of numbers", self._work.wait)
        found = self._rows.tolist()
        heads = [row[:_HEAD] for row in found]
        if heads.count(heads[0]) < len(heads):
            said = "; ".join(
                f"rank {rank} at {POINTS[int(at)]} {n:.0f}, with {k:.0f} numbers"
                for rank, (at, n, k) in enumerate(heads)
            )
            raise RankError(
                f"ranks are at different points: {said}. They take the same steps and report the same entries. Give "
                "each rank as many batches, pipeline.shard(world.rank, world.size), and branch on no rank."
            )
        if len(self._numbers) > ROOM:
            work, rows = gathering(self._ranks, torch.tensor(self._numbers[ROOM:], dtype=torch.float64))
            together("an exchange of numbers", work.wait)
            found = [[*row, *rest] for row, rest in zip(found, rows.tolist(), strict=True)]
        return [row[_HEAD : len(self._numbers)] for row in found]


def gathering(ranks: Ranks, mine: Tensor) -> tuple[Any, Tensor]:
    """Begin to bring together a flat tensor of every rank: what waits for it, and where it will be, [ranks, n].

    Example:
        >>> from tnt_func.distributed.world import init, mesh
        >>> with init() as world:
        ...     work, rows = gathering(Ranks.of(mesh(world)), torch.ones(2))
        ...     _ = work.wait()
        >>> rows
        tensor([[1., 1.]])
    """
    rows = mine.new_empty(ranks.size, len(mine))
    return together("a gathering", _all_gather, rows.view(-1), mine, ranks), rows


def _all_gather(room: Tensor, mine: Tensor, ranks: Ranks) -> Any:
    return all_gather(room, mine, group=ranks.group, async_op=True)


class Scalars:
    """0-d tensors and numbers of every rank, on their way, with facts that the host needs.

    Args:
        ranks, point, count: as of an `Exchange`.
        names: of what is told now and brought together next, in its order; the same on every rank.
        facts: numbers; as many on every rank.
        values: numbers, and 0-d tensors of one device.
    """

    def __init__(
        self,
        ranks: Ranks,
        point: str,
        count: int,
        names: tuple[str, ...],
        facts: Sequence[float],
        values: Sequence[Any],
    ):
        self._names, facts = names, [_checksum(names), *facts]
        self._facts = len(facts)
        device = next((x.device for x in values if isinstance(x, Tensor) and x.device.type != "cpu"), None)
        told = [*facts, *(float(x) for x in values)] if device is None else facts
        self._exchange, self._work = Exchange(ranks, point, count, told), None
        if device is not None:
            # Nothing waits for the device.
            mine = torch.stack([torch.as_tensor(x).to(device, torch.float64, non_blocking=True) for x in values])
            self._work, self._rows = gathering(ranks, mine)

    def wait(self) -> tuple[list[list[float]], list[list[float]] | Tensor]:
        """Facts, by rank, and values, by rank: where those are of a device, float64 [ranks, values] there.

        Raises:
            RankError: names differ.
        """
        found = self._exchange.wait()
        if other := [rank for rank, row in enumerate(found) if row[0] != found[0][0]]:
            raise RankError(
                f"rank {other[0]} has other parameters or outputs than rank 0, or has them in another order; here they "
                f"are {', '.join(map(str, self._names))}. What ranks find is brought together in the order in which "
                "dicts were filled: fill them in the same way on every rank."
            )
        facts = [row[1 : self._facts] for row in found]
        if self._work is None:
            return facts, [row[self._facts :] for row in found]
        together("an exchange of numbers", self._work.wait)
        return facts, self._rows


@functools.lru_cache(maxsize=256)
def _checksum(names: tuple[str, ...]) -> float:
    # A hash would be another one in each process.
    return float(zlib.crc32(repr(names).encode()))


def rows_of_all(ranks: Ranks, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Tensors of every rank, in rank order; shapes may differ.

    Example:
        >>> from tnt_func.distributed.world import init, mesh
        >>> with init() as world:
        ...     rows_of_all(Ranks.of(mesh(world)), [torch.arange(2)])
        [[tensor([0, 1])]]
    """
    shapes = [float(x) for t in tensors for x in (t.dim(), *t.shape, *[0] * (_AXES - t.dim()))]
    told = Exchange(ranks, "shapes of rows", 0, shapes).wait()
    found: list[list[Tensor]] = [[] for _ in range(ranks.size)]
    for place, tensor in enumerate(tensors):
        begin = place * (1 + _AXES)
        own = [[int(x) for x in row[begin + 1 : begin + 1 + int(row[begin])]] for row in told]
        sizes = [math.prod(shape) * tensor.element_size() for shape in own]
        mine = torch.empty(max(sizes), dtype=torch.uint8, device=tensor.device)
        mine[: tensor.nbytes] = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        room = mine.expand(ranks.size, len(mine))
        if max(sizes):
            work, room = gathering(ranks, mine)
            together("an exchange of rows", work.wait)
        for rank, (data, size, shape) in enumerate(zip(room, sizes, own, strict=True)):
            found[rank].append(data[:size].view(tensor.dtype).reshape(shape))
    return found


class Sums:
    """Weighted sums of tensors over the ranks, on their way, in a few flat buckets.

    Args:
        ranks: who takes part.
        tensors: of this rank; None counts for nothing. They leave the list as they are sent, to make room.
        like: what they are like, on every rank the same.
        share: of this rank, by which its tensors are multiplied, a number or a 0-d tensor. What has none counts for
            nothing, be it NaN.

    Example:
        >>> from tnt_func.distributed.world import init, mesh
        >>> with init() as world:
        ...     Sums(Ranks.of(mesh(world)), [torch.ones(2)], [torch.ones(2)], 0.5).wait()
        [tensor([0.5000, 0.5000])]
    """

    def __init__(self, ranks: Ranks, tensors: list[Tensor | None], like: Sequence[Tensor], share: Any):
        self._like = like
        self._buckets: list[tuple[list[int], list[Tensor], Any]] = []
        for places, dtype, device in buckets(like):
            flat = torch.empty(sum(like[place].numel() for place in places), dtype=dtype, device=device)
            views = _views(flat, [like[place] for place in places])
            _fill(flat, views, [tensors[place] for place in places], share)
            for place in places:
                tensors[place] = None
            self._buckets.append((places, views, together("a sum over ranks", _all_reduce, flat, ranks)))

    def wait(self) -> list[Tensor]:
        """The sums, in the dtypes of what they are like."""
        found: list[Any] = [None] * len(self._like)
        for places, views, work in self._buckets:
            together("a sum over ranks", work.wait)
            for place, view in zip(places, views, strict=True):
                found[place] = view if view.dtype == self._like[place].dtype else view.to(self._like[place].dtype)
        return found


def _all_reduce(flat: Tensor, ranks: Ranks) -> Any:
    return dist.all_reduce(flat, group=ranks.group, async_op=True)


def _fill(flat: Tensor, views: list[Tensor], tensors: list[Tensor | None], share: Any) -> None:
    """Put tensors, times their share, where they are to be; what is not there is nothing."""
    if len(views) == 1:
        return weighted(tensors[0], share, views[0])
    there = [(view, tensor) for view, tensor in zip(views, tensors, strict=True) if tensor is not None]
    if len(there) < len(views):
        flat.zero_()
    if there:
        _copy_all(*map(list, zip(*there, strict=True)))
    weighted(flat, share, flat)


def weighted(tensor: Tensor | None, share: Any, out: Tensor) -> None:
    """A tensor times its share, where it is to be; what has none is nothing, be it NaN."""
    if tensor is None or (not isinstance(share, Tensor) and share == 0):
        out.zero_()
    elif isinstance(share, Tensor):
        here = share.to(out.device)
        torch.where(here == 0, torch.zeros_like(out), tensor * here.to(out.real.dtype), out=out)
    elif tensor.dtype == out.dtype:
        torch.mul(tensor, share, out=out)
    else:
        out.copy_(tensor).mul_(share)


def buckets(like: Sequence[Tensor], widened: bool = True) -> list[tuple[list[int], torch.dtype, torch.device]]:
    """Places of tensors that go together: of one dtype, float32 at least if widened, and one device; of a size."""
    open_ones: dict[Any, tuple[list[int], int]] = {}
    full: list[tuple[list[int], torch.dtype, torch.device]] = []
    for place, tensor in enumerate(like):
        kind = torch.promote_types(tensor.dtype, torch.float32) if widened else tensor.dtype, tensor.device
        size = tensor.numel() * kind[0].itemsize
        if size > ALONE:
            full.append(([place], *kind))
            continue
        places, before = open_ones.get(kind, ([], 0))
        places.append(place)
        open_ones[kind] = places, before + size
        if before + size >= BUCKET:
            full.append((open_ones.pop(kind)[0], *kind))
    return [*full, *((places, *kind) for kind, (places, _) in open_ones.items())]


def _views(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    parts = torch.split_with_sizes(flat, [tensor.numel() for tensor in like])
    return [part.view_as(tensor) for part, tensor in zip(parts, like, strict=True)]


def broadcast(ranks: Ranks, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors of rank 0, of the dtypes, shapes and devices that those of this rank have.

    Example:
        >>> from tnt_func.distributed.world import init, mesh
        >>> with init() as world:
        ...     broadcast(Ranks.of(mesh(world)), [torch.arange(2), torch.tensor(True)])
        [tensor([0, 1]), tensor(True)]
    """
    found: list[Any] = [None] * len(tensors)
    kinds = dict.fromkeys((tensor.dtype, tensor.device) for tensor in tensors)
    for dtype, device in kinds:
        places = [place for place, x in enumerate(tensors) if (x.dtype, x.device) == (dtype, device)]
        flat = torch.cat([tensors[place].detach().reshape(-1) for place in places])
        as_bytes = flat.view(torch.uint8)
        if len(as_bytes):
            together("a broadcast", _broadcast, as_bytes, ranks)
        for place, view in zip(places, _views(flat, [tensors[place] for place in places]), strict=True):
            found[place] = view.clone()
    return found


def _broadcast(flat: Tensor, ranks: Ranks) -> None:
    dist.broadcast(flat, group=ranks.group, group_src=0)

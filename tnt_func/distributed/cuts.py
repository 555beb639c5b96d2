"""How tensors are cut into parts, one for each rank, and the messages by which ranks put them together, or sum them up.

What is cut alike in every step is looked at once: how its parts are cut, and which of them go together.

Example:
    >>> from tnt_func import rng
    >>> from tnt_func.distributed.shards import shard
    >>> from tnt_func.distributed.world import init, mesh
    >>> from tnt_func.state import State
    >>> with init() as world:
    ...     w = shard(State(params=torch.ones(4, 2), key=rng.key(0)), mesh(world)).params
    ...     Cut.of(w).part, wholes([w])[0].shape
    (torch.Size([4, 2]), torch.Size([4, 2]))
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from tnt_func.distributed.collectives import buckets, gathering, reduce_scatter, weighted
from tnt_func.distributed.world import Ranks, together
from tnt_func.meshes import here, placed

AT_ONCE = 2
"""Messages of parts that are on their way: gloo holds a copy of each, and does as many at once."""


@dataclass(frozen=True, eq=False)
class Cut:
    """How a tensor is cut.

    Args:
        shape: of the whole.
        dimension: which is cut.
        size: rows of a part; the last parts may have fewer.
        part: the shape of this rank's.
        dtype, device: of the tensor.
        joins: whether the parts of all ranks, one after another, are the whole.
    """

    shape: torch.Size
    dimension: int
    size: int
    part: torch.Size
    dtype: torch.dtype
    device: torch.device
    joins: bool

    @classmethod
    def of(cls, tensor: Any) -> "Cut":
        """That of a DTensor which is cut: one and the same for all that are cut alike."""
        own = here(tensor)
        return _cut(tensor._spec, own.shape, own.device)

    @functools.cached_property
    def rest(self) -> tuple[int, ...]:
        """The other dimensions."""
        return (*self.shape[: self.dimension], *self.shape[self.dimension + 1 :])

    @functools.cached_property
    def room(self) -> int:
        """Elements that the part of a rank takes in a message."""
        return self.size * torch.Size(self.rest).numel()

    def numel(self) -> int:
        """Elements of the whole."""
        return self.shape.numel()

    def rows(self, flat: Tensor) -> Tensor:
        """This rank's rows, the dimension that is cut first, where its part of a message is."""
        return flat.unflatten(-1, (self.size, *self.rest)).narrow(-len(self.rest) - 1, 0, self.part[self.dimension])

    def own(self, flat: Tensor) -> Tensor:
        """This rank's part, out of its part of a message."""
        return flat.view(self.part) if self.joins else self.rows(flat).movedim(0, self.dimension).contiguous()

    def whole(self, parts: Tensor) -> Tensor:
        """The whole, out of the parts of all ranks, [ranks, room]."""
        if self.joins:
            return parts.reshape(self.shape)
        rows = parts.reshape(-1, *self.rest)[: self.shape[self.dimension]]
        return rows.movedim(0, self.dimension).contiguous()

    def scattered(self, tensor: Tensor | None, share: Any, parts: Tensor) -> None:
        """Put a whole tensor, times its share, where the parts of all ranks are to be."""
        if tensor is None:
            parts.zero_()
        elif self.joins:
            weighted(tensor.reshape(parts.shape), share, parts)
        else:
            room = parts.unflatten(1, (self.size, *self.rest))
            rows = tensor.movedim(self.dimension, 0).split(self.size)
            if len(rows) < len(room) or len(rows[-1]) < self.size:
                parts.zero_()
            for part, own in zip(room, rows, strict=False):
                weighted(own, share, part[: len(own)])


@functools.lru_cache(1 << 14)
def _cut(spec: Any, part: torch.Size, device: torch.device) -> Cut:
    shape, dimension, count = spec.shape, spec.placements[-1].dim, spec.mesh.size(spec.mesh.ndim - 1)
    size = -(-shape[dimension] // count)
    joins = dimension == 0 and size * count == shape[0]
    return Cut(shape, dimension, size, part, spec.tensor_meta.dtype, device, joins)


class Message(NamedTuple):
    """Tensors that go together.

    Args:
        places: of the tensors, among all.
        cuts, rooms: how each is cut, and how many elements the part of a rank takes.
        dtype, device: of all of them.
        joins: whether the parts of each, one after another, are the whole.
    """

    places: list[int]
    cuts: list[Cut]
    rooms: list[int]
    dtype: torch.dtype
    device: torch.device
    joins: bool


@functools.lru_cache(256)
def _messages(cuts: tuple[Cut, ...], widened: bool) -> list[Message]:
    like: Any = cuts
    found = list[Message]()
    for places, dtype, device in buckets(like, widened):
        own = [cuts[place] for place in places]
        joins = all(cut.joins for cut in own)
        found.append(Message(places, own, [cut.room for cut in own], dtype, device, joins))
    return found


def wholes(tensors: Sequence[Any]) -> list[Tensor]:
    """The whole of each tensor that is cut, by one message for many, or for a large one."""
    if not tensors:
        return []
    found: list[Any] = [None] * len(tensors)
    mesh = tensors[0].device_mesh
    ranks = Ranks.of(mesh, mesh.ndim - 1)
    begun: list[tuple[Message, Any, Tensor]] = []

    def settle() -> None:
        message, work, room = begun.pop(0)
        together("a gathering of parts", work.wait)
        for place, cut, parts in zip(message.places, message.cuts, room.split(message.rooms, 1), strict=True):
            found[place] = cut.whole(parts)

    for message in _messages(tuple(map(Cut.of, tensors)), False):
        own = [here(tensors[place]) for place in message.places]
        if message.joins:
            mine = own[0].reshape(-1) if len(own) == 1 else torch.cat([part.reshape(-1) for part in own])
        else:
            mine = torch.zeros(sum(message.rooms), dtype=message.dtype, device=message.device)
            for cut, part, flat in zip(message.cuts, own, mine.split(message.rooms), strict=True):
                cut.rows(flat).copy_(part.movedim(cut.dimension, 0))
        if len(begun) == AT_ONCE:
            settle()
        begun.append((message, *gathering(ranks, mine)))
    while begun:
        settle()
    return found


class PartSums:
    """Weighted sums of whole tensors over the ranks, of which each rank gets its part, on their way.

    Args:
        tensors: of this rank; None counts for nothing. They leave the list as they are sent, to make room.
        like: DTensors which are cut: how the sums are to lie.
        share: of this rank, by which its tensors are multiplied, a number or a 0-d tensor.
    """

    def __init__(self, tensors: list[Tensor | None], like: Sequence[Any], share: Any):
        self._like, self._begun = like, list[tuple[Message, Tensor, Any]]()
        self._found: list[Any] = [None] * len(like)
        if not like:
            return
        self._mesh = like[0].device_mesh
        ranks = Ranks.of(self._mesh, self._mesh.ndim - 1)
        for message in _messages(tuple(map(Cut.of, like)), True):
            whole = self._scattered(message, tensors, share, ranks.size)
            if len(self._begun) == AT_ONCE:
                self._settle()
            mine = whole.new_empty(whole.shape[1])
            self._begun.append((message, mine, together("a sum of parts", _scattering, mine, whole, ranks)))

    def _scattered(self, message: Message, tensors: list[Any], share: Any, count: int) -> Tensor:
        """What is sent of whole tensors: the parts of each rank in a row of its own."""
        own = [tensors[place] for place in message.places]
        for place in message.places:
            tensors[place] = None
        alike = message.joins and all(each is not None and each.dtype == message.dtype for each in own)
        if alike and len(own) > 1 and type(share) is float and share != 0:
            # One call for many small ones; a large one is multiplied where it is put.
            return torch.cat([tensor.reshape(count, -1) for tensor in own], 1).mul_(share)
        whole = torch.empty(count, sum(message.rooms), dtype=message.dtype, device=message.device)
        for cut, parts in zip(message.cuts, whole.split(message.rooms, 1), strict=True):
            cut.scattered(own.pop(0), share, parts)
        return whole

    def wait(self) -> list[Tensor]:
        """The sums, as DTensors in the dtypes of what they are like."""
        while self._begun:
            self._settle()
        return self._found

    def _settle(self) -> None:
        message, mine, work = self._begun.pop(0)
        together("a sum of parts", work.wait)
        for axis in range(self._mesh.ndim - 1):
            group = Ranks.of(self._mesh, axis).group
            together("a sum over ranks", lambda group=group: dist.all_reduce(mine, group=group))
        for place, cut, flat in zip(message.places, message.cuts, mine.split(message.rooms), strict=True):
            self._found[place] = placed(cut.own(flat).to(cut.dtype), self._like[place])


def _scattering(mine: Tensor, whole: Tensor, ranks: Ranks) -> Any:
    return reduce_scatter(mine, whole.view(-1), group=ranks.group, async_op=True)

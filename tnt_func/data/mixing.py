"""Several pipelines as one, and when it ends.

How many elements of each member come, and in which stretches, follows from lengths and weights alone; where in a
stretch each of them stands is arithmetic, or a permutation. So any position is found without counting up to it.

Laws:
    With stop="longest" an epoch has every element of every member once.

Example:
    >>> from tnt_func.data.stages import Items
    >>> a, b = Items("abc"), Items("xy")
    >>> mixed = Interleaved(("a", "b"), (a, b), "round_robin", stretches("round_robin", (3, 2), (1, 1), "longest"))
    >>> [*(element for pair in mixed.read(0, range(len(mixed))) for element in pair.values())]
    ['a', 'x', 'b', 'y', 'c']

References:
    The strategies and ways to stop of `torchtnt.utils.data.MultiDataLoader`.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch

from tnt_func import rng
from tnt_func.data.permutation import Indices, permute
from tnt_func.data.stages import Stage, Stream, in_turns, rows, tensor

How: TypeAlias = Literal["round_robin", "weighted", "in_order", "all"]
Stop: TypeAlias = Literal["longest", "shortest", "restart"] | int
Stretch: TypeAlias = tuple[int, ...]
"""How many elements of each member come in it."""


@dataclass(frozen=True, eq=False)
class Mixed(Stage):
    names: tuple[str, ...]
    stages: tuple[Stage, ...]

    @property
    def parents(self) -> tuple[Stage, ...]:
        return self.stages

    def cut(self, index: int, count: int) -> Stage:
        return replace(self, stages=tuple(stage.cut(index, count) for stage in self.stages))

    def _fetch(self, epoch: int, member: int, total: int, places: torch.Tensor) -> list[Any]:
        """Elements of a member of which so many come in an epoch; past its end its next epoch begins."""
        stage = self.stages[member]
        return rows(in_turns(stage, epoch * -(-total // len(stage)), places))


@dataclass(frozen=True, eq=False)
class Interleaved(Mixed):
    """One member's element at a time: {name: element}."""

    how: How
    stretches: Sequence[Stretch]
    stream: Stream | None = None

    def __len__(self) -> int:
        return sum(map(sum, self.stretches))

    @functools.cached_property
    def _totals(self) -> list[int]:
        return [sum(counts) for counts in zip(*self.stretches, strict=True)]

    def read(self, epoch: int, indices: Indices) -> list[Any]:
        places, found = tensor(indices), [None] * len(indices)
        start, before = 0, torch.zeros(len(self.stages), dtype=torch.int64)
        for number, stretch in enumerate(self.stretches):
            inside = ((places >= start) & (places < start + sum(stretch))).nonzero().flatten()
            if len(inside):
                within: Indices = places[inside] - start
                if isinstance(indices, range) and len(inside) == len(indices):
                    within = range(indices.start - start, indices.stop - start, indices.step)
                members, nth = self._member(epoch, number, within)
                for member in members.unique().tolist():
                    its = (members == member).nonzero().flatten()
                    elements = self._fetch(epoch, member, self._totals[member], nth[its] + before[member])
                    for place, element in zip(inside[its].tolist(), elements, strict=True):
                        found[place] = {self.names[member]: element}
            start, before = start + sum(stretch), before + torch.tensor(stretch)
        return found

    def _member(self, epoch: int, number: int, within: Indices) -> tuple[torch.Tensor, torch.Tensor]:
        """Whose turn it is at places of a stretch, and at which of its elements in that stretch it then is."""
        counts = torch.tensor(self.stretches[number])
        if self.stream is None:
            active = counts.nonzero().flatten()
            return active[tensor(within) % len(active)], tensor(within) // len(active)
        drawn = permute(rng.fold_in(self.stream.at(epoch), number), int(counts.sum()), within)
        ends = counts.cumsum(0)
        members = torch.bucketize(drawn, ends, right=True)
        return members, drawn - (ends - counts)[members]


@dataclass(frozen=True, eq=False)
class Together(Mixed):
    """An element of every member at a time: {name: element, ...}; members that have ended are left out."""

    stop: Stop

    def __len__(self) -> int:
        if isinstance(self.stop, int):
            return self.stop
        return (min if self.stop == "shortest" else max)(map(len, self.stages))

    def read(self, epoch: int, indices: Indices) -> list[Any]:
        places, found = tensor(indices), [dict[str, Any]() for _ in indices]
        for member, name in enumerate(self.names):
            length = len(self.stages[member])
            total = length if self.stop == "longest" else len(self)
            its = (places < total).nonzero().flatten()
            elements = self._fetch(epoch, member, total, places[its])
            for place, element in zip(its.tolist(), elements, strict=True):
                found[place][name] = element
        return found


def stretches(how: How, lengths: Sequence[int], weights: Sequence[float], stop: Stop) -> list[Stretch]:
    """In which stretches the elements of members come: in each the same members take turns.

    Example:
        >>> stretches("round_robin", (3, 2), (1, 1), "shortest")
        [(2, 2), (1, 0)]
        >>> stretches("weighted", (3, 4), (3, 1), "longest")
        [(3, 1), (0, 3)]
    """
    size = len(lengths)
    if how == "in_order":
        return [
            tuple(length if other == member else 0 for other in range(size)) for member, length in enumerate(lengths)
        ]
    if how == "round_robin" and isinstance(stop, int):
        found = [(stop // size,) * size, _first(stop % size, size)]
    elif how == "round_robin" and stop == "restart":
        found = [(max(lengths),) * size]
    elif how == "round_robin" and stop == "shortest":
        found = [(min(lengths),) * size, _first(lengths.index(min(lengths)), size)]
    elif isinstance(stop, int):
        bounds = [round(stop * part / sum(weights)) for part in itertools.accumulate(weights, initial=0)]
        found = [tuple(after - before for before, after in itertools.pairwise(bounds))]
    elif stop == "restart":
        scale = max(length / weight for length, weight in zip(lengths, weights, strict=True))
        found = [tuple(max(n, round(scale * weight)) for n, weight in zip(lengths, weights, strict=True))]
    else:
        found = _until_all_ended(lengths, (1,) * size if how == "round_robin" else weights)
        found = found[:1] if stop == "shortest" else found
    return [stretch for stretch in found if any(stretch)]


def _until_all_ended(lengths: Sequence[int], weights: Sequence[float]) -> list[Stretch]:
    left, found = list(lengths), list[Stretch]()
    while active := [member for member, count in enumerate(left) if count]:
        scale, ending = min((left[member] / weights[member], member) for member in active)
        counts = [min(count, round(scale * weight)) for count, weight in zip(left, weights, strict=True)]
        counts[ending] = left[ending]
        found.append(tuple(counts))
        left = [count - gone for count, gone in zip(left, counts, strict=True)]
    return found


def _first(count: int, size: int) -> Stretch:
    return tuple(int(member < count) for member in range(size))

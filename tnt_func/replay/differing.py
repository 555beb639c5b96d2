"""What differs first between two states, or between two recorded runs."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tnt_func import pytree as trees
from tnt_func.checkpoint.restoring import inspect
from tnt_func.checkpoint.saving import MANIFEST, TENSORS
from tnt_func.checkpoint.tensors import Mapped
from tnt_func.errors import UsageTypeError
from tnt_func.replay.rows import Record, Row
from tnt_func.state import State
from tnt_func.types import typed

STATIC = ("key", "progress", "stop")


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The first difference.

    Args:
        path: of the leaf, None where no leaf is known to differ.
        a, b: the leaf on either side, its dtype and shape; None where it is missing.
        said: how they differ: how many elements, and by how much at most.
        step: of two runs, the first step that differs.
    """

    path: str | None
    a: str | None
    b: str | None
    said: str
    step: int | None = None

    def __str__(self) -> str:
        at = "" if self.step is None else f"step {self.step}: "
        leaf = "" if self.path is None else f"state{self.path}: "
        return f"{at}{leaf}{self.said}"


@typed
def diff(a: State | str | os.PathLike[str], b: State | str | os.PathLike[str]) -> Difference | None:
    """The first difference of two states, two checkpoints or two records; None where they are the same to the bit.

    Of two records the first step is found at which batches, numbers or digests differ, and the first leaf at the first
    digest from there on. No code of the runs is needed, nor executed.

    Args:
        a, b: two States, two directories of checkpoints, or two of records.

    Raises:
        UsageTypeError: they are not of one kind.
        CheckpointError: a directory has neither, or is damaged.

    Example:
        >>> from tnt_func.rng import key
        >>> one = State(params={"w": torch.zeros(2, 3)}, key=key(0))
        >>> print(diff(one, one.replace(params={"w": torch.ones(2, 3)})))
        state.params['w']: float32[2, 3]: 6 of 6 elements differ, by at most 1
        >>> diff(one, one) is None
        True
    """
    if isinstance(a, State) and isinstance(b, State):
        found = _leaf(dict(trees.named_leaves(a)), dict(trees.named_leaves(b)))
        return found or _static(*({name: getattr(state, name) for name in STATIC} for state in (a, b))) or _rest(a, b)
    kinds = ["State" if isinstance(x, State) else "checkpoint" if (Path(x) / MANIFEST).exists() else "" for x in (a, b)]
    if kinds[0] != kinds[1] or isinstance(a, State) or isinstance(b, State):
        named = [kind or "record" for kind in kinds]
        raise UsageTypeError(
            f"diff was given a {named[0]} and a {named[1]}; it takes two of one kind. Restore the state."
        )
    if kinds[0]:
        return _leaf(_leaves(Path(a)), _leaves(Path(b))) or _static(inspect(a).static, inspect(b).static)
    return diff_records(Record.read(a), Record.read(b))


def _leaves(path: Path) -> dict[str, Any]:
    """The leaves of a checkpoint by path, without the State that it is one of."""
    manifest = inspect(path)
    file = Mapped(path / TENSORS, manifest.layout)
    file.verify(manifest.layout.entries)
    tensors = {name: file.read(name, torch.device("cpu")) for name in manifest.layout.entries}
    return {**tensors, **manifest.values}


def _leaf(a: Mapping[str, Any], b: Mapping[str, Any]) -> Difference | None:
    for path in {**a, **b}:
        if path in a and path in b and trees.same_leaf(a[path], b[path]):
            continue
        here, there = (trees.describe(side[path]) if path in side else None for side in (a, b))
        if here is None or there is None:
            return Difference(path=path, a=here, b=there, said=f"{here or 'nothing'} and {there or 'nothing'}")
        said = trees.diff(a[path], b[path])[0].removeprefix("tree: ")
        return Difference(path=path, a=here, b=there, said=said if here != there else f"{here}: {said}")
    return None


def _static(a: Mapping[str, Any], b: Mapping[str, Any]) -> Difference | None:
    for name in STATIC:
        if a[name] != b[name]:
            return Difference(path=f".{name}", a=repr(a[name]), b=repr(b[name]), said=f"{a[name]!r} became {b[name]!r}")
    return None


def _rest(a: State, b: State) -> Difference | None:
    """What no leaf shows: containers, and the static fields inside."""
    said = trees.diff(a, b, "state")
    return Difference(path=None, a=None, b=None, said=said[0]) if said else None


def diff_records(a: Record, b: Record) -> Difference | None:
    """The first difference of two records that were read, as `diff` finds it."""
    theirs, first = _places(b), None
    for where, (index, row) in (ours := _places(a)).items():
        if where not in theirs:
            if row.counts and first is None:
                first = row.step, f"{_kind(row)} is in the first record alone"
            continue
        other, pair = theirs[where]
        numbers, others = row.numbers or {}, pair.numbers or {}
        both = numbers.keys() & others.keys()
        seen: dict[str, tuple[Any, Any]] = {
            "batches": (row.batch, pair.batch),
            "numbers": ({name: numbers[name] for name in both}, {name: others[name] for name in both}),
            "states": (row.digest, pair.digest),
        }
        differing = [what for what, (x, y) in seen.items() if None not in (x, y) and x != y]
        if differing and first is None:
            first = row.step, f"{', '.join(differing)} differ"
        if first is not None and "states" in differing:
            return _named(first, row.step, a.marks_at(index), b.marks_at(other))
    extra = [row for where, (_, row) in theirs.items() if row.counts and where not in ours]
    if first is None and extra:
        first = extra[0].step, f"{_kind(extra[0])} is in the second record alone"
    return None if first is None else Difference(path=None, a=None, b=None, said=first[1], step=first[0])


def _places(record: Record) -> dict[tuple[int, int, str], tuple[int, Row]]:
    """The rows but for those of calls, with their index, by what they are about."""
    return {(*row.place, row.row): (index, row) for index, row in enumerate(record.rows) if row.row != "call"}


def _kind(row: Row) -> str:
    return "it" if row.row == "step" else f"the end of epoch {row.epoch}"


def _named(first: tuple[int, str], step: int, a: Mapping[str, Any], b: Mapping[str, Any]) -> Difference:
    path = next((path for path in {**a, **b} if a.get(path) != b.get(path)), None)
    here, there = (side.get(path or "", (None,))[0] for side in (a, b))
    late = "" if step == first[0] else f", states at the digest of step {step}"
    return Difference(path=path, a=here, b=there, said=f"{first[1]}{late}", step=first[0])

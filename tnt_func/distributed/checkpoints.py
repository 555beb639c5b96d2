"""Checkpoints that many ranks write at once, and that any number of ranks read.

Where the State lies in parts, each rank writes its own, as a checkpoint of the usual form in a folder of its own, and
`shards.json` says how the parts make the whole. All of it appears at once, when the last rank is done, or not at all.
Checksums, names and refusals are those of `tnt.checkpoint`; nothing is ever unpickled. Ranks see one file system.

Laws:
    Whatever the layouts of the states that are saved and restored into, `gather(restore(path, like))` is the State that
    was saved, to the bit; so is what one process restores of `consolidate(path, to)`.

Example:
    >>> import tempfile
    >>> from tnt_func import rng
    >>> from tnt_func.distributed.shards import shard
    >>> from tnt_func.distributed.world import init, mesh
    >>> first = State(params={"w": torch.arange(4.0)}, key=rng.key(0))
    >>> with init() as world, tempfile.TemporaryDirectory() as directory:
    ...     save(f"{directory}/parts", shard(first, mesh(world)), mesh(world))
    ...     consolidate(f"{directory}/parts", f"{directory}/whole")
    ...     restore(f"{directory}/parts", first).params, restore(f"{directory}/whole", first).params
    ({'w': tensor([0., 1., 2., 3.])}, {'w': tensor([0., 1., 2., 3.])})
"""

import json
import zlib
from collections.abc import Callable
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from tnt_func import checkpoint
from tnt_func import pytree as trees
from tnt_func.checkpoint.saving import MANIFEST, TENSORS, appear, synced
from tnt_func.checkpoint.tensors import Mapped, opened, write
from tnt_func.distributed.collectives import Exchange
from tnt_func.distributed.replicas import told
from tnt_func.distributed.shards import dimension_of, is_laid_out, laid, on_mesh
from tnt_func.distributed.world import Ranks
from tnt_func.errors import CheckpointError, StructureError, TntError, UsageError
from tnt_func.state import State
from tnt_func.types import typed

Place = str | PathLike[str]
SHARDS = "shards.json"


class Shards(NamedTuple):
    """How a State has been cut.

    Args:
        parts: how many.
        cuts: by the path of a leaf, the dimension and the shape of the whole.
    """

    parts: int
    cuts: dict[str, tuple[int, list[int]]]

    @classmethod
    def of(cls, state: State) -> "Shards | None":
        """How a State lies; None where none of it is in parts."""
        leaves = {path: leaf for path, leaf in trees.named_leaves(state) if dimension_of(leaf) is not None}
        meshes = [leaf.device_mesh for leaf in leaves.values()]
        cuts = {path: (int(dimension_of(leaf) or 0), [*leaf.shape]) for path, leaf in leaves.items()}
        return cls(meshes[0].size(meshes[0].ndim - 1), cuts) if cuts else None

    def text(self) -> str:
        """This, as JSON under a checksum."""
        body = json.dumps([self.parts, self.cuts])
        return json.dumps({"crc32": zlib.crc32(body.encode()), "shards": body})

    @classmethod
    def read(cls, path: Path) -> "Shards | None":
        """What a checkpoint says; None where it is of the usual form.

        Raises:
            CheckpointError: it is damaged.
        """
        if not (path / SHARDS).exists():
            return None
        try:
            with opened(path / SHARDS) as file:
                found = json.loads(file.read())
            if zlib.crc32(found["shards"].encode()) != found["crc32"]:
                raise ValueError("its checksum differs")
            count, cuts = json.loads(found["shards"])
            return cls(count, {name: (dimension, shape) for name, (dimension, shape) in cuts.items()})
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path / SHARDS} is damaged: {error}. Restore another checkpoint.") from error

    def folder(self, path: Path, index: int) -> Path:
        """Where a part is."""
        return path / f"part-{index:05}-of-{self.parts:05}"

    def rows(self, name: str, index: int) -> tuple[int, int, int]:
        """Which dimension of a leaf is cut, from where, and how many rows a part has."""
        dimension, shape = self.cuts[name]
        size = -(-shape[dimension] // self.parts)
        start = min(index * size, shape[dimension])
        return dimension, start, min(size, shape[dimension] - start)


@typed
def save(path: Place, state: State, mesh: DeviceMesh) -> None:
    """Write a State as a checkpoint; every rank calls it. What is the same on all ranks is written by the first alone.

    Args:
        path: the directory to make, the same on every rank.
        state: of a resumable event.
        mesh: the ranks.

    Raises:
        UsageError, StructureError, CheckpointError: as `tnt.checkpoint.save`, on the rank that could not; on the others
            a CheckpointError that names it. Nothing of it is left.

    Example:
        >>> import tempfile
        >>> from tnt_func import rng
        >>> from tnt_func.distributed.world import init, mesh
        >>> with init() as world, tempfile.TemporaryDirectory() as directory:
        ...     save(f"{directory}/first", State(params=torch.ones(1), key=rng.key(0)), mesh(world))
        ...     restore(f"{directory}/first", State(params=torch.zeros(1), key=rng.key(0))).params
        tensor([1.])
    """
    ranks, path, shards = Ranks.of(mesh), Path(path), Shards.of(state)
    own = _map(lambda leaf: leaf.to_local() if is_laid_out(leaf) else leaf, state)
    if shards is None:
        return agreed_on(ranks, f"save {path}", (lambda: checkpoint.save(path, own)) if ranks.rank == 0 else None)
    index = mesh.get_local_rank(mesh.ndim - 1)
    writes = all(mesh.get_local_rank(axis) == 0 for axis in range(mesh.ndim - 1))

    def part(folder: Path) -> None:
        agreed_on(
            ranks, f"save {path}", (lambda: checkpoint.save(shards.folder(folder, index), own)) if writes else None
        )

    def fill(folder: Path) -> None:
        told(ranks, str(folder))
        asked.append(folder)
        part(folder)
        with synced(folder / SHARDS) as file:
            file.write(shards.text().encode())

    asked = list[Path]()

    def first() -> None:
        try:
            if path.exists() or path.is_symlink():
                raise UsageError(
                    f"save({str(path)!r}, state, mesh) was given a path that exists; a checkpoint is never "
                    "overwritten. Save under another name, or remove it first."
                )
            appear(path, fill)
        finally:
            if not asked:
                told(ranks, None)

    def other() -> None:
        if (folder := told(ranks, None)) is not None:
            part(Path(folder))

    agreed_on(ranks, f"save {path}", first if ranks.rank == 0 else other)


@typed
def restore(path: Place, like: State) -> State:
    """The State that a checkpoint holds, laid out like another one; ranks call it, each for itself.

    A rank whose part has been written as such reads that alone; else it reads all parts, and keeps its own.

    Args:
        path: of a checkpoint of either form: of `tnt.checkpoint`, or with a part for each rank.
        like: of the same structure, in any layout: `shard(tnt.prepare(unit, state), mesh)`.

    Raises:
        CheckpointError, StructureError: as `tnt.checkpoint.restore`.

    Example:
        >>> from tnt_func import rng
        >>> restore("nowhere", State(params=1.0, key=rng.key(0)))
        Traceback (most recent call last):
        tnt_func.errors.CheckpointError: ...
    """
    path = Path(path)
    there, here = Shards.read(path), Shards.of(like)
    kinds = dict(trees.named_leaves(like))
    if there is not None and (lost := there.cuts.keys() - kinds.keys()):
        raise StructureError(
            f"the checkpoint {path} holds {sorted(lost)[:8]} in parts, which `like` has not; what is in parts is put "
            "together where it belongs. Pass the State of the run that wrote it: tnt.prepare(unit, state, callbacks)."
        )
    if there is not None and there == here:
        leaf = next(leaf for leaf in kinds.values() if dimension_of(leaf) is not None)
        index = leaf.device_mesh.get_local_rank(leaf.device_mesh.ndim - 1)
        own = _map(lambda leaf: leaf.to_local() if is_laid_out(leaf) else leaf, like)
        found = checkpoint.restore(there.folder(path, index), own)
        return _named(lambda name, own: _on_mesh_like(own, kinds.get(name)), found)
    plain = _map(
        lambda leaf: (
            torch.empty_like(leaf.to_local(), device="meta").new_empty(leaf.shape) if is_laid_out(leaf) else leaf
        ),
        like,
    )
    if there is None:
        whole = checkpoint.restore(path, plain)
    else:
        parts = [checkpoint.restore(there.folder(path, k), _part(plain, there, k)) for k in range(there.parts)]
        pieces = {name: [trees.at(part, name) for part in parts] for name in there.cuts}
        whole = _named(
            lambda name, leaf: torch.cat(pieces[name], there.cuts[name][0]) if name in pieces else leaf, parts[0]
        )
    return _named(lambda name, leaf: _laid_like(leaf, kinds.get(name)), whole)


@typed
def consolidate(path: Place, to: Place) -> None:
    """Write a checkpoint that is in parts as one of the usual form, which one process restores. One process calls it.

    Args:
        path: of the checkpoint, which is left as it is.
        to: the directory to make.

    Raises:
        UsageError: it is of the usual form, or there is something already.
        CheckpointError: it is damaged, or cannot be written.

    Example:
        >>> consolidate("nowhere", "whole")
        Traceback (most recent call last):
        tnt_func.errors.UsageError: consolidate('nowhere', ...) was given what is no checkpoint in parts; ...
    """
    path, to = Path(path), Path(to)
    shards = Shards.read(path)
    if shards is None or to.exists():
        wrong = "what is no checkpoint in parts" if shards is None else f"{str(to)!r}, which exists"
        raise UsageError(
            f"consolidate({str(path)!r}, ...) was given {wrong}; it makes a new one of one that ranks have written. "
            "Write consolidate('runs/7/step-...', 'whole')."
        )
    folders = [shards.folder(path, index) for index in range(shards.parts)]
    manifests = [checkpoint.inspect(folder) for folder in folders]
    files = [Mapped(folder / TENSORS, each.layout) for folder, each in zip(folders, manifests, strict=True)]
    for file, manifest in zip(files, manifests, strict=True):
        file.verify(manifest.layout.entries)
    cpu = torch.device("cpu")
    tensors = {
        name: torch.cat([file.read(name, cpu) for file in files], shards.cuts[name][0])
        if name in shards.cuts
        else files[0].read(name, cpu)
        for name in manifests[0].layout.entries
    }

    def fill(folder: Path) -> None:
        with synced(folder / TENSORS) as file:
            layout = write(file, tensors)
        with synced(folder / MANIFEST) as file:
            file.write(replace(manifests[0], layout=layout).text().encode())

    appear(to, fill)


def agreed_on(ranks: Ranks, what: str, work: Callable[[], Any] | None) -> None:
    """Do one's part; where that of any rank fails, all fail.

    Raises:
        TntError: that of this rank; a CheckpointError where it is another's.
    """
    error: TntError | None = None
    try:
        if work is not None:
            work()
    except TntError as found:
        error = found
    verdicts = Exchange(ranks, "checkpoint", 0, [float(error is not None)]).wait()
    if error is not None:
        raise error
    if failed := [rank for rank, (bad,) in enumerate(verdicts) if bad]:
        raise CheckpointError(f"rank {failed[0]} could not {what}; its own error says why. Nothing of it is left.")


def _map(function: Callable[[Any], Any], state: State) -> State:
    return trees.map(function, state)


def _named(function: Callable[[str, Any], Any], state: State) -> State:
    leaves = [function(name, leaf) for name, leaf in trees.named_leaves(state)]
    return trees.unflatten(leaves, trees.structure(state))


def _part(plain: State, shards: Shards, index: int) -> State:
    """What the State of a part is like."""

    def narrow(name: str, leaf: Any) -> Any:
        if name not in shards.cuts or not isinstance(leaf, Tensor):
            return leaf
        dimension, shape = shards.cuts[name]
        if [*leaf.shape] != shape:
            raise StructureError(
                f"state{name} is {shape} in the checkpoint and {trees.describe(leaf)} in `like`; a checkpoint fits the "
                "states of the run that wrote it. Pass like=tnt.prepare(unit, state, callbacks) of that run."
            )
        _, start, length = shards.rows(name, index)
        return leaf.to("meta").narrow(dimension, start, length)

    return _named(narrow, plain)


def _laid_like(leaf: Any, like: Any) -> Any:
    """A whole leaf, as another one lies."""
    if not isinstance(leaf, Tensor) or not isinstance(like, Tensor):
        return leaf
    if not is_laid_out(like):
        return leaf.to(like.device)
    return laid(leaf.to(like.device), like.device_mesh, dimension_of(like))  # pyright: ignore


def _on_mesh_like(own: Any, like: Any) -> Any:
    return on_mesh(own, like.device_mesh, dimension_of(like), like.shape) if is_laid_out(like) else own

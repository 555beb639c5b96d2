"""Reading a State: all of it is checked before any of it is given."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from tnt_func import pytree as trees
from tnt_func.checkpoint.manifest import Manifest, adopt, parse
from tnt_func.checkpoint.parts import MODEL, Opaque, Part, parts, rebuilt
from tnt_func.checkpoint.saving import MANIFEST, TENSORS
from tnt_func.checkpoint.tensors import Mapped, opened
from tnt_func.errors import StructureError, UsageError
from tnt_func.state import State
from tnt_func.types import PyTree, typed

SHOWN = 8
"""How many differences a message lists."""

Device = str | torch.device


@typed
def inspect(path: str | os.PathLike[str]) -> Manifest:
    """What a checkpoint holds, without reading its tensors.

    Raises:
        CheckpointError: it is missing or damaged.

    Example:
        >>> import tempfile
        >>> from tnt_func.checkpoint.saving import save
        >>> from tnt_func.rng import key
        >>> directory = tempfile.TemporaryDirectory()
        >>> save(f"{directory.name}/first", State(params={"w": torch.ones(2)}, key=key(0)))
        >>> inspect(f"{directory.name}/first").leaves, inspect(f"{directory.name}/first").static["key"]
        ({".params['w']": 'float32[2]'}, Key(seed=0))
        >>> directory.cleanup()
    """
    with opened(Path(path) / MANIFEST) as file:
        return parse(file.read(), Path(path) / MANIFEST)


@typed
def restore(
    path: str | os.PathLike[str],
    like: State,
    *,
    only: Callable[[str], bool] | None = None,
    device: Device | None = None,
    new_slots: bool = False,
) -> State:
    """The State that a checkpoint holds.

    Structure, shapes, dtypes and checksums are compared before anything is given; `like` is not written to. Key,
    counters and stop come from the checkpoint. Slots of memory that `like` has not are kept, and saved again unchanged;
    metrics that `like` has not are left out. A leaf that is no tensor may differ in type outside of the model.

    Large tensors stay in the pages of the file, read when first used and private to the process; the disk gives the
    room of a removed checkpoint back once they are gone.

    Args:
        path: the directory of the checkpoint.
        like: a State of the same structure: `tnt.prepare(unit, state, callbacks)`.
        only: `path of a leaf -> bool`, `".params['encoder.weight']"` say: takes these leaves from the checkpoint, and
            everything else, key and counters too, from `like`. The other leaves need not fit.
        device: where tensors go; without it, where those of `like` are.
        new_slots: slots of memory and metrics that the checkpoint has not keep what `like` has in them.

    Raises:
        CheckpointError: it is missing, incomplete or damaged; the file or the leaf is named.
        StructureError: it holds another structure, shape or dtype; the leaf is named.
        UsageError: `only` chooses no leaf.

    Example:
        >>> import tempfile
        >>> from tnt_func.checkpoint.saving import save
        >>> from tnt_func.rng import key
        >>> directory = tempfile.TemporaryDirectory()
        >>> save(f"{directory.name}/first", State(params={"w": torch.ones(2)}, key=key(7)))
        >>> restored = restore(f"{directory.name}/first", State(params={"w": torch.zeros(2)}, key=key(0)))
        >>> restored.params, restored.key
        ({'w': tensor([1., 1.])}, Key(seed=7))
        >>> directory.cleanup()
    """
    path = Path(path)
    manifest = inspect(path)
    if only is not None:
        return _some(path, manifest, like, only, device)
    lines = list(_differences(manifest, like, new_slots))
    if lines:
        raise _unlike(path, lines)
    file = Mapped(path / TENSORS, manifest.layout)
    file.verify(manifest.layout.entries)

    def build(part: Part) -> PyTree:
        if part.prefix not in manifest.outlines:
            return part.tree
        if isinstance(part.tree, Opaque):
            return _opaque(file, manifest, part.prefix, device)
        taken = [_leaf(file, manifest, name, leaf, device) for name, leaf in part.leaves().items()]
        structure = trees.structure(part.tree)
        adopt(structure, manifest.outlines[part.prefix])
        return trees.unflatten(taken, structure)

    state = rebuilt(like.replace(output=None, **manifest.static), build)
    unknown = {prefix: name for prefix, name in manifest.slots.items() if name not in like.memory}
    slots = {name: _opaque(file, manifest, prefix, device) for prefix, name in unknown.items()}
    return state.replace(memory={**state.memory, **slots})


def _differences(manifest: Manifest, like: State, new_slots: bool) -> Iterator[str]:
    """Why `like` cannot take what a checkpoint holds, a line a reason."""
    for part in parts(like):
        if part.prefix not in manifest.outlines:
            if not new_slots:
                yield (
                    f"state{part.prefix} is not in the checkpoint: the callback, unit transform or metric of that name "
                    "is new. Write new_slots=True to begin it afresh"
                )
            continue
        here = part.leaves()
        there = {name: None for name in manifest.leaves if name.startswith(part.prefix)}
        yield from (f"state{name} is not in the checkpoint" for name in here if name not in there)
        yield from (f"state{name} is in the checkpoint alone" for name in there if name not in here)
        if here.keys() == there.keys():
            if not isinstance(part.tree, Opaque) and not adopt(
                trees.structure(part.tree), manifest.outlines[part.prefix]
            ):
                yield f"the containers of state{part.prefix} differ: {manifest.outlines[part.prefix]} in the checkpoint"
            yield from _unfitting(manifest, here)


def _unfitting(manifest: Manifest, leaves: Mapping[str, Any]) -> Iterator[str]:
    """The leaves that are of another kind in the checkpoint, a line each."""
    for name, leaf in leaves.items():
        entry = manifest.layout.entries.get(name)
        if isinstance(leaf, torch.Tensor) and entry is not None:
            # An accumulator takes the shape of what it sees, which an empty one does not know.
            shaped = name.startswith(".metrics") or entry.shape == tuple(leaf.shape)
            fits = shaped and entry.dtype == str(leaf.dtype).removeprefix("torch.")
        else:
            fits = not name.startswith(tuple(f".{part}" for part in MODEL)) or (
                name in manifest.values and type(manifest.values[name]) is type(leaf)
            )
        if not fits:
            yield f"state{name} is {manifest.leaves[name]} in the checkpoint and {trees.describe(leaf)} in `like`"


def _some(path: Path, manifest: Manifest, like: State, only: Callable[[str], bool], device: Device | None) -> State:
    """`like` with some leaves out of a checkpoint."""
    chosen = {name: leaf for part in parts(like) for name, leaf in part.leaves().items() if only(name)}
    if not chosen:
        raise UsageError(
            f"restore(..., only=...) chose none of the leaves of `like`, {trees.paths(like)[:SHOWN]}, ...; it is given "
            "their paths. Write only=lambda path: path.startswith('.params'), say."
        )
    missing = [f"state{name} is not in the checkpoint" for name in chosen if name not in manifest.leaves]
    lines = missing or list(_unfitting(manifest, chosen))
    if lines:
        raise _unlike(path, lines)
    file = Mapped(path / TENSORS, manifest.layout)
    file.verify(name for name in chosen if name in manifest.layout.entries)

    def build(part: Part) -> PyTree:
        taken = [
            _leaf(file, manifest, name, leaf, device) if name in chosen else leaf
            for name, leaf in part.leaves().items()
        ]
        return trees.unflatten(taken, trees.structure(part.tree))

    return rebuilt(like, build)


def _leaf(file: Mapped, manifest: Manifest, name: str, leaf: Any, device: Device | None) -> Any:
    if name in manifest.values:
        return manifest.values[name]
    here = leaf.device if isinstance(leaf, torch.Tensor) and not leaf.is_meta else "cpu"
    return file.read(name, torch.device(here if device is None else device))


def _opaque(file: Mapped, manifest: Manifest, prefix: str, device: Device | None) -> Opaque:
    names = [name for name in manifest.leaves if name.startswith(prefix)]
    leaves = {name.removeprefix(prefix): _leaf(file, manifest, name, None, device) for name in names}
    return Opaque(leaves, json.dumps(manifest.outlines[prefix], sort_keys=True))


def _unlike(path: Path, lines: list[str]) -> StructureError:
    shown = [*lines[:SHOWN], *([f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else [])]
    return StructureError(
        f"the checkpoint {path} does not fit `like`:\n  " + "\n  ".join(shown) + "\nIt fits the states of the run that "
        "wrote it: pass like=tnt.prepare(unit, state, callbacks) of that run, or only=... for some of its leaves."
    )

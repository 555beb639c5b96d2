"""Writing a State to a directory of its own, all of it or nothing.

The files are written beside their destination, under a hidden name, flushed to the disk and then renamed: whenever the
process or the machine dies, what has the name is whole.
"""

import contextlib
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import torch

from tnt_func.checkpoint.manifest import Manifest
from tnt_func.checkpoint.parts import parts
from tnt_func.checkpoint.tensors import check, write
from tnt_func.ensembles import PerMember
from tnt_func.errors import CheckpointError, StructureError, UsageError, kind_of
from tnt_func.state import State
from tnt_func.types import typed

MANIFEST, TENSORS = "checkpoint.json", "tensors.safetensors"
HIDDEN = ".tnt-"
"""How the names begin of what is being written or removed."""


@typed
def save(
    path: str | os.PathLike[str], state: State, *, metrics: Mapping[str, Mapping[str, float]] | None = None
) -> None:
    """Write a State as a checkpoint: a new directory with `checkpoint.json` and `tensors.safetensors`.

    Once it returns, the checkpoint is whole and on the disk; before, there is nothing of that name. A checkpoint is
    never overwritten. Leaves on other devices are fetched, which waits for them.

    Args:
        path: the directory to make; the one it is in exists.
        state: of a resumable event, or any other without output.
        metrics: what `best` will compare, by phase and name; those in the state with one element, if not given.

    Raises:
        UsageError: something of that name is there, or the state has an output.
        StructureError: a leaf is nothing that a checkpoint holds; it is named.
        CheckpointError: it could not be written; nothing of it is left.

    Example:
        >>> import tempfile
        >>> from tnt_func.rng import key
        >>> directory = tempfile.TemporaryDirectory()
        >>> save(f"{directory.name}/first", State(params={"w": torch.ones(2)}, key=key(0)))
        >>> sorted(os.listdir(f"{directory.name}/first"))
        ['checkpoint.json', 'tensors.safetensors']
        >>> directory.cleanup()
    """
    path = Path(path)
    if state.output is not None:
        raise UsageError(
            f"save({str(path)!r}, state) was given the state of a step_end event, which has an output; a run resumes "
            "from the state of a resumable event. Save where event.resumable, or state.replace(output=None)."
        )
    if path.exists() or path.is_symlink():
        raise UsageError(
            f"save({str(path)!r}, state) was given a path that exists; a checkpoint is never overwritten. Save under "
            "another name (tnt.checkpoint.name(state) has the step in it), or remove it first."
        )
    named = [*state.memory, *state.metrics, *(name for found in state.metrics.values() for name in found)]
    if odd := [name for name in named if type(name) is not str]:
        raise StructureError(
            f"state.memory or state.metrics has the key {odd[0]!r}, {kind_of(odd[0])}; slots, phases and metrics have "
            "names. Use str(key)."
        )
    whole = list(parts(state))
    leaves = {name: leaf for part in whole for name, leaf in part.leaves().items()}
    for name, leaf in leaves.items():
        _check_leaf(name, leaf)
    tensors = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, torch.Tensor)}
    manifest = Manifest(
        tnt_func=sys.modules["tnt_func"].__version__,
        torch=str(torch.__version__),
        static={"key": state.key, "progress": state.progress, "stop": state.stop},
        outlines={part.prefix: part.outline() for part in whole},
        values={name: leaf for name, leaf in leaves.items() if name not in tensors},
        metrics=numbers(state) if metrics is None else metrics,
    )

    def fill(folder: Path) -> None:
        with synced(folder / TENSORS) as file:
            layout = write(file, tensors)
        with synced(folder / MANIFEST) as file:
            file.write(replace(manifest, layout=layout).text().encode())

    appear(path, fill)


def numbers(state: State, *, members: bool = True) -> dict[str, dict[str, float]]:
    """The metrics of a state that are one number, by phase and name.

    Args:
        state: any.
        members: of an ensemble, whether each member's are wanted besides mean and standard deviation.

    Example:
        >>> from tnt_func.metrics import mean
        >>> from tnt_func.rng import key
        >>> numbers(State(params={}, key=key(0), metrics={"eval": {"loss": mean("loss").of({"loss": 0.5})}}))
        {'eval': {'loss': 0.5}}
    """
    return {phase: dict(_numbers(accumulators, members)) for phase, accumulators in state.metrics.items()}


def _numbers(accumulators: Mapping[str, Any], members: bool) -> Iterator[tuple[str, float]]:
    for name, accumulator in accumulators.items():
        try:
            if isinstance(accumulator, PerMember):
                yield from accumulator.numbers(name, members=members).items()
                continue
            value = torch.as_tensor(accumulator.value())
        except Exception:
            continue  # What has seen nothing may have no value; a checkpoint is no place to find that out.
        if value.numel() == 1 and not value.is_complex():
            yield name, float(value)


def _check_leaf(name: str, leaf: Any) -> None:
    if isinstance(leaf, torch.Tensor):
        return check(name, leaf)
    if type(leaf) not in (type(None), bool, int, float, str):
        raise StructureError(
            f"state{name} is {leaf!r}, {kind_of(leaf)}; a checkpoint holds tensors, None, bool, int, float, str, and "
            "no subclasses of these, which would come back as another type. Convert it: float(x), int(x), str(x)."
        )


@contextlib.contextmanager
def synced(path: Path) -> Iterator[BinaryIO]:
    """A new file, which is on the disk when it is closed."""
    with path.open("xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def appear(path: Path, fill: Callable[[Path], None]) -> None:
    """Make a directory that is there with all that `fill` puts into it, or is not there."""
    folder = None
    try:
        folder = _hidden(path.parent)
        fill(folder)
        _sync(folder)
        folder.rename(path)
        _sync(path.parent)
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"the checkpoint {path} could not be written: {error}. Nothing of that name is left, and what was saved "
            "before is as it was. Make room, or save to a directory that exists and can be written to."
        ) from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _hidden(directory: Path) -> Path:
    """A new directory inside one that exists, with the permissions that any new directory gets."""
    folder = directory / f"{HIDDEN}{secrets.token_hex(8)}"
    folder.mkdir()
    return folder


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_ready(directory: Path) -> None:
    """Make a directory for checkpoints ready: there, writable, and without what a killed process left half-done.

    Raises:
        CheckpointError: nothing can be written there.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _hidden(directory)
        for left in directory.glob(f"{HIDDEN}*"):
            shutil.rmtree(left, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(
            f"checkpoints cannot be written to {directory}: {error}. Give a directory that can be written to."
        ) from error


def remove(path: Path) -> None:
    """Remove a checkpoint: it has gone before the first of its files has.

    What of it cannot be removed is left under a hidden name.

    Raises:
        CheckpointError: it cannot be renamed.
    """
    try:
        hidden = _hidden(path.parent)
        path.rename(hidden / path.name)
    except OSError as error:
        raise CheckpointError(f"the checkpoint {path} could not be removed: {error}.") from error
    shutil.rmtree(hidden, ignore_errors=True)

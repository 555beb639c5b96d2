"""Law 15: a checkpoint is the state, or it is refused."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from tnt_func import pytree as trees
from tnt_func import rng
from tnt_func.checkpoint import restore as restore_state
from tnt_func.checkpoint import save as save_state
from tnt_func.errors import CheckpointError, LawError
from tnt_func.state import State, digest
from tnt_func.testing.snapshot import SHOWN, freeze


def check_checkpoint(
    state: State,
    directory: str | os.PathLike[str],
    *,
    save: Callable[..., Any] = save_state,
    restore: Callable[..., State] = restore_state,
    damages: int = 8,
    seed: int = 0,
) -> None:
    """Law 15. What is restored is what was saved, bitwise; a damaged checkpoint is refused, and nothing is half-loaded.

    The state is saved, restored inside itself and inside a state of other values, and saved once more, which must give
    the same files. Then bytes are changed, files cut short, emptied, removed and exchanged, one at a time.

    Args:
        state: with whatever a unit and callbacks of your own put into it; their classes are what is on trial.
        directory: where checkpoints are written for the while; left as it was.
        save, restore: on trial too.
        damages: how many of them, beside those of whole files.
        seed: of their choice.

    Raises:
        LawError: what was restored differs, with the leaves; or a damage went unseen, with its place.

    Example:
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     check_checkpoint(State(params=torch.ones(2), key=rng.key(0)), directory)
    """
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        path, again = Path(folder, "saved"), Path(folder, "saved again")
        before, like = freeze(state), _other(state)
        save(path, state)
        for inside, said in ((state, "itself"), (like, "a state of other values")):
            kept = freeze(inside)
            restored = restore(path, inside)
            lines = trees.diff(state, restored, "state") or _marks(state, restored)
            if lines or digest(restored) != digest(state):
                raise _broken(f"restored inside {said}, the state is another", lines, _OTHER)
            if freeze(state) != before or freeze(inside) != kept:
                raise _broken("saving or restoring wrote into a state that it was given", [], _READS)
            save(again, restored)
            if _files(again) != _files(path):
                raise _broken("the restored state, saved again, gives other files", sorted(_files(path)), _OTHER)
            shutil.rmtree(again)
        files, kept = _files(path), freeze(like)
        for said, damaged in _damages(files, rng.split(rng.key(seed), damages)):
            _put(path, damaged)
            try:
                restore(path, like)
            except CheckpointError:
                pass
            else:
                raise _broken(f"a damaged checkpoint was restored: {said}", [], _CHECKSUMS)
            if freeze(like) != kept:
                raise _broken(f"a damaged checkpoint was half-loaded: {said}", [], _READS)


_OTHER = (
    "A class in a state is a frozen dataclass under @pytree that is made again of its fields, with no computing in "
    "__post_init__; what no checkpoint holds is refused by save."
)
_READS = "Checkpoints are copies: detach and clone, and write to nothing that was given."
_CHECKSUMS = "Every byte of every file is under a checksum, which is compared before anything is given."


def _other(state: State) -> State:
    """A state of the same structure with other values, none of which may come back."""
    progress = state.progress.put("train", state.progress.train._replace(epochs=state.progress.train.epochs + 1))
    blank = trees.map(lambda leaf: torch.zeros_like(leaf) if isinstance(leaf, torch.Tensor) else leaf, state)
    return blank.replace(key=rng.fold_in(state.key, "other"), progress=progress, stop=f"not {state.stop}")


def _marks(a: State, b: State) -> list[str]:
    """Leaves of equal bits that one trains and the other does not."""
    pairs = zip(trees.named_leaves(a), trees.leaves(b), strict=True)
    return [
        f"state{path}: requires_grad={x.requires_grad} became {y.requires_grad}"
        for (path, x), y in pairs
        if isinstance(x, torch.Tensor) and x.requires_grad != y.requires_grad
    ]


def _files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def _put(path: Path, files: dict[str, bytes]) -> None:
    shutil.rmtree(path)
    path.mkdir()
    for name, content in files.items():
        (path / name).write_bytes(content)


def _damages(files: dict[str, bytes], choices: Sequence[rng.Key]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Damaged copies of a checkpoint, each with what was done to it."""
    names = list(files)
    for name in names:
        yield f"{name} was missing", {other: files[other] for other in names if other != name}
        yield f"{name} was empty", {**files, name: b""}
        yield f"{name} had a byte more", {**files, name: files[name] + b"\0"}
    yield "its files were exchanged", dict(zip(names, reversed(files.values()), strict=True))
    for choice in choices:
        name = names[rng.fold_in(choice, "file").seed % len(names)]
        content = files[name]
        place = rng.fold_in(choice, "place").seed % len(content)
        yield f"{name} was cut short at byte {place}", {**files, name: content[:place]}
        changed = bytes([content[place] ^ 1 + rng.fold_in(choice, "bits").seed % 255])
        yield f"byte {place} of {name} was changed", {**files, name: content[:place] + changed + content[place + 1 :]}


def _broken(said: str, lines: Sequence[str], advice: str) -> LawError:
    shown = "".join(f"\n  {line}" for line in lines[:SHOWN])
    return LawError(f"law 15 (checkpoint) is broken: {said}{shown}\n{advice}")

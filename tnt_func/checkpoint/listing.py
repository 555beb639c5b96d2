"""The checkpoints of a run in their directory: which there are, the latest, the best, the one to resume from.

Example:
    >>> import tempfile
    >>> from tnt_func.checkpoint.saving import save
    >>> from tnt_func.rng import key
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     state = State(params={}, key=key(0))
    ...     save(Path(directory) / name(state), state)
    ...     [path.name for path in checkpoints(directory)]
    ['step-000000000000-epoch-000000']
"""

import math
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tnt_func import pytree as trees
from tnt_func.checkpoint.manifest import Manifest
from tnt_func.checkpoint.restoring import Device, inspect, restore
from tnt_func.checkpoint.saving import MANIFEST, save
from tnt_func.errors import CheckpointError, StructureError, UsageError
from tnt_func.state import State
from tnt_func.types import Mode, Phase, typed

Directory = str | os.PathLike[str]
_NAME = re.compile(r"step-(\d{12,})-epoch-(\d{6,})(?:\.(\d+))?")


def name(state: State) -> str:
    """What a checkpoint of a state is called: its training steps and epochs completed, of the lifetime. Names sort.

    Example:
        >>> from tnt_func.rng import key
        >>> name(State(params={}, key=key(0)))
        'step-000000000000-epoch-000000'
    """
    progress = state.progress.train
    return f"step-{progress.steps:012}-epoch-{progress.epochs:06}"


def place(path: Path) -> tuple[int, int, int]:
    """The steps and epochs in a checkpoint's name, and which of that name it is.

    Example:
        >>> place(Path("step-000000000012-epoch-000003.1"))
        (12, 3, 1)
    """
    found = _NAME.fullmatch(path.name)
    assert found is not None
    return int(found[1]), int(found[2]), int(found[3] or 0)


def save_in(directory: Path, state: State, metrics: Mapping[str, Mapping[str, float]] | None = None) -> Path:
    """Save a state under its name, numbered where other states have that; one that is there already stays.

    Args:
        directory: of the checkpoints.
        state, metrics: as in `save`.

    Returns:
        The path of its checkpoint.

    Example:
        >>> import tempfile
        >>> from tnt_func.rng import key
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     states = (State(params=number, key=key(0)) for number in (1, 1, 2))
        ...     [save_in(Path(directory), state).name for state in states]
        ['step-000000000000-epoch-000000', 'step-000000000000-epoch-000000', 'step-000000000000-epoch-000000.1']
    """
    path, again = directory / name(state), 0
    while path.exists():
        if _holds(path, state):
            return path
        again += 1
        path = directory / f"{name(state)}.{again}"
    save(path, state, metrics=metrics)
    return path


def _holds(path: Path, state: State) -> bool:
    """Whether a checkpoint is whole and of this very state: a resumed run makes the states again that it made."""
    try:
        return trees.equal(restore(path, state), state)
    except (CheckpointError, StructureError):
        return False


@typed
def checkpoints(directory: Directory) -> list[Path]:
    """The checkpoints of a directory that are named as `name` does, the earliest first; none where it does not exist.

    Names alone are looked at. What is being written has no such name, so all are complete; whether they are whole,
    `restore` finds out.
    """
    directory = Path(directory)
    if not directory.is_dir():
        return []
    return sorted((path for path in directory.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()), key=place)


@typed
def latest(directory: Directory) -> Path | None:
    """The checkpoint of the most steps, or None.

    Example:
        >>> latest("nowhere") is None
        True
    """
    return max(checkpoints(directory), key=place, default=None)


@typed
def best(directory: Directory, metric: str, mode: Mode, *, phase: Phase = "eval") -> Path | None:
    """The checkpoint whose metric is the least or the greatest, of equal ones the earliest; None where none has it.

    The metrics of an evaluation belong to the checkpoints of the state that was evaluated. NaN is no number, 0.0 is.

    Args:
        directory: of the checkpoints.
        metric: its name in the unit.
        mode: "min" or "max".
        phase: whose metric.

    Example:
        >>> best("nowhere", "loss", "min") is None
        True
    """
    scores = {path: score(found, metric, mode, phase) for path, found in _readable(directory)}
    return min((path for path in scores if scores[path] < math.inf), key=lambda path: scores[path], default=None)


def score(manifest: Manifest, metric: str, mode: Mode, phase: Phase) -> float:
    """What is to be made small: a checkpoint's metric, or minus it; infinity where it has none."""
    value = manifest.metrics.get(phase, {}).get(metric, math.nan)
    return math.inf if math.isnan(value) else value if mode == "min" else -value


def _readable(directory: Directory) -> Any:
    for path in checkpoints(directory):
        try:
            yield path, inspect(path)
        except CheckpointError as error:
            warnings.warn(f"a checkpoint was passed over: {error}", stacklevel=4)


@typed
def resume(directory: Directory, like: State, *, device: Device | None = None, new_slots: bool = False) -> State:
    """The State of the latest good checkpoint of a directory, or `like` where there is none yet.

    So one script begins a run and continues it. Of a damaged checkpoint that it passes over it warns.

    Args:
        directory: of the checkpoints; it need not exist.
        like, device, new_slots: as in `restore`.

    Raises:
        UsageError: the path is no directory of checkpoints but a file, or one checkpoint.
        CheckpointError: there are checkpoints, and all are damaged.
        StructureError: the latest good one does not fit `like`.

    Example:
        >>> from tnt_func.rng import key
        >>> resume("nowhere", State(params=1.0, key=key(0))).params
        1.0
    """
    path = Path(directory)
    if path.is_file() or (path / MANIFEST).is_file():
        what = "a file" if path.is_file() else "one checkpoint"
        raise UsageError(
            f"resume was given {str(path)!r}, which is {what}; it looks through a directory of checkpoints, and begins "
            f"anew where there is none. Write resume({str(path.parent)!r}, like), or restore(path, like) for one."
        )
    reasons = list[str]()
    for path in reversed(checkpoints(directory)):
        try:
            state = restore(path, like, device=device, new_slots=new_slots)
        except CheckpointError as error:
            reasons.append(str(error))
            continue
        for reason in reasons:
            warnings.warn(f"resuming from {path.name}; a newer checkpoint was passed over: {reason}", stacklevel=3)
        return state
    if reasons:
        raise CheckpointError(
            f"every checkpoint in {directory} is damaged: {' '.join(reasons)} Begin in another directory, or restore "
            "these from a backup."
        )
    return like

"""The checkpoints of a run of many ranks: written as it goes, found again where it goes on.

Example:
    >>> import tempfile
    >>> import torch
    >>> import tnt_func as tnt
    >>> step = lambda state, batch: (state.replace(params=state.params + batch), {})
    >>> unit, first = tnt.TrainUnit(train_step=step), tnt.State(params=torch.zeros(2), key=tnt.key(0))
    >>> with tnt.distributed.init() as world, tempfile.TemporaryDirectory() as directory:
    ...     mesh, like = tnt.distributed.mesh(world), tnt.prepare(unit, first)
    ...     saving = checkpointer(directory, mesh, every_n_steps=1)
    ...     state = tnt.train(unit, like, [1, 2], max_epochs=2, observers=[saving])
    ...     tnt.digest(resume(directory, like, mesh)) == tnt.digest(state)
    True
"""

import warnings
from os import PathLike
from pathlib import Path

from torch.distributed.device_mesh import DeviceMesh

from tnt_func import checkpoint
from tnt_func.checkpoint.listing import checkpoints
from tnt_func.checkpoint.saving import make_ready, remove
from tnt_func.distributed.checkpoints import agreed_on, restore, save
from tnt_func.distributed.collectives import Exchange
from tnt_func.distributed.replicas import told
from tnt_func.distributed.world import Ranks
from tnt_func.errors import CheckpointError, UsageError
from tnt_func.events import Event, refuse_a_part
from tnt_func.state import State
from tnt_func.types import typed

Place = str | PathLike[str]


@typed
def resume(directory: Place, like: State, mesh: DeviceMesh) -> State:
    """The State of the latest checkpoint that every rank can restore, or `like` where there is none yet.

    Args:
        directory: of the checkpoints; it need not exist.
        like: as of `restore`.
        mesh: the ranks.

    Raises:
        CheckpointError: there are checkpoints, and none is good.

    Example:
        >>> from tnt_func import rng
        >>> from tnt_func.distributed.world import init, mesh
        >>> with init() as world:
        ...     resume("nowhere", State(params=1.0, key=rng.key(0)), mesh(world)).params
        1.0
    """
    ranks = Ranks.of(mesh)
    names = told(ranks, [path.name for path in reversed(checkpoints(directory))])
    for name in names:
        state, error = like, None
        try:
            state = restore(Path(directory) / name, like)
        except CheckpointError as found:
            error = found
        if not any(bad for (bad,) in Exchange(ranks, "checkpoint", 0, [float(error is not None)]).wait()):
            return state
        warnings.warn(f"{name} was passed over: {error or 'another rank cannot restore it'}", stacklevel=3)
    if names:
        raise CheckpointError(f"every checkpoint in {directory} is damaged. Begin in another directory.")
    return like


@typed
def checkpointer(
    directory: Place,
    mesh: DeviceMesh,
    *,
    every_n_steps: int | None = None,
    every_n_epochs: int | None = None,
    keep: int | None = 3,
) -> "Checkpointer":
    """An observer that saves resumable states, for every rank: the last one where the run ends or pauses, in any case.

    A run that fails on one rank saves nothing then, for the others do not know; it goes on from the last checkpoint.

    Args:
        directory: of the checkpoints; made if need be.
        mesh: the ranks.
        every_n_steps, every_n_epochs: of the lifetime.
        keep: how many of the latest are kept; None keeps all.

    Raises:
        UsageError: a number is below 1.
        CheckpointError: out of the run, when a checkpoint cannot be written.

    Example:
        >>> from tnt_func.distributed.world import init, mesh
        >>> with init() as world:
        ...     checkpointer("runs/7", mesh(world), every_n_steps=100).directory.name
        '7'
    """
    for given, value in (("every_n_steps", every_n_steps), ("every_n_epochs", every_n_epochs), ("keep", keep)):
        if value is not None and value < 1:
            raise UsageError(
                f"checkpointer({given}={value}) was given; it is at least 1, or None. Write {given}=1, say."
            )
    return Checkpointer(Path(directory), mesh, every_n_steps, every_n_epochs, keep)


class Checkpointer:
    """What `checkpointer` makes: called with every event, on every rank."""

    open = refuse_a_part

    def __init__(self, directory: Path, mesh: DeviceMesh, steps: int | None, epochs: int | None, keep: int | None):
        self.directory = directory
        self._mesh, self._ranks = mesh, Ranks.of(mesh)
        self._steps, self._epochs, self._keep = steps, epochs, keep
        self._state: State | None = None

    def __call__(self, event: Event) -> None:
        """Save where it is due."""
        if event.phase != "train":
            return
        if event.point == "start":
            agreed_on(
                self._ranks, "write there", (lambda: make_ready(self.directory)) if self._ranks.rank == 0 else None
            )
        elif event.point in ("step_done", "epoch_done"):
            self._state = event.state
            done, every = event.state.progress.train, self._steps if event.point == "step_done" else self._epochs
            if every is not None and (done.steps if event.point == "step_done" else done.epochs) % every == 0:
                self._save(event.state)
        elif event.point in ("end", "paused") and self._state is not None:
            self._save(self._state)

    def _save(self, state: State) -> None:
        path = self.directory / checkpoint.name(state)
        if told(self._ranks, path.exists()):
            return
        save(path, state, self._mesh)
        if self._ranks.rank == 0 and self._keep is not None:
            for old in checkpoints(self.directory)[: -self._keep]:
                remove(old)

"""Recording a run while it goes on: a line for every step, a digest and a checkpoint now and then.

Every line is one write at the end of a file, so a killed process leaves whole lines and at most one torn one. A line is
there before the checkpoint that follows it, so a run resumed from a checkpoint finds all lines up to it; those after it
are cut, for the steps are taken again.
"""

import hashlib
import json
import os
import sys
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tnt_func.checkpoint.listing import checkpoints, place, save_in
from tnt_func.checkpoint.saving import make_ready, remove
from tnt_func.errors import CheckpointError, UsageError, UsageTypeError
from tnt_func.events import Event, refuse_a_part
from tnt_func.lines import append, owned
from tnt_func.replay.marks import mark_of_batch, marks, numbers, row_numbers
from tnt_func.replay.rows import CHECKPOINTS, ROWS, Directory, Lineage, Record, line
from tnt_func.state import State, digest
from tnt_func.types import typed
from tnt_func.unit import RESERVED


@typed
def record(
    directory: Directory,
    *,
    digest_every_n_steps: int = 100,
    checkpoint_every_n_steps: int = 500,
    metrics_every_n_steps: int = 1,
    mark_batches: bool = True,
    code: str | None = None,
    config: Mapping[str, Any] | None = None,
    fingerprint: str | None = None,
) -> "Recording":
    """An observer that records a run of `train` or `fit`, so that `tnt.replay` can answer for it.

    Resume from its checkpoints: `tnt.checkpoint.resume(f"{directory}/checkpoints", like)`. A call that begins where the
    record has been cuts the rows and checkpoints after that place. States, batches and outputs are fetched to the CPU
    at their cadences, which waits for the device.

    Args:
        directory: made when the run starts; it belongs to one run at a time.
        digest_every_n_steps: steps of the lifetime from digest to digest. One takes a pass of SHA-256 over the state.
        checkpoint_every_n_steps: likewise; where a call begins and where it ends there is one too.
        metrics_every_n_steps: likewise, for the numbers in the steps' output.
        mark_batches: whether each batch is marked, a pass of CRC-32, so that another batch is found at its step.
        code: the version of the user's code, a commit say.
        config: the run's configuration, of JSON's types; `str(optimizer)` is the call that made it.
        fingerprint: the version of the data, a checksum say.

    Raises:
        UsageError: a cadence is below 1; out of the run, when the directory holds another run.
        UsageTypeError: JSON cannot hold `config`.
        CheckpointError: out of the run, when the directory cannot be written.

    Example:
        >>> record("runs/7", digest_every_n_steps=1, code="v3", config={"lr": 0.1})
        record('runs/7')
    """
    cadence = (digest_every_n_steps, checkpoint_every_n_steps, metrics_every_n_steps)
    if min(cadence) < 1:
        raise UsageError(f"record was given the cadences {cadence}; each is at least 1 step. Write 1 for every step.")
    try:
        config = json.loads(json.dumps(config or {}, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise UsageTypeError(
            f"record(config={config!r}) was given; JSON cannot hold it: {error}. Turn values into text and finite "
            "numbers: str(x), float(x)."
        ) from error
    return Recording(
        Path(directory), cadence, mark_batches, {"code": code, "config": config, "fingerprint": fingerprint}
    )


def surroundings() -> dict[str, Any]:
    """What the bits of a run may depend on beside its unit, state and data.

    Example:
        >>> sorted(surroundings())
        ['cpu', 'threads', 'tnt_func', 'torch']
    """
    return {
        "tnt_func": sys.modules["tnt_func"].__version__,
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }


class Recording:
    """What `record` makes: called with every event, closed at the end.

    Attributes:
        directory: of the record.
    """

    def __init__(self, directory: Path, cadence: tuple[int, int, int], mark_batches: bool, origin: dict[str, Any]):
        self.directory = directory
        self._digest_every, self._checkpoint_every, self._metrics_every = cadence
        self._mark_batches, self._origin = mark_batches, origin
        self._file: int | None = None
        self._begun = self._last = self._saved = None
        self._leaves: Mapping[str, str] = {}
        self._numbers: dict[str, Any] | None = None
        self._evaluated = False

    def __repr__(self) -> str:
        return f"record({str(self.directory)!r})"

    def __call__(self, event: Event) -> None:
        """Write what is due."""
        if event.phase == "eval" and event.point == "end":
            self._evaluated = True
        if event.phase != "train":
            return
        if event.point == "start":
            self.close()
            self._begun = event.state
        elif event.point == "step_end" and event.state.progress.train.steps % self._metrics_every == 0:
            self._numbers = numbers(event.state.output)
        elif event.point in ("fetched", "epoch_done") and self._begun is not None:
            # Only here does the state know what data it reads.
            self._begin(self._begun, event.state)
            self._begun = None
        if event.point in ("step_done", "epoch_done"):
            self._add(event)
        elif event.point in ("end", "paused", "failed") and self._last is not None and event.state is not None:
            self._keep(self._last)

    open = refuse_a_part

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            os.close(self._file)
        self._file = self._begun = self._last = self._saved = None
        self._leaves, self._numbers, self._evaluated = {}, None, False

    def _add(self, event: Event) -> None:
        state, step = event.state, event.state.progress.train.steps
        stepped = event.point == "step_done"
        found = row_numbers(state, self._numbers, stepped=stepped, evaluated=self._evaluated)
        batch = mark_of_batch(event.batch) if stepped and self._mark_batches else None
        named = self._named(state) if stepped and step % self._digest_every == 0 else {}
        self._append(state, row="step" if stepped else "epoch", numbers=found, batch=batch, **named)
        self._last, self._numbers, self._evaluated = state, None, False
        if stepped and step % self._checkpoint_every == 0:
            self._keep(state)

    def _append(self, state: State, **values: Any) -> None:
        assert self._file is not None
        progress = state.progress.train
        text = line({"step": progress.steps, "epoch": progress.epochs, **values})
        try:
            append(self._file, text, self.directory / ROWS)
        except CheckpointError:
            self._last = None  # Where a row does not fit, no checkpoint will.
            raise

    def _named(self, state: State) -> dict[str, Any]:
        """The digest of a state and the marks of its leaves."""
        kinds, found = marks(state)
        known, self._leaves = kinds == self._leaves, kinds
        return {"digest": digest(state), "marks": found, "leaves": None if known else kinds}

    def _keep(self, state: State) -> None:
        """A checkpoint of a state, once the rows before it are on the disk."""
        assert self._file is not None
        if state is self._saved:
            return
        os.fsync(self._file)
        path = save_in(self.directory / CHECKPOINTS, state)
        self._append(state, row="checkpoint", checkpoint=path.name, **self._named(state))
        self._saved = state

    def _begin(self, first: State, opened: State) -> None:
        """Bring the directory to where a call begins."""
        folder = self.directory / CHECKPOINTS
        make_ready(folder)
        named, progress = digest(first), first.progress.train
        here = (progress.steps, progress.epochs)
        try:
            known = Record.read(self.directory) if (self.directory / ROWS).exists() else None
            end, continues = 0, False
            if known is not None and known.rows:
                count = sum(row.place <= here for row in known.rows)
                while count and known.rows[count - 1].row == "call":
                    count -= 1  # Nothing came of it.
                self._check(known, count, here, named, first)
                end, continues = known.ends[count - 1] if count else 0, _continues(known, count, here, named)
            # Read before it is owned: a process that closes a file gives up its lock.
            self._file = owned(self.directory / ROWS, self.directory, "Record to another directory.")
            # Checkpoints first: rows without their checkpoint can be read, and resumed from the one before.
            later = [path for path in checkpoints(folder) if place(path)[:2] > here]
            if later:
                warnings.warn(
                    f"{self.directory} is recorded further than step {here[0]}, where this run starts; the rows and "
                    f"{len(later)} checkpoints after it are removed, for the run gets there again.",
                    stacklevel=2,
                )
            for path in reversed(later):
                remove(path)
            os.ftruncate(self._file, end)
        except OSError as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"{self.directory} cannot be recorded to: {error}. Give another directory."
            ) from error
        name_of_run = json.dumps([named, self._origin], sort_keys=True)
        lineage = Lineage(
            run=hashlib.sha256(name_of_run.encode()).hexdigest()[:12],
            key=first.key.seed,
            data=dict(opened.memory[RESERVED]),
            **surroundings(),
            **self._origin,
        )
        self._append(first, row="call", lineage=asdict(lineage))
        if not continues:
            self._keep(first)

    def _check(self, known: Record, count: int, here: tuple[int, int], named: str, first: State) -> None:
        """Refuse to mix two runs in one record."""
        first_place, last = known.rows[0].place, known.rows[-1].place
        if not first_place <= here <= last:
            raise UsageError(
                f"{self.directory} is recorded from step {first_place[0]}, epoch {first_place[1]}, to step {last[0]}, "
                f"epoch {last[1]}, and this run starts at step {here[0]}, epoch {here[1]}; a record has every step "
                "from its first one on. Resume from its latest checkpoint, "
                f"{checkpoints(self.directory / CHECKPOINTS)[-1:]}, or record to another directory."
            )
        digests = [row.digest for row in known.rows[:count] if row.place == here and row.digest is not None]
        other = named not in digests if digests else first.key.seed != known.lineage_at(len(known.rows) - 1).key
        if other and count < len(known.rows):
            raise UsageError(
                f"{self.directory} holds another run: at step {here[0]} its state is not the one that this run starts "
                "with, and the rows after it would be lost. Record to another directory, or remove this one."
            )


def _continues(known: Record, count: int, here: tuple[int, int], named: str) -> bool:
    """Whether the last checkpoint that is left is of the state that a call begins with, and is there."""
    saved = [row for row in known.rows[:count] if row.row == "checkpoint"]
    return bool(saved) and (saved[-1].place, saved[-1].digest) == (here, named) and known.path(saved[-1]).is_dir()

"""Rows as history of a run in Weights & Biases.

Example:
    >>> import tempfile
    >>> from tnt_func.observers.rows import Row
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     writer = wandb_writer("digits", "first", directory=directory, mode="offline", settings={"silent": True})
    ...     writer.open((0, 0))
    ...     writer.write(Row(1, 0, "train", "step", {"loss": 0.5}))
    ...     writer.close()
    ...     [path.name for path in Path(directory).glob("wandb/offline-run-*/*.wandb")]
    ['run-first.wandb']
"""

import glob
import importlib
import json
import os
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tnt_func.errors import optional
from tnt_func.observers.jsonl_writer import jsonl_writer, read_jsonl
from tnt_func.observers.rows import Place, Row
from tnt_func.observers.scalars import Recorded, scalars
from tnt_func.types import typed

HEADER, BLOCK, WHOLE, LAST = 7, 32 * 2**10, 1, 4
"""A .wandb file is a header and a log of LevelDB's: records in pieces, none of them over the end of a block."""


@typed
def wandb_writer(
    project: str,
    run_id: str,
    *,
    directory: str | os.PathLike[str] = ".",
    config: Mapping[str, Any] | None = None,
    **options: Any,
) -> "WandbWriter":
    """A `Writer` of history to Weights & Biases; charts are over "step", the train steps of the lifetime.

    Metrics of epochs and evaluations are "train/loss", "eval/loss"; a step's output is "train_step/loss". Beside each
    row stands the epoch, "epoch/train_step" and so on.

    W&B has a process of its own, which dies with the one that trains and may then lose the last rows. So they are kept
    in RUN_ID.jsonl too, as `jsonl_writer` does, beside W&B's files; and a resumed run first hands in what W&B has not.
    W&B takes nothing back: rows after the place where a run resumes stay, and when these steps are taken again, theirs
    are left out. That is sound, for a resumed run ends on the same bits as one that never stopped; only what was
    measured, a time say, stays as it was the first time. A row that is different is logged as a warning, once.

    Offline each process writes a file of its own, of the same run; together they have each row once, and `wandb sync`
    uploads them in order. Online what is there is read from the server.

    Args:
        project, run_id, config, options: of `wandb.init`, `mode="offline"` say. A run of another id is another run.
        directory: `dir` of `wandb.init`; it is made when a run starts.

    Raises:
        MissingExtraError: wandb is not installed.

    Example:
        >>> wandb_writer("digits", "7", mode="offline", config={"lr": 1e-3})
        wandb_writer('digits', '7')
    """
    wandb = optional("wandb", user="wandb_writer", extra="wandb")
    optional("wandb.proto.wandb_internal_pb2", user="wandb_writer", extra="wandb", package="wandb")
    options = {"resume": "allow", "reinit": "create_new", **options, "project": project, "id": run_id}
    return WandbWriter(wandb, Path(directory), {**options, "config": dict(config or {})})


class WandbWriter:
    """What `wandb_writer` makes.

    Attributes:
        run: of W&B, while the writer is open, or None.
    """

    def __init__(self, wandb: Any, directory: Path, options: dict[str, Any]):
        self.run: Any = None
        self._wandb, self._directory, self._options = wandb, directory, options
        self._path = directory / "wandb" / f"{options['id']}.jsonl"
        self._journal = jsonl_writer(self._path)
        self._recorded = Recorded("W&B")

    def __repr__(self) -> str:
        return f"wandb_writer({self._options['project']!r}, {self._options['id']!r})"

    def open(self, place: Place | None) -> None:
        """Begin a run of W&B or go on with it, and hand in the rows that it has not."""
        self.close()
        self._journal.open(place)
        self.run = self._wandb.init(dir=str(self._directory), **self._options)
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")
        store = f"The W&B run {self._options['id']!r}"
        self._recorded = Recorded(store, _points(self._offline() if self.run.offline else self._online()))
        for row in read_jsonl(self._path):
            self._log(row)
        if place is None:
            self._recorded = Recorded(store)

    def write(self, row: Row) -> None:
        """Keep a row, and log it unless it is there."""
        self._journal.write(row)
        self._log(row)

    def close(self) -> None:
        """Tell W&B that the run is over."""
        self._journal.close()
        run, self.run = self.run, None
        if run is not None:
            run.finish(exit_code=1 if sys.exc_info()[0] else 0)

    def _log(self, row: Row) -> None:
        if row not in self._recorded:
            self.run.log({"step": row.step, **scalars(row)})

    def _online(self) -> Iterable[Mapping[str, Any]]:
        return self._wandb.Api().run(self.run.path).scan_history() if self.run.resumed else ()

    def _offline(self) -> Iterator[Mapping[str, Any]]:
        """The history in the files of earlier processes."""
        mine = Path(self.run.dir).parent
        record = importlib.import_module("wandb.proto.wandb_internal_pb2").Record
        for path in sorted(mine.parent.glob(f"*run-*/run-{glob.escape(self._options['id'])}.wandb")):
            for content in _records(path.read_bytes()) if path.parent != mine else ():
                items = record.FromString(content).history.item
                yield {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def _points(history: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, int, float]]:
    """The scalars of rows in a history, which may have other things too; what is not finite is a string there."""
    for found in history:
        for name, value in found.items() if "step" in found else ():
            if "/" in name and (isinstance(value, int | float) or value in ("NaN", "Infinity", "-Infinity")):
                yield name, int(found["step"]), float(value)


def _records(content: bytes) -> Iterator[bytes]:
    """The whole records of a log; before each piece are its checksum in 4 bytes, length in 2 and kind in 1."""
    start, pieces = HEADER, list[bytes]()
    while start + 7 <= len(content):
        if BLOCK - start % BLOCK < 7:
            start += BLOCK - start % BLOCK
            continue
        length, kind = struct.unpack_from("<HB", content, start + 4)
        end = start + 7 + length
        if kind == 0 or end > len(content):
            return
        pieces.append(content[start + 7 : end])
        if kind in (WHOLE, LAST):
            yield b"".join(pieces)
            pieces = []
        start = end

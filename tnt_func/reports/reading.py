"""What is known of a run: from the files in its directory, or from rows in memory.

Of a directory are read: the record of `tnt.replay.record`, the files of `jsonl_writer` and `csv_writer`, and the
manifests of checkpoints, there and in `checkpoints/`. Nothing in them is imported or executed.
"""

import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tnt_func.checkpoint.listing import checkpoints, place
from tnt_func.checkpoint.restoring import inspect
from tnt_func.errors import CheckpointError, UsageError, UsageTypeError, kind_of
from tnt_func.observers.rows import FIELDS, Row
from tnt_func.replay.rows import CHECKPOINTS, ROWS, Record
from tnt_func.reports.series import Series, collected


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of a report.

    Args:
        name: shown.
        series: its numbers.
        steps, epochs: completed, of the lifetime.
        record: of `tnt.replay.record`, where there is one.
        resumed: the steps that calls after the first began at.
        facts: what is known of where it came from, by name.
        config: as given to `record`.
        digests: of states, by step.
        checkpoints: of each the name, step, epoch, size in bytes, and metrics by "phase.name", or what is wrong.
    """

    name: str
    series: Sequence[Series]
    steps: int
    epochs: int
    record: Record | None = None
    resumed: Sequence[int] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    digests: Mapping[int, str] = field(default_factory=dict)
    checkpoints: Sequence[tuple[str, int, int, int, Mapping[str, float] | str]] = ()


def read(source: str | os.PathLike[str] | Sequence[Row], name: str) -> Run:
    """A run.

    Raises:
        UsageError: a directory or file has nothing of a run, or of two runs.
        UsageTypeError: it is something else.
        CheckpointError: its record is damaged.

    Example:
        >>> read([Row(1, 0, "train", "step", {"loss": 0.5})], "first").series[0].values
        [0.5]
    """
    if isinstance(source, str | os.PathLike):
        return _directory(Path(source), name) if Path(source).is_dir() else _rows(_file(Path(source)), name, source)
    if not isinstance(source, Sequence):
        raise UsageTypeError(
            f"report was given {kind_of(source)}; it takes the directory of a run, a file of rows, or a History."
        )
    return _rows(source, name, "the history")


def _rows(rows: Sequence[Row], name: str, source: Any) -> Run:
    if not rows:
        raise UsageError(
            f"{source} has no rows to draw. Record a run first: observers=[tnt.observers.recorder(History())]."
        )
    return Run(name=name, series=collected(rows), steps=rows[-1].step, epochs=rows[-1].epoch)


def _file(path: Path) -> list[Row]:
    found = _parsed(path) if path.is_file() else None
    if found is None:
        raise UsageError(
            f"{path} is no directory, and no file of jsonl_writer or csv_writer. Give the directory of a run."
        )
    return found


def _directory(path: Path, name: str) -> Run:
    record = Record.read(path) if (path / ROWS).exists() else None
    sources = {file: rows for file in sorted(path.iterdir()) if file.name != ROWS and (rows := _parsed(file))}
    saved = [found for folder in (path, path / CHECKPOINTS) for found in checkpoints(folder)]
    if record is not None:
        sources[path / ROWS] = list(_of_record(record))
    if not any(sources.values()) and not saved:
        raise UsageError(
            f"{path} has no rows of a run yet: none in {ROWS} or in a file of jsonl_writer or csv_writer, and no "
            "checkpoints. Give the directory that holds them."
        )
    places = [row[:2] for rows in sources.values() for row in rows[-1:]] + [place(found)[:2] for found in saved]
    steps, epochs = max(places, default=(0, 0))
    listed = [_checkpoint(found) for found in saved]
    rows = record.rows if record is not None else ()
    lineage = asdict(record.lineage_at(len(rows) - 1)) if record is not None and rows else _versions(saved)
    config = lineage.pop("config", {})
    data = lineage.pop("data", {})
    return Run(
        name=name,
        series=_merged({file: collected(rows) for file, rows in sources.items()}),
        steps=steps,
        epochs=epochs,
        record=record,
        resumed=[row.step for row in rows if row.row == "call"][1:],
        facts=lineage | {f"data.{fact}": value for fact, value in data.items()},
        config=config,
        digests={row.step: row.digest for row in rows if row.digest is not None},
        checkpoints=listed,
    )


def _merged(sources: Mapping[Path, list[Series]]) -> list[Series]:
    """The series of every file, the longest of each: a run may have been written down at several cadences."""
    found: dict[Any, tuple[Path, Series]] = {}
    for path, series in sources.items():
        for one in series:
            other_path, other = found.get(one.key, (path, one))
            _check_same(path, one, other_path, other)
            found[one.key] = (path, one) if len(one.steps) > len(other.steps) else (other_path, other)
    return [series for _, series in found.values()]


def _check_same(path: Path, one: Series, other_path: Path, other: Series) -> None:
    if one is other:
        return
    known: dict[int, set[str]] = {}
    for step, value in zip(other.steps, other.values, strict=True):
        known.setdefault(step, set()).add(repr(value))
    for step, value in zip(one.steps, one.values, strict=True):
        if step in known and repr(value) not in known[step]:
            raise UsageError(
                f"{other_path} and {path} differ in {one.phase} {one.name} at step {step}, so they are of two runs. "
                "Give these files one by one."
            )


def _of_record(record: Record) -> Iterator[Row]:
    """The rows of a record, as the recorder would have written them."""
    evaluated: Mapping[str, float] | None = None
    for row in record.rows:
        if not row.counts:
            continue
        split: dict[Any, dict[str, float]] = {}
        for name, value in (row.numbers or {}).items():
            phase, _, metric = name.partition(".")
            stepped = row.row == "step" and phase != "eval"
            split.setdefault("" if stepped else phase, {})[name if stepped else metric] = float(value)
        # An epoch's row has the metrics of the state, those of an evaluation long before too: it is drawn once.
        if row.row == "epoch" and repr(split.get("eval")) == repr(evaluated):
            split.pop("eval", None)
        evaluated = split.get("eval", evaluated)
        for phase, metrics in split.items():
            yield Row(row.step, row.epoch, phase or "train", "epoch" if phase else "step", metrics)


def _parsed(path: Path) -> list[Row] | None:
    """The rows of a file that a writer wrote, and None of any other; a torn last line is no row."""
    if path.suffix not in (".jsonl", ".csv") or not path.is_file():
        return None
    text = path.read_bytes().decode(errors="replace")
    lines = text[: text.rfind("\n") + 1].split("\n")[:-1]
    try:
        return _of_jsonl(lines) if path.suffix == ".jsonl" else _of_csv(lines)
    except _Foreign:
        return None
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise UsageError(
            f"{path} begins as the rows of a run do, and goes on otherwise: {error!r}. Mend it."
        ) from error


class _Foreign(Exception):
    """A file that is of something else."""


def _of_jsonl(lines: list[str]) -> list[Row]:
    try:
        first = json.loads(lines[0]) if lines else {}
    except ValueError as error:
        raise _Foreign from error
    if not isinstance(first, dict) or not {*FIELDS, "metrics"} <= first.keys():
        raise _Foreign
    found = (json.loads(line) for line in lines)
    return [_row([row[name] for name in FIELDS], row["metrics"]) for row in found]


def _of_csv(lines: list[str]) -> list[Row]:
    header, *rows = csv.reader(lines or [""])
    if tuple(header[:4]) != FIELDS:
        raise _Foreign
    names = [name.removeprefix("metrics.") for name in header[4:]]
    return [_row(row[:4], {n: x for n, x in zip(names, row[4:], strict=True) if x}) for row in rows]


def _row(fields: Sequence[Any], metrics: Mapping[str, Any]) -> Row:
    step, epoch, phase, kind = fields
    if phase not in ("train", "eval", "predict") or kind not in ("step", "epoch"):
        raise ValueError(f"a row of the phase {phase!r} and the kind {kind!r}")
    return Row(int(step), int(epoch), phase, kind, {name: float(value) for name, value in metrics.items()})


def _checkpoint(path: Path) -> tuple[str, int, int, int, Mapping[str, float] | str]:
    step, epoch, _ = place(path)
    size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    try:
        found = inspect(path).metrics
    except CheckpointError as error:
        return path.name, step, epoch, size, str(error)
    named = {f"{phase}.{name}": value for phase, metrics in found.items() for name, value in metrics.items()}
    return path.name, step, epoch, size, named


def _versions(saved: Sequence[Path]) -> dict[str, Any]:
    """What the last checkpoint that is whole says of where it came from."""
    for path in reversed(saved):
        try:
            manifest = inspect(path)
        except CheckpointError:
            continue
        return {"key": manifest.static["key"].seed, "tnt_func": manifest.tnt_func, "torch": manifest.torch}
    return {}

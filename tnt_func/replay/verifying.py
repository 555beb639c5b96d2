"""Whether a run gives again what was recorded: its segments are taken once more, and digests compared.

A segment goes from one checkpoint to the next, or to the end of the record. Where its digests agree, so did the steps
between them, for a step is a function.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tnt_func.data.cursors import describe
from tnt_func.errors import CheckpointError, StructureError, UsageError
from tnt_func.replay.differing import diff
from tnt_func.replay.marks import mark_of_batch, marks
from tnt_func.replay.recording import surroundings
from tnt_func.replay.replaying import Rerun, Strayed
from tnt_func.replay.rows import Directory, Lineage, Record, Row
from tnt_func.state import State, digest
from tnt_func.types import typed
from tnt_func.unit import FitUnit, TrainUnit


@dataclass(frozen=True)
class Verdict:
    """What `verify` found; `print` says it.

    Args:
        problems: what does not agree, a line each.
        segments: how many checkpoints were restored and gone on from, and of how many.
        digests: how many were compared.
        unchecked: steps that nothing was found out about, from the first to the last of each stretch.
        notes: what the bits may depend on and is not as it was.
    """

    problems: tuple[str, ...]
    segments: tuple[int, int]
    digests: int
    unchecked: tuple[tuple[int, int], ...]
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether all that was checked agrees."""
        return not self.problems

    def __str__(self) -> str:
        done, all_of_them = self.segments
        lines = [f"{done} of {all_of_them} checkpoints restored and gone on from, {self.digests} digests compared"]
        lines += [f"not checked: steps {first} to {last}" for first, last in self.unchecked]
        lines += [f"differs: {problem}" for problem in self.problems]
        if self.problems:
            lines += [f"not as it was: {note}" for note in self.notes]
        return "\n".join([*lines, "the run gives what was recorded" if self.ok else "the run is not what was recorded"])


@typed
def verify(
    directory: Directory,
    unit: TrainUnit | FitUnit,
    state: State,
    data: Any,
    *,
    sample: int | None = None,
    seed: int = 0,
    fingerprint: str | None = None,
    **options: Any,
) -> Verdict:
    """Take a recorded run again and compare: checkpoints, batches, numbers and digests.

    Args:
        directory, unit, state, data, options: as in `replay`.
        sample: so many segments, chosen by `seed`; None is all. The verdict says what was left out.
        seed: of the choice.
        fingerprint: as given to `record`.

    Raises:
        UsageError: it cannot be equal: another torch, key, fingerprint or data; the message says which.
        CheckpointError: there is no record.

    Example:
        >>> import tempfile
        >>> import tnt_func as tnt
        >>> unit = TrainUnit(train_step=lambda state, batch: (state.replace(params=state.params + batch), {}))
        >>> first = State(params=0, key=tnt.key(0))
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     _ = tnt.train(unit, first, [1, 2, 3], max_epochs=1, observers=[tnt.replay.record(directory)])
        ...     print(verify(directory, unit, first, [1, 2, 4]))
        2 of 2 checkpoints restored and gone on from, 3 digests compared
        differs: step 3: the batch is another
        differs: step 3, epoch 1: state.params is another at the digest; the state is not the recorded one
        the run is not what was recorded
    """
    rerun = Rerun.of(directory, unit, state, data, options)
    record = rerun.record
    calls = [record.lineage_at(index) for index, row in enumerate(record.rows) if row.row == "call"]
    for call in calls:
        _refuse(call, state, data, fingerprint)
    whole = list(_segments(record))
    chosen = set(range(len(whole)))
    if sample is not None and sample < len(whole):
        order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed))
        chosen = set(order[:sample].tolist())
    problems, compared = _first(rerun, state), 0
    begins = record.rows[0].step
    unchecked = [(begins + 1, step) for start, _ in whole[:1] if (step := record.rows[start].step) > begins]
    for number, (start, end) in enumerate(whole):
        rows = record.after(start, end)
        tail = rows if number not in chosen else _tail(record, rows, end)
        unchecked += [(tail[0].step, tail[-1].step)] if tail else []
        if number in chosen:
            found, count = _segment(rerun, start, end)
            problems, compared = problems + found, compared + count
    now = surroundings()
    notes = {f"{name}: {getattr(call, name)} then, {now[name]} now" for call in calls for name in now}
    notes = {note for note in notes if not any(note == f"{name}: {now[name]} then, {now[name]} now" for name in now)}
    return Verdict(tuple(problems), (len(chosen), len(whole)), compared, _joined(unchecked), tuple(sorted(notes)))


def _refuse(call: Lineage, state: State, data: Any, fingerprint: str | None) -> None:
    """Refuse what cannot be equal."""
    note = describe(data)
    reasons = [
        f"{what} {then!r} then and {now!r} now"
        for what, then, now in (
            ("torch was", call.torch, str(torch.__version__)),
            ("the key's seed was", call.key, state.key.seed),
            ("the fingerprint of the data was", call.fingerprint, fingerprint or call.fingerprint),
            *((f"the data's {name} was", call.data.get(name, note[name]), note[name]) for name in note),
        )
        if then != now
    ]
    if reasons:
        raise UsageError(
            f"the recorded run cannot be given again: {'; '.join(reasons)}. Verify with what it was recorded with; "
            "tnt.replay.lineage(directory) says what that is."
        )


def _segments(record: Record) -> Iterator[tuple[int, int]]:
    """From each checkpoint the index of the row that the next one is, or of the last row."""
    saved = record.checkpoints()
    for start, end in zip(saved, [*saved[1:], len(record.rows) - 1], strict=True):
        if record.after(start, end) or start == end:
            yield start, end


def _first(rerun: Rerun, state: State) -> list[str]:
    """How the first state differs from the one that the record begins with, where both are of the same step."""
    saved = rerun.record.checkpoints()
    progress = rerun.like.progress.train
    if not saved or rerun.record.rows[saved[0]].place != (progress.steps, progress.epochs):
        return []
    try:
        found = diff(rerun.restored(saved[0]), rerun.begun())
    except (CheckpointError, StructureError):
        return []  # The segment that begins there says so.
    return [f"the first state: {found}"] if found else []


def _segment(rerun: Rerun, start: int, end: int) -> tuple[list[str], int]:
    """What does not agree in a segment, and how many digests were compared."""
    record, rows = rerun.record, rerun.record.rows
    try:
        state = rerun.restored(start)
    except (CheckpointError, StructureError) as error:
        return [f"checkpoint {rows[start].checkpoint}: {error}"], 0
    problems, agreed = list[str](), list[bool]()
    if digest(state) != rows[start].digest:
        leaf = _leaf(state, record.marks_at(start))
        return [f"checkpoint {rows[start].checkpoint}: {leaf} is another than when it was saved"], 1
    wanted = [index for index in range(start + 1, end + 1) if rows[index].counts]
    last = {rows[end].place: end} if rows[end].row == "checkpoint" else {}
    odd: dict[int, str] = {}
    try:
        for index, passed in zip(wanted, rerun.walk(state, record.after(start, end)), strict=False):
            row = passed.row
            if row.batch is not None and row.batch != mark_of_batch(passed.batch):
                problems.append(f"step {row.step}: the batch is another")
            recorded = row.numbers or {}
            names = [name for name in recorded if recorded[name] != passed.numbers.get(name)]
            if names and not odd:
                problems.append(f"step {row.step}, epoch {row.epoch}: another {', '.join(names)}")
            for at in (index, *([last[row.place]] if row.place in last else [])):
                if rows[at].digest is None:
                    continue
                agreed.append(digest(passed.state) == rows[at].digest)
                if not agreed[-1]:
                    odd[len(agreed) - 1] = (
                        f"step {row.step}, epoch {row.epoch}: {_leaf(passed.state, record.marks_at(at))}"
                    )
    except Strayed as error:
        problems.append(f"after step {rows[start].step}: {error.said}")
    if odd:
        first = min(odd)
        mended = any(agreed[first + 1 :])
        cause = "later ones agree, so it was altered" if mended else "the state is not the recorded one"
        problems.append(f"{odd[first]} is another at the digest; {cause}")
    return problems, len(agreed) + 1


def _leaf(state: State, recorded: Mapping[str, tuple[str, str]]) -> str:
    """The first leaf that is not as it was marked."""
    kinds, found = marks(state)
    now = {path: (kind, found[8 * at : 8 * at + 8]) for at, (path, kind) in enumerate(kinds.items())}
    path = next((path for path in {**now, **recorded} if now.get(path) != recorded.get(path)), None)
    return f"state{path}" if path is not None else "no leaf, but the state or its digest,"


def _tail(record: Record, rows: list[Row], end: int) -> list[Row]:
    """The rows after the last digest."""
    if record.rows[end].row == "checkpoint":
        return []
    last = max((at for at, row in enumerate(rows) if row.digest is not None), default=-1)
    return rows[last + 1 :]


def _joined(stretches: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Stretches of steps, those that follow each other made one."""
    joined = list[tuple[int, int]]()
    for first, last in stretches:
        if joined and first <= joined[-1][1] + 1:
            joined[-1] = (joined[-1][0], max(last, joined[-1][1]))
        else:
            joined.append((first, last))
    return tuple(joined)

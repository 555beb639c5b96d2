"""What a record survives: kills, torn lines, full disks, another run; and what it says of where it came from."""

import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_runs import forked
from replay_runs import COUNTING, LOADER, OPTIONS, START, TRAIN, steps, trained

import tnt_func as tnt
from tnt_func.errors import CheckpointError, UsageError, UsageTypeError
from tnt_func.replay import Record, diff, lineage, record, replay
from tnt_func.replay.marks import mark, mark_of_batch

CADENCE: dict[str, Any] = {"digest_every_n_steps": 2, "checkpoint_every_n_steps": 4}


def resumed(directory: Path, **more: Any) -> tnt.State:
    state = tnt.checkpoint.resume(directory / "checkpoints", tnt.prepare(TRAIN, START, [COUNTING]))
    return tnt.train(TRAIN, state, LOADER, **OPTIONS, observers=[record(directory, **CADENCE)], **more)


# Killed and resumed


def killed(work: Callable[[], Any], after: float) -> bool:
    """Whether a process of its own was killed before its work was done, after so many seconds of its own CPU time."""
    child = os.fork()
    if child == 0:
        # The signal's default ends the process where it stands, as SIGKILL does, and other load does not move it.
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, after)
        try:
            work()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_a_record_survives_being_killed_at_random_moments(tmp_path: Path):
    states = trained(tmp_path / "whole", **CADENCE)
    choice, kills, number = random.Random(0), 0, 0
    while kills < 20:
        number += 1
        directory = tmp_path / str(number)
        while killed(lambda directory=directory: resumed(directory), choice.uniform(0.001, 0.03)):
            kills += 1
            if kills % 7 == 0:
                break
        assert tnt.digest(resumed(directory)) == tnt.digest(resumed(tmp_path / "whole"))
        assert steps(directory) == list(range(1, 16))
        for step in choice.sample(sorted(states), 4) if kills < 20 else states:
            state = replay(directory, TRAIN, START, LOADER, step, **OPTIONS)
            assert tnt.digest(state) == tnt.digest(states[step])
        assert diff(directory, tmp_path / "whole") is None


def test_a_torn_last_line_is_cut_wherever_it_tore(tmp_path: Path):
    trained(tmp_path / "unbroken", **CADENCE)
    whole = tmp_path / "whole"
    state = resumed(whole, pause_when=tnt.pausing.until(lambda: len(steps(whole)) == 7))
    shutil.rmtree(whole / "checkpoints" / tnt.checkpoint.name(state))
    text = (whole / "record.jsonl").read_bytes()
    kept = text.rindex(b'"row":"checkpoint"', 0, text.rindex(b'"row":"checkpoint"'))
    for end in range(text.index(b"\n", kept) + 1, len(text), 37):
        torn = tmp_path / str(end)
        shutil.copytree(whole, torn)
        (torn / "record.jsonl").write_bytes(text[:end])
        resumed(torn)
        assert steps(torn) == list(range(1, 16)) and diff(torn, tmp_path / "unbroken") is None


def test_a_damaged_line_or_one_written_twice_is_refused(tmp_path: Path):
    trained(tmp_path)
    path = tmp_path / "record.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    for damaged, said in (
        ([*lines[:3], b"{\n", *lines[3:]], "line 4 of .* is damaged"),
        ([*lines[:3], b'{"row":"step","step":1}\n', *lines[3:]], "line 4 of .* is damaged"),
        ([*lines[:4], *lines[3:]], "or one is there twice"),
    ):
        path.write_bytes(b"".join(damaged))
        with pytest.raises(CheckpointError, match=said):
            Record.read(tmp_path)


def test_a_line_of_another_program_is_not_cut_as_a_torn_one_is(tmp_path: Path):
    path = tmp_path / "record.jsonl"
    path.write_bytes(b'{"loss": 1}\n')
    with pytest.raises(CheckpointError, match="line 1 of .* is damaged"):
        trained(tmp_path)
    assert path.read_bytes() == b'{"loss": 1}\n'


def test_going_back_cuts_what_comes_after_and_says_so(tmp_path: Path):
    trained(tmp_path, **CADENCE)
    like = tnt.prepare(TRAIN, START, [COUNTING])
    state = tnt.checkpoint.restore(tmp_path / "checkpoints" / "step-000000000004-epoch-000000", like)
    options = {"callbacks": [COUNTING], "max_steps": 6}
    with pytest.warns(UserWarning, match="recorded further than step 4"):
        tnt.train(TRAIN, state, LOADER, **options, observers=[record(tmp_path, **CADENCE)])
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6]
    assert len(tnt.checkpoint.checkpoints(tmp_path / "checkpoints")) == 3


def test_two_runs_are_not_mixed(tmp_path: Path):
    states = trained(tmp_path)
    with pytest.raises(UsageError, match="holds another run: at step 0"):
        trained(tmp_path, state=START.replace(key=tnt.key(4)))
    with pytest.raises(UsageError, match="holds another run: at step 7"):
        trained(tmp_path, state=states[7].replace(key=tnt.key(4)))
    before = steps(tmp_path)
    more = {**OPTIONS, "max_epochs": 5}
    with pytest.raises(UsageError, match="to step 15, epoch 3, and this run starts at step 20"):
        state = tnt.train(TRAIN, tnt.end_epoch(TRAIN, states[15]), LOADER, **{**OPTIONS, "max_epochs": 4})
        tnt.train(TRAIN, state, LOADER, **more, observers=[record(tmp_path)])
    assert steps(tmp_path) == before


def test_a_failed_and_a_paused_run_leave_a_checkpoint_to_go_on_from(tmp_path: Path):
    def breaking(state: tnt.State) -> tnt.State:
        if state.progress.train.steps == 7:
            raise ArithmeticError
        return state

    with pytest.raises(ArithmeticError):
        failing = [COUNTING, tnt.Callback(name="break", on_train_step_end=breaking)]
        tnt.train(TRAIN, START, LOADER, max_epochs=3, callbacks=failing, observers=[record(tmp_path)])
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6]
    saved = tnt.checkpoint.latest(tmp_path / "checkpoints")
    assert saved is not None and saved.name.startswith("step-000000000006")


def test_a_full_disk_fails_the_run_and_leaves_what_can_be_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def filling(file: int, line: bytes) -> int:
        return write(file, line[:9] if b'"step":7,' in line else line)

    write = os.write
    monkeypatch.setattr("tnt_func.lines.os.write", filling)
    with pytest.raises(CheckpointError, match="could not be written: the disk is full"):
        trained(tmp_path, **CADENCE)
    monkeypatch.undo()
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6]
    resumed(tmp_path)
    assert steps(tmp_path) == list(range(1, 16))


def test_one_process_at_a_time_records_to_a_directory(tmp_path: Path):
    said: list[str] = []

    def other(event: tnt.Event) -> None:
        if event.point == "step_end" and event.state.progress.train.steps == 7:
            said.append(forked(lambda: trained(tmp_path))[0])

    tnt.train(TRAIN, START, LOADER, **OPTIONS, observers=[record(tmp_path), other])
    assert len(said) == 1 and "is being written by another process" in said[0]
    assert steps(tmp_path) == list(range(1, 16))


# Where it came from


def test_a_record_and_its_checkpoints_name_what_they_came_from(tmp_path: Path):
    trained(tmp_path, code="abc1234", config={"lr": 0.1}, fingerprint="v2")
    saved = tnt.checkpoint.latest(tmp_path / "checkpoints")
    assert saved is not None
    found = lineage(saved)
    assert found == lineage(tmp_path)
    assert (found.code, found.config, found.fingerprint, found.key) == ("abc1234", {"lr": 0.1}, "v2", 3)
    assert (found.torch, found.tnt_func) == (str(torch.__version__), tnt.__version__)
    assert found.data["sampler"] == "RandomSampler" and len(found.run) == 12
    with pytest.raises(CheckpointError):
        lineage(tmp_path / "checkpoints" / "other")


def test_arguments_that_cannot_work_are_refused_before_a_run(tmp_path: Path):
    with pytest.raises(UsageError, match="each is at least 1 step"):
        record(tmp_path, digest_every_n_steps=0)
    with pytest.raises(UsageTypeError, match="JSON cannot hold it"):
        record(tmp_path, config={"lr": torch.tensor(1.0)})
    assert not list(tmp_path.iterdir())


def test_equal_leaves_have_equal_marks_and_others_have_not():
    z = torch.tensor([1 + 2j, 3 - 1j])
    same = [
        (z.conj(), z.conj().resolve_conj()),
        (z.conj().imag, torch.tensor([-2.0, 1.0])),
        (torch.eye(2).to_sparse(), torch.eye(2)),
        (torch.arange(6.0).reshape(2, 3).T, torch.arange(6.0).reshape(2, 3).T.contiguous()),
        (np.ones(3)[::2], np.ones(2)),
        (torch.ones(2, requires_grad=True), torch.ones(2)),
    ]
    for a, b in same:
        assert mark(a) == mark(b)
    others = [
        z,
        z.conj(),
        z.real,
        torch.empty(0),
        torch.empty(0, 2),
        np.ones(2),
        np.ones(2, "f"),
        1,
        1.0,
        True,
        "1",
        None,
    ]
    assert len({mark(other) for other in others}) == len(others)
    assert mark_of_batch((torch.ones(2), np.array([object()]))) is None is mark_of_batch(torch.empty(2, device="meta"))


def test_what_is_not_finite_is_strict_json(tmp_path: Path):
    unit = tnt.TrainUnit(train_step=lambda state, batch: (state, {"loss": batch}))
    data = [float("nan"), float("-inf"), 0.5]
    tnt.train(unit, START, data, max_epochs=1, observers=[record(tmp_path)])
    assert [row.numbers for row in Record.read(tmp_path).rows if row.row == "step"] == [
        {"loss": "nan"},
        {"loss": "-inf"},
        {"loss": 0.5},
    ]

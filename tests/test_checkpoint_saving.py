"""What save writes, what it refuses, and that what it cannot finish is not there."""

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_runs import forked

import tnt_func as tnt
from tnt_func.checkpoint import name, restore, resume, save
from tnt_func.checkpoint import saving as module
from tnt_func.errors import CheckpointError, StructureError, UsageError
from tnt_func.metrics import mean
from tnt_func.progress import Progress, RunProgress
from tnt_func.pytree import pytree
from tnt_func.state import State
from tnt_func.testing.snapshot import freeze


def at(steps: int) -> State:
    progress = RunProgress(train=Progress(0, steps))
    return State(params={"w": torch.full((3,), float(steps))}, key=tnt.key(0), progress=progress)


@pytree(static=("function",))
@dataclass(frozen=True)
class Holder:
    value: Any
    function: Any


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("leaf", "words"),
    [
        (torch.ones(2).to_sparse(), "state.memory['x'] is a Tensor, float32[2] sparse_coo"),
        (torch.ones(2, device="meta"), "state.memory['x'] is a Tensor, float32[2] on meta"),
        (torch.empty(2, dtype=torch.uint8).view(torch.bits8), "state.memory['x'] is a Tensor, bits8[2]"),
        (torch.ones(2).as_subclass(Subclass), "state.memory['x'] is a Subclass"),
        (len, "state.memory['x'] is <built-in function len>, a builtin_function_or_method; a checkpoint holds"),
        (torch.float32, "state.memory['x'] is torch.float32, a dtype; a checkpoint holds"),
        ({(1, 2): 0}, "state.memory['x'] has the key (1, 2)"),
        (Holder(1, len), "state.memory['x'], a Holder, has a static field"),
    ],
)
def test_what_no_checkpoint_holds_is_refused_by_name(tmp_path: Path, leaf: Any, words: str):
    with pytest.raises(StructureError) as caught:
        save(tmp_path / "x", at(0).replace(memory={"x": leaf}))
    assert words in str(caught.value) and list(tmp_path.iterdir()) == []


def test_slots_have_names(tmp_path: Path):
    slots: Any = {1: 0.5}
    with pytest.raises(StructureError, match="has the key 1, an int"):
        save(tmp_path / "x", at(0).replace(memory=slots))


def test_a_numpy_number_is_refused_and_says_what_to_write(tmp_path: Path):
    numpy = pytest.importorskip("numpy")
    with pytest.raises(StructureError, match=r"a float64; .*float\(x\)"):
        save(tmp_path / "x", at(0).replace(memory={"x": numpy.float64(1.0)}))


def test_static_fields_come_from_the_checkpoint(tmp_path: Path):
    held = at(0).replace(memory={"x": Holder(1, (1, "a", 2.5, torch.int8))})
    save(tmp_path / "x", held)
    found = restore(tmp_path / "x", at(0).replace(memory={"x": Holder(1, None)}))
    assert found.memory["x"].function == (1, "a", 2.5, torch.int8)


def test_nothing_is_overwritten_and_no_output_is_saved(tmp_path: Path):
    save(tmp_path / "x", at(0))
    with pytest.raises(UsageError, match="never overwritten"):
        save(tmp_path / "x", at(1))
    with pytest.raises(UsageError, match="step_end"):
        save(tmp_path / "y", at(0).replace(output={"loss": 1}))
    assert restore(tmp_path / "x", at(1)).progress.train.steps == 0


def test_a_metric_without_a_value_is_left_out(tmp_path: Path):
    class Empty:
        def value(self) -> Any:
            raise ZeroDivisionError

    values = {"none": Empty(), "two": mean("x").of({"x": torch.ones(2)}), "one": mean("x").of({"x": 0.0})}
    assert module.numbers(at(0).replace(metrics={"eval": values})) == {"eval": {"one": 0.0}}


@pytest.mark.parametrize("step", ["write", "fsync", "rename", "mkdir"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_cannot_be_finished_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException
):
    save(tmp_path / name(at(1)), at(1))

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    owner: Any = {"write": module, "fsync": os, "rename": Path, "mkdir": Path}[step]
    with monkeypatch.context() as patch:
        patch.setattr(owner, step, fail)
        with pytest.raises(CheckpointError if isinstance(error, OSError) else KeyboardInterrupt) as caught:
            save(tmp_path / name(at(2)), at(2))
    assert isinstance(error, KeyboardInterrupt) or "No space left on device" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [name(at(1))]
    assert freeze(resume(tmp_path, at(0))) == freeze(at(1))


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path: Path):
    """The kernel itself refuses to write on, as on a disk that is full."""
    code = f"""
import signal, resource, torch
import tnt_func as tnt
from tnt_func.errors import CheckpointError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
state = tnt.State(params=torch.zeros(100), key=tnt.key(0))
tnt.checkpoint.save({str(tmp_path / name(at(0)))!r}, state)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    saving = tnt.observers.checkpointer({str(tmp_path)!r}, every_n_steps=1)
    tnt.train(tnt.TrainUnit(train_step=lambda state, batch: (state, {{}})), state.replace(params=torch.zeros(5000)),
              [1, 2], max_epochs=1, observers=[saving])
except CheckpointError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert "could not be written: [Errno 27] File too large" in done.stdout, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [name(at(0))]
    assert resume(tmp_path, at(0).replace(params=torch.ones(100))).params.sum() == 0


def test_a_directory_that_cannot_be_written_to(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="could not be written"):
        save(tmp_path / "gone" / "x", at(0))
    with pytest.raises(CheckpointError, match="could not be written"):
        save(tmp_path / "file" / "x", at(0))


def test_a_directory_that_is_read_only():
    """Root writes anywhere, so the one who saves is nobody."""

    def work() -> Any:
        if os.geteuid() == 0:
            os.setuid(65534)
        save(Path(directory) / "x", at(0))

    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o555)
        said, _ = forked(work)
        assert said.startswith("CheckpointError") and "Permission denied" in said
        assert os.listdir(directory) == []

"""Which checkpoint is the latest, the best, the one to resume from."""

import math
from pathlib import Path

import pytest
import torch

import tnt_func as tnt
from tnt_func.checkpoint import best, checkpoints, latest, name, resume, save
from tnt_func.errors import CheckpointError, StructureError, UsageError
from tnt_func.metrics import mean
from tnt_func.progress import Progress, RunProgress
from tnt_func.state import State


def at(steps: int, epochs: int = 0, loss: float | None = None) -> State:
    metrics = {} if loss is None else {"eval": {"loss": mean("x").of({"x": loss})}}
    progress = RunProgress(train=Progress(epochs, steps))
    return State(params={"w": torch.full((3,), float(steps))}, key=tnt.key(0), progress=progress, metrics=metrics)


def put(directory: Path, *steps: int, **losses: float) -> None:
    for step in steps:
        save(directory / name(at(step)), at(step, loss=losses.get(f"at{step}")))


def test_names_sort_and_half_written_ones_are_not_listed(tmp_path: Path):
    put(tmp_path, 5, 12, 100)
    save(tmp_path / name(at(12, 1)), at(12, 1))
    save(tmp_path / f"{name(at(12, 1))}.10", at(12, 1))
    save(tmp_path / f"{name(at(12, 1))}.9", at(12, 1))
    save(tmp_path / "mine", at(1))
    (tmp_path / ".tnt-0123").mkdir()
    (tmp_path / name(at(500))).touch()
    listed = [path.name for path in checkpoints(tmp_path)]
    assert listed[:3] == [name(at(5)), name(at(12)), name(at(12, 1))] == sorted(listed[:3])
    assert [other[-3:] for other in listed[3:5]] == ["1.9", ".10"]
    assert latest(tmp_path) == tmp_path / name(at(100))
    assert checkpoints(tmp_path / "nowhere") == [] and latest(tmp_path / "nowhere") is None


def test_zero_is_a_number_and_nan_is_none(tmp_path: Path):
    put(tmp_path, 1, 2, 3, 4, 5, 6, at1=math.nan, at2=1.0, at3=0.0, at4=0.0, at5=-math.inf)
    assert best(tmp_path, "loss", "max") == tmp_path / name(at(2))
    assert best(tmp_path, "loss", "min") == tmp_path / name(at(5))
    (tmp_path / name(at(5)) / "checkpoint.json").unlink()
    with pytest.warns(UserWarning, match="passed over.*checkpoint.json"):
        assert best(tmp_path, "loss", "min") == tmp_path / name(at(3))
    with pytest.warns(UserWarning):
        assert best(tmp_path, "accuracy", "max") is None


def test_resume_takes_the_latest_good_one_and_says_what_it_passed_over(tmp_path: Path):
    like = at(0)
    assert resume(tmp_path, like) is like
    put(tmp_path, 1, 2, 3)
    assert resume(tmp_path, like).progress.train.steps == 3
    tensors = tmp_path / name(at(3)) / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="resuming from step-000000000002.*tensors.safetensors has"):
        assert resume(tmp_path, like).progress.train.steps == 2
    (tmp_path / name(at(2)) / "checkpoint.json").write_text("{}")
    with pytest.warns(UserWarning) as caught:
        assert resume(tmp_path, like).progress.train.steps == 1
    assert len(caught) == 2
    (tmp_path / name(at(1)) / "checkpoint.json").unlink()
    with pytest.raises(CheckpointError, match="every checkpoint in"):
        resume(tmp_path, like)


def test_a_checkpoint_or_a_file_is_not_resumed_from_by_beginning_anew(tmp_path: Path):
    put(tmp_path, 3)
    with pytest.raises(UsageError, match=r"which is one checkpoint; .* Write resume\(.*or restore\(path, like\)"):
        resume(tmp_path / name(at(3)), at(0))
    (tmp_path / "model.pt").touch()
    with pytest.raises(UsageError, match="which is a file"):
        resume(tmp_path / "model.pt", at(0))


def test_another_model_is_no_damage(tmp_path: Path):
    put(tmp_path, 1)
    with pytest.raises(StructureError, match=r"state.params\['w'\] is in the checkpoint alone"):
        resume(tmp_path, at(0).replace(params={}))

"""Each example runs as its reader would run it, and prints the numbers it promises."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "examples"
DIGEST = r"\b[0-9a-f]{64}\b"


def quickstart(lines: list[str]) -> None:
    (accuracy,) = [float(line.split()[-1]) for line in lines if line.startswith("held-out accuracy ")]
    assert 0.95 <= accuracy <= 1.0
    stopped, resumed = (re.findall(DIGEST, line) for line in lines[-2:])
    assert len(stopped) == 1 and stopped == resumed
    (paused,) = [line for line in lines if line.startswith("paused at ")]
    assert not paused.endswith("steps_in_epoch=0)")


def four_levels(lines: list[str]) -> None:
    digests = re.findall(DIGEST, "\n".join(lines))
    assert len(digests) == 4 and len(set(digests)) == 1


def check_your_unit(lines: list[str]) -> None:
    assert lines[0].startswith("LawError: law ") and "train_step" in lines[0]
    assert lines[-1].startswith("the mended unit keeps every law")


def digits_mlp(lines: list[str]) -> None:
    assert float(lines[-1].removeprefix("held-out accuracy ")) >= 0.95


def through_training(lines: list[str]) -> None:
    assert float(lines[-1].removeprefix("relative distance ")) < 1e-5


def huggingface(lines: list[str]) -> None:
    assert float(lines[-1].removeprefix("held-out accuracy ")) >= 0.9


def digits_cnn(lines: list[str]) -> None:
    assert float(lines[-1].removeprefix("held-out accuracy ")) >= 0.97


def char_gpt(lines: list[str]) -> None:
    assert lines[-3].endswith(" tokens per second") and len(lines[-2]) > 160
    assert float(lines[-1].removeprefix("loss ")) < 2.1


def gan(lines: list[str]) -> None:
    assert float(lines[-2].removeprefix("points on a cloud ")) >= 0.6
    assert lines[-1] == "clouds found 8 of 8"


def finetune(lines: list[str]) -> None:
    scratch, tuned = float(lines[0].removeprefix("from scratch ")), float(lines[-1].removeprefix("held-out accuracy "))
    assert tuned >= 0.9 and tuned > scratch


def debug_nan(lines: list[str]) -> None:
    assert lines[0] == "the run ended on loss nan"
    assert lines[1].startswith("not finite: first at step 137; SqrtBackward0 gave the first NaN")
    assert float(lines[-1].split()[-1]) < 0.5


def watch(lines: list[str]) -> None:
    assert lines[:2] == ["the process ended with exit code -9", "the process ended with exit code 0"]
    assert lines[2] == "run.jsonl: each of 200 steps once, 8 evaluations"
    assert lines[3].startswith("events: the same loss at 20 steps, 20 speeds of ")
    assert lines[4] == "checkpoints: step-000000000100-epoch-000003, step-000000000200-epoch-000008"
    assert float(lines[5].removeprefix("held-out loss ")) < 0.6


def dashboard(lines: list[str]) -> None:
    assert [line.split()[1] for line in lines[:-1]] == ["0.0003", "0.003", "0.03"]
    assert float(lines[-2].split()[-1]) >= 0.95
    assert lines[-1] == "dashboard/report.html"


def seeds(lines: list[str]) -> None:
    assert float(lines[0].split()[2]) >= 0.9
    assert float(lines[1].split()[-1]) < 1e-2
    assert float(lines[-1].removeprefix("speedup ")) > 0


def sweep(lines: list[str]) -> None:
    assert lines[0].split() == ["lr", "weight_decay", "loss", "accuracy"] and len(lines) == 66
    assert float(lines[-1].split()[-1]) >= 0.95


def torchrun_digits(lines: list[str]) -> None:
    assert lines[-2] == "after step 276 on 1 processes"
    assert float(lines[-1].removeprefix("held-out accuracy ")) >= 0.95


EXPECTED: dict[str, Callable[[list[str]], None]] = {
    "quickstart.py": quickstart,
    "seeds.py": seeds,
    "sweep.py": sweep,
    "four_levels.py": four_levels,
    "check_your_unit.py": check_your_unit,
    "digits_mlp.py": digits_mlp,
    "through_training.py": through_training,
    "huggingface.py": huggingface,
    "debug_nan.py": debug_nan,
    "watch.py": watch,
    "dashboard.py": dashboard,
    "digits_cnn.py": digits_cnn,
    "char_gpt.py": char_gpt,
    "gan.py": gan,
    "finetune.py": finetune,
    "torchrun_digits.py": torchrun_digits,
}


def run(name: str, folder: Path, hash_seed: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, FOLDER / name],
        cwd=folder,
        env={**os.environ, "PYTHONHASHSEED": str(hash_seed)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_every_example_has_its_expectation():
    assert {path.name for path in FOLDER.glob("*.py")} == EXPECTED.keys()


@pytest.mark.parametrize("name", sorted(EXPECTED.keys() - {"quickstart.py"}))
def test_example_prints_what_it_promises(name: str, tmp_path: Path):
    EXPECTED[name](run(name, tmp_path).splitlines())


@pytest.mark.parametrize("name", EXPECTED)
def test_example_is_read_in_one_sitting(name: str):
    assert len((FOLDER / name).read_text().splitlines()) <= 120


def test_two_runs_of_the_quickstart_print_what_it_promises_and_the_same(tmp_path: Path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    printed = run("quickstart.py", first, hash_seed=1)
    quickstart(printed.splitlines())
    assert run("quickstart.py", second, hash_seed=2) == printed

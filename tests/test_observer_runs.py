"""A run killed at random points and resumed has each row once, in every format, and ends on the same bits."""

import csv
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas
import test_observers_mlflow_writer as in_mlflow
import test_observers_wandb_writer as in_wandb
from mlflow.tracking import MlflowClient
from test_observers_recorder import FIRST, check_files, fit, whole
from test_observers_tensorboard_summaries import hparams, read

import tnt_func as tnt

SCRIPT = Path(__file__).parent / "observer_runs.py"


def test_a_run_killed_at_random_and_resumed_has_each_row_once_everywhere(tmp_path: Path):
    command = [sys.executable, str(SCRIPT), str(tmp_path), "--kills", "4", "--seed", str(os.urandom(2)[0])]
    environment = {
        # Without the process of W&B's that other tests have started, which outlives the one that is killed.
        **{name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"},
        **{"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parent.parent), "MLFLOW_DISABLE_TELEMETRY": "true"},
        **{"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false", "TMPDIR": str(tmp_path)},
    }
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, env=environment)
    print(command, done.stdout, done.stderr)
    *log, last = done.stdout.splitlines()
    assert (
        done.returncode == 0
        and last == tnt.digest(fit(FIRST, []))
        and len(log) == 4
        and any("killed" in line for line in log)
    )

    history = whole()
    check_files(tmp_path, history)
    assert [event.step for event in read(tmp_path / "shown").Histograms("histogram")] == [*range(1, 10)]
    assert hparams(tmp_path / "shown") == [{"lr": 1}]
    uri = f"sqlite:///{tmp_path}/runs.db"
    (*_, newest) = sorted(in_mlflow.runs(uri, "killed"), key=lambda run: run.info.start_time)
    assert newest.info.status == "FINISHED"
    found = in_mlflow.metrics(SimpleNamespace(client=MlflowClient(uri), run_id=newest.info.run_id))
    assert found == in_mlflow.stored(history)
    assert in_wandb.history_of(tmp_path) == in_wandb.stored(history)
    with open(tmp_path / "all.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    frame = pandas.read_parquet(tmp_path / "all.parquet")
    loss = float(history[-1].metrics["loss"])
    assert [(int(row["at"]), float(row["loss"])) for row in rows] == [(at, loss) for at in range(4)]
    assert list(zip(frame["at"], frame["loss"], strict=True)) == [(at, loss) for at in range(4)]
    assert (tmp_path / "eval.csv").read_text() == f"at,loss\n0,{loss}\n"

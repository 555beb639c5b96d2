"""A run that every writer records and whose predictions are written, killed at random points and resumed to its end.

python tests/observer_runs.py DIRECTORY --kills 5 --seed 3     a line for each kill
"""

import argparse
import itertools
import os
import random
import signal
import threading
from pathlib import Path
from typing import Any

import mlflow.store.tracking.sqlalchemy_store
import torch
import wandb
from checkpoint_runs import forked
from mlflow.tracking import MlflowClient
from test_observers_recorder import FIRST, UNIT, fit, writers

import tnt_func as tnt
from tnt_func.observers import (
    checkpointer,
    mlflow_writer,
    predictions,
    recorder,
    tensorboard_summaries,
    tensorboard_writer,
    wandb_writer,
)

EVENTS = 34
QUIET = {"mode": "offline", "settings": {"silent": True, "x_disable_stats": True, "console": "off"}}
IMPORTED = (mlflow, wandb)  # Once, before the forks.


def resumed(directory: Path, turn: random.Random, dies: tuple[int, float] | None) -> str:
    """Train on from what a directory has, then predict; the digest, unless it dies so many seconds after an event."""
    left = itertools.count()

    def killer(event: tnt.Event) -> None:
        if dies is not None and next(left) == dies[0]:
            if dies[1] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            threading.Timer(dies[1], os.kill, (os.getpid(), signal.SIGKILL)).start()

    def columns(event: tnt.Event) -> Any:
        return {"at": [event.batch], "loss": event.state.output["loss"][None]}

    state = tnt.checkpoint.resume(directory / "checkpoints", tnt.prepare(UNIT, FIRST))
    saving = checkpointer(directory / "checkpoints", every_n_steps=1, every_n_epochs=1, keep=3)
    online = [
        mlflow_writer("killed", "run", tracking_uri=f"sqlite:///{directory}/runs.db", params={"lr": 1}),
        wandb_writer("killed", "run", directory=directory, **QUIET),
    ]
    recording = recorder(*writers(directory), *online, every_n_steps=1)
    observers: list[Any] = [
        recording,
        saving,
        killer,
        predictions(directory / "eval.csv", phase="eval", columns=columns),
    ]
    shown = tensorboard_writer(directory / "shown", hparams={"lr": 1})
    observers.append(tensorboard_summaries(shown, every_n_steps=1, histograms=lambda event: event.state.params))
    turn.shuffle(observers)
    state = fit(state, observers)
    for name in ("all.csv", "all.parquet"):
        assert UNIT.predict_unit is not None
        tnt.predict(
            UNIT.predict_unit, state, range(4), observers=[predictions(directory / name, columns=columns), killer]
        )
    return tnt.digest(state)


def main(directory: Path, kills: int, seed: int) -> None:
    turn = random.Random(seed)
    forked(lambda: MlflowClient(f"sqlite:///{directory}/runs.db").search_experiments())  # It takes seconds to make.
    for number in range(kills):
        # The first run has not ended by then; later ones may have.
        at, after = turn.randrange(EVENTS), turn.choice((0, turn.uniform(0, 0.03))) if number else 0
        order, dies = random.Random(turn.random()), (at, after)
        said, _ = forked(lambda order=order, dies=dies: resumed(directory, order, dies))
        last = tnt.checkpoint.latest(directory / "checkpoints")
        print(f"{dies[1]:.3f} s after event {dies[0]}: {said or 'killed'}, latest {last.name if last else 'none'}")
        assert "\n" not in said and " " not in said, said
    said, _ = forked(lambda: resumed(directory, turn, None))
    print(said)


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    main(given.directory, given.kills, given.seed)

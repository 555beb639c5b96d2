"""Small runs to make reports of: recorded, killed and resumed, ensembles."""

import math
from pathlib import Path
from typing import Any

import torch

import tnt_func as tnt
from tnt_func.observers import History, Row, jsonl_writer, points, recorder, timing

EPOCHS, LENGTH = 4, 25


def train_step(state: tnt.State, batch: float) -> tuple[tnt.State, dict[str, Any]]:
    w = state.params - state.opt_state["lr"] * (state.params - batch - 0.3 * torch.randn((), dtype=torch.float64))
    return state.replace(params=w), {"loss": (w - 1) ** 2, "spike": 1e6 if state.progress.train.steps == 41 else 1.0}


def eval_step(state: tnt.State, batch: float) -> tuple[tnt.State, dict[str, Any]]:
    return state, {"loss": (state.params - batch) ** 2}


MEAN = {"loss": tnt.metrics.mean("loss")}
UNIT = tnt.FitUnit(
    train_unit=tnt.TrainUnit(train_step=train_step, metrics=MEAN),
    eval_unit=tnt.EvalUnit(eval_step=eval_step, metrics=MEAN),
)
DATA = [1.0] * LENGTH


def first(lr: float = 0.1, seed: int = 0) -> tnt.State:
    number = torch.zeros((), dtype=torch.float64)
    return tnt.State(params=number, opt_state={"lr": number + lr}, key=tnt.key(seed))


def recorded(directory: Path, *, lr: float = 0.1, seed: int = 0, **options: Any) -> tnt.State:
    """A run of a hundred steps with a record and rows; it goes on from the last checkpoint in its directory."""
    state = tnt.checkpoint.resume(directory / "checkpoints", tnt.prepare(UNIT, first(lr, seed)))
    cadence: dict[str, Any] = {"digest_every_n_steps": 10, "checkpoint_every_n_steps": 20}
    config = {"lr": lr, "model": {"depth": 2}}
    observers = [
        tnt.replay.record(directory, **cadence, code="v3", config=config),
        recorder(jsonl_writer(directory / "rows.jsonl"), every_n_steps=5, measures=[timing(), points()]),
    ]
    return tnt.fit(UNIT, state, DATA, [1.0], max_epochs=EPOCHS, observers=observers, **options)


def ensemble(members: int = 5) -> History:
    """Rows of an ensemble: every member's loss, one of them with a NaN and an infinity."""

    def metrics(step: int, more: float) -> dict[str, float]:
        found = {
            f"loss.{i}": 2 * math.exp(-step / (40 + 9 * i)) + more + 0.1 * math.sin(step + i) for i in range(members)
        }
        return found | ({"loss.1": math.nan, "loss.3": math.inf} if step == 60 else {})

    rows = [Row(step, step // 50, "train", "step", metrics(step, 0.0)) for step in range(1, 151)]
    rows += [Row(step, step // 50, "eval", "epoch", metrics(step, 0.2)) for step in (50, 100, 150)]
    return History(sorted(rows, key=lambda row: row.step))


def long(steps: int) -> History:
    """Many steps of four metrics, each with a spike, and one with what is not finite."""

    def metrics(step: int) -> dict[str, float]:
        noise = math.sin(step * 12.9898) * 43758.5453 % 1
        found = {
            "loss": noise + 1e3 / (step + 1e3),
            "accuracy": 1 - noise / 3,
            "norm": noise**2,
            "optim.lr": 1e-3 / step,
        }
        odd = {steps // 3: {"norm": math.nan}, steps // 2: {"loss": 99.0}, steps // 2 + 1: {"accuracy": -9.0}}
        return found | odd.get(step, {})

    return History(Row(step, step // 1000, "train", "step", metrics(step)) for step in range(1, steps + 1))

"""A small run to record: draws, a shuffling loader, a callback with memory, metrics; `made` gives it to the shell."""

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

import tnt_func as tnt
from tnt_func.metrics import mean
from tnt_func.replay import Record, record

START = tnt.State(params={"w": torch.ones(3), "b": torch.zeros(2, 2)}, key=tnt.key(3))


def noisy(state: tnt.State, batch: torch.Tensor) -> tuple[tnt.State, dict[str, Any]]:
    w = state.params["w"] * 0.9 + batch * torch.rand(3)
    return state.replace(params={"w": w, "b": state.params["b"] + 1}), {"loss": w.sum(), "text": "x"}


def read(state: tnt.State, batch: torch.Tensor) -> tuple[tnt.State, dict[str, Any]]:
    return state, {"gap": state.params["w"].sum() - batch.sum()}


def count(state: tnt.State) -> tnt.State:
    return state.remember("count", state.memory["count"] + 1)


TRAIN = tnt.TrainUnit(train_step=noisy, metrics={"loss": mean("loss")})
FIT = tnt.FitUnit(train_unit=TRAIN, eval_unit=tnt.EvalUnit(eval_step=read, metrics={"gap": mean("gap")}))
COUNTING = tnt.Callback(name="count", memory=lambda state: 0, on_train_step_end=count, on_train_epoch_end=count)
LOADER = DataLoader(torch.arange(5.0), batch_size=1, shuffle=True)  # pyright: ignore
OPTIONS: dict[str, Any] = {"callbacks": [COUNTING], "max_epochs": 3}
FIT_OPTIONS: dict[str, Any] = {**OPTIONS, "eval_data": LOADER, "evaluate_every_n_steps": 2}


def trained(directory: Path, *, data: Any = LOADER, state: tnt.State = START, **cadence: Any) -> dict[int, tnt.State]:
    """A run of fifteen steps that is recorded; the states after its steps."""
    states: dict[int, tnt.State] = {}
    tnt.train(TRAIN, state, data, **OPTIONS, observers=[record(directory, **cadence), keeping(states)])
    return states


def keeping(states: dict[int, tnt.State]) -> tnt.Observer:
    def observe(event: tnt.Event) -> None:
        if event.phase == "train" and event.point == "step_done":
            states[event.state.progress.train.steps] = event.state

    return observe


def steps(directory: Path) -> list[int]:
    return [row.step for row in Record.read(directory).rows if row.row == "step"]


def made() -> tuple[Any, ...]:
    return TRAIN, START, LOADER, OPTIONS


def made_otherwise() -> tuple[Any, ...]:
    return TRAIN, START.replace(params={**START.params, "w": torch.zeros(3)}), LOADER, OPTIONS


def nothing() -> None:
    return None

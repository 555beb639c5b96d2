"""Watching a run with what people usually put on one: a bar, files of numbers, TensorBoard, checkpoints, throughput.

The process that trains is killed in the middle, and another goes on from its last checkpoint. Then every file is read
back with its own reader: each step is there once, with the same numbers everywhere.

Prints what was read.
"""

import multiprocessing
import os
import signal
import tempfile
from pathlib import Path

import pandas
import torch
from sklearn.datasets import load_digits
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn import functional as F

import tnt_func as tnt
from tnt_func.observers import checkpointer, jsonl_writer, progress_bar, recorder, tensorboard_writer, throughput

EPOCHS, KILLED_AT = 8, 150


def data() -> list[tuple[Tensor, Tensor]]:
    inputs, targets = load_digits(return_X_y=True)
    columns = torch.tensor(inputs, dtype=torch.float32) / 16, torch.tensor(targets)
    return list(zip(*(column.split(64) for column in columns), strict=True))


def train(directory: Path, dies: bool) -> None:
    """Go on from the directory's last checkpoint, or begin."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = tnt.optim.adamw(tnt.schedules.cosine(1e-2, steps=200))
    unit, state = tnt.supervised(module, F.cross_entropy, optimizer, key=tnt.key(0))
    state = tnt.checkpoint.resume(directory / "checkpoints", tnt.prepare(unit, state))

    def killer(event: tnt.Event) -> None:
        if dies and event.point == "step_done" and event.state.progress.train.steps == KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)

    observers = [
        progress_bar(max_epochs=EPOCHS),
        recorder(jsonl_writer(directory / "run.jsonl"), every_n_steps=1, hyperparameters=["lr"]),
        recorder(tensorboard_writer(directory / "events"), every_n_steps=10, measures=[throughput()]),
        checkpointer(directory / "checkpoints", every_n_steps=100, keep=2),
        killer,
    ]
    batches = data()
    tnt.fit(unit, state, batches[:-4], batches[-4:], max_epochs=EPOCHS, observers=observers)


def read(directory: Path) -> None:
    rows = pandas.read_json(directory / "run.jsonl", lines=True, precise_float=True)
    steps = rows[rows.kind == "step"]
    assert steps.step.tolist() == list(range(1, len(steps) + 1))
    print(f"run.jsonl: each of {len(steps)} steps once, {sum(rows.phase == 'eval')} evaluations")

    events = EventAccumulator(str(directory / "events"), size_guidance={"tensors": 0}).Reload()
    shown = {event.step: event.tensor_proto.double_val[0] for event in events.Tensors("train_step/loss")}
    assert shown == {
        step: metrics["loss"] for step, metrics in zip(steps.step, steps.metrics, strict=True) if step % 10 == 0
    }
    speeds = [event.tensor_proto.double_val[0] for event in events.Tensors("train_step/throughput.samples_per_second")]
    print(f"events: the same loss at {len(shown)} steps, {len(speeds)} speeds of {min(speeds):.0f} samples/s and more")

    saved = tnt.checkpoint.checkpoints(directory / "checkpoints")
    print(f"checkpoints: {', '.join(path.name for path in saved)}")
    print(f"held-out loss {rows[rows.phase == 'eval'].metrics.iloc[-1]['loss']:.3f}")


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        for dies in (True, False):
            process = multiprocessing.get_context("fork").Process(target=train, args=(Path(directory), dies))
            process.start()
            process.join()
            print(f"the process ended with exit code {process.exitcode}")
        read(Path(directory))


if __name__ == "__main__":
    main()

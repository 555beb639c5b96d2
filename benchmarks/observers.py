"""What watching a run costs a step: each observer alone, and the usual set, beside Lightning's and TorchTNT's.

The step does nothing, so that what is added is seen to the microsecond: the time a step with observers less that
without. The state is that of a small MLP with AdamW, for checkpoints. The usual set is a progress bar, throughput, the
loss every 10 steps as lines of text and in TensorBoard, and a checkpoint every 100.

Everybody takes a turn in every round, in an order that rotates. CPU time of the thread that trains is what the run has
to pay: median over rounds, with quartiles. That of the process has the threads that write as well. The clock, with what
waits for the disk, is that of the fastest round of each, for other work on the machine is in the rest.
"""

import contextlib
import gc
import importlib.util
import io
import logging
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tnt_func as tnt
from tnt_func import observers as watch

STEPS, ROUNDS, BAR = 3_000, 9, 50
WITHOUT = "without"
Batch = tuple[Tensor, Tensor]
BATCH, LOSS = (torch.zeros(32, 64), torch.zeros(32)), torch.tensor(0.5)
Run = Callable[[Path], object]
"""A whole run; what it writes goes into a directory."""


class Terminal(io.StringIO):
    """What a bar takes for a terminal."""

    def isatty(self) -> bool:
        return True


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))


ALONE: dict[str, Callable[[Path], Any]] = {
    "a function that does nothing": lambda path: lambda event: None,
    "every(function, steps=10)": lambda path: watch.every(lambda event: None, steps=10),
    "progress_bar": lambda path: watch.progress_bar(file=Terminal()),
    "console": lambda path: watch.console(file=io.StringIO()),
    "throughput": lambda path: watch.throughput(),
    "timing": lambda path: watch.timing(),
    "recorder(History), every 10": lambda path: watch.recorder(watch.History(), every_n_steps=10),
    "recorder(CSV), every 10": lambda path: watch.recorder(watch.csv_writer(path / "a.csv"), every_n_steps=10),
    "recorder(JSON lines), every 10": lambda path: watch.recorder(
        watch.jsonl_writer(path / "a.jsonl"), every_n_steps=10
    ),
    "recorder(TensorBoard), every 10": lambda path: watch.recorder(watch.tensorboard_writer(path), every_n_steps=10),
    "recorder(History), every 10, timing, throughput, system": lambda path: watch.recorder(
        watch.History(), every_n_steps=10, measures=[watch.timing(), watch.throughput(), watch.system()]
    ),
    "recorder(anomalies), every step": lambda path: watch.recorder(
        watch.anomalies("loss", above=10, spike=10), every_n_steps=1
    ),
    "warn_on_empty_data": lambda path: watch.warn_on_empty_data(),
    "warn_on_slow_data": lambda path: watch.warn_on_slow_data(share=0.99),
    "garbage_collection, every 1000": lambda path: watch.garbage_collection(every_n_steps=1000),
    "checkpointer, every 100": lambda path: watch.checkpointer(path, every_n_steps=100, keep=2),
    "checkpointer, every 100, asynchronous": lambda path: watch.checkpointer(
        path, every_n_steps=100, keep=2, asynchronous=True
    ),
}


def idle() -> Callable[[list[Any]], object]:
    """A run of steps that do nothing, with these observers."""
    _, state = tnt.supervised(net(), F.cross_entropy, tnt.optim.adamw(1e-3), key=tnt.key(0))
    output, data = {"loss": torch.tensor(0.5)}, [BATCH] * STEPS
    unit = tnt.TrainUnit(train_step=lambda state, batch: (state, output), draws=())
    return lambda observers: tnt.train(unit, state, data, max_epochs=1, observers=observers)


def alone() -> None:
    run = idle()
    runs: dict[str, Run] = {name: lambda path, make=make: run([make(path)]) for name, make in ALONE.items()}
    taken = rounds({WITHOUT: lambda path: run([]), **runs})
    print(f"| {'':55} | {'of the thread':21} | of the process | on the clock |\n|---|---|---|---|")
    for name in ALONE:
        print(f"| {name:55} | {told(taken[name], taken[WITHOUT])} |")


def ours() -> tuple[Run, Run]:
    run = idle()

    def watched(path: Path) -> None:
        writers = (watch.jsonl_writer(path / "run.jsonl"), watch.tensorboard_writer(path))
        run(
            [
                watch.checkpointer(path, every_n_steps=100, keep=2, asynchronous=True),
                watch.progress_bar(file=Terminal()),
                watch.recorder(*writers, every_n_steps=10, measures=[watch.throughput()]),
            ]
        )

    return lambda path: run([]), watched


def lightning() -> tuple[Run, Run]:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint, ThroughputMonitor, TQDMProgressBar
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(LightningModule):
        def __init__(self, logs: bool) -> None:
            super().__init__()
            self.net, self.logs, self.automatic_optimization = net(), logs, False

        def training_step(self, batch: Batch) -> None:
            optimizer: Any = self.optimizers()
            optimizer.step()  # Without gradients it does nothing, but cadences count its calls.
            if self.logs:
                self.log("loss", LOSS, prog_bar=True)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    plain: dict[str, Any] = {"max_epochs": 1, "accelerator": "cpu", "enable_model_summary": False}
    off = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    batches: Any = [BATCH] * STEPS
    data = torch.utils.data.DataLoader(batches, batch_size=None)  # It takes a list for several loaders.

    def watched(path: Path) -> None:
        callbacks = [
            TQDMProgressBar(),
            ModelCheckpoint(path, every_n_train_steps=100),
            ThroughputMonitor(batch_size_fn=lambda batch: len(batch[0]), window_size=10),
        ]
        loggers = [CSVLogger(str(path)), TensorBoardLogger(str(path))]
        Trainer(**plain, logger=loggers, log_every_n_steps=10, callbacks=callbacks).fit(Module(True), data)

    return lambda path: Trainer(**plain, **off).fit(Module(False), data), watched


def torchtnt() -> tuple[Run, Run]:
    from torchtnt.framework.callbacks import DistributedCheckpointSaver, ThroughputLogger, TQDMProgressBar
    from torchtnt.framework.state import State
    from torchtnt.framework.train import train
    from torchtnt.framework.unit import TrainUnit
    from torchtnt.utils.loggers import JSONLogger, TensorBoardLogger

    class Unit(TrainUnit[Batch]):
        def __init__(self, loggers: list[Any]) -> None:
            super().__init__()
            self.net, self.loggers = net(), loggers
            self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-3)

        def train_step(self, state: State, data: Batch) -> None:
            step = self.train_progress.num_steps_completed + 1
            if self.loggers and step % 10 == 0:
                for logger in self.loggers:
                    logger.log("loss", LOSS.item(), step)

    data = [BATCH] * STEPS

    def watched(path: Path) -> None:
        tensorboard, lines = TensorBoardLogger(str(path)), JSONLogger(str(path / "run.json"))
        callbacks = [
            TQDMProgressBar(),
            DistributedCheckpointSaver(str(path), save_every_n_train_steps=100, keep_last_n_checkpoints=2),
            ThroughputLogger(tensorboard, {"samples": 32}, log_every_n_steps=10),
        ]
        train(Unit([tensorboard, lines]), data, max_epochs=1, callbacks=callbacks)
        lines.close()
        tensorboard.close()

    return lambda path: train(Unit([]), data, max_epochs=1), watched


def usual() -> None:
    pairs = {"tnt_func": ours()}
    for name, make in {"Lightning": lightning, "TorchTNT": torchtnt}.items():
        if importlib.util.find_spec(name.lower()):
            pairs[name] = make()
        else:
            print(f"{name} is not installed")
    runs = {name: pair[0] for name, pair in pairs.items()} | {
        f"{name}, watched": pair[1] for name, pair in pairs.items()
    }
    taken = rounds(runs)
    print(
        f"\n| {'the usual set':13} | without | {'of the thread':21} | of the process | on the clock | of ours | bar |"
    )
    print("|---|---|---|---|---|---|---|")
    medians = {name: statistics.median(added(taken[f"{name}, watched"], taken[name], "thread")) for name in pairs}
    for name in pairs:
        plain = statistics.median(each["thread"] for each in taken[name])
        cells = told(taken[f"{name}, watched"], taken[name])
        ratio, bar = medians[name] / medians["tnt_func"], BAR if name == "tnt_func" else ""
        print(f"| {name:13} | {plain:7.1f} | {cells} | {ratio:7.1f} | {bar:3} |")


def rounds(runs: dict[str, Run]) -> dict[str, list[dict[str, float]]]:
    """Microseconds a step of every run in every round, by clock; a first round is not counted."""
    clocks = {"thread": time.thread_time, "process": time.process_time, "clock": time.perf_counter}
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    names = list(runs)
    for turn in range(ROUNDS + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            with quiet(), tempfile.TemporaryDirectory() as directory:
                gc.collect()
                start = {clock: read() for clock, read in clocks.items()}
                runs[name](Path(directory))
                taken[name].append({clock: 1e6 * (read() - start[clock]) / STEPS for clock, read in clocks.items()})
    return {name: of[1:] for name, of in taken.items()}


def added(watched: list[dict[str, float]], plain: list[dict[str, float]], clock: str) -> list[float]:
    """What was added, round by round."""
    return [a[clock] - b[clock] for a, b in zip(watched, plain, strict=True)]


def told(watched: list[dict[str, float]], plain: list[dict[str, float]]) -> str:
    """Of the thread with quartiles; of the process; on the clock, the least less the least."""
    low, middle, high = statistics.quantiles(added(watched, plain, "thread"), n=4)
    process = statistics.median(added(watched, plain, "process"))
    clock = min(each["clock"] for each in watched) - min(each["clock"] for each in plain)
    return f"{f'{middle:.1f} ({low:.1f} - {high:.1f})':21} | {process:14.1f} | {clock:12.1f}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Bars draw into a terminal that nobody looks at."""
    with contextlib.redirect_stdout(Terminal()), contextlib.redirect_stderr(Terminal()):
        yield


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(f"Python {platform.python_version()}, {platform.machine()}, one thread; torch {torch.__version__}")
    print(
        f"Added microseconds a step, of {STEPS:,} steps, {ROUNDS} rounds: CPU time of the thread: median (quartiles).\n"
    )
    alone()
    usual()

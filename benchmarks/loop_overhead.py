"""What the loop itself costs a step, beside TorchTNT, Ignite and Lightning where they are installed.

The step does nothing, the data is a plain list, and every contestant runs once a round, so that all meet the same
machine. Times are CPU time of the whole call divided by its steps; ratios are taken within a round. Then, for tnt_func
alone: how time and memory grow with the number of steps, and time with the number of leaves in the state.
"""

import functools
import gc
import importlib.metadata
import importlib.util
import logging
import math
import platform
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator

import torch

import tnt_func as tnt

STEPS, ROUNDS = 5_000, 9
BATCHES = list(range(STEPS))
BASE = "TorchTNT: train"
BARS = {"tnt_func: train, draws=()": 0.35, "tnt_func: train": 0.6}


class Drawing:
    """An iterable that might draw, as a DataLoader might: the loop seeds every `next`."""

    def __iter__(self) -> Iterator[int]:
        return iter(BATCHES)


def ours() -> dict[str, Callable[[], object]]:
    state = tnt.State(params={"w": torch.zeros(2)}, key=tnt.key(0))

    def train_step(state: tnt.State, batch: int) -> tuple[tnt.State, dict[str, float]]:
        return state, {"loss": 1.0}

    def hook(state: tnt.State) -> tnt.State:
        return state

    seeded = tnt.TrainUnit(train_step=train_step)
    unit = tnt.TrainUnit(train_step=train_step, draws=())
    measured = tnt.TrainUnit(train_step=train_step, draws=(), metrics={"loss": tnt.metrics.mean("loss")})
    callback = tnt.Callback(name="idle", on_train_step_end=hook)

    def generate(unit: tnt.TrainUnit) -> None:
        for _ in tnt.train_events(unit, state, BATCHES, max_epochs=1):
            pass

    def reduce(unit: tnt.TrainUnit) -> None:
        functools.reduce(functools.partial(tnt.step, unit), BATCHES, state)

    return {
        "tnt_func: train, draws=()": lambda: tnt.train(unit, state, BATCHES, max_epochs=1),
        "tnt_func: train": lambda: tnt.train(seeded, state, BATCHES, max_epochs=1),
        "tnt_func: train, draws=(), one callback": lambda: tnt.train(
            unit, state, BATCHES, max_epochs=1, callbacks=[callback]
        ),
        "tnt_func: train, draws=(), one observer": lambda: tnt.train(
            unit, state, BATCHES, max_epochs=1, observers=[lambda event: None]
        ),
        "tnt_func: train, draws=(), one metric": lambda: tnt.train(measured, state, BATCHES, max_epochs=1),
        "tnt_func: train, draws=(), data may draw": lambda: tnt.train(unit, state, Drawing(), max_epochs=1),
        "tnt_func: train, data may draw": lambda: tnt.train(seeded, state, Drawing(), max_epochs=1),
        "tnt_func: train_events, draws=()": lambda: generate(unit),
        "tnt_func: train_events": lambda: generate(seeded),
        "tnt_func: reduce of step, draws=()": lambda: reduce(unit),
        "tnt_func: reduce of step": lambda: reduce(seeded),
    }


def torchtnt() -> dict[str, Callable[[], object]]:
    from torchtnt.framework.callback import Callback
    from torchtnt.framework.state import State
    from torchtnt.framework.train import train
    from torchtnt.framework.unit import TrainUnit, TTrainUnit

    class Unit(TrainUnit[int]):
        def train_step(self, state: State, data: int) -> None:
            return None

    class Idle(Callback):
        def on_train_step_end(self, state: State, unit: TTrainUnit) -> None:
            return None

    return {
        BASE: lambda: train(Unit(), BATCHES, max_epochs=1),
        "TorchTNT: train, one callback": lambda: train(Unit(), BATCHES, max_epochs=1, callbacks=[Idle()]),
    }


def ignite() -> dict[str, Callable[[], object]]:
    from ignite.engine import Engine

    return {"Ignite: Engine.run": lambda: Engine(lambda engine, batch: None).run(BATCHES, max_epochs=1)}


def lightning() -> dict[str, Callable[[], object]]:
    from lightning.pytorch import LightningModule, Trainer

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: int) -> None:
            return None

        def configure_optimizers(self) -> None:
            return None

    # Its own setting for measuring the trainer's overhead: no logger, checkpoints, progress bar or summary.
    return {
        "Lightning: Trainer(barebones=True).fit": lambda: Trainer(barebones=True, max_epochs=1, accelerator="cpu").fit(
            Module(), BATCHES
        )
    }


def seconds(run: Callable[[], object]) -> float:
    gc.collect()
    start = time.process_time()
    run()
    return time.process_time() - start


def compare() -> None:
    """Every contestant once a round, each round beginning with another one."""
    contestants = ours()
    for name, peers in {"torchtnt": torchtnt, "ignite": ignite, "lightning": lightning}.items():
        if importlib.util.find_spec(name):
            contestants |= peers()
        else:
            print(f"{name} is not installed")
    for run in contestants.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for turn in range(ROUNDS):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            times[name].append(seconds(contestants[name]) / STEPS * 1e6)
    print(f"{STEPS:,} steps a call, {ROUNDS} rounds: median (least - most)\n")
    print(f"| {'':40} | {'µs a step':22} | {'of TorchTNT':20} | {'bar':4} |\n|---|---|---|---|")
    for name, of in times.items():
        ratios = [a / b for a, b in zip(of, times.get(BASE, [math.nan] * ROUNDS), strict=True)]
        print(f"| {name:40} | {spread(of, 1):22} | {spread(ratios, 2):20} | {BARS.get(name, ''):4} |")


def spread(values: list[float], digits: int) -> str:
    low, middle, high = (f"{value:.{digits}f}" for value in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({low} - {high})"


def growth_with_steps() -> None:
    """Time a step and peak memory, shortest run first; a metric is on, to see that its accumulator does not grow."""
    unit = tnt.TrainUnit(
        train_step=lambda state, batch: (state, {"loss": 1.0}), draws=(), metrics={"loss": tnt.metrics.mean("loss")}
    )
    state = tnt.State(params={"w": torch.zeros(2)}, key=tnt.key(0))
    print("\n| steps, one metric | µs a step | peak MiB of the process |\n|---|---|---|")
    for steps in (1_000, 10_000, 100_000, 1_000_000):
        run = functools.partial(tnt.train, unit, state, range(steps), max_epochs=1)
        took = statistics.median(seconds(run) for _ in range(max(1, 200_000 // steps))) / steps * 1e6
        # Kilobytes, but bytes on macOS.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
        print(f"| {steps:,} | {took:.1f} | {peak:.1f} |", flush=True)


def growth_with_leaves() -> None:
    """The step returns the state it was given: the loop must not walk the leaves at each step."""
    unit = tnt.TrainUnit(train_step=lambda state, batch: (state, {}), draws=())
    one: dict[int, list[float]] = {10: [], 100: [], 1_000: []}
    whole: dict[int, list[float]] = {leaves: [] for leaves in one}
    for _ in range(ROUNDS):
        for leaves in one:
            params = {f"layer{index}.weight": torch.zeros(2) for index in range(leaves)}
            state = tnt.State(params=params, key=tnt.key(0))
            one[leaves].append(seconds(functools.partial(tnt.train, unit, state, BATCHES[:1], max_epochs=1)))
            whole[leaves].append(seconds(functools.partial(tnt.train, unit, state, BATCHES, max_epochs=1)))
    print("\n| leaves in the state | µs a step | µs a call |\n|---|---|---|")
    for leaves in one:
        call = statistics.median(one[leaves])
        print(f"| {leaves:,} | {(statistics.median(whole[leaves]) - call) / STEPS * 1e6:.1f} | {call * 1e6:.0f} |")


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    peers = ["torch", "tnt-func", "torchtnt", "pytorch-ignite", "lightning"]
    installed = {found.metadata["Name"]: found.version for found in importlib.metadata.distributions()}
    print(f"Python {platform.python_version()}, {platform.machine()}, one thread;", end=" ")
    print(", ".join(f"{name} {installed[name]}" for name in peers if name in installed))
    # First, while what memory the process has ever had is about what it has.
    growth_with_steps()
    growth_with_leaves()
    print()
    compare()

"""What recording a run costs a step, and how fast a state is digested.

A small convolutional net on 8 x 8 images, as handwritten digits are, AdamW, batches of 64, one thread. Runs with and
without `tnt.replay.record` are under way at once and take 25 steps in turns, so that all meet the same machine. Ratios
are of all the steps of a round, checkpoints included: of CPU time, and of the time on the clock, which includes waiting
for the disk.
"""

import hashlib
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import tnt_func as tnt

STEPS, TURN, ROUNDS, BAR = 1_000, 25, 5, 1.05
CADENCES: dict[str, dict[str, Any] | None] = {
    "not recorded": None,
    "recorded, default cadence": {},
    "recorded, a digest a step": {"digest_every_n_steps": 1},
    "recorded, no digests or marks": {"digest_every_n_steps": 10**6, "mark_batches": False},
}


def conv() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 4 * 4, 10)),
    )


def recording() -> None:
    torch.manual_seed(0)
    batches = [(torch.rand(64, 1, 8, 8), torch.randint(10, (64,))) for _ in range(22)]
    unit, state = tnt.supervised(conv(), F.cross_entropy, tnt.optim.adamw(1e-3), key=tnt.key(0))

    def begun(cadence: dict[str, Any] | None, directory: str) -> Callable[[], tuple[float, float]]:
        """A run that takes some steps whenever it is called, and the time that they took."""
        observe = (lambda event: None) if cadence is None else tnt.replay.record(directory, **cadence)
        events = tnt.train_events(unit.train_unit, state, batches, max_steps=STEPS + 1)

        def advance() -> tuple[float, float]:
            cpu, clock = time.process_time(), time.perf_counter()
            for event in events:
                observe(event)
                if event.point == "step_done" and event.state.progress.train.steps % TURN == 0:
                    break
            return time.process_time() - cpu, time.perf_counter() - clock

        return advance

    took: dict[str, list[tuple[float, float]]] = {name: [] for name in CADENCES}
    names = list(CADENCES)
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory() as directory:
            runs = {name: begun(CADENCES[name], f"{directory}/{index}") for index, name in enumerate(names)}
            turns: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
            for turn in range(STEPS // TURN):
                for name in names[turn % len(names) :] + names[: turn % len(names)]:
                    turns[name].append(runs[name]())
        for name, of in turns.items():
            took[name].append((sum(cpu for cpu, _ in of), sum(clock for _, clock in of)))
    print(f"{STEPS:,} steps, {ROUNDS} rounds: median (least - most)\n")
    print(f"| {'':33} | {'CPU ms a step':22} | {'of not recorded':22} | {'on the clock':22} | bar  |")
    print("|---|---|---|---|---|")
    base = took["not recorded"]
    for name, of in took.items():
        each = spread([cpu / STEPS * 1e3 for cpu, _ in of])
        cpu, clock = ([a[i] / b[i] for a, b in zip(of, base, strict=True)] for i in (0, 1))
        bar = BAR if name == "recorded, default cadence" else ""
        print(f"| {name:33} | {each:22} | {spread(cpu):22} | {spread(clock):22} | {bar:4} |")


def digesting() -> None:
    """Bytes a second of `tnt.digest` over 25 million parameters, beside SHA-256 and BLAKE2b of the same bytes."""
    leaves = {f"layer{index}.weight": torch.randn(1_000_000) for index in range(25)}
    arrays = [leaf.numpy() for leaf in leaves.values()]

    def hashed(hasher: Any) -> None:
        for array in arrays:
            hasher.update(array)

    contestants: dict[str, Callable[[], object]] = {
        "tnt.digest": lambda: tnt.digest(leaves),
        "hashlib.sha256": lambda: hashed(hashlib.sha256()),
        "hashlib.blake2b": lambda: hashed(hashlib.blake2b()),
    }
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(ROUNDS):
        for name, run in contestants.items():
            start = time.process_time()
            run()
            rates[name].append(0.1 / (time.process_time() - start))
    print("\n| 25,000,000 parameters, float32 | GB/s |\n|---|---|")
    for name, of in rates.items():
        print(f"| {name} | {spread(of)} |")


def spread(values: list[float]) -> str:
    low, middle, high = (f"{value:.3f}" for value in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({low} - {high})"


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(f"Python {platform.python_version()}, {platform.machine()}, one thread; torch {torch.__version__}")
    digesting()
    print()
    recording()

"""A whole training step: `supervised` in `train()` beside the imperative loop, TorchTNT and Lightning.

AdamW, float32, CPU, one thread. Every contestant takes the same batches for the same number of steps in every round,
in an order that rotates; figures are medians over rounds of the CPU time a step, and of its ratio to the imperative
loop within the round, with the quartiles. Donated runs consume the state that they are given, as the imperative loop
does. Peak memory and page faults are of a process of its own, also with glibc told to keep what is freed.

    python benchmarks/step.py                        everything
    python benchmarks/step.py "MLP of 25M, batch 16" one case
"""

import importlib.util
import itertools
import json
import logging
import os
import re
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tnt_func as tnt

ROUNDS = 9
LR = 1e-3
Batch = tuple[Tensor, Tensor]
Run = Callable[[int], float]
"""Takes so many steps and returns the seconds that they took."""


class Transformer(nn.Module):
    """Two layers, d 64, over 64 tokens of 128."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(128, 64)
        layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 128)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(self.embed(tokens))).flatten(0, 1)


def mlp(*sizes: int) -> nn.Module:
    layers = [(nn.Linear(a, b), nn.ReLU()) for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(*list(itertools.chain(*layers))[:-1])


def conv() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 7 * 7, 10)),
    )


def images(count: int, *shape: int) -> Batch:
    return torch.randn(count, *shape), torch.randint(0, 10, (count,))


def tokens() -> Batch:
    text = torch.randint(0, 128, (8, 65))
    return text[:, :-1], text[:, 1:].flatten()


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Batch], int]] = {
    "MLP 64-32-32-10, batch 32": (lambda: mlp(64, 32, 32, 10), lambda: images(32, 64), 400),
    "MLP 64-256-256-10, batch 64": (lambda: mlp(64, 256, 256, 10), lambda: images(64, 64), 200),
    "conv net 1x28x28, batch 32": (conv, lambda: images(32, 1, 28, 28), 40),
    "transformer d 64, T 64, batch 8": (Transformer, tokens, 30),
    "MLP of 25M, batch 16": (lambda: mlp(1024, 4096, 4096, 1024, 10), lambda: images(16, 1024), 4),
}
"""Name: module, batch, steps a round."""
LEAVES = {
    f"{2 * n:,} leaves": (lambda n=n: mlp(*[8] * n, 10), lambda: images(4, 8), max(2000 // n, 20)) for n in (5, 50, 500)
}
LARGE = "MLP of 25M, batch 16"
KEEPING = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(1 << 28),
}
"""What tells glibc to take large buffers from its heap, and to keep them when they are freed."""


def imperative(module: nn.Module, batches: list[Batch]) -> Run:
    optimizer = torch.optim.AdamW(module.parameters(), lr=LR, fused=True)

    def run(steps: int) -> float:
        start = time.thread_time()
        for x, y in itertools.islice(itertools.cycle(batches), steps):
            optimizer.zero_grad()
            F.cross_entropy(module(x), y).backward()
            optimizer.step()
        return time.thread_time() - start

    return run


def tnt_func(
    optimizer: tnt.optim.Optimizer, donate: Any = False, change: Callable[[Any], Any] = lambda unit: unit
) -> Callable[[nn.Module, list[Batch]], Run]:
    def make(module: nn.Module, batches: list[Batch]) -> Run:
        unit, state = tnt.supervised(module, F.cross_entropy, optimizer, key=tnt.key(0))
        train_unit = change(unit.train_unit)

        def run(steps: int) -> float:
            nonlocal state
            data = list(itertools.islice(itertools.cycle(batches), steps))
            start = time.thread_time()
            total = state.progress.train.steps + steps
            state = tnt.train(train_unit, state, data, max_steps=total, donate=donate)
            return time.thread_time() - start

        return run

    return make


def compiled(form: Any) -> Callable[[nn.Module, list[Batch]], Run]:
    return tnt_func(tnt.optim.adamw(LR), "given", lambda unit: tnt.compiled(unit, form=form))


def by_hand(module: nn.Module, batches: list[Batch]) -> Run:
    """`tnt.step` in a loop, where nobody holds on to the first state."""
    unit, state = tnt.supervised(module, F.cross_entropy, tnt.optim.adamw(LR), key=tnt.key(0))
    state = tnt.prepare(unit, state)

    def run(steps: int) -> float:
        nonlocal state
        start = time.thread_time()
        for batch in itertools.islice(itertools.cycle(batches), steps):
            state = tnt.step(unit.train_unit, state, batch)
        return time.thread_time() - start

    return run


def torchtnt(module: nn.Module, batches: list[Batch]) -> Run:
    from torchtnt.framework.state import State
    from torchtnt.framework.train import train
    from torchtnt.framework.unit import TrainUnit

    class Unit(TrainUnit[Batch]):
        def __init__(self) -> None:
            super().__init__()
            self.module = module
            self.optimizer = torch.optim.AdamW(module.parameters(), lr=LR, fused=True)

        def train_step(self, state: State, data: Batch) -> None:
            self.optimizer.zero_grad()
            F.cross_entropy(self.module(data[0]), data[1]).backward()
            self.optimizer.step()

    unit = Unit()
    return _torchtnt(train, unit, batches)


def torchtnt_auto(module: nn.Module, batches: list[Batch]) -> Run:
    from torchtnt.framework.auto_unit import AutoUnit
    from torchtnt.framework.train import train

    class Unit(AutoUnit[Batch]):
        def configure_optimizers_and_lr_scheduler(self, module: nn.Module) -> Any:
            return torch.optim.AdamW(module.parameters(), lr=LR, fused=True), None

        def compute_loss(self, state: Any, data: Batch) -> tuple[Tensor, None]:
            return F.cross_entropy(self.module(data[0]), data[1]), None

    return _torchtnt(train, Unit(module=module, device=torch.device("cpu")), batches)


def _torchtnt(train: Callable[..., None], unit: Any, batches: list[Batch]) -> Run:
    def run(steps: int) -> float:
        data = list(itertools.islice(itertools.cycle(batches), steps))
        epochs = unit.train_progress.num_epochs_completed
        start = time.thread_time()
        train(unit, data, max_epochs=epochs + 1)
        return time.thread_time() - start

    return run


def lightning(module: nn.Module, batches: list[Batch]) -> Run:
    import lightning as L

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = module

        def training_step(self, batch: Batch, index: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=LR, fused=True)

        def on_train_epoch_start(self) -> None:
            self.started = time.thread_time()

        def on_train_epoch_end(self) -> None:
            self.took = time.thread_time() - self.started

    unit = Module()

    def run(steps: int) -> float:
        # Lightning takes a list for several loaders side by side; a dataset of batches is one.
        data: Any = torch.utils.data.DataLoader(
            list(itertools.islice(itertools.cycle(batches), steps)),  # pyright: ignore[reportArgumentType]
            batch_size=None,
        )
        L.Trainer(max_epochs=1, accelerator="cpu", barebones=True).fit(unit, data)
        return unit.took

    return run


def contestants() -> dict[str, Callable[[nn.Module, list[Batch]], Run]]:
    found: dict[str, Callable[[nn.Module, list[Batch]], Run]] = {
        "imperative, fused": imperative,
        "supervised, from_torch(AdamW, fused=True)": tnt_func(
            tnt.optim.from_torch(torch.optim.AdamW, lr=LR, fused=True)
        ),
        "supervised, from_torch(AdamW)": tnt_func(tnt.optim.from_torch(torch.optim.AdamW, lr=LR)),
        "supervised, adamw": tnt_func(tnt.optim.adamw(LR)),
        "supervised, adamw, donated": tnt_func(tnt.optim.adamw(LR), "given"),
        "supervised, from_torch(AdamW, fused=True), donated": tnt_func(
            tnt.optim.from_torch(torch.optim.AdamW, lr=LR, fused=True), "given"
        ),
    }
    if importlib.util.find_spec("torchtnt"):
        found |= {"TorchTNT TrainUnit": torchtnt, "TorchTNT AutoUnit": torchtnt_auto}
    if importlib.util.find_spec("lightning"):
        found["Lightning"] = lightning
    return found


OURS = ("imperative, fused", "supervised, adamw", "supervised, adamw, donated")


def made(case: str, name: str) -> Run:
    make_module, make_batch, _ = {**CASES, **LEAVES}[case]
    torch.manual_seed(0)
    make = {**contestants(), **ALONE}[name]
    return make(make_module(), [make_batch() for _ in range(4)])


ALONE = {
    "tnt.step by hand, adamw": by_hand,
    "compiled, adamw, donated": compiled("auto"),
    "compiled as one graph, adamw, donated": compiled("step"),
}
"""What is measured in a process of its own only."""


def interleaved(runs: dict[str, Run], steps: int) -> dict[str, list[float]]:
    """Seconds a step of every round, in which all take their turn, each time in another order."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    for _ in range(ROUNDS):
        for name in order:
            taken[name].append(runs[name](steps) / steps)
        order = order[1:] + order[:1]
    return taken


def compare(case: str, names: Iterable[str]) -> None:
    steps = {**CASES, **LEAVES}[case][2]
    runs = {name: made(case, name) for name in names}
    for run in runs.values():
        run(steps)
    taken = interleaved(runs, steps)
    print(f"\n{case} ({ROUNDS} rounds of {steps} steps)")
    base = taken["imperative, fused"]
    for name, seconds in taken.items():
        low, middle, high = statistics.quantiles([a / b for a, b in zip(seconds, base, strict=True)], n=4)
        print(f"  {name:52}{statistics.median(seconds) * 1e6:10.0f} us  ratio {middle:5.2f}  ({low:.2f} to {high:.2f})")


def alone(case: str, name: str, environment: dict[str, str]) -> dict[str, float]:
    """Of a process that takes ten steps: peak resident memory in MiB, page faults and seconds a step."""
    command, surroundings = [sys.executable, __file__, case, name], {**os.environ, **environment}
    found = subprocess.run(command, capture_output=True, text=True, check=True, env=surroundings)
    return json.loads(found.stdout)


def _measured(run: Run) -> dict[str, float]:
    run(2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    seconds = run(8) / 8
    faults = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 8
    return {"peak": _peak_of_this_process(), "faults": faults, "seconds": seconds}


def _peak_of_this_process() -> float:
    """MiB. Not by getrusage, whose peak a process inherits from the one that started it."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if len(sys.argv) == 3:
        print(json.dumps(_measured(made(sys.argv[1], sys.argv[2]))))
        return
    print(f"torch {torch.__version__}, tnt_func {tnt.__version__}, one thread")
    if len(sys.argv) == 2:
        compare(sys.argv[1], contestants() if sys.argv[1] in CASES else OURS)
        return
    for case in CASES:
        compare(case, contestants())
    for case in LEAVES:
        compare(case, OURS)
    print(f"\n{LARGE}, each in a process of its own: peak memory, page faults a step, CPU time a step")
    for name in (*contestants(), *ALONE):
        for said, environment in (("", {}), ("glibc keeps", KEEPING)):
            found = alone(LARGE, name, environment)
            figures = f"{found['peak']:8.0f} MiB {found['faults']:10,.0f} faults {found['seconds'] * 1e3:8.0f} ms"
            print(f"  {name:52}{said:12}{figures}")


if __name__ == "__main__":
    main()

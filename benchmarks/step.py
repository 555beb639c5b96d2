"""A whole training step: `supervised` in `train()` beside the imperative loop, TorchTNT and Lightning.

AdamW, float32, CPU, one thread. Every contestant takes the same batches for the same number of steps in every round,
in an order that rotates; figures are medians over rounds of the time a step, and of its ratio to the imperative loop
within the round, with the quartiles. Peak memory is of a process of its own.
"""

import importlib.util
import itertools
import logging
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
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
    "conv net 1x28x28, batch 32": (conv, lambda: images(32, 1, 28, 28), 40),
    "transformer d 64, T 64, batch 8": (Transformer, tokens, 30),
    "MLP of 25M, batch 16": (lambda: mlp(1024, 4096, 4096, 1024, 10), lambda: images(16, 1024), 4),
}
"""Name: module, batch, steps a round."""


def imperative(module: nn.Module, batches: list[Batch]) -> Run:
    optimizer = torch.optim.AdamW(module.parameters(), lr=LR, fused=True)

    def run(steps: int) -> float:
        start = time.perf_counter()
        for x, y in itertools.islice(itertools.cycle(batches), steps):
            optimizer.zero_grad()
            F.cross_entropy(module(x), y).backward()
            optimizer.step()
        return time.perf_counter() - start

    return run


def tnt_func(optimizer: tnt.optim.Optimizer) -> Callable[[nn.Module, list[Batch]], Run]:
    def make(module: nn.Module, batches: list[Batch]) -> Run:
        unit, state = tnt.supervised(module, F.cross_entropy, optimizer, key=tnt.key(0))

        def run(steps: int) -> float:
            nonlocal state
            data = list(itertools.islice(itertools.cycle(batches), steps))
            start = time.perf_counter()
            state = tnt.train(unit.train_unit, state, data, max_steps=state.progress.train.steps + steps)
            return time.perf_counter() - start

        return run

    return make


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
        start = time.perf_counter()
        train(unit, data, max_epochs=epochs + 1)
        return time.perf_counter() - start

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
            self.started = time.perf_counter()

        def on_train_epoch_end(self) -> None:
            self.took = time.perf_counter() - self.started

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
    }
    if importlib.util.find_spec("torchtnt"):
        found |= {"TorchTNT TrainUnit": torchtnt, "TorchTNT AutoUnit": torchtnt_auto}
    if importlib.util.find_spec("lightning"):
        found["Lightning"] = lightning
    return found


def made(case: str, name: str) -> Run:
    make_module, make_batch, _ = CASES[case]
    torch.manual_seed(0)
    return contestants()[name](make_module(), [make_batch() for _ in range(4)])


def compare(case: str) -> None:
    steps = CASES[case][2]
    runs = {name: made(case, name) for name in contestants()}
    for run in runs.values():
        run(steps)
    taken: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    for _ in range(ROUNDS):
        for name in order:
            taken[name].append(runs[name](steps) / steps)
        order = order[1:] + order[:1]
    print(f"\n{case} ({ROUNDS} rounds of {steps} steps)")
    base = taken["imperative, fused"]
    for name, seconds in taken.items():
        low, middle, high = statistics.quantiles([a / b for a, b in zip(seconds, base, strict=True)], n=4)
        print(f"  {name:44}{statistics.median(seconds) * 1e6:10.0f} us  ratio {middle:5.2f}  ({low:.2f} to {high:.2f})")


def peak(case: str, name: str) -> float:
    """Peak resident memory, in MiB, of a process that takes a few steps."""
    command = [sys.executable, __file__, case, name]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def _peak_of_this_process() -> float:
    """MiB. Not by getrusage, whose peak a process inherits from the one that started it."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if len(sys.argv) == 3:
        made(sys.argv[1], sys.argv[2])(3)
        print(_peak_of_this_process())
        return
    print(f"torch {torch.__version__}, tnt_func {tnt.__version__}, one thread")
    for case in CASES:
        compare(case)
    print("\nPeak memory of the process, MLP of 25M, batch 16")
    for name in contestants():
        print(f"  {name:44}{peak('MLP of 25M, batch 16', name):10.0f} MiB")


if __name__ == "__main__":
    main()

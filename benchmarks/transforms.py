"""What each transform adds to a step of `supervised`, beside what the same adds to the imperative loop.

AdamW, float32, CPU, one thread. Every contestant takes the same batches for the same number of steps in every round, in
an order that rotates; figures are medians over rounds: the CPU time a step, what it is more than that of the plain step
within the round, and the ratio to it.
"""

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import tnt_func as tnt

ROUNDS, LR = 7, 1e-3
Batch = tuple[Tensor, Tensor]
Run = Callable[[int], float]
"""Takes so many steps and returns the seconds that they took."""


class Body(nn.Sequential):
    """The part that is rematerialised; by itself, where the loop is imperative."""

    lean = False

    def forward(self, input: Tensor) -> Tensor:
        if self.lean and self.training:
            return checkpoint(super().forward, input, use_reentrant=False)
        return super().forward(input)


def mlp() -> nn.Module:
    return nn.Sequential(Body(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU()), nn.Linear(32, 10))


def conv() -> nn.Module:
    return nn.Sequential(
        Body(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        Body(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 7 * 7, 10)),
    )


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "MLP 64-32-32-10, batch 32": (mlp, (32, 64), 200),
    "conv net 1x28x28, batch 32": (conv, (32, 1, 28, 28), 20),
}
"""Name: module, shape of a batch, steps a round."""

T = tnt.transforms
TRANSFORMS: dict[str, Callable[[Any], Any]] = {
    "plain": lambda unit: unit,
    "microbatch(4)": lambda unit: T.microbatch(unit, 4),
    "ema": T.ema,
    "autocast(bfloat16)": T.autocast,
    "autocast(float16)": lambda unit: T.autocast(unit, torch.float16),
    "remat": lambda unit: T.remat(unit, lambda name, module: isinstance(module, Body)),
    "skip_nonfinite": T.skip_nonfinite,
    "with_gradient_stats": T.with_gradient_stats,
    "detect_anomaly": T.detect_anomaly,
    "swa": T.swa,
}
IMPERATIVE = ("plain", "microbatch(4)", "ema", "autocast(bfloat16)", "autocast(float16)", "remat", "detect_anomaly")


def transformed(name: str, module: nn.Module, batches: list[Batch]) -> Run:
    unit, state = tnt.supervised(module, F.cross_entropy, tnt.optim.adamw(LR), key=tnt.key(0))
    unit = TRANSFORMS[name](unit)

    def run(steps: int) -> float:
        nonlocal state
        data = list(itertools.islice(itertools.cycle(batches), steps))
        start = time.process_time()
        state = tnt.train(unit.train_unit, state, data, max_steps=state.progress.train.steps + steps)
        return time.process_time() - start

    return run


def imperative(name: str, module: nn.Module, batches: list[Batch]) -> Run:
    for part in module.modules():
        if isinstance(part, Body):
            part.lean = name == "remat"
    optimizer = torch.optim.AdamW(module.parameters(), lr=LR, fused=True)
    average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn()) if name == "ema" else None
    scaler = torch.amp.GradScaler("cpu", enabled=name == "autocast(float16)")
    dtype = {"autocast(bfloat16)": torch.bfloat16, "autocast(float16)": torch.float16}.get(name)
    count = 4 if name == "microbatch(4)" else 1

    def run(steps: int) -> float:
        start = time.process_time()
        with torch.autograd.set_detect_anomaly(name == "detect_anomaly"):
            for x, y in itertools.islice(itertools.cycle(batches), steps):
                optimizer.zero_grad()
                for inputs, targets in zip(x.chunk(count), y.chunk(count), strict=True):
                    with torch.autocast("cpu", dtype=dtype) if dtype else contextlib.nullcontext():
                        loss = F.cross_entropy(module(inputs), targets)
                    scaler.scale(loss / count if count > 1 else loss).backward()
                scaler.step(optimizer)
                scaler.update()
                if average is not None:
                    average.update_parameters(module)
        return time.process_time() - start

    return run


def compare(case: str) -> None:
    make_module, shape, steps = CASES[case]
    torch.manual_seed(0)
    batches = [(torch.randn(shape), torch.randint(0, 10, (shape[0],))) for _ in range(4)]
    # Convolutions in float16 take twenty times as long on a CPU, whoever asks for them.
    names = [name for name in TRANSFORMS if not (name == "autocast(float16)" and "conv" in case)]
    makers = {("tnt_func", name): transformed for name in names}
    makers |= {("imperative", name): imperative for name in IMPERATIVE if name in names}
    runs = {key: make(key[1], make_module(), batches) for key, make in makers.items()}
    for run in runs.values():
        run(max(2, steps // 4))
    taken: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    order = list(runs)
    for _ in range(ROUNDS):
        for key in order:
            taken[key].append(runs[key](steps) / steps * 1e6)
        order = order[1:] + order[:1]
    print(f"\n{case} ({ROUNDS} rounds of {steps} steps)")
    print(f"  {'':22}{'tnt_func, us':>14}{'added':>8}{'ratio':>7}{'imperative, us':>18}{'added':>8}{'ratio':>7}")
    for name in names:
        columns = ""
        for who, width in (("tnt_func", 14), ("imperative", 18)):
            if (who, name) in taken:
                pairs = list(zip(taken[who, name], taken[who, "plain"], strict=True))
                added, ratio = (
                    statistics.median(each) for each in ([a - b for a, b in pairs], [a / b for a, b in pairs])
                )
                columns += f"{statistics.median(taken[who, name]):{width}.0f}{added:8.0f}{ratio:7.2f}"
        print(f"  {name:22}{columns}")


def main() -> None:
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, tnt_func {tnt.__version__}, one thread")
    for case in CASES:
        compare(case)


if __name__ == "__main__":
    main()

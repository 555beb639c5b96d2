"""Time of a training step on two gloo ranks: data_parallel against DistributedDataParallel, interleaved.

OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/distributed.py
"""

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import tnt_func as tnt

ROUNDS = 11
Step = Callable[[], Any]


def mlp(width: int, layers: int) -> nn.Sequential:
    sizes = [64, *[width] * layers, 10]
    parts = [part for a, b in zip(sizes, sizes[1:], strict=False) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*parts[:-1])


def ours(module: nn.Module, mesh: Any, batch: Any) -> Step:
    unit, state = tnt.supervised(module, nn.functional.cross_entropy, tnt.optim.sgd(1e-2), key=tnt.key(0))
    step = tnt.distributed.data_parallel(unit.train_unit, mesh).train_step
    state = tnt.prepare(unit, tnt.distributed.replicate(state, mesh))

    def run() -> None:
        nonlocal state
        state, _ = step(state, batch)

    return run


def ddp(module: nn.Module, batch: Any) -> Step:
    wrapped = DistributedDataParallel(copy.deepcopy(module), gradient_as_bucket_view=True)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=1e-2)

    def run() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(wrapped(batch[0]), batch[1]).backward()
        optimizer.step()

    return run


def seconds(step: Step, repeats: int) -> float:
    torch.distributed.barrier()
    began = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - began) / repeats


def compare(name: str, width: int, layers: int, repeats: int, world: tnt.distributed.World) -> None:
    torch.manual_seed(0)
    module, mesh = mlp(width, layers), tnt.distributed.mesh(world)
    batch = (torch.randn(32, 64), torch.randint(10, (32,)))
    steps = {"data_parallel": ours(module, mesh, batch), "DDP": ddp(module, batch)}
    times: dict[str, list[float]] = {peer: [] for peer in steps}
    for _ in range(ROUNDS):
        for peer, step in steps.items():
            times[peer].append(seconds(step, repeats))
    if world.rank == 0:
        ratios = [a / b for a, b in zip(times["data_parallel"], times["DDP"], strict=True)]
        each = ", ".join(f"{peer} {statistics.median(found) * 1e3:.2f} ms" for peer, found in times.items())
        least = ", ".join(f"{min(found) * 1e3:.2f}" for found in times.values())
        print(f"{name}: {each} (least {least}), ratio {statistics.median(ratios):.2f}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tnt.distributed.init(device="cpu") as world:
        compare("64-256-256-10", 256, 2, 50, world)
        compare("25M parameters", 2048, 7, 1, world)

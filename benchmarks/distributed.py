"""A training step on gloo ranks beside DistributedDataParallel and fully_shard: time, memory, and bytes sent.

Starts itself under torchrun: for times once, with all contestants taking turns, and once for each one's memory.
"""

import ctypes
import functools
import os
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import tnt_func as tnt

RANKS, ROUNDS, SECONDS = 2, 13, 25.0
MODELS = {"64-256-256-10": (256, 2), "25M parameters": (2048, 7)}
Step = Callable[[], Any]
Optimizers = tuple[Callable[[], tnt.optim.Optimizer], Callable[[Any], torch.optim.Optimizer]]
OPTIMIZERS: dict[str, Optimizers] = {
    "SGD": (lambda: tnt.optim.sgd(1e-2), lambda params: torch.optim.SGD(params, lr=1e-2)),
    "AdamW": (lambda: tnt.optim.adamw(1e-3), lambda params: torch.optim.AdamW(params, lr=1e-3, fused=True)),
}


def mlp(width: int, layers: int) -> nn.Sequential:
    sizes = [64, *[width] * layers, 10]
    parts = [part for a, b in zip(sizes, sizes[1:], strict=False) for part in (nn.Linear(a, b), nn.ReLU())]
    torch.manual_seed(0)
    return nn.Sequential(*parts[:-1])


def unwrapped(module: nn.Module) -> tuple[Any, Any]:
    """A module as a function that does not hold the first parameters, and those."""
    model = tnt.from_module(module)
    return model.apply, model.params


def ours(model: Any, optimizers: Optimizers, mesh: Any, batch: Any, parts: bool = False, graph: bool = False) -> Step:
    apply, params = unwrapped(mlp(*model))

    def objective(params: Any, state: tnt.State, batch: Any) -> Any:
        loss = nn.functional.cross_entropy(apply(params, {}, batch[0], train=True)[0], batch[1])
        return loss, (state.buffers, {"loss": loss, "num_samples": len(batch[0])})

    optimizer = optimizers[0]()
    unit = tnt.TrainUnit(train_step=tnt.minimize(objective, optimizer), draws=())
    unit = tnt.compiled(unit, form="gradients") if graph else unit
    unit = tnt.donate(tnt.distributed.data_parallel(unit, mesh))
    state = tnt.distributed.replicate(tnt.State(params=params, key=tnt.key(0), opt_state=optimizer.init(params)), mesh)
    state = tnt.prepare(unit, tnt.distributed.shard(state, mesh) if parts else state)
    del params

    def run() -> None:
        nonlocal state
        state, _ = unit.train_step(state, batch)

    return run


def imperative(model: Any, optimizers: Optimizers, mesh: Any, batch: Any, parts: bool = False) -> Step:
    module: Any = mlp(*model)
    wrapped = fully_shard(module, mesh=mesh) if parts else DistributedDataParallel(module, gradient_as_bucket_view=True)
    optimizer = optimizers[1](wrapped.parameters())

    def run() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(wrapped(batch[0]), batch[1]).backward()
        optimizer.step()

    return run


CONTESTANTS: dict[str, Callable[..., Step]] = {
    "DDP": imperative,
    "data_parallel, replicated": ours,
    "data_parallel, replicated, compiled": functools.partial(ours, graph=True),
    "FSDP2": functools.partial(imperative, parts=True),
    "data_parallel, in parts": functools.partial(ours, parts=True),
}
PEERS = {name: "DDP" if number < 3 else "FSDP2" for number, name in enumerate(CONTESTANTS)}
PASSES = {"DDP": 2, "FSDP2": 3}
"""How often each rank sends (n - 1) / n of the parameters' bytes, at least: scattered sums, gathered sums or wholes."""


def sent() -> int:
    """Bytes that this process has sent by its sockets, and that have arrived."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                with socket.socket(fileno=os.dup(int(name))) as end:
                    info = end.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                total += struct.unpack_from("Q", info, 120)[0]
        except (OSError, struct.error):
            continue
    return total


def sent_a_step(step: Step) -> float:
    torch.distributed.barrier()
    before = sent()
    for _ in range(4):
        step()
    time.sleep(0.2)
    return (sent() - before) / 4


def seconds(step: Step, repeats: int) -> tuple[float, float]:
    """CPU time of the process, threads that send included, and time on the clock."""
    torch.distributed.barrier()
    began, clock = time.process_time(), time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.process_time() - began) / repeats, (time.perf_counter() - clock) / repeats


def spread(found: list[float]) -> str:
    low, middle, high = statistics.quantiles(found, n=4)
    return f"{middle:.2f} ({low:.2f} - {high:.2f})"


def compare(name: str, optimizer: str, mesh: Any, batch: Any, rank: int) -> None:
    steps = {who: make(MODELS[name], OPTIMIZERS[optimizer], mesh, batch) for who, make in CONTESTANTS.items()}
    once = torch.tensor([sum(seconds(step, 3)[1] for step in steps.values() if step() is None)])
    torch.distributed.all_reduce(once)
    repeats = max(1, min(40, round(SECONDS * RANKS / ROUNDS / once.item())))
    times: dict[str, list[tuple[float, float]]] = {who: [] for who in steps}
    for _ in range(ROUNDS):
        for who, step in steps.items():
            times[who].append(seconds(step, repeats))
    bytes_sent = {who: sent_a_step(step) for who, step in steps.items()}
    if rank:
        return
    size = 4 * sum(leaf.numel() for leaf in mlp(*MODELS[name]).parameters())
    print(f"\n| {name}, {optimizer} | ms of CPU | of its peer | ms on the clock | of its peer | sent, of the least |")
    print("|---|---|---|---|---|---|")
    for who, found in times.items():
        columns = list[str]()
        for place in (0, 1):
            columns.append(f"{statistics.median(each[place] for each in found) * 1e3:.2f}")
            columns.append(spread([a[place] / b[place] for a, b in zip(found, times[PEERS[who]], strict=True)]))
        least = PASSES[PEERS[who]] * size * (RANKS - 1) / RANKS
        print(f"| {who} | {' | '.join(columns)} | {bytes_sent[who] / least:.4f} |", flush=True)


def memory(who: str, optimizer: str, mesh: Any, batch: Any, rank: int) -> None:
    """The most that five steps take, beyond what the process took before there was a model."""
    before = resident("VmRSS")
    step = CONTESTANTS[who](MODELS["25M parameters"], OPTIMIZERS[optimizer], mesh, batch)
    step()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(5):
        step()
    if not rank:
        print(f"| {who}, {optimizer} | {resident('VmHWM') - before:.0f} | {before:.0f} |", flush=True)


def resident(name: str) -> float:
    """MiB, as the system counts."""
    (line,) = (each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith(name))
    return int(line.split()[1]) / 1024


def main(what: str, *names: str) -> None:
    torch.set_num_threads(1)
    with tnt.distributed.init(device="cpu") as world:
        torch.manual_seed(world.rank)
        batch = (torch.randn(32, 64), torch.randint(10, (32,)))
        mesh = tnt.distributed.mesh(world)
        {"compare": compare, "memory": memory}[what](*names, mesh, batch, world.rank)


if __name__ == "__main__":
    if "RANK" in os.environ:
        main(*sys.argv[1:])
        sys.exit()
    runs = [("compare", model, optimizer) for optimizer in OPTIMIZERS for model in MODELS]
    runs += [("memory", who, optimizer) for optimizer in OPTIMIZERS for who in CONTESTANTS]
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS))
    for run in runs:
        if run[0] == "memory" and run[1] == next(iter(CONTESTANTS)):
            print(
                "\n| 25M parameters | peak, MiB beyond the imports | of which there were |\n|---|---|---|", flush=True
            )
        print(f"load {os.getloadavg()[0]:.0f}", file=sys.stderr)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, *torchrun, __file__, *run], check=True, env=environment)

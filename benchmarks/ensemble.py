"""Ensembles: a step of many members in `train()`, beside the members one after another, and jax.vmap.

AdamW, float32, CPU, one thread, one batch for all members. Every contestant takes the same number of steps in every
round, in an order that rotates; figures are medians over rounds of the CPU time a member and step, and of its ratio to
one step of the imperative loop within the round. Members one after another cost that, however many they are.

    python benchmarks/ensemble.py             everything
    python benchmarks/ensemble.py small 8     one model, one size
"""

import os

# Read when jax is imported: one thread, as torch has.
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"

import importlib.util
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import tnt_func as tnt

ROUNDS, SECONDS = 7, 0.4
CASES = {"small": ((64, 32, 32, 10), 32), "middle": ((64, 256, 256, 10), 64)}
SIZES = (8, 32, 128)
BARS = {"small": {8: 0.12, 32: 0.08, 128: 0.08}}
Run = Callable[[int], None]


def network(sizes: tuple[int, ...], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers = [(nn.Linear(a, b), nn.ReLU()) for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(*list(itertools.chain(*layers))[:-1])


def imperative(sizes: tuple[int, ...], batch: Any) -> Run:
    module = network(sizes, 0)
    optimizer = torch.optim.AdamW(module.parameters(), 1e-3, fused=True)

    def run(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(module(batch[0]), batch[1]).backward()
            optimizer.step()

    return run


def ensembles(sizes: tuple[int, ...], batch: Any, members: int) -> dict[str, Run]:
    made = [
        tnt.supervised(network(sizes, seed), F.cross_entropy, tnt.optim.adamw(1e-3), key=tnt.key(0))
        for seed in range(members)
    ]
    first, plain = tnt.stack([state for _, state in made]), made[0][0].train_unit
    unit = tnt.ensemble(plain, members)
    units = {
        "eager": unit,
        "eager, chunks of 16": tnt.ensemble(plain, members, chunk_size=16),
        "compiled": tnt.compiled(unit),
        "compiled, donated": tnt.donate(tnt.compiled(unit)),
    }
    if members <= 16:
        del units["eager, chunks of 16"]

    def runs(unit: tnt.TrainUnit) -> Run:
        states = [first]

        def run(steps: int) -> None:
            done = states[0].progress.train.steps
            states[0] = tnt.train(unit, states[0], [batch] * steps, max_steps=done + steps, max_epochs=10**9)

        return run

    def alone(step: Any) -> Run:
        """Without the loop around it, as the step of jax is; metrics are in it."""
        states = [tnt.keep(tnt.prepare(unit, first))]

        def run(steps: int) -> None:
            for _ in range(steps):
                states[0] = step.merging(states[0], batch)[0]

        return run

    found = {name: runs(one) for name, one in units.items()}
    return found | {"compiled, donated, no loop": alone(units["compiled, donated"].train_step)}


def jax_vmap(sizes: tuple[int, ...], batch: Any, members: int) -> dict[str, Run]:
    if importlib.util.find_spec("jax") is None or importlib.util.find_spec("optax") is None:
        return {}
    import jax
    import jax.numpy as jnp
    import optax

    optimizer = optax.adamw(1e-3, weight_decay=1e-2)
    inputs, targets = (jnp.asarray(x.numpy()) for x in batch)

    def init(key: Any) -> Any:
        keys = jax.random.split(key, len(sizes))
        pairs = zip(keys, itertools.pairwise(sizes), strict=False)
        return [(jax.random.normal(k, (a, b)) / a**0.5, jnp.zeros(b)) for k, (a, b) in pairs]

    def loss(params: Any) -> Any:
        x = inputs
        for weight, bias in params[:-1]:
            x = jax.nn.relu(x @ weight + bias)
        scores = x @ params[-1][0] + params[-1][1]
        return optax.softmax_cross_entropy_with_integer_labels(scores, targets).mean()

    def step(params: Any, opt_state: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    params = jax.vmap(init)(jax.random.split(jax.random.key(0), members))
    held = [params, jax.vmap(optimizer.init)(params)]
    whole = jax.jit(jax.vmap(step), donate_argnums=(0, 1))

    def run(steps: int) -> None:
        for _ in range(steps):
            held[0], held[1], _ = whole(*held)
        jax.block_until_ready(held)

    return {"jax.vmap, jit, donated": run}


def measure(contestants: dict[str, Run], members: dict[str, int]) -> dict[str, list[float]]:
    """Microseconds a member and step, a number for each round."""
    counts: dict[str, int] = {}
    for name, run in contestants.items():
        start = time.perf_counter()
        run(1)
        print(f"  {name}: first step {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
        run(2)
        start = time.process_time()
        run(3)
        counts[name] = max(5, int(SECONDS / max((time.process_time() - start) / 3, 1e-6)))
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(ROUNDS):
        names = [*contestants]
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.process_time()
            contestants[name](counts[name])
            taken[name].append((time.process_time() - start) / counts[name] / members[name] * 1e6)
    return taken


def report(case: str, size: int) -> None:
    sizes, rows = CASES[case]
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(rows, sizes[0], generator=generator), torch.randint(0, 10, (rows,), generator=generator)
    contestants = {"one after another, fused": imperative(sizes, batch)}
    contestants |= ensembles(sizes, batch, size) | jax_vmap(sizes, batch, size)
    taken = measure(contestants, {name: 1 if name.startswith("one") else size for name in contestants})
    base, peer = taken["one after another, fused"], taken.get("jax.vmap, jit, donated")
    print(f"\nMLP {'-'.join(map(str, sizes))}, batch {rows}, {size} members")
    for name, times in taken.items():
        ratio = statistics.median(a / b for a, b in zip(times, base, strict=True))
        line = f"  {name:26} {statistics.median(times):8.1f} us a member  {ratio:.3f} of one after another"
        if peer is not None:
            line += f"  {statistics.median(a / b for a, b in zip(times, peer, strict=True)):.2f} of jax.vmap"
        bar = BARS.get(case, {}).get(size) if name.startswith("compiled, donated") else None
        print(line + (f"  (bars {bar}, 1.25)" if bar else ""), flush=True)


def main(only: list[str]) -> None:
    torch.set_num_threads(1)
    for case, size in itertools.product(CASES, SIZES):
        if not only or (case in only and (len(only) == 1 or str(size) in only)):
            report(case, size)


if __name__ == "__main__":
    main(sys.argv[1:])

"""Fused steps beside the same compiled steps one by one, and `jax.lax.scan` beside `jax.jit`.

AdamW, float32, CPU, one thread; states are donated. Every contestant takes the same batches for the same number of
steps in every round, in an order that rotates; figures are medians over rounds of the CPU time a step, with the
quartiles, and of its ratios within the round: to its own peer one by one, and to `jax.lax.scan`. JAX's batches are
stacked before the clock starts. What is watched has an observer that is told of every step, and does nothing.

    python benchmarks/fused.py                             everything
    python benchmarks/fused.py "MLP 64-32-32-10, batch 32" one case
"""

import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"

import torch
from step import CASES, LR
from torch.nn import functional as F

import tnt_func as tnt

ROUNDS = 15
STEPS = {"MLP 64-32-32-10, batch 32": 400, "conv net 1x28x28, batch 32": 100}
Run = Callable[[], float]
"""Takes the steps of a round and returns the seconds that each of them took."""


def ours(name: str, data: list[Any], sizes: tuple[int, ...]) -> dict[str, Run]:
    torch.manual_seed(0)
    unit, first = tnt.supervised(CASES[name][0](), F.cross_entropy, tnt.optim.adamw(LR), key=tnt.key(0))
    begun = time.process_time()
    fast = tnt.donate(tnt.compiled(unit, form="step")).train_unit
    tnt.train(fast, first, data, max_steps=2)
    print(f"compiled in {time.process_time() - begun:.0f} s, the one graph for every k")

    def run(fuse: int, observers: Sequence[tnt.Observer] = ()) -> Run:
        def train() -> float:
            begun = time.process_time()
            tnt.train(fast, first, data, max_steps=len(data), fuse=fuse, observers=observers)
            return (time.process_time() - begun) / len(data)

        return train

    runs = {f"fuse={fuse}" if fuse > 1 else "one by one": run(fuse) for fuse in sizes}
    return runs | {f"fuse={sizes[-1]}, watched": run(sizes[-1], [lambda event: None])}


def scanned(name: str, data: list[Any], k: int) -> dict[str, Run]:
    import jax
    import jax.numpy as jnp
    import optax

    optimizer, key = optax.adamw(LR), jax.random.key(0)
    convolves = "conv" in name

    def init(*shape: int) -> Any:
        return jax.random.normal(key, shape) * 0.05

    if convolves:
        params = {"a": init(16, 1, 3, 3), "b": init(32, 16, 3, 3), "out": (init(1568, 10), jnp.zeros(10))}
        params |= {norm: (jnp.ones(n), jnp.zeros(n)) for norm, n in (("na", 16), ("nb", 32))}
    else:
        params = [(init(a, b), jnp.zeros(b)) for a, b in itertools.pairwise((64, 32, 32, 10))]

    def logits(params: Any, x: Any) -> Any:
        if not convolves:
            for w, b in params[:-1]:
                x = jax.nn.relu(x @ w + b)
            return x @ params[-1][0] + params[-1][1]
        for layer, norm in (("a", "na"), ("b", "nb")):
            x = jax.lax.conv(x, params[layer], (1, 1), "SAME")
            mean, var = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
            scale, shift = (p[:, None, None] for p in params[norm])
            x = jax.nn.relu((x - mean) / jnp.sqrt(var + 1e-5) * scale + shift)
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
        return x.reshape(len(x), -1) @ params["out"][0] + params["out"][1]

    def step(carry: Any, batch: Any) -> Any:
        params, opt_state = carry
        x, y = batch

        def loss(params: Any) -> Any:
            return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    one = jax.jit(step, donate_argnums=0)
    block = jax.jit(lambda carry, batches: jax.lax.scan(step, carry, batches), donate_argnums=0)
    batches = [(jnp.asarray(x.numpy()), jnp.asarray(y.numpy())) for x, y in data]
    blocks = [
        (jnp.stack([x for x, _ in part]), jnp.stack([y for _, y in part]))
        for part in (batches[at : at + k] for at in range(0, len(batches), k))
    ]
    begun = time.process_time()
    carry = (params, optimizer.init(params))
    carry, _ = one(carry, batches[0])
    carry, last = block(carry, blocks[0])
    jax.block_until_ready(last)
    print(f"jax compiled in {time.process_time() - begun:.0f} s")

    def run(function: Any, given: list[Any]) -> Run:
        def train() -> float:
            nonlocal carry, last
            begun = time.process_time()
            for batch in given:
                carry, last = function(carry, batch)
            jax.block_until_ready((carry, last))
            return (time.process_time() - begun) / len(data)

        return train

    return {"jax.jit": run(one, batches), f"lax.scan({k})": run(block, blocks)}


def measured(runs: dict[str, Run]) -> dict[str, list[float]]:
    names, taken = [*runs], dict[str, list[float]]()
    for turn in range(ROUNDS + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            taken.setdefault(name, []).append(runs[name]())
    return {name: times[1:] for name, times in taken.items()}


def spread(values: list[float], form: str) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:{form}} ({low:{form}}-{high:{form}})"


def main() -> None:
    torch.set_num_threads(1)
    for name, steps in STEPS.items():
        if sys.argv[1:] not in ([], [name]):
            continue
        print(f"\n{name}, {steps} steps a round, {ROUNDS} rounds")
        data = [CASES[name][1]() for _ in range(steps)]
        times = measured(ours(name, data, (1, 10, 100)) | scanned(name, data, 100))
        for contestant, its in times.items():
            one = times["jax.jit" if "jax" in contestant or "scan" in contestant else "one by one"]
            of_one, of_scan = (
                spread([a / b for a, b in zip(its, peer, strict=True)], ".2f") for peer in (one, times["lax.scan(100)"])
            )
            print(
                f"{contestant:>17}: {spread([1e6 * t for t in its], '.0f')} us, least {1e6 * min(its):.0f}; "
                f"{of_one} of one by one, {of_scan} of lax.scan"
            )


if __name__ == "__main__":
    main()

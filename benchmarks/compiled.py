"""Compiled steps: `train()` on compiled units beside two imperative loops of PyTorch, and beside JAX with optax.

AdamW, float32, CPU, one thread; times are CPU time, which other work on the machine changes least. The imperative loops
have torch's fused kernel; one of them has its forward and backward pass compiled by torch.compile. JAX has the whole
step under jit with params and opt_state donated, and waits for every step. All take the same batches from the same
first weights. Figures are medians over rounds in which all take turns; a ratio is of one round, with its quartiles.
"""

import importlib.util
import itertools
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"

import torch  # noqa: E402
from step import CASES, LR, ROUNDS, Batch, images, imperative, interleaved, mlp  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

import tnt_func as tnt  # noqa: E402

Run = Callable[[int], float]
BARS = {
    "MLP 64-32-32-10, batch 32": (0.45, 1.25),
    "MLP 64-256-256-10, batch 64": (0.8, 1.25),
    "conv net 1x28x28, batch 32": (0.75, 1.0),
    "transformer d 64, T 64, batch 8": (0.9, 1.0),
    "MLP of 25M, batch 16": (None, 1.05),
}
"""Of each case: what a compiled run may take, of the faster imperative loop and of JAX."""
SHAPES = {**CASES, "MLP 64-256-256-10, batch 64": (lambda: mlp(64, 256, 256, 10), lambda: images(64, 64), 200)}


def imperative_compiled(module: nn.Module, batches: list[Batch]) -> Run:
    optimizer = torch.optim.AdamW(module.parameters(), lr=LR, fused=True)
    loss_of = torch.compile(lambda x, y: F.cross_entropy(module(x), y))

    def run(steps: int) -> float:
        start = time.process_time()
        for x, y in itertools.islice(itertools.cycle(batches), steps):
            optimizer.zero_grad()
            loss_of(x, y).backward()
            optimizer.step()
        return time.process_time() - start

    return run


def compiled(change: Callable[[Any], Any]) -> Callable[[nn.Module, list[Batch]], Run]:
    def make(module: nn.Module, batches: list[Batch]) -> Run:
        unit, state = tnt.supervised(module, F.cross_entropy, tnt.optim.adamw(LR), key=tnt.key(0))
        train_unit = change(unit.train_unit)

        def run(steps: int) -> float:
            nonlocal state
            data = list(itertools.islice(itertools.cycle(batches), steps))
            start = time.process_time()
            state = tnt.train(train_unit, state, data, max_steps=state.progress.train.steps + steps)
            return time.process_time() - start

        return run

    return make


def jitted(module: nn.Module, batches: list[Batch]) -> Run:
    import jax
    import jax.numpy as jnp
    import optax

    jax.config.update("jax_cpu_enable_async_dispatch", False)
    optimizer = optax.adamw(LR, weight_decay=1e-2)
    forward = jax_forward(module)
    # Copies, for JAX may take a tensor's memory as its own.
    params = {name: jnp.array(leaf.detach().numpy(), copy=True) for name, leaf in module.named_parameters()}
    opt_state = optimizer.init(params)
    data = [tuple(jnp.array(leaf.numpy(), copy=True) for leaf in batch) for batch in batches]
    if any(isinstance(part, nn.Conv2d) for part in module.modules()):
        data = [(x.transpose(0, 2, 3, 1), y) for x, y in data]
    averages = {name: jnp.array(leaf.numpy(), copy=True) for name, leaf in module.named_buffers() if leaf.dim()}

    def objective(params: Any, averages: Any, x: Any, y: Any) -> Any:
        logits, averages = forward(params, averages, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), averages

    def step(params: Any, averages: Any, opt_state: Any, x: Any, y: Any) -> Any:
        (loss, averages), grads = jax.value_and_grad(objective, has_aux=True)(params, averages, x, y)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), averages, opt_state, loss

    taken = jax.jit(step, donate_argnums=(0, 1, 2))

    def run(steps: int) -> float:
        nonlocal params, averages, opt_state
        loss: Any = None
        start = time.process_time()
        for x, y in itertools.islice(itertools.cycle(data), steps):
            params, averages, opt_state, loss = taken(params, averages, opt_state, x, y)
        jax.block_until_ready((params, loss))
        return time.process_time() - start

    return run


def jax_forward(module: nn.Module) -> Callable[[Any, Any, Any], Any]:
    """What the modules of the cases compute, `(params, averages, inputs) -> (logits, averages)`."""
    import jax
    import jax.numpy as jnp

    def linear(p: Any, name: str, x: Any) -> Any:
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def norm(p: Any, name: str, x: Any) -> Any:
        centered = x - x.mean(-1, keepdims=True)
        scale = jax.lax.rsqrt(jnp.square(centered).mean(-1, keepdims=True) + 1e-5)
        return centered * scale * p[f"{name}.weight"] + p[f"{name}.bias"]

    def dense(p: Any, averages: Any, x: Any) -> Any:
        names = [name.removesuffix(".weight") for name in p if name.endswith(".weight")]
        for name in names[:-1]:
            x = jax.nn.relu(linear(p, name, x))
        return linear(p, names[-1], x), averages

    def convolved(p: Any, averages: Any, x: Any) -> Any:
        for conv, bn in (("0", "1"), ("4", "5")):
            kernel = p[f"{conv}.weight"].transpose(2, 3, 1, 0)
            x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
            x = x + p[f"{conv}.bias"]
            mean, var, n = x.mean((0, 1, 2)), x.var((0, 1, 2)), x.size // x.shape[-1]
            old = averages[f"{bn}.running_mean"], averages[f"{bn}.running_var"]
            averages = {
                **averages,
                f"{bn}.running_mean": 0.9 * old[0] + 0.1 * mean,
                f"{bn}.running_var": 0.9 * old[1] + 0.1 * var * n / (n - 1),
            }
            x = (x - mean) * jax.lax.rsqrt(var + 1e-5) * p[f"{bn}.weight"] + p[f"{bn}.bias"]
            x = jax.nn.relu(x)
            b, h, w, c = x.shape
            x = x.reshape(b, h // 2, 2, w // 2, 2, c).max((2, 4))
        return linear(p, "9", x.transpose(0, 3, 1, 2).reshape(len(x), -1)), averages

    def attended(p: Any, averages: Any, tokens: Any) -> Any:
        x = p["embed.weight"][tokens]
        b, t, d = x.shape
        for layer in ("body.layers.0", "body.layers.1"):
            qkv = x @ p[f"{layer}.self_attn.in_proj_weight"].T + p[f"{layer}.self_attn.in_proj_bias"]
            q, k, v = (part.reshape(b, t, 4, d // 4).transpose(0, 2, 1, 3) for part in jnp.split(qkv, 3, -1))
            weights = jax.nn.softmax(q @ k.transpose(0, 1, 3, 2) / (d // 4) ** 0.5, axis=-1)
            heads = (weights @ v).transpose(0, 2, 1, 3).reshape(b, t, d)
            x = norm(p, f"{layer}.norm1", x + linear(p, f"{layer}.self_attn.out_proj", heads))
            inner = jax.nn.relu(linear(p, f"{layer}.linear1", x))
            x = norm(p, f"{layer}.norm2", x + linear(p, f"{layer}.linear2", inner))
        return linear(p, "head", x).reshape(b * t, -1), averages

    if any(isinstance(part, nn.Embedding) for part in module.modules()):
        return attended
    return convolved if any(isinstance(part, nn.Conv2d) for part in module.modules()) else dense


def contestants() -> dict[str, Callable[[nn.Module, list[Batch]], Run]]:
    found = {
        "imperative, fused": imperative,
        "imperative, fused, torch.compile": imperative_compiled,
        "compiled": compiled(tnt.compiled),
        "compiled, donated": compiled(lambda unit: tnt.transforms.donate(tnt.compiled(unit))),
    }
    if importlib.util.find_spec("jax") and importlib.util.find_spec("optax"):
        found["jax.jit, optax, donated"] = jitted
    return found


def compare(case: str) -> None:
    make_module, make_batch, steps = SHAPES[case]
    runs: dict[str, Run] = {}
    first: dict[str, float] = {}
    for name, make in contestants().items():
        torch.manual_seed(0)
        runs[name] = make(make_module(), [make_batch() for _ in range(4)])
        start = time.process_time()
        runs[name](2)
        first[name] = time.process_time() - start
        runs[name](steps)
    taken = interleaved(runs, steps)
    imperatives = [
        min(pair) for pair in zip(taken["imperative, fused"], taken["imperative, fused, torch.compile"], strict=True)
    ]
    peers = {"of the faster imperative": imperatives, "of JAX": taken.get("jax.jit, optax, donated")}
    print(f"\n{case} ({ROUNDS} rounds of {steps} steps); bars {BARS[case]}")
    for name, seconds in taken.items():
        ratios = []
        for peer, its in peers.items():
            if its is not None:
                low, middle, high = statistics.quantiles([a / b for a, b in zip(seconds, its, strict=True)], n=4)
                ratios.append(f"{peer} {middle:5.2f} ({low:.2f} to {high:.2f})")
        print(f"  {name:34}{statistics.median(seconds) * 1e6:9.0f} us  {'  '.join(ratios)}  first {first[name]:.1f} s")


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(f"torch {torch.__version__}, tnt_func {tnt.__version__}, one thread")
    for case in sys.argv[1:] or BARS:
        compare(case)


if __name__ == "__main__":
    main()

"""A run in every form that a unit has, on every rank: donated, compiled, in micro-batches; whole States and parts.

python tests/distributed_forms.py SIZE    prints what each rank of a world found
"""

import functools
import itertools
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from distributed_worlds import started
from torch import nn

import tnt_func as tnt

SAMPLES, STEPS = 23, 4
INPUTS = torch.sin(torch.arange(SAMPLES * 5.0).reshape(-1, 5)).double()
DATA = tnt.data.source((INPUTS, torch.arange(SAMPLES) * 7 % 3)).batch(7)
averaged = functools.partial(tnt.transforms.ema, decay=0.9)
halved = functools.partial(tnt.transforms.microbatch, count=2)
graph = functools.partial(tnt.compiled, backend="aot_eager")
FORMS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "plain": (lambda unit: unit, lambda unit: unit),
    "micro-batches": (halved, lambda unit: unit),
    "compiled": (lambda unit: averaged(halved(unit)), graph),
}


def made() -> Any:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    optimizer = tnt.optim.chain(tnt.optim.clip_by_global_norm(0.3), tnt.optim.adamw(1e-2))
    return tnt.supervised(module, nn.functional.cross_entropy, optimizer, key=tnt.key(3))


def run(unit: Any, state: tnt.State, data: Any, **options: Any) -> tnt.State:
    last = tnt.fit(unit, tnt.prepare(unit, state), data, data, max_steps=STEPS, **options)
    return tnt.distributed.gather(last)


def apart(a: tnt.State, b: tnt.State) -> float:
    """How far parameters are from each other at most; infinity if losses are not as near."""
    losses = [
        tnt.metrics.compute(state, phase)["loss"] for state, phase in itertools.product((a, b), ("train", "eval"))
    ]
    if abs(losses[0] - losses[2]) + abs(losses[1] - losses[3]) > 1e-10:
        return float("inf")
    return max(float((a.params[name] - b.params[name]).abs().max()) for name in a.params)


def refusal(function: Callable[[], Any]) -> str:
    try:
        function()
    except tnt.errors.UsageError as error:
        return str(error)
    return "nothing was refused"


def checks(world: tnt.distributed.World) -> dict[str, Any]:
    """What a rank finds."""
    mesh = tnt.distributed.mesh(world)
    data, (unit, state) = DATA.shard(world.rank, world.size), made()
    parts = tnt.distributed.shard(state, mesh, lambda name: 1 if name == "2.weight" else 0)
    parallel = functools.partial(tnt.distributed.data_parallel, mesh=mesh)
    found: dict[str, Any] = {}
    for name, (inside, outside) in FORMS.items():
        alone = run(inside(unit), state, DATA)
        own = parallel(outside(inside(unit)))
        ends = {
            "whole": run(own, state, data),
            "whole, donated": run(own, state, data, donate=True),
            "parts": run(own, parts, data),
            "parts, donated": run(own, tnt.keep(parts), data, donate="given"),
        }
        if name == "plain":
            ends["whole, debugged"] = run(own, state, data, donate="debug")
            ends["whole, donated before"] = run(parallel(tnt.donate(unit)), state, data)
        found[name] = {
            "apart": {at: apart(end, alone) for at, end in ends.items()},
            "digests": {at: tnt.digest(end) for at, end in ends.items()},
            "alone": tnt.digest(alone),
            "messages": messages(own, state, data),
        }
    found["given"] = given(parallel(unit), tnt.keep(parts), data)
    found["refused"] = refused(unit, state, data, parallel)
    return found


def messages(unit: Any, state: tnt.State, data: Any) -> list[int]:
    """How many sums ranks begin in each of the first two steps."""
    counts, begun = list[int](), dist.all_reduce
    dist.all_reduce = lambda *args, **options: (counts.append(1), begun(*args, **options))[1]
    try:
        ends = [len(counts) for event in tnt.train_events(unit.train_unit, state, data, max_steps=2) if at_end(event)]
    finally:
        dist.all_reduce = begun
    return [ends[0], ends[1] - ends[0]]


def at_end(event: tnt.Event) -> bool:
    return event.point == "step_end"


def given(unit: tnt.FitUnit, state: tnt.State, data: Any) -> str:
    """What is left of parts that were given."""
    tnt.train(unit.train_unit, state, data, max_steps=1, donate="given")
    try:
        return str(state.params)
    except tnt.errors.ConsumedError as error:
        return str(error)


def refused(unit: tnt.FitUnit, state: tnt.State, data: Any, parallel: Any) -> dict[str, str]:
    """Orders that cannot be right."""
    half = tnt.transforms.autocast(parallel(unit), torch.float16)
    return {
        "in a graph": refusal(lambda: run(graph(parallel(unit)), state, data)),
        "in a graph of the gradient": refusal(lambda: run(graph(parallel(unit), form="gradients"), state, data)),
        "in a graph, to evaluate": refusal(lambda: tnt.evaluate(graph(parallel(unit).eval_unit), state, data)),
        "one graph": refusal(lambda: parallel(graph(unit, form="step"))),
        "micro-batches": refusal(lambda: tnt.transforms.microbatch(parallel(unit), 2)),
        "micro-batches in half": refusal(lambda: tnt.transforms.microbatch(half, 2)),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(started(int(sys.argv[1]), checks)))

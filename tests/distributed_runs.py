"""A run with everything in it that ranks must agree on, checked on every rank against one process.

torchrun --nproc-per-node 2 tests/distributed_runs.py checks DIRECTORY    what each rank found, in rank-R.json
torchrun --nproc-per-node 2 --max-restarts 1 tests/distributed_runs.py faults DIRECTORY    a kill, then an error
"""

import functools
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import tnt_func as tnt

SAMPLES, BATCH, STEPS = 46, 7, 30
INPUTS = torch.cat([torch.arange(SAMPLES)[:, None], torch.sin(torch.arange(SAMPLES * 5.0).reshape(-1, 5))], 1).double()
TARGETS = torch.arange(SAMPLES) * 7 % 3


def augmented(row: Any) -> Any:
    """The sample with noise of its own, but for its number."""
    return torch.cat([row[0][:1], row[0][1:] + 0.1 * torch.randn(5, dtype=torch.float64)]), row[1]


DATA = tnt.data.source((INPUTS, TARGETS)).shuffle(tnt.key(1)).map(augmented, draws=("torch",)).batch(BATCH)
EVAL_DATA = tnt.data.source((INPUTS, TARGETS)).batch(BATCH)


class Numbered(nn.Module):
    """A module that does not look at the number of a sample."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs[:, 1:])


def accuracy(output: Tensor, targets: Tensor) -> Tensor:
    return (output.argmax(-1) == targets).double().mean()


HITS = tnt.Metric(
    lambda: tnt.metrics.total("hits").of({"hits": torch.zeros(3)}),
    lambda output: tnt.metrics.total("hits").of(
        {"hits": torch.bincount(output["targets"][output["output"].argmax(-1) == output["targets"]], minlength=3)}
    ),
)


def prepared(
    *layers: nn.Module, parts: int = 2, parallel: Callable[[tnt.FitUnit], tnt.FitUnit] = lambda unit: unit
) -> Any:
    """Micro-batches, clipping, accumulation over epochs' ends, a schedule, an average, metrics of means and of rows."""
    torch.manual_seed(0)
    module = Numbered(*(layers or (nn.Linear(5, 8), nn.Tanh())), nn.LazyLinear(3)).double()
    module(INPUTS)
    lr = tnt.schedules.cosine(1e-2, steps=12)
    optimizer = tnt.optim.chain(tnt.optim.clip_by_global_norm(0.3), tnt.optim.accumulate(tnt.optim.adamw(lr), 2))
    metrics: dict[str, Any] = {"accuracy": accuracy, "hits": HITS}
    unit, state = tnt.supervised(module, nn.functional.cross_entropy, optimizer, key=tnt.key(3), metrics=metrics)
    unit = tnt.transforms.skip_nonfinite(tnt.transforms.ema(tnt.transforms.microbatch(unit, parts), 0.9, evaluate=True))
    unit = tnt.transforms.with_gradient_stats(unit)
    unit = tnt.attach(parallel(unit), tnt.callbacks.early_stopping("loss", patience=50))
    return unit, tnt.prepare(unit, state)


def events(unit: tnt.FitUnit, state: tnt.State, cut: Callable[[Any], Any], **options: Any) -> list[tnt.Event]:
    options = {"max_steps": STEPS, "evaluate_every_n_steps": 8, **options}
    return list(tnt.fit_events(unit, state, cut(DATA), cut(EVAL_DATA), **options))


def order(found: list[tnt.Event]) -> list[Any]:
    """What happened in which order, and the whole numbers of it."""
    return [(e.phase, e.point, e.state.progress, e.reason, sorted(e.state.output or ())) for e in found]


def seen(found: list[tnt.Event]) -> list[list[int]]:
    """The numbers of the samples of every step."""
    return [e.batch[0][:, 0].int().tolist() for e in found if e.point == "fetched"]


def apart(a: tnt.State, b: tnt.State) -> float:
    """How far two states are from each other at most, relative to 1 or what is larger; infinity if of two kinds."""
    here, there = tnt.pytree.named_leaves(a), tnt.pytree.named_leaves(b)
    if [path for path, _ in here] != [path for path, _ in there] or a.progress != b.progress:
        return float("inf")
    largest = 0.0
    for (_, x), (_, y) in zip(here, there, strict=True):
        if isinstance(x, float | Tensor) and tnt.pytree.describe(x).split()[0] == tnt.pytree.describe(y).split()[0]:
            p, q = torch.as_tensor(x).double(), torch.as_tensor(y).double()
            gap = torch.where(p == q, 0.0, (p - q).abs() / q.abs().clamp(min=1))
            largest = max([largest, *gap.reshape(-1).tolist()])
        elif x != y:
            return float("inf")
    return largest


def refusal(function: Callable[[], Any]) -> str:
    try:
        function()
    except tnt.errors.TntError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"


def checks(world: tnt.distributed.World, directory: Path) -> dict[str, Any]:
    """What a rank finds."""
    mesh = tnt.distributed.mesh(world)
    cut = lambda data: data.shard(world.rank, world.size)  # noqa: E731
    parallel = functools.partial(tnt.distributed.data_parallel, mesh=mesh)
    unit, state = prepared()
    alone = events(unit, state, lambda data: data)
    together = events(prepared(parallel=parallel)[0], tnt.distributed.replicate(state, mesh), cut)
    found: dict[str, Any] = {
        "apart": max(apart(a.state, b.state) for a, b in zip(together, alone, strict=True)),
        "apart unsynchronised": unsynchronised(unit, state, cut, together),
        "order": order(together) == order(alone),
        "seen": seen(together),
        "seen alone": seen(alone),
        "digest": tnt.digest([tnt.digest(event.state) for event in together]),
        "digest alone": tnt.digest([tnt.digest(event.state) for event in alone]),
    }
    found |= of_parts(world, state, alone)
    found |= of_checkpoints(world, directory, together[11].state)
    found |= of_merged(state, parallel, cut, together[-1].state)
    found |= of_buffers(parallel, cut)
    found |= of_predictions(unit, parallel, state, cut)
    found |= of_gradients(world, mesh)
    found |= of_draws(parallel, cut)
    found |= of_pauses(world, directory, cut, state)
    found |= of_replicas(world, mesh, state)
    found |= of_wrong_use(world, mesh, parallel)
    return found


def unsynchronised(unit: tnt.FitUnit, state: tnt.State, cut: Any, together: list[tnt.Event]) -> float:
    """How far parameters go on this rank's data alone, in eight steps."""
    params = tnt.train(unit.train_unit, state, cut(DATA), max_steps=8).params
    (there,) = [e.state.params for e in together if e.point == "step_done" and e.state.progress.train.steps == 8]
    return max(float((params[name] - there[name]).abs().max()) for name in params)


def in_parts(world: tnt.distributed.World, state: tnt.State) -> tuple[tnt.FitUnit, tnt.State, DeviceMesh]:
    mesh = tnt.distributed.mesh(world, **({"replicas": 2, "shards": 2} if world.size == 4 else {}))
    unit, _ = prepared(parallel=functools.partial(tnt.distributed.data_parallel, mesh=mesh))
    first = tnt.distributed.shard(state, mesh, lambda path: {"0.weight": 1, "2.bias": None}.get(path[9:-2], 0))
    return unit, first, mesh


def of_parts(world: tnt.distributed.World, state: tnt.State, alone: list[tnt.Event]) -> dict[str, Any]:
    """Parameters of which each rank has a part, in rows, in columns, or the whole; where there are four, on a grid."""
    unit, first, _ = in_parts(world, state)
    data, eval_data = (whole.shard(world.rank, world.size) for whole in (DATA, EVAL_DATA))
    gaps, kinds, last = [0.0], set[str](), first
    found = tnt.fit_events(unit, first, data, eval_data, max_steps=STEPS, evaluate_every_n_steps=8)
    for event, expected in zip(found, alone, strict=True):
        kinds.add(str([getattr(leaf, "placements", None) for leaf in tnt.pytree.leaves(event.state.params)]))
        if event.point in ("step_end", "end"):
            gaps.append(apart(tnt.distributed.gather(event.state), expected.state))
        last = event.state
    whole, parts = (tnt.pytree.tensors([s.params, s.opt_state]) for s in (tnt.distributed.gather(last), last))
    held = sum(getattr(leaf, "_local_tensor", leaf).numel() for leaf in parts)
    return {
        "parts apart": max(gaps),
        "parts digest": tnt.digest(tnt.distributed.gather(last)),
        "parts layouts": len(kinds),
        "parts held": held / sum(leaf.numel() for leaf in whole),
        "parts back": tnt.digest(tnt.distributed.gather(first)) == tnt.digest(state),
    }


def of_checkpoints(world: tnt.distributed.World, directory: Path, state: tnt.State) -> dict[str, Any]:
    """Written in parts, in one, and by other numbers of ranks; read into every layout; damaged; in the way."""
    state, d = state.replace(output=None), tnt.distributed
    mesh = d.mesh(world)
    layouts = [state, d.shard(state, mesh), d.shard(state, mesh, lambda path: 1 if "weight" in path else None)]
    if world.size == 4:
        layouts.append(d.shard(state, d.mesh(world, replicas=2, shards=2)))
    wrong = list[Any]()
    for number, layout in enumerate(layouts):
        d.save(directory / f"{number}", layout, mesh if number < 3 else d.mesh(world, replicas=2, shards=2))
    for number, (layout, like) in enumerate(itertools.product(range(len(layouts)), layouts)):
        blank = tnt.pytree.map(lambda x: torch.zeros_like(x) if isinstance(x, Tensor) else x, like)
        found = d.restore(directory / f"{layout}", blank.replace(key=tnt.key(99)))
        kinds = [[getattr(x, "placements", None) for x in tnt.pytree.leaves(s)] for s in (found, like)]
        if tnt.digest(d.gather(found)) != tnt.digest(state) or kinds[0] != kinds[1]:
            wrong.append((layout, number))
    if world.size > 1 and world.rank == 0:
        d.consolidate(directory / "1", directory / "whole")
        if tnt.digest(tnt.checkpoint.restore(directory / "whole", state)) != tnt.digest(state):
            wrong.append("consolidated")
    refused = refusal(lambda: d.save(directory / "1", layouts[1], mesh))
    torch.distributed.barrier()
    if world.rank == world.size - 1:
        (target,) = (
            (directory / "2").glob(f"**/part-{world.size - 1:05}-*/tensors.safetensors") if world.size > 1 else [None]
        )
        if target is not None:
            content = target.read_bytes()
            target.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    torch.distributed.barrier()
    return {
        "checkpoints": wrong,
        "save refused": refused,
        "left over": [path.name for path in directory.glob(".*")],
        "damaged": refusal(lambda: d.restore(directory / "2", layouts[2])),
        "damaged for others": refusal(lambda: d.restore(directory / "2", layouts[0])),
    }


def of_merged(state: tnt.State, parallel: Any, cut: Any, joined: tnt.State) -> dict[str, Any]:
    unit, _ = prepared(parallel=functools.partial(parallel, merged=("hits",)))
    last = events(unit, state, cut)
    outputs = [sorted(e.state.output) for e in last if e.point == "step_end"]
    return {"merged": apart(last[-1].state, joined), "merged has no rows": outputs[0]}


def of_buffers(parallel: Any, cut: Any) -> dict[str, Any]:
    layers = (nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.ReLU())
    unit, state = prepared(*layers, parts=1, parallel=functools.partial(parallel, buffers="mean"))
    refused, _ = prepared(*layers, parts=1, parallel=parallel)
    data = cut(tnt.data.source((INPUTS, TARGETS)).batch(16, drop_last=True))
    last = tnt.train(unit.train_unit, state, data, max_steps=3)
    return {
        "buffers": tnt.digest(last),
        "buffers moved": float((last.buffers["layers.1.running_mean"] - state.buffers["layers.1.running_mean"]).norm()),
        "buffers refused": refusal(lambda: tnt.train(refused.train_unit, state, data, max_steps=1)),
    }


def of_predictions(unit: tnt.FitUnit, parallel: Any, state: tnt.State, cut: Any) -> dict[str, Any]:
    assert unit.predict_unit is not None
    _, alone = tnt.predict(unit.predict_unit, state, EVAL_DATA)
    _, together = tnt.predict(parallel(unit.predict_unit), state, cut(EVAL_DATA))
    return {"predictions": all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(alone, together, strict=True))}


def of_gradients(world: tnt.distributed.World, mesh: DeviceMesh) -> dict[str, Any]:
    """Parameters that one rank alone uses, or none; a rank that has nothing to say, and says it with NaN."""

    def objective(params: Any, state: tnt.State, batch: Tensor) -> Any:
        used = params["own"] if world.rank == world.size - 1 else params["all"]
        weight = torch.tensor(0.0 if world.rank == 0 and world.size > 1 else float(len(batch)))
        value = ((used + params["all"]) * batch).mean() + (float("nan") * params["all"].sum() if weight == 0 else 0)
        return value, (state.buffers, {"loss": value, "tokens": weight})

    optimizer = tnt.optim.sgd(1.0, weight_decay=0.5)
    params = {name: torch.ones((), dtype=torch.float64) for name in ("all", "own", "idle")}
    metrics = {"loss": tnt.metrics.mean("loss", weight="tokens")}
    unit = tnt.TrainUnit(train_step=tnt.minimize(objective, optimizer), metrics=metrics)
    unit = tnt.distributed.data_parallel(unit, mesh, weight="tokens")
    state = tnt.State(params=params, key=tnt.key(0), opt_state=optimizer.init(params))
    state = tnt.step(unit, tnt.prepare(unit, state), torch.full((2,), world.rank + 1.0))
    loss = tnt.metrics.compute(state, "train")["loss"]
    return {"params": {name: float(x) for name, x in state.params.items()}, "loss": float(loss)}


def of_draws(parallel: Any, cut: Any) -> dict[str, Any]:
    """Dropout masks are those of a rank, and leave no rank's generators elsewhere than another's."""
    unit, state = prepared(nn.Linear(5, 8), nn.Dropout(0.5), parallel=parallel)
    drawn: list[float] = []
    hook = tnt.Callback(
        name="draw",
        memory=lambda state: torch.zeros(1),
        draws=("torch",),
        on_train_step_end=lambda state: state.remember("draw", torch.rand(1)),
    )

    def watched(params: Any, state: tnt.State, batch: Any) -> Any:
        drawn.append(float(torch.rand(())))
        value = (params["w"] * batch[0].sum(1)).mean()
        return value, (state.buffers, {"num_samples": len(batch[0])})

    w = {"w": torch.ones((), dtype=torch.float64)}
    plain = tnt.State(params=w, key=tnt.key(5), opt_state=tnt.optim.sgd(0.1).init(w))
    watching = tnt.TrainUnit(train_step=tnt.minimize(watched, tnt.optim.sgd(0.1)))
    tnt.train(parallel(watching), plain, cut(EVAL_DATA), max_steps=2)
    last = events(unit, state, cut, max_steps=3, callbacks=[hook])[-1].state
    return {"dropout": tnt.digest(last), "drawn": drawn}


def of_pauses(world: tnt.distributed.World, directory: Path, cut: Any, state: tnt.State) -> dict[str, Any]:
    """The last rank is asked to end at step 11: all pause there, each saves its parts, and all go on."""
    unit, first, mesh = in_parts(world, state)
    saving = tnt.distributed.checkpointer(directory / "checkpoints", mesh, every_n_steps=4, keep=2)

    def interrupt(event: tnt.Event) -> None:
        if (world.rank, event.point, event.state.progress.train.steps) == (world.size - 1, "step_end", 11):
            os.kill(os.getpid(), signal.SIGTERM)

    with tnt.pausing.on_signal(signal.SIGTERM) as signalled:
        paused = tnt.fit(
            unit,
            first,
            cut(DATA),
            cut(EVAL_DATA),
            max_steps=STEPS,
            evaluate_every_n_steps=8,
            observers=[interrupt, saving],
            pause_when=tnt.distributed.agreed(signalled, mesh),
        )
    resumed = tnt.distributed.resume(directory / "checkpoints", first, mesh)
    return {
        "paused": paused.progress.train.steps,
        "signalled": signalled.received is not None,
        "kept": sorted(path.name for path in (directory / "checkpoints").iterdir()),
        "resumed": tnt.digest(tnt.distributed.gather(resumed)) == tnt.digest(tnt.distributed.gather(paused)),
        "ended": tnt.digest(tnt.distributed.gather(events(unit, resumed, cut)[-1].state)),
    }


def of_replicas(world: tnt.distributed.World, mesh: DeviceMesh, state: tnt.State) -> dict[str, Any]:
    other = tnt.pytree.map(lambda x: x + world.rank if isinstance(x, Tensor) and x.dtype != torch.bool else x, state)
    other = other.replace(key=tnt.key(world.rank)).remember("note", "of " + str(world.rank))
    same = tnt.distributed.replicate(other, mesh)
    grown = state.remember("more", 1) if world.rank == world.size - 1 and world.size > 1 else state
    return {
        "replicated": tnt.digest(same),
        "replicated is the first": tnt.digest(other) == tnt.digest(same) if world.rank == 0 else True,
        "replicate refused": refusal(lambda: tnt.distributed.replicate(grown, mesh)),
    }


def of_wrong_use(world: tnt.distributed.World, mesh: DeviceMesh, parallel: Any) -> dict[str, Any]:
    """Ranks whose data have different lengths, or that report different entries, are told so and do not wait."""

    def objective(params: Any, state: tnt.State, batch: Tensor) -> Any:
        more = {"more": params.detach()} if world.rank == 1 and batch.sum() > 1 else {}
        return (params * batch).mean(), (state.buffers, {"num_samples": len(batch), **more})

    w = torch.ones(())
    unit = parallel(tnt.TrainUnit(train_step=tnt.minimize(objective, tnt.optim.sgd(0.1))))
    state = tnt.State(params=w, key=tnt.key(0), opt_state=tnt.optim.sgd(0.1).init(w))
    uneven = [torch.zeros(1)] * (3 if world.rank == 0 else 4)
    # What a rank has begun that another never joins is in the way of whatever comes afterwards: so this comes last.
    return {
        "entries": refusal(lambda: tnt.train(unit, state, [torch.ones(3)], max_epochs=1)),
        "uneven": refusal(lambda: tnt.train(unit, state, uneven, max_epochs=1)),
    }


def faults(world: tnt.distributed.World, directory: Path) -> None:
    """The first attempt is killed; the second goes on from the last checkpoint, and then has an error."""
    mesh, first = tnt.distributed.mesh(world), os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    unit, like = prepared(parallel=lambda unit: tnt.distributed.data_parallel(unit, mesh))
    data, eval_data = (whole.shard(world.rank, world.size) for whole in (DATA, EVAL_DATA))
    saving = tnt.observers.checkpointer(directory / "checkpoints", every_n_steps=1, keep=2, asynchronous=True)

    def kill(event: tnt.Event) -> None:
        if first and (world.rank, event.point, event.state.progress.train.steps) == (1, "step_end", 13):
            os.kill(os.getpid(), signal.SIGKILL)

    mine = tnt.checkpoint.resume(directory / "checkpoints", like) if world.rank == 0 else like
    state = tnt.distributed.replicate(mine, mesh)
    start = state.progress.train.steps
    state = tnt.fit(
        unit,
        state,
        data,
        eval_data,
        max_steps=STEPS,
        evaluate_every_n_steps=8,
        observers=[kill, tnt.observers.rank_zero(saving)],
    )
    unbroken = tnt.fit(unit, like, data, eval_data, max_steps=STEPS, evaluate_every_n_steps=8)
    report(world, directory, {"start": start, "ended": tnt.digest(state), "unbroken": tnt.digest(unbroken)})

    def fail(event: tnt.Event) -> None:
        if world.rank == 1 and event.state.progress.train.steps == STEPS + 3:
            raise ValueError("the disk of rank 1 is full")

    tnt.train(unit.train_unit, state, data, max_steps=STEPS + 9, observers=[fail])


def report(world: tnt.distributed.World, directory: Path, found: dict[str, Any]) -> None:
    (directory / f"rank-{world.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, where = sys.argv[1], Path(sys.argv[2])
    with tnt.distributed.init(device="cpu", timeout=60) as world:
        if what == "checks":
            report(world, where, checks(world, where))
        else:
            faults(world, where)

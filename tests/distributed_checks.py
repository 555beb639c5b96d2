"""What every rank of a world finds: that the run is that of one process, and what is refused."""

import functools
import itertools
import os
import signal
from pathlib import Path
from typing import Any

import torch
from distributed_runs import (
    DATA,
    EVAL_DATA,
    INPUTS,
    LAYOUTS,
    NOTHING,
    STEPS,
    TARGETS,
    apart,
    events,
    laid,
    order,
    prepared,
    refusal,
    seen,
)
from distributed_units import IN_PLACE, LOOKING, SOUND
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import tnt_func as tnt
from tnt_func.testing import check_ranks, check_unit
from tnt_func.testing.broken import CONTROLS


def checks(world: tnt.distributed.World, directory: Path) -> dict[str, Any]:
    """What a rank finds."""
    directory = directory / f"{world.size}"
    directory.mkdir(exist_ok=True)
    mesh = tnt.distributed.mesh(world)
    cut = lambda data: data.shard(world.rank, world.size)  # noqa: E731
    parallel = functools.partial(tnt.distributed.data_parallel, mesh=mesh)
    unit, state = prepared()
    alone = events(unit, state, lambda data: data)
    found: dict[str, Any] = {layout: of_layout(world, layout, state, cut, alone) for layout in LAYOUTS[world.size]}
    found["seen alone"], found["digest alone"] = seen(alone), marked(alone)
    found["norms"] = [float(e.state.output["grad_norm"]) for e in alone if (e.phase, e.point) == ("train", "step_end")]
    found |= of_controls(world, unit, state, cut, alone, parallel)
    found |= of_checkpoints(world, directory, alone[11].state)
    found |= of_merged(state, parallel, cut, alone[-1].state)
    found |= of_buffers(parallel, cut)
    found |= of_predictions(unit, parallel, state, cut)
    found |= of_gradients(world, mesh)
    found |= of_draws(parallel, cut)
    found |= of_pauses(world, directory, cut, state)
    found |= of_replicas(world, mesh, state)
    found |= of_logs(world, directory)
    found |= of_units(world, mesh, parallel, state, cut)
    found |= of_wrong_use(world, mesh, parallel)
    return found


def told(found: list[tnt.Event]) -> list[tnt.Event]:
    """Train steps, and the ends of epochs and runs: after them all that was computed is in the state."""
    return [e for e in found if e.point in ("epoch_end", "end") or (e.phase, e.point) == ("train", "step_end")]


def marked(found: list[tnt.Event]) -> str:
    """A word for all that ranks must agree on: which events came, and the whole state at those that computed."""
    states = [tnt.digest(tnt.distributed.gather(event.state)) for event in told(found)]
    return tnt.digest([repr(order(found)), *states])


def of_layout(
    world: tnt.distributed.World, layout: str, state: tnt.State, cut: Any, alone: list[tnt.Event]
) -> dict[str, Any]:
    """A run of thirty steps, with the state laid out in one way, against that of one process."""
    unit, first, _ = laid(world, layout, state)
    together = events(unit, first, cut)
    last = together[-1].state
    pairs = zip(told(together), told(alone), strict=True)
    whole, parts = (tnt.pytree.tensors([s.params, s.opt_state]) for s in (tnt.distributed.gather(last), last))
    held = sum(getattr(leaf, "_local_tensor", leaf).numel() for leaf in parts)
    kinds = {str([getattr(x, "placements", None) for x in tnt.pytree.leaves(e.state.params)]) for e in together}
    return {
        "apart": max(apart(tnt.distributed.gather(a.state), b.state) for a, b in pairs),
        "order": order(together) == order(alone),
        "seen": seen(together),
        "digest": marked(together),
        "end": tnt.digest(tnt.distributed.gather(last)),
        "placements": len(kinds),
        "held": held / sum(leaf.numel() for leaf in whole),
        "back": tnt.digest(tnt.distributed.gather(first)) == tnt.digest(state),
    }


def of_controls(
    world: tnt.distributed.World, unit: tnt.FitUnit, state: tnt.State, cut: Any, alone: list[tnt.Event], parallel: Any
) -> dict[str, Any]:
    """What the comparisons say of runs that are not that of one process: how far they go, how many marks there are."""

    def nudge(state: tnt.State) -> tnt.State:
        here = world.rank == world.size - 1 > 0 and state.progress.train.steps == 2
        return state.replace(params=tnt.pytree.map(lambda x: x + 1e-15, state.params)) if here else state

    few = {"max_steps": 3, "evaluate_every_n_steps": 0}
    whole = events(unit, state, lambda data: data, **few)[-1].state
    unweighted = functools.partial(parallel, weight="one", summed=["num_samples"])
    means, begun = prepared(parallel=unweighted, one=lambda output, targets: torch.ones(()).double())
    off, _ = prepared(parallel=parallel)
    off = tnt.attach(off, tnt.Callback(name="nudge", on_train_step_end=nudge))
    strayed = events(off, state, cut, **few)
    return {
        "apart unsynchronised": apart_in_params(events(unit, state, cut, **few)[-1].state, whole),
        "apart unweighted": apart_in_params(events(means, begun, cut, **few)[-1].state, whole),
        "apart strayed": apart_in_params(strayed[-1].state, whole),
        "digest strayed": marked(strayed),
    }


def apart_in_params(a: tnt.State, b: tnt.State) -> float:
    return max(float((a.params[name] - b.params[name]).abs().max()) for name in a.params)


def of_checkpoints(world: tnt.distributed.World, directory: Path, state: tnt.State) -> dict[str, Any]:
    """Written in parts, in one, and by other numbers of ranks; read into every layout; damaged; in the way."""
    state, d = state.replace(output=None), tnt.distributed
    mesh = d.mesh(world)
    layouts = [state, d.shard(state, mesh), d.shard(state, mesh, lambda name: 1 if "weight" in name else None)]
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
    names = ("all", "own", "idle")
    params = {name: torch.ones((), dtype=torch.float64) for name in names}
    metrics = {"loss": tnt.metrics.mean("loss", weight="tokens")}
    unit = tnt.TrainUnit(train_step=tnt.minimize(objective, optimizer), metrics=metrics)
    unit = tnt.distributed.data_parallel(unit, mesh, weight="tokens")
    state = tnt.State(params=params, key=tnt.key(0), opt_state=optimizer.init(params))
    batch = torch.full((2,), world.rank + 1.0)
    turned = {name: params[name] for name in (names if world.rank == 0 else names[::-1])}
    refused = refusal(lambda: tnt.step(unit, tnt.prepare(unit, state.replace(params=turned)), batch))
    state = tnt.step(unit, tnt.prepare(unit, state), batch)
    loss = tnt.metrics.compute(state, "train")["loss"]
    params = {name: float(x) for name, x in state.params.items()}
    return {"params": params, "loss": float(loss), "turned refused": refused}


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
    unit, first, mesh = laid(world, LAYOUTS[world.size][-1], state)
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
    }


def of_replicas(world: tnt.distributed.World, mesh: DeviceMesh, state: tnt.State) -> dict[str, Any]:
    other = tnt.pytree.map(lambda x: x + world.rank if isinstance(x, Tensor) and x.dtype != torch.bool else x, state)
    other = other.replace(key=tnt.key(world.rank)).remember("note", "of " + str(world.rank))
    same = tnt.distributed.replicate(other, mesh)
    grown = state.remember("more", 1) if world.rank == world.size - 1 and world.size > 1 else state
    names = [*state.memory][:: 1 if grown is state else -1]
    turned = state.replace(memory={name: state.memory[name] for name in names})
    return {
        "replicas turned": refusal(tnt.distributed.replicate, turned, mesh),
        "replicas": tnt.digest(same),
        "replicas are the first": tnt.digest(other) == tnt.digest(same) if world.rank == 0 else True,
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


def of_logs(world: tnt.distributed.World, directory: Path) -> dict[str, Any]:
    """Writers of all ranks that were given one file, and those that have one each."""
    found = dict[str, Any]()
    for name in ("run.jsonl", "run.csv", f"rank-{world.rank}.jsonl"):
        make = tnt.observers.csv_writer if name.endswith("csv") else tnt.observers.jsonl_writer
        writer = make(directory / name)
        found[f"log {name.replace(str(world.rank), 'r')}"] = refusal(writer.open, None)
        torch.distributed.barrier()
        writer.close()
        torch.distributed.barrier()
    return found


def of_units(
    world: tnt.distributed.World, mesh: DeviceMesh, parallel: Any, state: tnt.State, cut: Any
) -> dict[str, Any]:
    """Every sound unit of the zoo is the same on all ranks, tried on two; those that look at their process are not."""
    sound = [control.make(False).case for control in CONTROLS.values() if world.size == 2]
    own = {"eval_batches": cut(EVAL_DATA), "mesh": mesh, "max_steps": 2}
    unit, _ = prepared(parallel=parallel)
    return {
        "sound": [text for case in sound if case and (text := refusal(case.check, check_ranks, mesh=mesh)) != NOTHING],
        "looking": {
            name: refusal(make().check, check_ranks, mesh=mesh)
            for name, make in LOOKING.items()
            if world.size == 2 or name == "environment"
        },
        "all laws": [refusal(each().check, check_unit, mesh=mesh) for each in (SOUND, IN_PLACE) if world.size == 2],
        "own": refusal(check_ranks, unit, state, cut(DATA), batch="own", **own),
        "own as shared": refusal(check_ranks, unit, state, cut(DATA), **own),
    }

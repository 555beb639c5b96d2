"""Runs saved by one number of ranks and gone on with by another, in whatever layouts (law 5).

python tests/distributed_resumptions.py DIRECTORY SEED    where each of them leads, and all else that worlds find
"""

import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
from distributed_checks import checks
from distributed_runs import DATA, EVAL_DATA, LAYOUTS, apart, laid, prepared
from distributed_worlds import started

import tnt_func as tnt

OPTIONS: dict[str, Any] = {"max_steps": 10, "evaluate_every_n_steps": 5}
RESUMABLE = 10 + 2
"""Places to go on from: every step, and the ends of two epochs."""


def runs(world: tnt.distributed.World, layout: str, state: tnt.State) -> tuple[Any, tnt.State, Any]:
    """A run in one layout, the state where it begins, and its mesh; "plain" is that of a process alone."""
    if layout == "plain":
        return prepared()[0], state, None
    return laid(world, layout, state)


def train(world: tnt.distributed.World, unit: Any, state: tnt.State, plain: bool, watch: Any = None) -> tnt.State:
    cut = (lambda data: data) if plain else (lambda data: data.shard(world.rank, world.size))
    observers = [watch] if watch else []
    return tnt.fit(unit, state, cut(DATA), cut(EVAL_DATA), **OPTIONS, observers=observers)


def saved(world: tnt.distributed.World, directory: Path, seed: int) -> dict[str, str]:
    """Run in every layout to the end, saving at a random place; the digests of the ends."""
    ends = dict[str, str]()
    for layout in (*LAYOUTS[world.size], *(["plain"] if world.size == 1 else [])):
        choice = random.Random(f"{seed} {world.size} {layout}")
        place, seen = choice.randrange(RESUMABLE), 0
        unit, state, mesh = runs(world, layout, prepared()[1])

        def keep(event: tnt.Event, layout: str = layout, place: int = place, mesh: Any = mesh) -> None:
            nonlocal seen
            if event.phase != "train" or not event.resumable:
                return
            if seen == place:
                path = directory / f"{world.size}-{layout}-{seen:02}"
                if mesh is None:
                    tnt.checkpoint.save(path, event.state)
                else:
                    tnt.distributed.save(path, event.state, mesh)
            seen += 1

        end = tnt.distributed.gather(train(world, unit, state, layout == "plain", keep))
        assert seen == RESUMABLE
        ends[layout] = tnt.digest(end)
        if layout == "plain":
            tnt.checkpoint.save(directory / "end", end)
    return ends


def resumed(world: tnt.distributed.World, directory: Path) -> dict[str, tuple[float, str]]:
    """Go on from everything that was saved; how far from the whole run each ends, and the digest of its end."""
    like = prepared()[1]
    expected = tnt.checkpoint.restore(directory / "end", like)
    found = dict[str, tuple[float, str]]()
    for turn, path in enumerate(sorted(path for path in directory.iterdir() if path.name[0].isdigit())):
        size, layout, _ = path.name.split("-")
        options = [*LAYOUTS[world.size], *(["plain"] if world.size == 1 else [])]
        to = layout if int(size) == world.size else options[turn % len(options)]
        unit, first, _ = runs(world, to, like)
        start = tnt.distributed.restore(path, first)
        end = tnt.distributed.gather(train(world, unit, start, to == "plain"))
        found[f"{path.name} {to}"] = apart(end, expected), tnt.digest(end)
        if world.size == 1 and (path / "shards.json").exists():
            whole = path.with_name(f"whole-{path.name}")
            tnt.distributed.consolidate(path, whole)
            same = tnt.digest(tnt.checkpoint.restore(whole, like)) == tnt.digest(tnt.distributed.restore(path, like))
            found[f"{path.name} consolidated"] = 0.0 if same else float("inf"), ""
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    where, seed = Path(sys.argv[1]), int(sys.argv[2])
    (where / "runs").mkdir()
    worlds = {size: started(size, checks, where) for size in LAYOUTS}
    ends = {size: started(size, saved, where / "runs", seed) for size in LAYOUTS}
    results = {size: started(size, resumed, where / "runs") for size in LAYOUTS}
    (where / "found.json").write_text(json.dumps({"worlds": worlds, "ends": ends, "resumed": results}))

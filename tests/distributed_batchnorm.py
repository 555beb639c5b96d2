"""Nets with BatchNorm on parts of a batch, each rank against one process on the whole of it.

torchrun --nproc-per-node 2 tests/distributed_batchnorm.py DIRECTORY    what each rank found, in rank-R.json
"""

import copy
import functools
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from distributed_runs import apart, refusal
from torch import Tensor, nn

import tnt_func as tnt
from tnt_func.distributed.batchnorm import Normalised
from tnt_func.distributed.world import Ranks

STEPS = 4
# Every third step has so few rows that ranks have parts of several sizes, or none.
ROWS = (11, 6, 3, 13)
IMAGES = [
    torch.sin(torch.arange(rows * 3 * 16.0) * (1 + step)).reshape(rows, 3, 4, 4) for step, rows in enumerate(ROWS)
]
# A mean that is large beside the spread: sums of squares would lose it.
BATCHES = [((x + 50).double(), torch.arange(len(x)) * 7 % 4) for x in IMAGES]


class Net(nn.Module):
    """BatchNorm in two branches, one layer of it twice, in one, two and three dimensions."""

    def __init__(self, **options: Any):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4, **options), nn.Tanh())
        self.left = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, **options))
        self.right = nn.Sequential(nn.Unflatten(1, (2, 2)), nn.BatchNorm3d(2, **options), nn.Flatten(1, 2))
        self.shared = nn.BatchNorm1d(4, **options)
        self.head = nn.Linear(4, 4)
        self.frozen = nn.BatchNorm1d(4).eval()

    def forward(self, images: Tensor) -> Tensor:
        found = self.stem(images)
        found = (self.left(found) + self.right(found)).relu().mean((2, 3))
        return self.head(self.frozen(self.shared(self.shared(found) + found)))


def made(convert: Callable[[nn.Module], nn.Module], module: nn.Module, change: Any = None) -> Any:
    loss: Any = nn.functional.cross_entropy
    unit, state = tnt.supervised(convert(module), loss, tnt.optim.sgd(0.3, momentum=0.9), key=tnt.key(0))
    unit = change(unit) if change else unit
    return unit, tnt.prepare(unit, state)


def part(world: tnt.distributed.World, batch: Any) -> Any:
    """This rank's rows: of very different numbers, of few none for the first."""
    rows = len(batch[1])
    cuts = [rows * k * k // world.size**2 for k in range(world.size + 1)]
    return tuple(x[cuts[world.rank] : cuts[world.rank + 1]] for x in batch)


def checks(world: tnt.distributed.World) -> dict[str, Any]:
    """What a rank finds."""
    mesh = tnt.distributed.mesh(world)
    sync = functools.partial(tnt.distributed.sync_batchnorm, mesh=mesh)
    parallel = functools.partial(tnt.distributed.data_parallel, mesh=mesh, buffers="synchronised")
    found: dict[str, Any] = {}
    parts = [part(world, batch) for batch in BATCHES]
    found["rows"] = [len(each[1]) for each in parts]

    def trained(name: str, change: Any = None, rtol: float = 1e-10, **options: Any) -> None:
        torch.manual_seed(0)
        net = Net(**options).double()
        alone, first = made(lambda module: module, net, change)
        unit, same = made(sync, net, lambda unit: parallel(change(unit) if change else unit))
        assert tnt.digest(first) == tnt.digest(same)
        run = functools.partial(tnt.fit_events, max_epochs=2, evaluate_every_n_steps=3)
        gaps, last = [], same
        for one, all_of_them in zip(run(alone, first, BATCHES, BATCHES), run(unit, first, parts, parts), strict=True):
            gaps.append(apart(all_of_them.state, one.state))
            last = all_of_them.state
        found[name] = {
            "apart": max(gaps),
            "digest": tnt.digest(last),
            "moved": float((last.params["head.weight"] - first.params["head.weight"]).norm()),
        }

    trained("plain")
    trained("cumulative", momentum=None)
    trained("no averages", track_running_stats=False)
    trained("not affine", affine=False)
    trained("rematerialised", lambda unit: tnt.transforms.remat(unit, lambda name, _: name in ("stem", "right")))
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tnt.distributed.init(device="cpu", timeout=60) as world:
        found = checks(world)
        (Path(sys.argv[1]) / f"rank-{world.rank}.json").write_text(json.dumps(found))

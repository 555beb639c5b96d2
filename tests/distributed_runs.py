"""A run with everything in it that ranks must agree on, checked on every rank against one process."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import tnt_func as tnt

SAMPLES, BATCH, STEPS = 46, 7, 30
INPUTS = torch.cat([torch.arange(SAMPLES)[:, None], torch.sin(torch.arange(SAMPLES * 5.0).reshape(-1, 5))], 1).double()
TARGETS = torch.arange(SAMPLES) * 7 % 3
LAYOUTS = {1: ("replicated", "sharded"), 2: ("replicated", "sharded"), 4: ("replicated", "sharded", "hybrid")}
NOTHING = "nothing was refused"


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
    *layers: nn.Module,
    parts: int = 2,
    parallel: Callable[[tnt.FitUnit], tnt.FitUnit] = lambda unit: unit,
    **metrics: Any,
) -> Any:
    """Micro-batches, clipping, accumulation over epochs' ends, a schedule, an average, metrics of means and of rows."""
    torch.manual_seed(0)
    module = Numbered(*(layers or (nn.Linear(5, 8), nn.Tanh())), nn.LazyLinear(3)).double()
    module(INPUTS)
    lr = tnt.schedules.cosine(1e-2, steps=12)
    optimizer = tnt.optim.chain(tnt.optim.clip_by_global_norm(0.3), tnt.optim.accumulate(tnt.optim.adamw(lr), 2))
    metrics = {"accuracy": accuracy, "hits": HITS, **metrics}
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


def refusal(function: Callable[..., Any], *args: Any, **options: Any) -> str:
    try:
        function(*args, **options)
    except (tnt.errors.TntError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return NOTHING


def laid(
    world: tnt.distributed.World, layout: str, state: tnt.State, **options: Any
) -> tuple[tnt.FitUnit, tnt.State, DeviceMesh]:
    """The unit on a world's mesh, and the state there: whole, cut in rows and columns, or cut over half of a grid."""
    mesh = tnt.distributed.mesh(world, **({"replicas": 2, "shards": 2} if layout == "hybrid" else {}))
    unit, _ = prepared(parallel=functools.partial(tnt.distributed.data_parallel, mesh=mesh), **options)
    if layout == "replicated":
        return unit, tnt.distributed.replicate(state, mesh), mesh
    rule = {"0.weight": 0 if layout == "sharded" and world.size == 4 else 1, "2.weight": 1, "2.bias": None}
    return unit, tnt.distributed.shard(state, mesh, lambda name: rule.get(name, 0)), mesh

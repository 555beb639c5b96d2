"""Nets with BatchNorm on parts of a batch, and noise on parts of gradients, each rank against one process on the whole.

python tests/distributed_batchnorm.py SIZE    prints what each rank of a world found
"""

import functools
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from distributed_runs import refusal
from distributed_worlds import started
from torch import Tensor, nn

import tnt_func as tnt
from tnt_func.distributed.batchnorm import Normalised
from tnt_func.distributed.world import Ranks

# Parts have very different numbers of rows, and the first rank may have none.
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


def made(convert: Callable[[nn.Module], nn.Module], module: nn.Module, change: Any) -> Any:
    optimizer = tnt.optim.sgd(0.3, momentum=0.9)
    unit, state = tnt.supervised(convert(module), nn.functional.cross_entropy, optimizer, key=tnt.key(0))
    unit = change(unit)
    return unit, tnt.prepare(unit, state)


def apart(a: tnt.State, b: tnt.State) -> float:
    """How far two states are from each other at most, relative to 1 or what is larger."""
    assert a.progress == b.progress and tnt.pytree.paths(a) == tnt.pytree.paths(b)
    pairs = zip(tnt.pytree.tensors(a), tnt.pytree.tensors(b), strict=True)
    return max(float(((x - y).abs() / y.abs().clamp(min=1)).max()) for x, y in pairs)


def part(world: tnt.distributed.World, batch: Any) -> Any:
    """This rank's rows."""
    rows = len(batch[1])
    cuts = [rows * k * k // world.size**2 for k in range(world.size + 1)]
    return tuple(x[cuts[world.rank] : cuts[world.rank + 1]] for x in batch)


def checks(world: tnt.distributed.World) -> dict[str, Any]:
    """What a rank finds."""
    mesh, parts = tnt.distributed.mesh(world), [part(world, batch) for batch in BATCHES]
    sync = functools.partial(tnt.distributed.sync_batchnorm, mesh=mesh)
    parallel = functools.partial(tnt.distributed.data_parallel, mesh=mesh, buffers="synchronised")
    found: dict[str, Any] = {"rows": [len(each[1]) for each in parts]}

    def trained(name: str, change: Any = lambda unit: unit, **options: Any) -> None:
        torch.manual_seed(0)
        net = Net(**options).double()
        alone, first = made(lambda module: module, net, change)
        unit, same = made(sync, net, lambda unit: parallel(change(unit)))
        assert tnt.digest(first) == tnt.digest(same)
        gaps, last = [], same
        for one, all_of_them in zip(events(alone, first, BATCHES), events(unit, first, parts), strict=True):
            gaps.append(apart(all_of_them.state, one.state))
            last = all_of_them.state
        found[name] = {"apart": max(gaps), "digest": tnt.digest(last)}

    trained("plain")
    trained("cumulative", momentum=None, affine=False)
    trained("no averages", track_running_stats=False)
    trained("rematerialised", lambda unit: tnt.transforms.remat(unit, lambda name, _: name in ("stem", "right")))
    found["twice"] = twice(world, mesh)
    found["masked"] = masked(world, mesh, sync)
    found["noise"] = noise(world)
    found |= half(world, sync, parallel)
    found |= refused(world, mesh, sync, parallel)
    return found


def events(unit: tnt.FitUnit, state: tnt.State, batches: Any) -> Any:
    return tnt.fit_events(unit, state, batches, batches, max_epochs=2, evaluate_every_n_steps=3)


def twice(world: tnt.distributed.World, mesh: Any) -> float:
    """How far first and second derivatives are from those of one process, through torch.func and through autograd."""
    ranks = Ranks.of(mesh)
    (whole, _), (own, _) = BATCHES[0], part(world, BATCHES[0])
    theta = torch.linspace(0.5, 1.5, 6).double()

    def objective(theta: Tensor, x: Tensor, norm: Any) -> Tensor:
        return (norm((x * theta[:3, None, None]).tanh() * x, theta[3:], theta[3:] ** 2) ** 3).cos().sum()

    def plain(*args: Any) -> Tensor:
        return nn.functional.batch_norm(args[0], None, None, args[1], args[2], True)

    def ours(*args: Any) -> Tensor:
        return Normalised.apply(*args, 1e-5, ranks)[0]  # pyright: ignore

    def derivatives(x: Tensor, norm: Any) -> list[Tensor]:
        along = torch.linspace(-1, 1, 6).double()
        first = torch.func.grad(objective)
        second = torch.func.grad(lambda theta: (first(theta, x, norm) * along).sum())
        leaf = theta.clone().requires_grad_()
        (once,) = torch.autograd.grad(objective(leaf, x, norm), leaf, create_graph=True)
        (again,) = torch.autograd.grad((once * along).sum(), leaf)
        return [first(theta, x, norm), second(theta), once.detach(), again]

    gaps = [0.0]
    for mine, expected in zip(derivatives(own, ours), derivatives(whole, plain), strict=True):
        torch.distributed.all_reduce(mine)
        gaps.append(float((mine - expected).abs().max() / expected.abs().max()))
    return max(gaps)


def masked(world: tnt.distributed.World, mesh: Any, sync: Any) -> float:
    """How far it is from one process where the rows of a rank weigh nothing, and are normalised with all the same."""
    (images, targets), mask = BATCHES[3], (torch.arange(13) > 4).double()
    net, optimizer = Net().double(), tnt.optim.sgd(0.3)

    def trained(module: nn.Module, batch: Any, change: Any) -> Any:
        model = tnt.from_module(module)

        def objective(params: Any, state: tnt.State, batch: Any) -> Any:
            x, y, mask = batch
            output, buffers = model.apply(params, state.buffers, x, train=True)
            losses, weight = nn.functional.cross_entropy(output, y, reduction="none") * mask, mask.sum()
            return losses.sum() / weight.clamp(min=1), (buffers, {"tokens": weight})

        unit = change(tnt.TrainUnit(train_step=tnt.minimize(objective, optimizer)))
        state = tnt.State(params=model.params, buffers=model.buffers, key=tnt.key(0))
        return tnt.train(unit, state.replace(opt_state=optimizer.init(model.params)), [batch] * 3, max_epochs=1)

    parallel = functools.partial(tnt.distributed.data_parallel, mesh=mesh, weight="tokens", buffers="synchronised")
    rows = len(part(world, BATCHES[3])[1])
    (own, _), (own_targets, own_mask) = part(world, BATCHES[3]), part(world, (targets, mask))
    assert world.size == 1 or world.rank != 1 or (rows and not own_mask.any())
    alone = trained(net, (images, targets, mask), lambda unit: unit)
    return apart(trained(sync(net), (own, own_targets, own_mask), parallel), alone)


def half(world: tnt.distributed.World, sync: Any, parallel: Any) -> dict[str, Any]:
    """In half precision with a scaled objective, all is finite, and averages are kept as they were."""
    unit, state = made(sync, Net(), lambda unit: parallel(tnt.transforms.autocast(unit, torch.float16)))
    batches = [(x.float() - 50, y) for x, y in map(functools.partial(part, world), BATCHES)]
    last = events(unit, state, batches)
    for event in last:
        state = event.state
    kinds = {str(leaf.dtype) for leaf in state.buffers.values()}
    return {"half": [tnt.digest(state), bool(tnt.treemath.all_finite(state.params)), sorted(kinds)]}


def noise(world: tnt.distributed.World) -> list[bool]:
    """Whether gradients with noise are those of one process, cut in rows and columns, evenly or not, and on a grid."""
    params = {
        "rows": torch.ones(7, 3),
        "columns": torch.ones(3, 8).double(),
        "all": torch.ones(()),
        "few": torch.ones(1),
    }
    params["complex"] = torch.ones(5, 4, dtype=torch.complex64)
    transform = tnt.optim.add_noise(tnt.key(1), eta=tnt.schedules.linear(1.0, 0.5, steps=4))
    begun = transform.init(params)
    expected, after = transform.update(params, begun, params)
    further, _ = transform.update(params, after, params)
    found = []
    for sizes in ({"ranks": world.size}, {"replicas": 2, "shards": world.size // 2})[: 1 + (world.size == 4)]:
        whole = tnt.State(params=params, key=tnt.key(0))
        mesh = tnt.distributed.mesh(world, **sizes)
        cut = tnt.distributed.shard(whole, mesh, lambda path: 1 if "co" in path else 0).params
        first, state = transform.update(cut, transform.init(cut), cut)
        second, _ = transform.update(cut, state, cut)
        found += [
            tnt.digest(tnt.distributed.gather(x)) == tnt.digest(y) for x, y in ((first, expected), (second, further))
        ]
    return [*found, tnt.digest(expected) != tnt.digest(further)]


class Own(nn.BatchNorm1d):
    """BatchNorm of another kind."""


def refused(world: tnt.distributed.World, mesh: Any, sync: Any, parallel: Any) -> dict[str, Any]:
    """What cannot be made right is told; on every rank, where ranks have different numbers of batches too."""
    one = Net().double()
    unit, state = made(sync, one, parallel)
    unconverted, _ = made(lambda module: module, one, parallel)
    free, still = made(sync, Net(track_running_stats=False).double(), parallel)
    batches = [part(world, BATCHES[0])] * (3 if world.rank == 0 else 4)
    single = (BATCHES[0][0][:1, :, :1, :1], BATCHES[0][1][:1])
    # All rows, of one value a channel each, are those of the last rank.
    single = single if world.rank == world.size - 1 else tuple(x[:0] for x in single)
    small, begun = made(sync, nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3), nn.Linear(3, 4)).double(), parallel)
    made_of = functools.partial(made, sync, one)
    return {
        "own": refusal(lambda: sync(nn.Sequential(Own(2)))),
        "lazy": refusal(lambda: sync(nn.LazyBatchNorm1d())),
        "micro-batches": refusal(lambda: made_of(lambda unit: parallel(tnt.transforms.microbatch(unit, 2)))),
        "unconverted": refusal(lambda: tnt.train(unconverted.train_unit, state, batches, max_steps=1)),
        "outside": refusal(lambda: sync(one)(batches[0][0])),
        "inside": refusal(lambda: torch.no_grad()(sync(one))(batches[0][0])),
        "single": refusal(lambda: tnt.train(small.train_unit, begun, [single], max_steps=1)),
        "uneven": refusal(lambda: tnt.train(unit.train_unit, state, batches, max_epochs=1)),
        "uneven evaluation": refusal(lambda: tnt.evaluate(free.eval_unit, still, batches)),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(started(int(sys.argv[1]), checks)))

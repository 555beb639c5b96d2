"""Every optimizer of the library on parameters that lie in parts, on every rank, against one process.

python tests/distributed_optimizers.py SIZE    prints what each rank of a world found
"""

import functools
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from distributed_worlds import started
from torch import Tensor

import tnt_func as tnt
from tnt_func import optim
from tnt_func.optim import leafwise, transforms
from tnt_func.optim.state import Settings

SAMPLES, STEPS = 12, 3
INPUTS = torch.sin(torch.arange(SAMPLES * 5.0).reshape(-1, 5)).double()
BATCHES = [(INPUTS, torch.arange(SAMPLES) * n % 3) for n in range(STEPS)]
CUTS = {"weight": 1, "whole": None}
"""Of the parameters in parts; the others are cut in rows."""


def is_matrix(name: str) -> bool:
    return "weight" in name or name == "in"


def decay(step: Any) -> Any:
    return 0.1 / (1 + step)


def muon(cls: Any, **options: Any) -> optim.Optimizer:
    return optim.grouped(optim.sgd(0.1), [(is_matrix, cls(lr=0.1, **options))])


OPTIMIZERS: dict[str, Callable[[], optim.Optimizer]] = {
    "sgd": lambda: optim.sgd(decay, maximize=True),
    "sgd, momentum": lambda: optim.sgd(0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "sgd, dampened": lambda: optim.sgd(0.1, momentum=0.9, dampening=0.5),
    "lion": lambda: optim.lion(0.1, weight_decay=0.1),
    "adam": lambda: optim.adam(0.1, amsgrad=True, weight_decay=0.1),
    "adamw": lambda: optim.adamw(decay),
    "rmsprop": lambda: optim.rmsprop(0.1, momentum=0.9, centered=True),
    "adagrad": lambda: optim.adagrad(0.1, lr_decay=0.1),
    "muon": lambda: muon(optim.muon, ns_dtype=torch.float64),
    "clip_by_global_norm": lambda: optim.chain(optim.clip_by_global_norm(0.1), optim.sgd(1.0)),
    "clip_by_value": lambda: optim.chain(optim.clip_by_value(0.01), optim.sgd(1.0)),
    "add_decayed_weights": lambda: optim.chain(optim.add_decayed_weights(0.1, mask=is_matrix), optim.sgd(0.1)),
    "centralize": lambda: optim.chain(optim.centralize(), optim.clip_by_value(0.01), optim.adamw(0.1)),
    "add_noise": lambda: optim.chain(optim.add_noise(tnt.key(1)), optim.sgd(0.1)),
    "accumulate": lambda: optim.accumulate(optim.chain(optim.clip_by_global_norm(0.1), optim.adamw(0.1)), 2),
    "grouped": lambda: optim.grouped(optim.sgd(0.1), [(is_matrix, {"lr": 0.2}), (lambda name: "whole" in name, WHOLE)]),
    "frozen": lambda: optim.grouped(optim.adamw(0.1), [(is_matrix, optim.frozen(optim.adamw(0.1)))]),
    **{
        f"torch.optim.{cls.__name__}": functools.partial(optim.from_torch, cls, lr=0.1, **options)
        for cls, options in {
            torch.optim.Adadelta: {},
            torch.optim.Adagrad: {},
            torch.optim.Adam: {"amsgrad": True},
            torch.optim.AdamW: {"groups": [(is_matrix, {"lr": 0.2})]},
            torch.optim.Adamax: {},
            torch.optim.ASGD: {"t0": 1},
            torch.optim.NAdam: {},
            torch.optim.RAdam: {},
            torch.optim.RMSprop: {"centered": True, "momentum": 0.9},
            torch.optim.Rprop: {},
            torch.optim.SGD: {"momentum": 0.9, "nesterov": True},
        }.items()
    },
}
WHOLE = optim.rmsprop(0.1)


def by_norm(elementwise: bool) -> optim.Optimizer:
    """A step as long as the parameter, along the gradient."""

    def leaf(n: Any, p: Tensor, g: Tensor) -> tuple[Tensor]:
        return (p - n["lr"] * p.norm() / g.norm() * g,)

    return leafwise.leafwise(
        Settings(lr=0.1), leafwise.Rule(slots={}, numbers=lambda h, t: h, leaf=leaf, elementwise=elementwise)
    )


def normed(elementwise: bool) -> optim.Optimizer:
    """A global norm of 1."""

    def rule(h: Any, grads: Any, here: Any, state: Any) -> Any:
        norm = tnt.treemath.global_norm([*grads.values()])
        return {place: grad / norm for place, grad in grads.items()}

    return optim.chain(transforms._transform(Settings(), rule, elementwise=elementwise), optim.sgd(0.1))


def made(optimizer: optim.Optimizer, watched: bool = False) -> tuple[tnt.TrainUnit, tnt.State]:
    """A unit, in transforms that look at its parameters and gradients, if watched, and its first state."""
    params = {
        "in": torch.cos(torch.arange(35.0).reshape(7, 5)),
        "bias": torch.arange(7.0) / 7,
        "weight": torch.sin(torch.arange(21.0).reshape(3, 7)),
        "whole": torch.zeros(3),
        "scale": torch.ones(()),
    }
    params = {name: leaf.double() for name, leaf in params.items()}

    def objective(params: Any, state: tnt.State, batch: Any) -> Any:
        inner = torch.tanh(batch[0] @ params["in"].T + params["bias"])
        output = params["scale"] * (inner @ params["weight"].T) + params["whole"]
        loss = torch.nn.functional.cross_entropy(output, batch[1])
        return loss, (state.buffers, {"loss": loss, "num_samples": len(batch[0])})

    unit = tnt.TrainUnit(train_step=tnt.minimize(objective, optimizer))
    if watched:
        unit = tnt.transforms.with_gradient_stats(tnt.transforms.skip_nonfinite(tnt.transforms.ema(unit, 0.9)))
    return unit, tnt.prepare(unit, tnt.State(params=params, key=tnt.key(0), opt_state=optimizer.init(params)))


def thawed(state: tnt.State) -> tnt.State:
    """After a step, what is frozen goes."""
    names = [name for values in optim.hyperparameters(state.opt_state) for name in values]
    return state.replace(opt_state=optim.set_hyperparameters(state.opt_state, frozen=0)) if "frozen" in names else state


def ran(unit: tnt.TrainUnit, optimizer: optim.Optimizer, state: tnt.State, batches: Any) -> tnt.State:
    """Three steps, and what was held back."""
    for number, batch in enumerate(batches):
        state = tnt.step(unit, thawed(state) if number == 1 else state, batch)
    params, opt_state = optim.flush(optimizer, state.opt_state, state.params)
    return tnt.distributed.gather(state.replace(params=params, opt_state=opt_state))


def apart(a: tnt.State, b: tnt.State) -> float:
    """How far params, opt_state and averages are from each other at most."""
    pairs = zip(*(tnt.pytree.tensors([s.params, s.opt_state, s.memory]) for s in (a, b)), strict=True)
    return max(float((x.double() - y.double()).abs().max()) for x, y in pairs if x.numel())


def checks(world: tnt.distributed.World) -> dict[str, Any]:
    """What a rank finds."""
    mesh = tnt.distributed.mesh(world)
    own = [(x[world.rank :: world.size], y[world.rank :: world.size]) for x, y in BATCHES]
    shard = functools.partial(tnt.distributed.shard, mesh=mesh, rule=lambda name: CUTS.get(name, 0))
    found: dict[str, Any] = {}
    for name, make in OPTIMIZERS.items():
        optimizer = make()
        unit, state = made(optimizer, name in ("adamw", "accumulate"))
        alone = ran(unit, optimizer, state, BATCHES)
        parallel = tnt.distributed.data_parallel(unit, mesh)
        forms = {"plain": parallel, "donated": tnt.donate(parallel), "debugged": tnt.donate(parallel, debug=True)}
        ends = {form: ran(each, optimizer, shard(tnt.keep(state)), own) for form, each in forms.items()}
        found[name] = {
            "apart": apart(ends["plain"], alone),
            "digests": [tnt.digest(end) for end in ends.values()],
            "moved": apart(ends["plain"].replace(opt_state=(), memory={}), state.replace(opt_state=(), memory={})),
        }
    for make in (by_norm, normed):
        ends = list[tnt.State]()
        for elementwise in (False, True):
            optimizer = make(elementwise)
            unit, state = made(optimizer)
            alone = ran(unit, optimizer, state, BATCHES)
            end = ran(tnt.distributed.data_parallel(unit, mesh), optimizer, shard(state), own)
            found[f"{make.__name__}, {'declared' if elementwise else 'not declared'}"] = apart(end, alone)
    found["used"], found["shown"] = used(mesh, own, shard)
    return found


def used(mesh: Any, batches: Any, shard: Any) -> tuple[dict[str, str], str]:
    """What is said of parts that a debugged step has written over, by how they are used."""
    unit, state = made(optim.sgd(0.1))
    unit, state = tnt.donate(tnt.distributed.data_parallel(unit, mesh), debug=True), shard(state)
    old = dict(state.params)
    with torch.no_grad():
        part = old["in"].to_local()
    tnt.step(unit, state, batches[0])
    uses: dict[str, Callable[[], Any]] = {
        "sum": lambda: old["in"].sum(),
        "add": lambda: 1 + old["whole"],
        "to_local": lambda: old["in"].to_local(),
        "full_tensor": lambda: old["in"].full_tensor(),
        "redistribute": lambda: old["in"].redistribute(mesh, old["whole"].placements),
        "gather": lambda: tnt.distributed.gather(old),
        "part": lambda: part + 1,
    }
    return {name: refusal(use) for name, use in uses.items()}, repr(old["in"])


def refusal(use: Callable[[], Any]) -> str:
    try:
        use()
    except tnt.errors.TntError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(started(int(sys.argv[1]), checks)))

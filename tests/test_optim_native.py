"""The native optimizers: torch's numbers, and one conformance suite that each of them passes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tnt_func import optim, schedules
from tnt_func import pytree as trees
from tnt_func.asserts import assert_max_compilations, assert_trees_close, assert_trees_equal
from tnt_func.errors import StructureError, UsageError
from tnt_func.optim import Optimizer, set_hyperparameters

Params = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """An optimizer, the torch class and options that it agrees with, and hyper-parameters for two members."""

    make: Callable[..., Optimizer]
    options: dict[str, Any]
    torch_class: type[torch.optim.Optimizer] | None
    members: list[dict[str, Any]]
    lr: float = 0.01

    def optimizer(self, lr: Any = None) -> Optimizer:
        """Muon's own arithmetic in the dtype of the parameters: bfloat16 would be all that one could see."""
        exact = {"ns_dtype": torch.float64} if self.make is optim.muon else {}
        return self.make(self.lr if lr is None else lr, **self.options, **exact)

    def params(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> Params:
        draw = torch.Generator().manual_seed(seed)
        shapes = [(4, 3), (3, 5)] if self.make is optim.muon else [(4, 3), (5,), ()]
        return {f"p{n}": torch.randn(shape, generator=draw, dtype=dtype) for n, shape in enumerate(shapes)}


def case(make: Any, torch_class: Any, members: list[dict[str, Any]], lr: float = 0.01, **options: Any) -> Case:
    return Case(make, options, torch_class, members, lr)


LRS = [{"lr": 0.3}, {"lr": 0.01}]
BETAS = [{"lr": 0.3, "betas": (0.5, 0.9)}, {"weight_decay": 0.7, "eps": 1e-3}]
CASES: dict[str, Case] = {
    "sgd": case(optim.sgd, torch.optim.SGD, LRS),
    "sgd with momentum": case(
        optim.sgd,
        torch.optim.SGD,
        [{"lr": 0.1, "momentum": 0.1}, {"dampening": 0.5, "weight_decay": 0.7}],
        momentum=0.9,
        dampening=0.3,
        weight_decay=0.1,
    ),
    "sgd with nesterov": case(optim.sgd, torch.optim.SGD, LRS, momentum=0.9, nesterov=True, maximize=True),
    "adam": case(optim.adam, torch.optim.Adam, BETAS),
    "adam with amsgrad": case(optim.adam, torch.optim.Adam, BETAS, amsgrad=True, weight_decay=0.1, maximize=True),
    "adamw": case(optim.adamw, torch.optim.AdamW, BETAS),
    "adamw with amsgrad": case(optim.adamw, torch.optim.AdamW, BETAS, amsgrad=True, maximize=True),
    "rmsprop": case(optim.rmsprop, torch.optim.RMSprop, [{"lr": 0.1, "alpha": 0.5}, {"eps": 1e-2}]),
    "rmsprop, centered": case(
        optim.rmsprop, torch.optim.RMSprop, LRS, centered=True, momentum=0.5, weight_decay=0.1, maximize=True
    ),
    "rmsprop with momentum": case(optim.rmsprop, torch.optim.RMSprop, LRS, momentum=0.5),
    "adagrad": case(
        optim.adagrad,
        torch.optim.Adagrad,
        [{"lr": 0.1, "lr_decay": 0.7}, {"weight_decay": 0.5}],
        lr_decay=0.1,
        weight_decay=0.1,
        initial_accumulator_value=0.2,
        maximize=True,
    ),
    "lion": case(optim.lion, None, [{"lr": 0.1, "betas": (0.5, 0.6)}, {"weight_decay": 0.7}], maximize=True),
    "muon": case(optim.muon, torch.optim.Muon, [{"lr": 0.1, "momentum": 0.5}, {"weight_decay": 0.7}]),
    "muon without nesterov": case(
        optim.muon, torch.optim.Muon, LRS, nesterov=False, adjust_lr_fn="match_rms_adamw", ns_steps=3
    ),
}
every_case = pytest.mark.parametrize("name", CASES)


def gradients(params: Params, steps: int, seed: int = 1, holes: bool = True) -> list[Params]:
    """Gradients that do not depend on the parameters, some of them missing."""
    draw = torch.Generator().manual_seed(seed)
    return [
        {
            name: None if holes and (step + n) % 5 == 0 else torch.randn(p.shape, generator=draw, dtype=p.dtype)
            for n, (name, p) in enumerate(params.items())
        }
        for step in range(steps)
    ]


def run(optimizer: Optimizer, params: Params, grads: list[Params], opt_state: Any = None) -> tuple[Params, Any]:
    opt_state = optimizer.init(params) if opt_state is None else opt_state
    for grad in grads:
        params, opt_state = optimizer.update(grad, opt_state, params)
    return params, opt_state


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=["32", "64"])
@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].torch_class])
def test_torch_gives_the_same_numbers(name: str, dtype: torch.dtype, tolerance: float):
    it = CASES[name]
    params = it.params(dtype) | ({} if it.make is optim.muon else {"none": torch.zeros(0, 3, dtype=dtype)})
    theirs = {key: torch.nn.Parameter(p.clone()) for key, p in params.items()}
    torch_class: Any = it.torch_class
    imperative = torch_class(theirs.values(), lr=it.lr, **it.options)
    optimizer = it.make(it.lr, **it.options)
    opt_state = optimizer.init(params)
    for grads in gradients(params, 200):
        for key, p in theirs.items():
            p.grad = None if grads[key] is None else grads[key].clone()
        imperative.step()
        params, opt_state = optimizer.update(grads, opt_state, params)
        if opt_state.step % 10 == 0:
            assert_trees_close(params, {k: p.detach() for k, p in theirs.items()}, rtol=tolerance, atol=tolerance)


def test_lion_follows_its_paper():
    params, grads = CASES["lion"].params(), gradients(CASES["lion"].params(), 200)
    ours, _ = run(optim.lion(0.01, betas=(0.7, 0.9), weight_decay=0.2), params, grads)
    for key, p in params.items():
        m = torch.zeros_like(p)
        for grad in grads:
            if (g := grad[key]) is not None:
                p = p - 0.01 * (torch.sign(0.7 * m + (1 - 0.7) * g) + 0.2 * p)
                m = 0.9 * m + (1 - 0.9) * g
        torch.testing.assert_close(ours[key], p, rtol=1e-12, atol=1e-12)


@every_case
def test_structure_stays_and_nothing_given_is_changed(name: str):
    it = CASES[name]
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        params, optimizer = it.params(dtype), it.optimizer()
        opt_state = optimizer.init(params)
        for grads in gradients(params, 4):
            given = (grads, opt_state, params)
            copies = trees.map(lambda x: x.clone() if isinstance(x, Tensor) else x, given)
            new, after = optimizer.update(*given)
            assert_trees_equal(given, copies)
            assert trees.structure((new, after)) == trees.structure((params, opt_state))
            described = [
                [trees.describe(x) for x in trees.leaves(tree)] for tree in ((new, after), (params, opt_state))
            ]
            for line, (was, now) in enumerate(zip(*described, strict=True)):
                assert was.split(" ")[0] == now.split(" ")[0], (line, was, now)
            for key, grad in grads.items():
                assert (grad is None) == (new[key] is params[key])
            params, opt_state = new, after
        assert opt_state.step == 4


@every_case
def test_members_of_a_vmap_are_runs_of_their_own(name: str):
    it = CASES[name]
    optimizer = it.optimizer()
    members = []
    for n, changes in enumerate(it.members):
        params = it.params(seed=n)
        held = {key: value for key, value in changes.items() if key in optimizer.init(params).hyperparameters}
        members.append((params, set_hyperparameters(optimizer.init(params), **held), gradients(params, 12, seed=n + 5)))
    alone = [run(optimizer, params, grads, state) for params, state, grads in members]

    def stacked(*each: Any) -> Any:
        return trees.map(lambda *x: None if x[0] is None else torch.stack(x), *each)

    params, state = (stacked(*(member[part] for member in members)) for part in (0, 1))
    for grads in zip(*(member[2] for member in members), strict=True):
        here, dims = stacked(*grads), trees.map(lambda x: None if x is None else 0, grads[0])
        params, state = torch.func.vmap(optimizer.update, in_dims=(dims, 0, 0))(here, state, params)
    assert_trees_close((params, state), stacked(*alone), rtol=1e-9, atol=1e-11)
    assert not torch.allclose(params["p0"][0], params["p0"][1])


@every_case
def test_a_compiled_update_is_compiled_once(name: str):
    it = CASES[name]
    optimizer = it.optimizer(schedules.cosine(it.lr, steps=20))
    params = it.params()
    grads, eager = gradients(params, 4, holes=False), optimizer.init(params)
    expected, eager = run(optimizer, params, grads)
    state, update = optimizer.init(params), torch.compile(optimizer.update, backend="eager", fullgraph=True)
    torch.compiler.reset()
    with assert_max_compilations(1):
        for grad in grads:
            params, state = update(grad, state, params)
    assert_trees_close((params, state), (expected, eager), rtol=1e-10, atol=1e-11)


def steep(params: Params) -> Any:
    """A quadratic whose curvature is between 1 and 3."""
    return sum(((p - 1) ** 2 * torch.linspace(1, 3, p.numel()).to(p).view(p.shape)).sum() for p in params.values())


@every_case
def test_the_gradient_with_respect_to_lr_goes_through_twenty_updates(name: str):
    it = CASES[name]
    optimizer, sign = it.optimizer(), -1 if it.options.get("maximize") else 1
    if name == "lion":
        sign = -1

    def after(lr: Any) -> Tensor:
        params = it.params()
        state = set_hyperparameters(optimizer.init(params), lr=lr)
        for _ in range(20):
            grads = torch.func.grad(lambda params: sign * steep(params))(params)
            params, state = optimizer.update(grads, state, params)
        return steep(params)

    lr, step = torch.tensor(0.003, dtype=torch.float64), 1e-6
    slope = torch.func.grad(after)(lr)
    central = (after(lr + step) - after(lr - step)) / (2 * step)
    torch.testing.assert_close(slope, central, rtol=1e-5, atol=1e-6)
    lr.requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(after(lr), lr)[0], slope, rtol=1e-9, atol=0)


def rosenbrock(params: Params) -> Tensor:
    x = torch.cat([p.reshape(-1) for p in params.values()])
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def descend(make: Callable[[Any], Optimizer], loss: Callable[[Params], Tensor], lr: float, steps: int) -> float:
    params = {"a": torch.full((1, 2), -0.5, dtype=torch.float64)}
    optimizer = make(schedules.cosine(lr, steps=steps))
    state = optimizer.init(params)
    for _ in range(steps):
        leaf = params["a"].requires_grad_()
        (grad,) = torch.autograd.grad(loss({"a": leaf}), leaf)
        params, state = optimizer.update({"a": grad}, state, {"a": leaf.detach()})
    return float(loss(params))


MINIMIZERS: dict[str, tuple[Callable[[Any], Optimizer], float, float]] = {
    "sgd": (lambda lr: optim.sgd(lr, momentum=0.9), 0.05, 1e-3),
    "adam": (optim.adam, 0.1, 0.2),
    "adamw": (lambda lr: optim.adamw(lr, weight_decay=1e-6), 0.1, 0.2),
    "rmsprop": (optim.rmsprop, 0.05, 0.05),
    "adagrad": (optim.adagrad, 1.0, 1.0),
    "lion": (optim.lion, 0.1, 0.1),
    "muon": (lambda lr: optim.muon(lr, weight_decay=0.0, ns_dtype=torch.float64), 0.05, 0.03),
}


@pytest.mark.parametrize("name", MINIMIZERS)
def test_minima_are_found(name: str):
    make, easy, hard = MINIMIZERS[name]
    assert descend(make, steep, easy, 200) < 1e-3
    assert descend(make, rosenbrock, hard, 800) < 0.05 < descend(make, rosenbrock, 0.0, 1)


class Plain(torch.Tensor):
    """A subclass, which no kernel is given."""


@every_case
@pytest.mark.parametrize("device", ["cpu", *["cuda"] * torch.cuda.is_available()])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.complex64])
def test_the_kernels_follow_the_rules(name: str, dtype: torch.dtype, device: str):
    it = CASES[name]
    if it.make is optim.muon and dtype.is_complex:
        return
    params = {key: p.to(device, dtype) for key, p in it.params().items()}
    grads = [{key: None if g is None else g.to(device) for key, g in grad.items()} for grad in gradients(params, 5)]
    by_kernel = run(it.make(it.lr, **it.options), params, grads)
    ruled = {key: p.as_subclass(Plain) for key, p in params.items()}
    by_rule = trees.map(lambda x: x.as_subclass(Tensor), run(it.make(it.lr, **it.options), ruled, grads))
    assert not any(type(p) is Plain for p in by_kernel[0].values())
    assert_trees_close(by_kernel, by_rule, rtol=1e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-6)


@every_case
def test_memory_layouts_do_not_matter(name: str):
    it = CASES[name]
    params, plain = it.params(), it.optimizer()
    odd = {key: p.t().contiguous().t() if p.dim() == 2 else p for key, p in params.items()}
    assert odd["p0"].stride() == (1, 4)
    grads = gradients(params, 5)
    gapped = [
        {key: g if g is None or g.dim() == 0 else g.repeat_interleave(2, -1)[..., ::2] for key, g in grad.items()}
        for grad in grads
    ]
    expected, _ = run(plain, params, grads)
    for start, given in ((odd, grads), (params, gapped), (odd, gapped)):
        ours, _ = run(plain, start, given)
        assert_trees_close(ours, expected, rtol=1e-9, atol=1e-12)
        assert ours["p0"].stride() == start["p0"].stride() or it.make is optim.muon


def test_trees_of_all_kinds_are_updated():
    a, b = torch.ones(2, dtype=torch.float64), torch.ones(3, dtype=torch.bfloat16)
    tree = {"layers": [{"w": a}, (b, None)], "head": a.float()}
    optimizer = optim.adamw(0.1)
    new, state = optimizer.update(trees.map(lambda x: x, tree), optimizer.init(tree), tree)
    assert trees.structure(new) == trees.structure(tree) and new["layers"][1][1] is None
    for path, leaf in trees.named_leaves(new):
        if leaf is not None:
            torch.testing.assert_close(leaf, trees.at(tree, path) * 0.999 - 0.1, rtol=1e-2, atol=0)
    assert state.slots["count"].tolist() == [1, 1, 0, 1]
    assert optimizer.update({}, optimizer.init({}), {})[0] == {}
    reordered = {"head": torch.zeros(1), "layers": tree["layers"]}
    with pytest.raises(StructureError, match=r"grads\['head'\] is float32\[1\] and its parameter float32\[2\]"):
        optimizer.update(reordered, state, tree)


def test_parameters_that_require_gradients_are_updated_differentiably():
    w = torch.tensor([2.0], requires_grad=True)
    optimizer = optim.adam(0.1, weight_decay=0.5)
    new, _ = optimizer.update(torch.ones(1), optimizer.init(w), w)
    assert new.requires_grad
    with torch.no_grad():
        assert not optimizer.update(torch.ones(1), optimizer.init(w), w)[0].requires_grad


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (lambda: optim.sgd(-0.1), UsageError, "lr=-0.1 was given; it is 0 or more. Write lr=0.1"),
        (lambda: optim.adam(0.1, eps=float("nan")), UsageError, "eps=nan was given"),
        (lambda: optim.adamw(0.1, betas=(0.9, 1.0)), UsageError, "each is at least 0 and below 1"),
        (lambda: optim.sgd(0.1, nesterov=True), UsageError, "needs a momentum"),
        (lambda: optim.muon(0.1).init({"b": torch.ones(3)}), UsageError, r"params\['b'\] is float32\[3\]"),
        (lambda: optim.adam(0.1).init({"b": 1.0}), StructureError, r"params\['b'\] is float 1.0"),
    ],
)
def test_what_cannot_work_is_refused(wrong: Callable[[], Any], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        wrong()


@pytest.mark.parametrize(
    ("grads", "message"),
    [
        ({"v": torch.ones(2)}, r"without \[\"\['w'\]\"\] and with \[\"\['v'\]\"\]"),
        ({"w": torch.ones(2, dtype=torch.float64)}, r"float64\[2\] and its parameter float32\[2\]"),
        ({"w": torch.ones(2).to_sparse()}, "SparseAdam"),
    ],
)
def test_gradients_of_another_kind_are_refused(grads: Params, message: str):
    params = {"w": torch.ones(2)}
    optimizer = optim.adamw(0.1)
    with pytest.raises(StructureError, match=message):
        optimizer.update(grads, optimizer.init(params), params)


@pytest.mark.parametrize("other", [optim.sgd(0.1), optim.chain(optim.clip_by_value(1.0), optim.adamw(0.1))])
def test_the_state_of_another_optimizer_is_refused(other: optim.Optimizer):
    params = {"w": torch.ones(2)}
    with pytest.raises(StructureError, match=r"opt_state of another: .*; its own has the slots \['count', 'exp"):
        optim.adamw(0.1).update(params, other.init(params), params)

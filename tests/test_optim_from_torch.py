"""`from_torch` gives the bits of the imperative class, whatever the class."""

import copy
import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from tnt_func import pytree as trees
from tnt_func.asserts import assert_trees_equal
from tnt_func.errors import ContractError, StructureError, UsageError
from tnt_func.optim import from_torch, get, set_hyperparameters

module = importlib.import_module("tnt_func.optim.from_torch")  # Its name in the package is the function.
Params = dict[str, Any]
DEVICES = ["cpu", *["cuda"] * torch.cuda.is_available()]
SHAPES = [(), (0, 3), (7,), (4, 3), (2, 3, 4), (40, 50)]

CLASSES = {
    name: cls
    for name, cls in vars(torch.optim).items()
    if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer
}
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "Adadelta": [{}, {"rho": 0.8, "weight_decay": 0.1, "maximize": True}, {"foreach": True}],
    "Adafactor": [{}, {"weight_decay": 0.1, "eps": (1e-3, 1e-2), "d": 2.0}, {"foreach": True, "maximize": True}],
    "Adagrad": [{}, {"lr_decay": 0.1, "initial_accumulator_value": 0.3}, {"fused": True}, {"foreach": True}],
    "Adam": [{}, {"amsgrad": True, "weight_decay": 0.1}, {"fused": True}, {"foreach": True}, {"lr": 1}],
    "AdamW": [{}, {"amsgrad": True, "maximize": True}, {"fused": True, "amsgrad": True}, {"foreach": True}],
    "Adamax": [{}, {"weight_decay": 0.1, "betas": (0.5, 0.6)}, {"foreach": True, "maximize": True}],
    "ASGD": [{}, {"t0": 5, "lambd": 0.1, "weight_decay": 0.1}, {"foreach": True, "t0": 3.0}],
    "Muon": [{}, {"nesterov": False, "ns_steps": 2}, {"adjust_lr_fn": "match_rms_adamw"}],
    "NAdam": [{}, {"decoupled_weight_decay": True, "weight_decay": 0.1}, {"foreach": True, "momentum_decay": 0.1}],
    "RAdam": [{}, {"decoupled_weight_decay": True, "weight_decay": 0.1}, {"foreach": True, "maximize": True}],
    "RMSprop": [{}, {"momentum": 0.9, "centered": True}, {"weight_decay": 0.1, "foreach": True, "maximize": True}],
    "Rprop": [{}, {"etas": (0.3, 1.5), "step_sizes": (1e-3, 2)}, {"foreach": True}],
    "SGD": [
        {},
        {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.9, "nesterov": True, "foreach": True},
        {"momentum": 0.9, "fused": True, "maximize": True},
    ],
    "SparseAdam": [{}, {"maximize": True}],
}
if torch.cuda.is_available():
    for name in ("Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop"):
        OPTIONS[name].append({"capturable": True})
CASES = [(name, options) for name, several in OPTIONS.items() for options in several]


def test_every_class_of_torch_is_here():
    assert OPTIONS.keys() == CLASSES.keys() - {"LBFGS"}


def some_params(name: str, options: dict[str, Any] | None = None, device: str = "cpu") -> Params:
    """Of every shape and dtype."""
    draw = torch.Generator().manual_seed(0)
    shapes = [(4, 3), (3, 5), (40, 50), (1, 1)] if name == "Muon" else SHAPES
    if name == "Adafactor":  # It divides by the number of elements.
        shapes = [shape for shape in shapes if 0 not in shape]
    return {
        f"{str(dtype).removeprefix('torch.')} {list(shape)}": torch.randn(shape, generator=draw).to(device, dtype)
        for dtype, some in ((torch.float32, shapes), (torch.float64, shapes[::2]), (torch.bfloat16, shapes[::-2]))
        # Torch's fused SGD does not give itself the same bits twice in bfloat16, on the CPU.
        if not (name == "SGD" and options and options.get("fused") and dtype is torch.bfloat16)
        for shape in some
    }


def some_grads(name: str, params: Params, step: int, options: dict[str, Any]) -> Params:
    """Some missing, another every time; fused SGD wants all or none of them at first."""
    draw, grads = torch.Generator().manual_seed(step), {}
    for n, (key, p) in enumerate(params.items()):
        g = torch.randn(p.shape, generator=draw).to(p)
        missing = (n + step) % 4 == 0 and not (name == "SGD" and options.get("fused"))
        grads[key] = None if missing else g.to_sparse() if name == "SparseAdam" else g
    return grads


def imperative(
    cls: Any, params: Params, groups: list[tuple[Any, dict[str, Any]]], **options: Any
) -> tuple[Any, Params]:
    theirs = {key: torch.nn.Parameter(p.clone()) for key, p in params.items()}
    left = dict(theirs)
    param_groups = []
    for claims, changes in groups:
        mine = [key for key in left if claims(f"[{key!r}]")]
        param_groups.append({"params": [left.pop(key) for key in mine], **changes})
    return cls([*param_groups, {"params": [*left.values()]}], **options), theirs


def check_bits(
    cls: Any, name: str, params: Params, options: dict[str, Any], groups: list[Any], steps: int, schedule: bool = True
) -> Any:
    """Steps of both, with lr driven from outside, the state copied in the middle, and all that is given unchanged."""
    other, theirs = imperative(cls, params, groups, **options)
    optimizer = from_torch(cls, groups=groups, **options)
    state = optimizer.init(params)
    for step in range(steps):
        if schedule:
            lr = 0.1 / (1 + step)
            state = set_hyperparameters(state, lr=lr)
            for group in other.param_groups:
                group["lr"] = lr
        if step == steps // 2:
            state = copy.deepcopy(state)
        grads = some_grads(name, params, step, options)
        for key, p in theirs.items():
            p.grad = None if grads[key] is None else grads[key].clone()
        other.step()
        given = grads, state, params
        copies = trees.map(lambda x: x.clone() if isinstance(x, Tensor) else x, given)
        structure = trees.structure(state)
        params, state = optimizer.update(*given)
        assert trees.structure(state) == structure
        assert_trees_equal(given, copies)
        assert_trees_equal(params, {key: p.detach() for key, p in theirs.items()})
    return state


@pytest.mark.parametrize(("name", "options"), CASES, ids=[f"{name} {options}" for name, options in CASES])
@pytest.mark.parametrize("device", DEVICES)
def test_fifty_steps_give_the_same_bits(name: str, options: dict[str, Any], device: str):
    state = check_bits(CLASSES[name], name, some_params(name, options, device), options, [], steps=50)
    assert state.step == 50


@pytest.mark.parametrize("name", OPTIONS)
def test_groups_give_the_same_bits(name: str):
    own = {"lr": 0.3} if name in ("Rprop", "SparseAdam") else {"weight_decay": 0.3}
    groups: list[Any] = [
        (lambda path: "[4, 3]" in path or "64" in path, own),
        (lambda path: "64" in path, {"lr": 100.0}),
        (lambda path: "nothing" in path, {}),
    ]
    state = check_bits(CLASSES[name], name, some_params(name), {}, groups, steps=10, schedule=False)
    assert [int(part.step) for part in state] == [10] * 4


def test_the_kernels_give_the_states_of_the_steps(monkeypatch: pytest.MonkeyPatch):
    for name in ("Adam", "AdamW", "SGD"):
        for options in OPTIONS[name]:
            by_kernel = check_bits(CLASSES[name], name, some_params(name, options), options, [], steps=3)
            with monkeypatch.context() as patch:
                patch.setattr(module, "KERNELS", {})
                by_step = check_bits(CLASSES[name], name, some_params(name, options), options, [], steps=3)
            assert_trees_equal(by_kernel, by_step)


class Counting(torch.optim.Optimizer):
    """Remembers numbers, lists and None, and makes all of it in its first step, of the gradient."""

    def __init__(self, params: Any, lr: float = 0.1, k: int = 0, distance: float = 0.0, window: Any = (1, None)):
        super().__init__(params, {"lr": lr, "k": k, "distance": distance, "window": window, "name": "counting"})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["k"] += 1
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state |= {"step": 0, "late": None, "history": [p.grad.clone(), p.clone()], "scale": 0.5}
                state["step"] += 1
                state["scale"] *= 0.9
                state["history"] = [p.grad.clone(), state["history"][0]]
                group["distance"] += float(p.grad.abs().sum())
                p.grad.mul_(group["lr"] * state["scale"] / group["k"])
                p.sub_(p.grad + 0.01 * state["history"][1] * state["step"] * group["window"][0])


class Hiding(Counting):
    def step(self, closure: Any = None) -> Any:
        super().step()
        self.calls = [getattr(self, "calls", [0])[0] + 1]


class Keyed(Counting):
    def step(self, closure: Any = None) -> Any:
        super().step()
        self.state["calls"] = 1  # pyright: ignore


class Renaming(Counting):
    def step(self, closure: Any = None) -> Any:
        super().step()
        self.param_groups[0]["name"] = "other"


class Late(Counting):
    def step(self, closure: Any = None) -> Any:
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                if self.state[p].get("step") == 2:
                    self.state[p]["new"] = 1.0


class Growing(Counting):
    def step(self, closure: Any = None) -> Any:
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["seen"] = [*self.state[p].get("seen", []), p.clone()]


class Closing(Counting):
    def step(self, closure: Any = None) -> Any:
        closure()


class Odd(Counting):
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["function"] = print


def test_a_class_of_another_package_gives_its_bits():
    groups: list[Any] = [(lambda path: "[7]" in path, {"k": 3, "window": (2, None)})]
    state = check_bits(Counting, "Counting", some_params("Counting"), {"distance": 0.25}, groups, steps=20)
    assert float(get(state, "k", group=0)) == 23.0 and float(get(state, "distance", group=1)) > 100
    assert get(state, "window", group=0)[1] is None


@pytest.mark.parametrize(
    ("cls", "options", "error", "message"),
    [
        (torch.optim.LBFGS, {}, UsageError, "evaluates the loss as often as it likes"),
        (Hiding, {}, ContractError, r"Hiding.step changed self.calls; from_torch takes"),
        (Keyed, {}, ContractError, r"Keyed.step changed self.state\['calls'\]"),
        (Renaming, {}, ContractError, "a step put 'name': 'other' into param_groups"),
        (Closing, {}, UsageError, "neither on dense ones: TypeError: .* nor on sparse ones: TypeError"),
        (Odd, {}, UsageError, r"state of params\['w'\]\['function'\] is a builtin_function_or_method"),
        (Late, {}, ContractError, "remembers .*'new'.* in its first step"),
        (Growing, {}, ContractError, r"'seen'\]\[1\].* of a parameter, in its first step"),
        (torch.optim.SGD, {"lr": torch.tensor(0.1)}, UsageError, "lr=0.1.* was given|hyper-parameters are numbers"),
        (torch.optim.SGD, {"differentiable": True}, UsageError, "nothing flows back"),
        (torch.optim.SGD, {"lr": -1.0}, ValueError, "Invalid learning rate: -1.0"),
        (torch.optim.SGD, {"learning_rate": 1.0}, TypeError, "learning_rate"),
        (torch.optim.SGD, {"groups": [(lambda path: True, {"learning_rate": 1.0})]}, UsageError, "SGD has .*'lr'"),
        (torch.optim.SparseAdam, {}, RuntimeError, "does not support dense gradients"),
    ],
)
def test_what_has_no_pure_counterpart_is_refused(cls: Any, options: Any, error: type[Exception], message: str):
    params = {"w": torch.ones(2)}
    with pytest.raises(error, match=message):
        optimizer = from_torch(cls, **options)
        state = optimizer.init(params)
        for _ in range(3):
            params, state = optimizer.update({"w": torch.ones(2)}, state, params)


def test_traced_and_sparse_updates_are_refused():
    w = torch.ones(2)
    optimizer = from_torch(torch.optim.AdamW)
    state = optimizer.init(w)
    with pytest.raises(UsageError, match=r"Write a native one: optim.adamw"):
        torch.func.vmap(optimizer.update)(w[None], trees.map(lambda x: x[None], state), w[None])
    with pytest.raises(StructureError, match="SparseAdam"):
        optimizer.update(w.to_sparse(), state, w)
    sgd = from_torch(torch.optim.SGD, lr=1.0)
    assert sgd.update(w.to_sparse(), sgd.init(w), w)[0].tolist() == [0.0, 0.0]


def test_structure_that_the_hyperparameters_ask_for_is_there_from_the_start():
    w = torch.ones(2)
    optimizer = from_torch(torch.optim.SGD, lr=1.0)
    state = set_hyperparameters(optimizer.init(w), momentum=0.5)
    with pytest.raises(ContractError, match="momentum=0.5 was set on a state of SGD"):
        optimizer.update(w, state, w)
    inert = from_torch(torch.optim.SGD, lr=1.0, momentum=0.9)
    state = set_hyperparameters(inert.init(w), momentum=0.0)
    new, state = inert.update(w, state, w)
    assert new.tolist() == [0.0, 0.0] and state.slots["started"].tolist() == [False]


def test_a_schedule_counts_updates():
    w = torch.tensor(0.0)
    optimizer = from_torch(torch.optim.SGD, lr=lambda step: 1.0 / (1 + step), groups=[(lambda path: True, {"lr": 2.0})])
    state = optimizer.init(w)
    for _ in range(2):
        w, state = optimizer.update(torch.tensor(1.0), state, w)
    assert w.item() == -4.0 and get(state, "lr", group=1).item() == 0.5
    plain = from_torch(torch.optim.Adagrad, lr=lambda step: [0.5, 0.25][step])
    state = plain.init(w)
    assert get(state, "lr").item() == 0.5
    for _ in range(2):
        w, state = plain.update(torch.tensor(1.0), state, w)
    assert get(state, "lr").item() == 0.25


def test_first_steps_leave_the_generators_alone():
    class Noisy(Counting):
        def step(self, closure: Any = None) -> Any:
            super().step()
            torch.rand(3)

    before = torch.get_rng_state()
    from_torch(Noisy).init({"w": torch.ones(2)})
    assert torch.equal(before, torch.get_rng_state())


def test_trees_integers_and_holes_are_taken():
    params = [{"w": torch.ones(2), "index": torch.arange(3)}, (None, torch.ones(()))]
    grads = [{"w": torch.ones(2), "index": None}, (None, torch.ones(()))]
    for cls in (torch.optim.AdamW, torch.optim.NAdam):
        optimizer = from_torch(cls, lr=0.1)
        new, state = optimizer.update(grads, optimizer.init(params), params)
        assert trees.structure(new) == trees.structure(params) and new[0]["index"] is params[0]["index"]
        assert state.slots["started"].tolist() == [True, False, False, True]
        assert optimizer.update({}, optimizer.init({}), {})[0] == {}


def test_gradients_are_laid_out_as_backward_does():
    params = {"w": torch.randn(4, 3), "t": torch.randn(3, 4).t()}
    grads = {"w": torch.randn(3, 4).t(), "t": torch.randn(4, 3)}
    for fused in (True, None):
        other, theirs = imperative(torch.optim.AdamW, params, [], fused=fused)
        sum((theirs[key] * grads[key]).sum() for key in params).backward()  # pyright: ignore
        other.step()
        optimizer = from_torch(torch.optim.AdamW, fused=fused)
        new, _ = optimizer.update(grads, optimizer.init(params), params)
        assert_trees_equal(new, {key: p.detach() for key, p in theirs.items()})

"""Activations that are computed again."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tnt_func as tnt
from tnt_func import optim, pytree
from tnt_func.errors import UsageError
from tnt_func.gradients import value_and_grad

T = tnt.transforms


class Block(nn.Module):
    """Takes two inputs, one by keyword; gives two outputs."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 8))

    def forward(self, x: Tensor, *, skip: Tensor) -> tuple[Tensor, Tensor]:
        y = self.body(x) + skip
        return y, y.sigmoid()


class Net(nn.Module):
    """The same block twice over, the second of three tied to the first; one is in eval mode."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.blocks[1] = self.blocks[0]
        self.blocks[2].eval()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x, gate = block(x, skip=x)
            x = x * gate
        return x


def supervised() -> Any:
    torch.manual_seed(0)
    return tnt.supervised(Net(), F.cross_entropy, optim.adamw(1e-2), key=tnt.key(0))


def batches(count: int = 2) -> list[Any]:
    noise = torch.Generator().manual_seed(1)
    return [(torch.randn(16, 8, generator=noise), torch.randint(0, 8, (16,), generator=noise)) for _ in range(count)]


CHOICES: dict[str, Any] = {
    "blocks": lambda name, module: isinstance(module, Block),
    "nested": lambda name, module: isinstance(module, Block | nn.Sequential),
    "norms and dropout": lambda name, module: isinstance(module, nn.BatchNorm1d | nn.Dropout),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_the_bits_are_the_same(choice: str):
    unit, state = supervised()
    plain = tnt.fit(unit, state, batches(), batches(1), max_epochs=2)
    lean = tnt.fit(T.remat(unit, CHOICES[choice]), state, batches(), batches(1), max_epochs=2)
    assert pytree.diff(plain.replace(output=None), lean) == []
    assert plain.buffers["blocks.0.body.1.num_batches_tracked"] == 8


class Drifting(nn.Module):
    """Its output depends on a buffer that it moves, as under spectral normalisation."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.tensor(1.0))
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return (self.layer(x) * self.calls).tanh()


def test_what_runs_again_starts_from_the_buffers_of_the_first_time():
    module = nn.Sequential(Drifting(), Drifting())
    unit, state = tnt.supervised(module, F.cross_entropy, optim.sgd(0.1), key=tnt.key(0))
    lean = T.remat(unit, lambda name, module: isinstance(module, Drifting))
    one, other = (tnt.train(each.train_unit, state, batches(), max_epochs=2) for each in (unit, lean))
    assert pytree.diff(one, other) == [] and one.buffers["0.calls"] == 5


def saved_bytes(unit: Any, state: tnt.State, batch: Any) -> int:
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    descent = unit.train_unit.train_step
    params = {name: leaf.detach().requires_grad_() for name, leaf in state.params.items()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value, _ = descent.objective(params, state, batch)
    held = {leaf.untyped_storage().data_ptr() for leaf in pytree.tensors((params, state.buffers, batch))}
    assert value.requires_grad
    return sum(size for place, size in kept.items() if place not in held)


def test_fewer_bytes_are_kept_for_the_backward_pass():
    unit, state = supervised()
    (batch,) = batches(1)
    plain, blocks = (saved_bytes(each, state, batch) for each in (unit, T.remat(unit, CHOICES["blocks"])))
    assert blocks < plain / 2


def test_it_goes_through_other_transforms_and_the_gradient_through_training():
    unit, state = supervised()
    lean = T.remat(T.autocast(T.detect_anomaly(unit)), CHOICES["blocks"])
    assert saved_bytes(lean_inner(lean), state, batches(1)[0]) < saved_bytes(unit, state, batches(1)[0])

    def after_a_step(unit: Any) -> Any:
        def outer(bias: Tensor) -> Any:
            with tnt.rng.scope(tnt.key(1)):
                moved = {**state.params, "blocks.2.body.4.bias": bias}
                after, output = unit.train_unit.train_step(state.replace(params=moved), batches(1)[0])
            return after.params["blocks.2.body.4.weight"].square().sum(), None

        bias = state.params["blocks.2.body.4.bias"].clone().requires_grad_()
        return value_and_grad(outer, bias)[2]

    normless = T.remat(unit, CHOICES["blocks"])
    torch.testing.assert_close(after_a_step(normless), after_a_step(unit))


def lean_inner(unit: Any) -> Any:
    """The unit without what is around its descent."""
    train = unit.train_unit
    return tnt.FitUnit(train_unit=tnt.TrainUnit(train_step=train.train_step.inner), eval_unit=unit.eval_unit)


@dataclass(frozen=True)
class Objective:
    """One of a user's own."""

    model: tnt.Model

    def __call__(self, params: Any, state: tnt.State, batch: Tensor) -> Any:
        output, buffers = self.model.apply(params, state.buffers, batch, train=True)
        return output.square().mean(), (buffers, {})


def test_a_dataclass_with_a_model_is_reached_into_and_a_closure_is_not():
    model = tnt.from_module(nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))))
    for objective, reached in (Objective(model), True), (lambda *args: Objective(model)(*args), False):
        unit = tnt.TrainUnit(train_step=tnt.minimize(objective, optim.sgd(0.1)))
        if reached:
            step: Any = T.remat(unit, lambda name, module: name == "1").train_step
            assert step.objective.model.apply is not model.apply and step.objective.model.params is model.params
            assert not pytree.equal(step(_first(model), torch.ones(2, 8))[0].params, model.params)
            continue
        with pytest.raises(UsageError, match="reaches models in the fields of a dataclass. Write @dataclass"):
            T.remat(unit, lambda name, module: True)


def _first(model: tnt.Model) -> tnt.State:
    params = model.params
    return tnt.State(params=params, buffers=model.buffers, opt_state=optim.sgd(0.1).init(params), key=tnt.key(0))


def test_no_choice_and_a_module_with_hooks_are_refused():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[0].register_forward_hook(lambda *called: None)
    unit, _ = tnt.supervised(module, F.cross_entropy, optim.sgd(0.1), key=tnt.key(0))
    with pytest.raises(UsageError, match=r"takes none of the submodules \['0', '1'\]; it takes at least one"):
        T.remat(unit, lambda name, module: False)
    with pytest.raises(UsageError, match="the choice of '0', which has forward hooks"):
        T.remat(unit, lambda name, module: True)
    assert T.remat(unit, lambda name, module: name == "1") != unit

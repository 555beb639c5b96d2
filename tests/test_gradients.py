"""The gradient of an objective, on each road."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tnt_func import pytree
from tnt_func.errors import ContractError
from tnt_func.gradients import value_and_grad

Params = dict[str, Tensor]


def objective(params: Params) -> tuple[Tensor, dict[str, Any]]:
    loss = (params["w"].sin() * params["b"]).sum()
    return loss, {"loss": loss, "n": 3, "none": None}


def params() -> Params:
    return {"w": torch.linspace(0, 1, 3), "b": torch.tensor([1.0, 2.0, 3.0])}


def test_eager_equals_torch_func_and_leaves_nothing_behind():
    given = params()
    value, aux, grads = value_and_grad(objective, given)
    expected, expected_value = torch.func.grad_and_value(lambda p: objective(p)[0])(given)
    assert pytree.equal(grads, expected) and torch.equal(value, expected_value)
    assert not any(leaf.requires_grad for leaf in pytree.tensors((given, value, aux, grads))) and aux["n"] == 3


def test_a_parameter_that_is_not_used_has_no_gradient():
    grads = value_and_grad(lambda p: (p["w"].sum(), None), params())[2]
    assert grads["b"] is None and torch.equal(grads["w"], torch.ones(3))


def test_under_vmap_and_compile_it_is_torch_func():
    stacked = {name: torch.stack([leaf, leaf + 1]) for name, leaf in params().items()}
    grads = torch.func.vmap(lambda p: value_and_grad(objective, p)[2])(stacked)
    assert pytree.equal(pytree.map(lambda leaf: leaf[0], grads), value_and_grad(objective, params())[2])
    compiled = torch.compile(lambda p: value_and_grad(objective, p)[2], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(params()), value_and_grad(objective, params())[2])


@pytest.mark.parametrize("road", ["autograd", "func"])
def test_a_gradient_can_be_differentiated_itself(road: str):
    def after_training(lr: Tensor) -> Tensor:
        given = params()
        for _ in range(3):
            grads = value_and_grad(objective, given)[2]
            given = pytree.map(lambda p, g: p - lr * g, given, grads)
        return objective(given)[0]

    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    slope = (
        torch.autograd.grad(after_training(lr), lr)[0] if road == "autograd" else torch.func.grad(after_training)(lr)
    )
    with torch.no_grad():
        around = (after_training(lr + 1e-3) - after_training(lr - 1e-3)) / 2e-3
    torch.testing.assert_close(slope, around, rtol=1e-2, atol=1e-3, check_dtype=False)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (lambda p: (p["w"], None), r"float32\[3\].*0-d tensor"),
        (lambda p: (1.0, None), "float 1.0.*0-d tensor"),
        (lambda p: (torch.tensor(1.0), None), "depends on no parameter"),
    ],
)
def test_objectives_without_a_gradient_are_told(bad: Any, words: str):
    with pytest.raises(ContractError, match=words):
        value_and_grad(bad, params())

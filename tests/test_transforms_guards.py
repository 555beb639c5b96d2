"""Steps that are skipped, measured and watched."""

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import tnt_func as tnt
from tnt_func import optim, pytree
from tnt_func.descent import Slope
from tnt_func.errors import ContractError
from tnt_func.optim import Optimizer
from tnt_func.transforms.guards import SkipNonfinite
from tnt_func.unit import TrainUnit

T = tnt.transforms


def unit_of(optimizer: Optimizer, part: str | None = None) -> TrainUnit:
    def objective(params: Any, state: tnt.State, batch: Tensor) -> Any:
        loss = (params["w"] * batch).sum()
        return loss, ({"seen": state.buffers["seen"] + batch, "frozen": state.buffers["frozen"]}, {"loss": loss})

    return TrainUnit(train_step=tnt.minimize(objective, optimizer, part=part))


def first(optimizer: Optimizer) -> tnt.State:
    params = {"w": torch.ones(2)}
    buffers = {"seen": torch.tensor(0.0), "frozen": torch.ones(3)}
    return tnt.State(params=params, buffers=buffers, opt_state=optimizer.init(params), key=tnt.key(0))


OPTIMIZERS: dict[str, Optimizer] = {
    # A gradient that is not finite need not show in the parameters: clipped, it is finite.
    "clipped": optim.chain(optim.clip_by_value(1.0), optim.sgd(0.1)),
    "momentum": optim.sgd(0.1, momentum=0.9),
    "adamw": optim.adamw(optim_lr := 0.1),
    "from_torch": optim.from_torch(torch.optim.Adam, lr=optim_lr),
    "accumulated": optim.accumulate(optim.sgd(0.1), every=2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_never_was(name: str, bad: float):
    unit = T.skip_nonfinite(unit_of(OPTIMIZERS[name]))
    state = tnt.train(unit, first(OPTIMIZERS[name]), [torch.tensor(x) for x in (0.5, bad, 2.0, bad)], max_epochs=1)
    fine = tnt.train(unit, first(OPTIMIZERS[name]), [torch.tensor(x) for x in (0.5, 2.0)], max_epochs=1)
    assert state.memory["skip_nonfinite"]["skipped"] == 2 and fine.memory["skip_nonfinite"]["skipped"] == 0
    for kept in ("params", "buffers", "opt_state"):
        assert pytree.diff(getattr(state, kept), getattr(fine, kept)) == []
    assert state.progress.train.steps == 4


def test_a_value_that_is_not_finite_is_enough():
    def objective(params: Any, state: tnt.State, batch: float) -> Any:
        return params.sum() + batch, (state.buffers, {})

    unit, w = T.skip_nonfinite(TrainUnit(train_step=tnt.minimize(objective, optim.sgd(0.1)))), torch.ones(2)
    state = tnt.State(params=w, opt_state=optim.sgd(0.1).init(w), key=tnt.key(0))
    assert tnt.train(unit, state, [math.inf], max_epochs=1).params is w


def test_where_nothing_is_looked_at_the_step_chooses_all_the_same():
    """As it does in a compiled step and on a device; what did not change is not copied."""
    skip = SkipNonfinite("skip")
    old, new = ({"w": torch.full((2,), x)} for x in (1.0, 2.0))
    frozen = torch.ones(3)

    def amended(grad: Tensor) -> Any:
        before = tnt.State(
            params=old, buffers={"frozen": frozen}, memory={"skip": {"skipped": torch.tensor(3)}}, key=tnt.key(0)
        )
        after, _ = skip(before, before.replace(params=new), Slope(grad, {}, {}, {"w": grad}))
        assert after.buffers["frozen"] is frozen
        return after.params["w"], after.memory["skip"]["skipped"]

    params, skipped = torch.func.vmap(amended)(torch.tensor([1.0, math.nan, math.inf]))
    assert params.tolist() == [[2.0, 2.0], [1.0, 1.0], [1.0, 1.0]] and skipped.tolist() == [3, 4, 4]


@pytest.mark.parametrize("part", [None, "part"])
def test_norms_are_torchs_and_of_the_trained_part(part: str | None):
    optimizer = optim.chain(optim.clip_by_global_norm(0.1), optim.sgd(0.5))
    unit, state = T.with_gradient_stats(unit_of(optimizer, part)), first(optimizer)
    if part is not None:
        wide = {
            "params": {part: state.params, "other": torch.ones(5)},
            "opt_state": {part: state.opt_state, "other": ()},
        }
        state = state.replace(**wide)
    _, output = unit.train_step(state, torch.tensor(3.0))
    w = torch.ones(2, requires_grad=True)
    (w * 3.0).sum().backward()
    assert output["grad_norm"].equal(torch.nn.utils.clip_grad_norm_([w], 0.1))
    torch.testing.assert_close(output["update_norm"], torch.tensor(0.05))
    torch.testing.assert_close(output["param_norm"], torch.tensor(2.0).sqrt())
    assert output["loss"] == 6.0


def test_gradients_are_those_that_the_optimizer_is_given():
    optimizer = optim.chain(optim.clip_by_global_norm(0.1), optim.sgd(0.5))
    _, output = T.with_gradients(unit_of(optimizer)).train_step(first(optimizer), torch.tensor(3.0))
    assert output["loss"] == 6.0 and output["grads"]["w"].tolist() == [3.0, 3.0]


@pytest.mark.parametrize("transform", [T.with_gradients, T.with_gradient_stats])
def test_what_is_added_needs_a_mapping_of_other_names(transform: Any):
    with pytest.raises(ContractError, match=r"given the output \['grad.*rename what collides"):
        transform(transform(unit_of(optim.sgd(0.1)))).train_step(first(optim.sgd(0.1)), torch.tensor(1.0))


def test_an_anomaly_is_named_and_the_mode_put_back():
    def objective(params: Any, state: tnt.State, batch: Tensor) -> Any:
        return (params["w"] * batch).sqrt().sum(), (state.buffers, {})

    unit = T.detect_anomaly(TrainUnit(train_step=tnt.minimize(objective, optim.sgd(0.1))))
    state = first(optim.sgd(0.1))
    assert tnt.train(unit, state, [torch.tensor(1.0)], max_epochs=1).progress.train.steps == 1
    with (
        warnings.catch_warnings(action="ignore"),
        pytest.raises(RuntimeError, match="'SqrtBackward0' returned nan") as caught,
    ):
        tnt.train(unit, state, [torch.tensor(1.0), torch.tensor(-1.0)], max_epochs=1)
    assert "at step 1" in caught.value.__notes__[0] and not torch.is_anomaly_enabled()
    with pytest.raises(RuntimeError, match="size of tensor") as other:
        unit.train_step(state, torch.ones(3))
    assert not hasattr(other.value, "__notes__")

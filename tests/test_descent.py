"""The step of `minimize` and its seams."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import tnt_func as tnt
from tnt_func import optim
from tnt_func.descent import Descent, Slope, differentiate
from tnt_func.errors import ContractError


def objective(params: Tensor, state: tnt.State, batch: float) -> Any:
    return params * batch, ({"seen": batch}, {"loss": params.detach() * batch})


def first() -> tnt.State:
    w = torch.tensor(2.0)
    return tnt.State(params=w, opt_state=optim.sgd(0.5).init(w), buffers={"seen": 0.0}, key=tnt.key(0))


def test_a_slope_is_value_buffers_output_and_gradient_of_the_whole_batch():
    slope = differentiate(objective, torch.tensor(2.0), first(), 3.0)
    assert slope == (6.0, {"seen": 3.0}, {"loss": 6.0}, 3.0) and not slope.value.requires_grad


def test_another_way_to_find_the_gradient_is_taken():
    def doubled(*args: Any) -> Slope:
        slope = differentiate(*args)
        return slope._replace(grads=2 * slope.grads)

    step = replace(tnt.minimize(objective, optim.sgd(0.5)), differentiate=doubled)
    assert step(first(), 1.0)[0].params == 1.0


def test_amendments_see_before_after_and_slope_and_follow_one_another():
    seen: list[tuple[float, float, float, Any]] = []

    def amendment(name: str, shift: float) -> Any:
        def amend(before: tnt.State, after: tnt.State, slope: Slope) -> tuple[tnt.State, Slope]:
            seen.append((float(before.params), float(after.params), float(slope.grads), dict(slope.output)))
            return after.replace(params=after.params + shift), slope._replace(output={**slope.output, name: shift})

        return amend

    amendments = (amendment("one", 10.0), amendment("two", 100.0))
    step = Descent(objective, optim.sgd(0.5), amendments=amendments)
    state, output = step(first(), 1.0)
    assert seen == [(2.0, 1.5, 1.0, {"loss": 2.0}), (2.0, 11.5, 1.0, {"loss": 2.0, "one": 10.0})]
    assert state.params == 111.5 and output == {"loss": 2.0, "one": 10.0, "two": 100.0}
    assert state.buffers == {"seen": 1.0}


@pytest.mark.parametrize("donates", [False, True])
def test_a_part_that_the_state_has_not_is_named(donates: bool):
    step = replace(tnt.minimize(objective, optim.sgd(0.5), part="critic"), donates=donates)
    state = tnt.State(params={"critic": torch.tensor(2.0)}, opt_state={"actor": ()}, key=tnt.key(0))
    with pytest.raises(ContractError, match=r"params have \['critic'\] and whose opt_state has \['actor'\].*'critic'"):
        step(state, 1.0)
    with pytest.raises(ContractError, match="params have a Tensor and whose opt_state has an OptState"):
        step(first(), 1.0)

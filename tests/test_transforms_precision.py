"""Half precision, and the scale of the loss."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tnt_func as tnt
from tnt_func import optim
from tnt_func.errors import UsageError
from tnt_func.unit import TrainUnit

T = tnt.transforms


SEEN: list[Any] = []
"""In what precision the layer worked, forward and backward; outside of it, for a model copies its module."""


class Seen(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)
        SEEN.append((y.dtype, torch.is_autocast_enabled("cpu")))
        if y.requires_grad:
            y.register_hook(lambda grad: SEEN.append(("backward", torch.is_autocast_enabled("cpu"))))
        return y


def test_forward_evaluation_and_prediction_are_cast_and_backward_is_not():
    SEEN.clear()
    unit, state = tnt.supervised(Seen(2, 2), F.cross_entropy, optim.sgd(0.1), key=tnt.key(0))
    unit, data = T.autocast(unit), [(torch.randn(4, 2), torch.tensor([0, 1, 1, 0]))]
    state = tnt.fit(unit, state, data, data, max_epochs=1)
    assert unit.predict_unit is not None
    tnt.predict(unit.predict_unit, state, data)
    cast = (torch.bfloat16, True)
    assert SEEN == [cast, ("backward", False), cast, cast]
    assert {leaf.dtype for leaf in state.params.values()} == {torch.float32}
    assert not torch.is_autocast_enabled("cpu")


def unit_of(**scale: Any) -> TrainUnit:
    def objective(params: Tensor, state: tnt.State, batch: float) -> Any:
        return (params * batch).sum(), (state.buffers, {})

    return T.autocast(TrainUnit(train_step=tnt.minimize(objective, optim.sgd(0.5))), torch.float16, **scale)


def test_the_scale_grows_after_good_steps_and_backs_off_after_bad_ones():
    unit, w = unit_of(init_scale=3.0, growth_factor=4.0, backoff_factor=0.25, growth_interval=2), torch.ones(1)
    state = tnt.State(params=w, opt_state=optim.sgd(0.5).init(w), key=tnt.key(0))
    data = [1.0, 1.0, math.inf, 1.0, math.nan, 1.0, 1.0]
    events = [event for event in tnt.train_events(unit, state, data, max_epochs=1) if event.point == "step_end"]
    slots = [{name: float(x) for name, x in event.state.memory["loss_scale"].items()} for event in events]
    assert [slot["scale"] for slot in slots] == [3.0, 12.0, 3.0, 3.0, 0.75, 0.75, 3.0]
    assert [slot["growth_tracker"] for slot in slots] == [1, 0, 0, 1, 0, 1, 0]
    assert [slot["skipped"] for slot in slots] == [0, 0, 1, 1, 2, 2, 2]
    torch.testing.assert_close(events[-1].state.params, torch.tensor([1 - 5 * 0.5]))


def test_the_scale_never_grows_to_infinity():
    unit, w = unit_of(init_scale=3e38, growth_interval=1), torch.ones(1)
    state = tnt.State(params=w, opt_state=optim.sgd(0.5).init(w), key=tnt.key(0))
    slot = tnt.train(unit, state, [1e-3], max_epochs=1).memory["loss_scale"]
    assert slot["scale"] == torch.tensor(3e38) and slot["growth_tracker"] == 0


def test_other_dtypes_are_refused():
    with pytest.raises(UsageError, match="torch.float32; it casts to half precision. Write torch.bfloat16"):
        T.autocast(TrainUnit(train_step=tnt.minimize(max, optim.sgd(0.5))), torch.float32)

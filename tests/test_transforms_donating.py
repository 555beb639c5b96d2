"""`donate`: which steps can, and what the debug mode finds."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tnt_func as tnt
from tnt_func import optim
from tnt_func.donation import donates
from tnt_func.errors import ConsumedError, UsageError
from tnt_func.transforms.donating import Consumed
from tnt_func.transforms.seams import amended

T = tnt.transforms
BATCHES = [(torch.full((2, 3), x), torch.tensor([0, 1])) for x in (0.5, -1.0, 2.0)]


def made() -> tuple[tnt.FitUnit, tnt.State]:
    torch.manual_seed(0)
    return tnt.supervised(nn.Linear(3, 2), F.cross_entropy, optim.sgd(0.1, momentum=0.9), key=tnt.key(0))


def plain(state: tnt.State, batch: Any) -> Any:
    return state, {}


def test_whatever_is_around_a_step_donates_with_it():
    unit, _ = made()
    for change in (T.detect_anomaly, T.autocast, T.skip_nonfinite, lambda unit: T.microbatch(unit, 2)):
        changed = change(unit)
        assert not donates(changed.train_unit.train_step)
        assert donates(tnt.donate(changed).train_unit.train_step)
        assert donates(change(tnt.donate(unit)).train_unit.train_step)
    assert tnt.donate(unit).eval_unit == unit.eval_unit
    assert donates(T.detect_anomaly(tnt.donate(unit, debug=True)).train_unit.train_step)


def test_composed_steps_donate_where_one_of_them_can():
    one, function = made()[0].train_unit, tnt.TrainUnit(train_step=plain)
    for unit in (tnt.sequence(one, function), tnt.alternate(function, one), tnt.focus(one, "a")):
        assert not donates(unit.train_step) and donates(tnt.donate(unit).train_step)
    assert donates(tnt.donate(tnt.sequence(tnt.sequence(function, function), one)).train_step)
    for unit in (tnt.sequence(function, function), tnt.alternate(function), tnt.focus(function, "a")):
        with pytest.raises(UsageError, match="donate was given the step <function plain"):
            tnt.donate(unit)
    with pytest.raises(UsageError, match="donate was given the step <function plain"):
        tnt.donate(T.detect_anomaly(function))


def test_an_old_tensor_raises_in_debug_mode_and_says_what_it_was():
    unit, state = made()
    state = tnt.prepare(unit, tnt.keep(state))
    weight, container = state.params["weight"], state.params
    after = tnt.step(tnt.donate(unit, debug=True).train_unit, state, BATCHES[0])
    assert after.params["weight"].data_ptr() and type(after.params["weight"]) is Tensor
    assert isinstance(weight, Consumed) and container["weight"] is weight
    assert repr(weight) == "Consumed(float32[2, 3])" and weight.shape == (2, 3)
    for use in (
        lambda: weight + 1,
        lambda: torch.sum(weight),
        weight.clone,
        weight.tolist,
        lambda: weight[0],
        weight.item,
    ):
        with pytest.raises(ConsumedError, match="a tensor of a consumed state was used by"):
            use()


def test_a_hook_that_holds_on_to_a_tensor_is_found_in_debug_mode_only():
    unit, state = made()
    held: list[Tensor] = []

    def hold(state: tnt.State) -> tnt.State:
        held.append(state.params["weight"])
        return state.remember("moved", (state.params["weight"] - held[0]).abs().sum())

    callback = tnt.Callback(name="moved", memory=lambda state: torch.tensor(0.0), on_train_step_end=hold)
    run: dict[str, Any] = {"max_epochs": 1, "callbacks": [callback]}
    assert tnt.train(unit.train_unit, state, BATCHES, **run).memory["moved"] > 0
    held.clear()
    assert tnt.train(unit.train_unit, state, BATCHES, donate=True, **run).memory["moved"] == 0
    held.clear()
    with pytest.raises(ConsumedError, match="keep a copy before"):
        tnt.train(unit.train_unit, state, BATCHES, donate="debug", **run)


def test_memory_that_is_the_parameters_is_copied_and_not_found_fault_with():
    unit, state = made()
    average = T.ema(unit, 0.5)
    whole = tnt.fit(average, state, BATCHES, BATCHES, max_epochs=2)
    for mode in (True, "debug"):
        assert tnt.pytree.equal(tnt.fit(average, state, BATCHES, BATCHES, max_epochs=2, donate=mode), whole)


def test_skipping_a_step_leaves_everything_in_its_place():
    unit, state = made()
    unit = tnt.donate(T.skip_nonfinite(unit)).train_unit
    state = tnt.step(unit, tnt.prepare(unit, tnt.keep(state)), BATCHES[0])
    before, at = tnt.digest((state.params, state.opt_state)), state.params["weight"].data_ptr()
    state = tnt.step(unit, state, (torch.full((2, 3), float("nan")), torch.tensor([0, 1])))
    assert tnt.digest((state.params, state.opt_state)) == before and state.params["weight"].data_ptr() == at
    assert state.memory["skip_nonfinite"]["skipped"] == 1


@pytest.mark.parametrize("order", ["before", "after"])
def test_amendments_of_ones_own_see_the_state_before(order: str):
    """An amendment that is a plain function is given copies, wherever it stands."""
    unit, state = made()
    seen: list[Tensor] = []

    def look(before: tnt.State, after: tnt.State, slope: Any) -> Any:
        seen.append(after.params["weight"] - before.params["weight"])
        return after, slope

    wrapped = T.skip_nonfinite(unit) if order == "before" else unit
    wrapped = amended(wrapped, "look", lambda descent: look)
    wrapped = T.skip_nonfinite(wrapped) if order == "after" else wrapped
    plainly = tnt.train(wrapped.train_unit, state, BATCHES, max_epochs=1)
    donated = tnt.train(wrapped.train_unit, state, BATCHES, max_epochs=1, donate=True)
    assert tnt.pytree.equal(plainly, donated)
    assert all(a.equal(b) and a.abs().sum() > 0 for a, b in zip(seen[:3], seen[3:], strict=True))

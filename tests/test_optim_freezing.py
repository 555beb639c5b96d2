"""Frozen groups: nothing of them moves, in eager mode and traced, and they begin when they are thawed."""

import copy
from typing import Any

import torch
from torch import nn

import tnt_func as tnt
from tnt_func import callbacks, optim
from tnt_func import pytree as trees
from tnt_func.asserts import assert_max_compilations, assert_trees_close, assert_trees_equal

ROWS = torch.tensor([[1.0, 2.0, 1.0], [3.0, -1.0, 0.0], [1.0, 1.0, 1.0]], dtype=torch.float64)
DATA = [(rows[:, :2], rows[:, 2:]) for rows in ROWS.split(2)]


def in_front(name: str) -> bool:
    return name.startswith("0.")


def both() -> tuple[optim.Optimizer, dict[str, Any]]:
    optimizer = optim.grouped(optim.sgd(0.5), [(in_front, optim.frozen(optim.adamw(0.1)))])
    return optimizer, {"0.w": torch.ones(2, dtype=torch.float64), "1.w": torch.ones(2, dtype=torch.float64)}


def test_compiled_it_is_as_in_eager_mode():
    optimizer, params = both()
    state = optimizer.init(params)
    compiled = torch.compile(optimizer.update, fullgraph=True, backend="eager")
    with assert_max_compilations(1):
        for frozen in (1.0, 0.0, 0.0, 1.0):
            state = optim.set_hyperparameters(state, frozen=frozen)
            eager, traced = optimizer.update(params, state, params), compiled(params, state, params)
            assert_trees_close(traced, eager, rtol=1e-12, atol=0.0)
            assert torch.equal(eager[0]["0.w"], params["0.w"]) is bool(frozen)
            params, state = eager


def test_members_of_a_vmap_are_frozen_each_on_its_own():
    optimizer, w = optim.frozen(optim.adamw(0.1)), torch.ones(2, dtype=torch.float64)
    members = [optim.set_hyperparameters(optimizer.init(w), frozen=frozen) for frozen in (0.0, 1.0)]
    stacked = trees.map(lambda *leaves: torch.stack(leaves), *members)
    several = torch.func.vmap(optimizer.update, in_dims=(None, 0, None))(w, stacked, w)
    for index, member in enumerate(members):
        one = trees.map(lambda leaf, index=index: leaf[index], several)
        assert_trees_close(one, optimizer.update(w, member, w), rtol=1e-12, atol=0.0)


def test_a_frozen_window_is_not_flushed():
    w = torch.tensor(1.0)
    optimizer = optim.frozen(optim.accumulate(optim.sgd(1.0), every=2))
    state = optim.set_hyperparameters(optimizer.init(w), frozen=0.0)
    w, state = optimizer.update(torch.tensor(3.0), state, w)
    assert_trees_equal(optim.flush(optimizer, optim.set_hyperparameters(state, frozen=1.0), w)[0], torch.tensor(1.0))
    assert_trees_equal(optim.flush(optimizer, state, w)[0], torch.tensor(-2.0))


def test_frozen_parameters_begin_as_if_they_had_just_been_added():
    """torch's own way is to add the parameters to the optimizer at that point."""
    optimizer = optim.grouped(optim.sgd(0.05), [(in_front, optim.frozen(optim.adamw(0.01)))])
    first_net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)).double()
    unit, state = tnt.supervised(first_net, nn.functional.mse_loss, optimizer, key=tnt.key(0))
    head = {name: value for name, value in state.params.items() if name.startswith("1.")}
    net = copy.deepcopy(first_net)
    plain, late = torch.optim.SGD(net[1].parameters(), lr=0.05), None
    for epoch in range(4):
        late = torch.optim.AdamW(net[0].parameters(), lr=0.01) if epoch == 2 else late
        for inputs, targets in DATA:
            net.zero_grad()
            nn.functional.mse_loss(net(inputs), targets).backward()
            for optimizer in (plain, late):
                if optimizer is not None:
                    optimizer.step()
        if epoch == 1:
            still = tnt.fit(unit, state, DATA, DATA, max_epochs=2, callbacks=[callbacks.unfreeze_at(epochs=2)])
            assert all(torch.equal(still.params[name], state.params[name]) for name in state.params if name not in head)
            assert trees.equal(still.opt_state[0], state.opt_state[0])
    done = tnt.fit(unit, state, DATA, DATA, max_epochs=4, callbacks=[callbacks.unfreeze_at(epochs=2)])
    for name, value in net.state_dict().items():
        torch.testing.assert_close(done.params[name], value, rtol=1e-10, atol=1e-12)


def test_what_is_thawed_layer_by_layer_has_a_group_each():
    optimizer = optim.grouped(
        optim.sgd(0.1), [(lambda name, n=n: name == n, optim.frozen(optim.sgd(0.1))) for n in "ab"]
    )
    thaw = [callbacks.unfreeze_at(steps=steps, group=group, name=f"{group}") for group, steps in ((1, 1), (0, 3))]
    params = {name: torch.zeros(()) for name in "abc"}

    def train_step(state: tnt.State, batch: Any) -> Any:
        params, opt_state = optimizer.update(trees.map(torch.ones_like, state.params), state.opt_state, state.params)
        return state.replace(params=params, opt_state=opt_state), {}

    state = tnt.State(params=params, key=tnt.key(0), opt_state=optimizer.init(params))
    done = tnt.train(tnt.TrainUnit(train_step=train_step), state, [0] * 5, max_epochs=1, callbacks=thaw)
    assert {name: round(-float(w) / 0.1) for name, w in done.params.items()} == {"a": 2, "b": 4, "c": 5}


def test_what_is_frozen_again_by_hand_stays_so():
    thaw = callbacks.unfreeze_at(steps=0)
    opt_state = optim.frozen(optim.sgd(1.0)).init({})
    state = tnt.State(params={}, key=tnt.key(0), opt_state=opt_state, memory={"unfreeze_at": {"done": False}})
    state = thaw.on_train_step_start(state)
    assert float(optim.get(state.opt_state, "frozen")) == 0.0
    again = state.replace(opt_state=optim.set_hyperparameters(state.opt_state, frozen=1.0))
    assert thaw.on_train_step_start(again) is again

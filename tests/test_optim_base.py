"""Chains, groups, accumulation, and hyper-parameters as leaves."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

import tnt_func as tnt
from tnt_func import optim, schedules
from tnt_func import pytree as trees
from tnt_func.asserts import assert_max_compilations, assert_trees_close, assert_trees_equal
from tnt_func.errors import StructureError, UsageError
from tnt_func.optim import GradientTransform, Optimizer, OptState
from tnt_func.optim.layout import ByName, layout

Params = dict[str, Any]


def params() -> Params:
    draw = torch.Generator().manual_seed(0)
    return {"weight": torch.randn(3, 2, generator=draw).double(), "bias": torch.randn(3, generator=draw).double()}


def grads(seed: int, **missing: None) -> Params:
    draw = torch.Generator().manual_seed(100 + seed)
    return {key: torch.randn(p.shape, generator=draw).double() for key, p in params().items()} | missing


def run(optimizer: Optimizer, given: list[Params], state: Any = None) -> tuple[Params, Any]:
    p, state = params(), optimizer.init(params()) if state is None else state
    for g in given:
        p, state = optimizer.update(g, state, p)
    return p, state


def is_bias(path: str) -> bool:
    return "bias" in path


def test_an_optimizer_ends_a_chain():
    sgd = optim.sgd(0.1)
    with pytest.raises(UsageError, match="an Optimizer as link 0 of 2; it takes one at most, at the end"):
        optim.chain(sgd, optim.centralize())
    with pytest.raises(UsageError, match="link 2 of 4"):
        optim.chain(optim.centralize(), optim.chain(optim.centralize(), sgd), sgd)
    assert optim.chain(sgd) is sgd and optim.chain(sgd, optim.chain()) is sgd


def test_a_chain_of_transforms_is_a_transform():
    both = optim.chain(optim.clip_by_value(0.5), optim.add_decayed_weights(0.1))
    assert isinstance(both, GradientTransform) and isinstance(optim.chain(), GradientTransform)
    new, state = both.update(grads(0), both.init(params()), params())
    expected = {key: g.clamp(-0.5, 0.5) + 0.1 * params()[key] for key, g in grads(0).items()}
    assert_trees_close(new, expected, rtol=1e-15, atol=0.0)
    assert [int(part.step) for part in state] == [1, 1]


def test_links_act_in_order():
    a, b = optim.clip_by_value(0.5), optim.add_decayed_weights(10.0)
    assert not trees.equal(
        run(optim.chain(a, b, optim.sgd(0.1)), [grads(0)])[0], run(optim.chain(b, a, optim.sgd(0.1)), [grads(0)])[0]
    )


def test_a_group_may_be_the_same_optimizer_with_other_numbers():
    by_group = optim.grouped(optim.adamw(0.1), [(is_bias, {"lr": 0.5, "weight_decay": 0.0})])
    new, state = run(by_group, [grads(0), grads(1)])
    bias, _ = run(optim.adamw(0.5, weight_decay=0.0), [grads(0), grads(1)])
    weight, _ = run(optim.adamw(0.1), [grads(0), grads(1)])
    assert_trees_equal(new, {"weight": weight["weight"], "bias": bias["bias"]})
    assert [float(optim.get(state, "lr", group=n)) for n in (0, 1)] == [0.5, 0.1]
    assert state[0].slots["exp_avg"]["weight"] is None and state[1].slots["exp_avg"]["bias"] is None


def test_the_first_group_that_claims_a_parameter_has_it():
    optimizer = optim.grouped(
        optim.sgd(1.0), [(is_bias, optim.sgd(2.0)), (lambda path: True, optim.sgd(3.0)), (is_bias, optim.sgd(4.0))]
    )
    ones = {key: torch.ones_like(p) for key, p in params().items()}
    new, _ = run(optimizer, [ones])
    assert_trees_equal(new, {"weight": params()["weight"] - 3, "bias": params()["bias"] - 2})


def test_predicates_are_given_the_names_that_modules_give():
    asked: list[str] = []
    nested = {"body.0": {"bias": torch.ones(1)}, "heads": [torch.ones(1)]}
    optim.grouped(optim.sgd(1.0), [(lambda name: bool(asked.append(name)), {})]).init(nested)
    assert asked == ["body.0.bias", "heads.0"]
    module = torch.nn.Sequential(torch.nn.Linear(1, 1))
    names: list[str] = []
    optim.grouped(optim.sgd(1.0), [(lambda name: bool(names.append(name)), {})]).init(tnt.from_module(module).params)
    assert names == [name for name, _ in module.named_parameters()]


def test_imperative_and_accumulated_optimizers_go_into_groups():
    inner = optim.accumulate(optim.sgd(1.0), every=2)
    optimizer = optim.grouped(optim.from_torch(torch.optim.AdamW, lr=0.1), [(is_bias, inner)])
    p, state = run(optimizer, [grads(0), grads(1), grads(2)])
    adamw, _ = run(optim.from_torch(torch.optim.AdamW, lr=0.1), [grads(0), grads(1), grads(2)])
    assert_trees_equal(p["weight"], adamw["weight"])
    mean = (grads(0)["bias"] + grads(1)["bias"]) / 2
    assert_trees_close(p["bias"], params()["bias"] - mean, rtol=1e-15, atol=1e-15)
    flushed, state = optim.flush(optimizer, state, p)
    assert_trees_equal(flushed, {"weight": p["weight"], "bias": p["bias"] - grads(2)["bias"]})
    assert state[0].count == 0


def test_a_transform_inside_a_group_sees_the_group():
    optimizer = optim.grouped(optim.sgd(1.0), [(is_bias, optim.chain(optim.clip_by_global_norm(1.0), optim.sgd(1.0)))])
    big = {key: 100 * g for key, g in grads(0).items()}
    new, _ = run(optimizer, [big])
    step = params()["bias"] - new["bias"]
    assert step.norm().item() == pytest.approx(1.0, abs=1e-6)
    assert_trees_equal(new["weight"], params()["weight"] - big["weight"])


@pytest.mark.parametrize("make", [optim.adamw, lambda: optim.from_torch(torch.optim.AdamW)])
def test_a_window_is_an_update_with_the_mean(make: Callable[[], Optimizer]):
    new, state = run(optim.accumulate(make(), every=3), [grads(n) for n in range(7)])
    means = [trees.map(lambda *g: sum(g) / 3, *(grads(3 * k + n) for n in range(3))) for k in range(2)]
    assert_trees_close(new, run(make(), means)[0], rtol=1e-14, atol=1e-14)
    assert state.count == 1 and state.inner.step == 2 and state.seen.tolist() == [True, True]
    assert_trees_equal(state.total, grads(6))


def test_inside_a_window_parameters_are_themselves():
    optimizer, p = optim.accumulate(optim.adamw(), every=2), params()
    new, _ = optimizer.update(grads(0), optimizer.init(p), p)
    assert new is p


def test_flush_applies_what_there_is_and_only_once():
    optimizer = optim.chain(optim.clip_by_value(0.5), optim.accumulate(optim.sgd(1.0), every=4))
    p, state = run(optimizer, [grads(0), grads(1)])
    flushed, after = optim.flush(optimizer, state, p)
    mean = trees.map(lambda a, b: (a.clamp(-0.5, 0.5) + b.clamp(-0.5, 0.5)) / 2, grads(0), grads(1))
    assert_trees_close(flushed, trees.map(lambda x, g: x - g, params(), mean), rtol=1e-14, atol=1e-14)
    again, same = optim.flush(optimizer, after, flushed)
    assert again is flushed and trees.equal(same, after)
    assert after[1].count == 0 and optim.flush(optim.sgd(1.0), (), p) == (p, ())


def test_a_parameter_without_any_gradient_in_a_window_is_left_alone():
    optimizer = optim.accumulate(optim.adamw(0.1, weight_decay=0.5), every=2)
    new, state = run(optimizer, [grads(0, bias=None), grads(1, bias=None)])
    assert new["bias"].equal(params()["bias"]) and state.inner.slots["count"].tolist() == [1, 0]
    once, _ = run(optimizer, [grads(0, bias=None), grads(1)])
    halved, _ = run(optim.adamw(0.1, weight_decay=0.5), [{"weight": grads(1)["weight"], "bias": grads(1)["bias"] / 2}])
    assert_trees_close(once["bias"], halved["bias"], rtol=1e-14, atol=1e-14)


def test_low_precision_is_summed_in_float32():
    w = torch.ones((), dtype=torch.bfloat16)
    optimizer = optim.accumulate(optim.sgd(1.0), every=257)
    state = optimizer.init(w)
    for grad in [256.0] + [1.0] * 256:
        w, state = optimizer.update(torch.tensor(grad, dtype=torch.bfloat16), state, w)
    assert w.item() == 1 - torch.tensor(512 / 257).bfloat16().item()


def test_accumulation_is_the_same_traced():
    optimizer = optim.accumulate(optim.adamw(schedules.linear(0.1, 0.0, steps=5)), every=3)
    given = [grads(n, bias=None) for n in range(7)]
    expected = run(optimizer, given)
    p, state = params(), optimizer.init(params())
    update = torch.compile(optimizer.update, backend="eager", fullgraph=True)
    torch.compiler.reset()
    with assert_max_compilations(1):
        for g in given:
            p, state = update(g, state, p)
    assert_trees_close(
        (p, state.inner, state.total), (expected[0], expected[1].inner, expected[1].total), rtol=1e-12, atol=1e-12
    )
    vmapped = torch.func.vmap(optimizer.update, in_dims=({"weight": 0, "bias": None}, 0, 0))
    p, state = (trees.map(lambda x: torch.stack([x, x]), tree) for tree in (params(), optimizer.init(params())))
    for g in given:
        p, state = vmapped({"weight": torch.stack([g["weight"]] * 2), "bias": None}, state, p)
    assert_trees_close({key: x[1] for key, x in p.items()}, expected[0], rtol=1e-12, atol=1e-12)
    with pytest.raises(UsageError, match="so it runs eagerly"):
        torch.func.vmap(optimizer.flush)(state, p)


def test_gradients_that_would_broadcast_are_refused():
    optimizer = optim.accumulate(optim.sgd(1.0), every=2)
    with pytest.raises(StructureError, match=r"grads\['bias'\] is float64\[1\] and its parameter float64\[3\]"):
        optimizer.update(grads(0) | {"bias": torch.ones(1).double()}, optimizer.init(params()), params())


def test_a_group_changes_what_there_is():
    with pytest.raises(UsageError, match=r"'momentum' was given; the state's hyper-parameters are"):
        optim.grouped(optim.sgd(0.1), [(is_bias, {"momentum": 0.5})]).init(params())


def test_a_window_has_a_gradient():
    with pytest.raises(UsageError, match="every=0; a window has at least one"):
        optim.accumulate(optim.sgd(1.0), every=0)


def test_hyperparameters_are_float64_leaves_on_the_cpu():
    state = optim.adamw(1e-3).init(params())
    for name, leaf in trees.named_leaves(state.hyperparameters):
        assert trees.describe(leaf) == "float64[]", name
    assert {*state.hyperparameters} == {"lr", "betas", "eps", "weight_decay"}
    assert optim.get(state, "lr").item() == 1e-3


def test_hyperparameters_are_set_everywhere_or_in_one_group():
    optimizer = optim.chain(
        optim.clip_by_global_norm(1.0),
        optim.accumulate(optim.grouped(optim.adam(0.1), [(is_bias, {"lr": 0.2})]), every=2),
    )
    state = optimizer.init(params())
    every = optim.set_hyperparameters(state, lr=0.5, max_norm=2.0)
    assert [float(values["lr"]) for values in optim.hyperparameters(every)[1:]] == [0.5, 0.5]
    one = optim.set_hyperparameters(state, group=0, lr=0.5, betas=(0.1, 0.2))
    assert [float(optim.get(one, "lr", group=n)) for n in (0, 1)] == [0.5, 0.1]
    assert [float(optim.get(one, "betas", group=n)[1]) for n in (0, 1)] == [0.2, 0.999]
    assert optim.get(every, "max_norm").item() == 2.0 and optim.get(state, "max_norm").item() == 1.0
    assert trees.structure(every) == trees.structure(state)
    assert every[1].inner[0].slots is state[1].inner[0].slots


def test_a_schedule_counts_updates_and_shows_the_last():
    optimizer = optim.sgd(schedules.piecewise([0.5, 0.25, 0.125], boundaries=[1, 2]))
    state = optimizer.init(params())
    assert optim.get(state, "lr").item() == 0.5
    p, seen = params(), []
    for n in range(4):
        p, state = optimizer.update(grads(n), state, p)
        seen.append(optim.get(state, "lr").item())
    assert seen == [0.5, 0.25, 0.125, 0.125] and state.step == 4
    with pytest.raises(UsageError, match="lr=0.1; it follows the schedule"):
        optim.set_hyperparameters(state, lr=0.1)


def test_new_hyperparameters_are_cast_and_broadcast():
    state = optim.sgd(0.1).init(params())
    stacked = trees.map(lambda x: torch.stack([x, x, x]), state)
    assert optim.get(optim.set_hyperparameters(stacked, lr=0.5), "lr").tolist() == [0.5] * 3
    each = optim.set_hyperparameters(stacked, lr=torch.tensor([1, 2, 3]))
    assert trees.describe(optim.get(each, "lr")) == "float64[3]"


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (lambda s: optim.get(s, "momentum"), UsageError, r"'momentum' was given; .* are \['lr', 'weight_decay'\]"),
        (lambda s: optim.set_hyperparameters(s, rate=1.0), UsageError, "'rate' was given"),
        (lambda s: optim.get((s, s), "lr"), UsageError, "which 2 groups have"),
        (lambda s: optim.get((s, s), "lr", group=2), UsageError, "group=2 was given; 2 have 'lr'"),
        (lambda s: optim.set_hyperparameters(s, lr=torch.ones(2)), StructureError, r"in place of float64\[\]"),
        (lambda s: optim.set_hyperparameters(s, lr="fast"), StructureError, "lr='fast' was given"),
        (lambda s: optim.set_hyperparameters(s, lr=(0.1, 0.2)), StructureError, "in place of"),
    ],
    ids=range(7),
)
def test_hyperparameters_that_are_not_there_are_refused(
    wrong: Callable[[Any], Any], error: type[Exception], message: str
):
    with pytest.raises(error, match=message):
        wrong(optim.sgd(0.1).init(params()))


def test_states_of_ones_own_take_part():
    inner = optim.sgd(0.1)
    state = {"ours": [inner.init(params())], "other": torch.ones(1)}
    assert optim.get(optim.set_hyperparameters(state, lr=0.5), "lr").item() == 0.5
    assert isinstance(optim.set_hyperparameters(state, lr=0.5)["ours"][0], OptState)


def test_a_state_survives_a_copy():
    state = optim.chain(optim.clip_by_value(1.0), optim.adamw()).init(params())
    assert trees.equal(copy.deepcopy(state), state)


def test_labels_are_made_anew_for_another_layout():
    asked: list[str] = []
    label = ByName(lambda name: asked.append(name) or len(name))
    for tree in ({"a": torch.ones(1)}, {"a": torch.zeros(2)}, {"bb": torch.ones(1)}, [torch.ones(1)]):
        assert label(layout(tree)) == [len(asked[-1])]
    assert asked == ["a", "bb", "0"]


def test_trees_of_another_layout_are_refused():
    nested = {"layer": [torch.ones(1)]}
    optimizer = optim.sgd(0.1)
    with pytest.raises(StructureError, match=r"grads was given without .*\['layer'\]\[0\]"):
        optimizer.update({"layer": []}, optimizer.init(nested), nested)

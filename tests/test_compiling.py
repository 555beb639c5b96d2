import operator
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tnt_func as tnt
from tnt_func.compiling import Compiled, FallbackWarning, RecompilationWarning, compiled
from tnt_func.compiling.plans import Plan
from tnt_func.compiling.rewrites import part_biases, settle
from tnt_func.compiling.templates import giving, taking
from tnt_func.errors import ContractError, StructureError, TreeError, UsageError


def net() -> nn.Module:
    layers = nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 3)
    return nn.Sequential(*layers)


def data(*sizes: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 4, generator=generator), torch.randint(0, 3, (n,), generator=generator))
        for n in sizes or (6, 6, 3)
    ]


def fit_unit(**options: Any) -> tuple[tnt.FitUnit, tnt.State]:
    torch.manual_seed(0)
    optimizer = tnt.optim.chain(
        tnt.optim.clip_by_global_norm(1.0), tnt.optim.adamw(tnt.schedules.cosine(1e-2, steps=20))
    )
    return tnt.supervised(net(), F.cross_entropy, optimizer, key=tnt.key(0), **options)


def step_of(function: Any, **options: Any) -> Any:
    return compiled(tnt.TrainUnit(train_step=function), backend="aot_eager", **options).train_step


STATE = tnt.State(params={"w": torch.ones(2)}, key=tnt.key(0))


def test_a_whole_run_is_compiled_once_and_is_the_run():
    unit, state = fit_unit()
    fast = compiled(unit, backend="aot_eager")
    with tnt.asserts.assert_max_compilations(2):
        paused = tnt.fit(fast, state, data(), data(), max_steps=4, evaluate_every_n_steps=2)
        got = tnt.fit(fast, paused, data(), data(), max_epochs=3, evaluate_every_n_steps=2)
    paused = tnt.fit(unit, state, data(), data(), max_steps=4, evaluate_every_n_steps=2)
    expected = tnt.fit(unit, paused, data(), data(), max_epochs=3, evaluate_every_n_steps=2)
    tnt.asserts.assert_trees_close(got, expected, rtol=1e-4, atol=1e-6)


def test_donated_equals_not_donated_and_lies_where_it_lay():
    unit, state = fit_unit()
    fast = compiled(unit, backend="aot_eager")
    expected = tnt.fit(fast, state, data(), data(), max_epochs=2)
    tnt.asserts.assert_trees_equal(tnt.fit(tnt.transforms.donate(fast), state, data(), data(), max_epochs=2), expected)
    both = compiled(tnt.transforms.donate(unit), backend="aot_eager")
    tnt.asserts.assert_trees_equal(tnt.fit(both, state, data(), data(), max_epochs=2), expected)
    train = tnt.transforms.donate(fast).train_unit
    first = tnt.prepare(train, state)
    where = {name: leaf.data_ptr() for name, leaf in first.params.items()}
    after, _ = train.train_step(first, data()[0])
    assert {name: leaf.data_ptr() for name, leaf in after.params.items()} == where


def test_of_steps_in_turns_each_is_a_graph():
    def objective(w: Any, state: tnt.State, batch: torch.Tensor) -> Any:
        loss = ((w - batch) ** 2).sum()
        return loss, (state.buffers, {"loss": loss})

    def turn(name: str, lr: float) -> tnt.TrainUnit:
        step = tnt.minimize(objective, tnt.optim.sgd(lr), part=name)
        return tnt.TrainUnit(train_step=step, metrics={name: tnt.metrics.mean("loss")})

    unit = tnt.alternate(turn("a", 0.1), turn("b", 0.2), turns=(0, 1, 1))
    parts = {name: torch.zeros(2) for name in "ab"}
    opt_state = {name: tnt.optim.sgd(lr).init(parts[name]) for name, lr in (("a", 0.1), ("b", 0.2))}
    state, batches = tnt.State(params=parts, key=tnt.key(0), opt_state=opt_state), [torch.ones(2), torch.zeros(2)] * 2
    fast = compiled(unit, backend="aot_eager")
    with tnt.asserts.assert_max_compilations(2):
        got = tnt.train(fast, state, batches, max_epochs=2)
    tnt.asserts.assert_trees_close(got, tnt.train(unit, state, batches, max_epochs=2), rtol=1e-6, atol=1e-6)
    tnt.asserts.assert_trees_equal(tnt.train(tnt.donate(fast), state, batches, max_epochs=2), got)
    assert compiled(fast).train_step == fast.train_step


def test_gradients_alone_are_compiled_and_the_optimizer_is_as_it_is():
    unit, state = fit_unit()
    fast = compiled(unit, backend="aot_eager", form="gradients").train_unit
    with tnt.asserts.assert_max_compilations(1):
        got = tnt.train(fast, state, data(), max_epochs=2)
    tnt.asserts.assert_trees_close(got, tnt.train(unit.train_unit, state, data(), max_epochs=2), rtol=1e-4, atol=1e-6)
    donated = tnt.transforms.donate(fast)
    tnt.asserts.assert_trees_equal(tnt.train(donated, state, data(), max_epochs=2), got)
    with pytest.raises(UsageError, match="form='gradients' was given for the step <function"):
        step_of(lambda state, batch: (state, {}), form="gradients")(STATE, None)


def test_the_form_is_chosen_by_size(monkeypatch: pytest.MonkeyPatch):
    unit, state = fit_unit()
    for large, graphs in ((0, 0), (10**9, 1)):
        monkeypatch.setattr("tnt_func.compiling.steps.LARGE", large)
        fast = compiled(unit, backend="aot_eager").train_unit
        tnt.train(fast, state, data(), max_steps=1)
        assert isinstance(fast.train_step, Compiled) and len(fast.train_step.memo.plans.get(True, [])) == graphs


def test_inductor_runs_the_step():
    unit, state = fit_unit()
    fast = compiled(unit)
    expected = tnt.fit(unit, state, data(), data(), max_epochs=2)
    got = tnt.fit(fast, state, data(), data(), max_epochs=2)
    tnt.asserts.assert_trees_close(got, expected, rtol=1e-4, atol=1e-6)
    donated = tnt.train(tnt.transforms.donate(fast).train_unit, state, data(), max_epochs=2)
    tnt.asserts.assert_trees_equal(donated.params, got.params)


def test_another_structure_is_told_with_the_leaf_that_changed():
    step = step_of(lambda state, batch: (state.replace(params=tnt.treemath.scale(state.params, batch[0])), {}))
    step(STATE, (2.0, torch.ones(3)))
    with pytest.warns(
        RecompilationWarning, match=r"train_step is compiled again: batch\[0\] was float 2.0 and is float 3.0"
    ):
        state, _ = step(STATE, (3.0, torch.ones(3)))
    assert state.params["w"].tolist() == [3.0, 3.0]
    with pytest.warns(RecompilationWarning, match=r"batch\[1\] was float32\[3\] and is float64\[3\]"):
        step(STATE, (3.0, torch.ones(3).double()))
    assert [each.number for each in step.compilations] == [1, 2, 3]
    step(STATE, (2.0, torch.ones(5)))
    assert len(step.compilations) == 3


def test_a_size_that_the_step_reads_is_compiled_for():
    step = step_of(lambda state, batch: (state, {"size": len(batch), "sum": batch.sum()}))
    assert step(STATE, torch.ones(3))[1]["size"] == 3
    with pytest.warns(RecompilationWarning, match=r"batch was float32\[3\] and is float32\[4\]"):
        assert step(STATE, torch.ones(4))[1]["size"] == 4
    open_step = step_of(lambda state, batch: (state, {"size": batch.shape[0], "sum": batch.sum()}))
    outputs = [open_step(STATE, torch.ones(n))[1] for n in (3, 4)]
    assert [(x["size"], x["sum"].item()) for x in outputs] == [(3, 3.0), (4, 4.0)]


def test_a_batch_that_holds_a_tensor_twice():
    step = step_of(lambda state, batch: (state, batch[0] + 2 * batch[1]))
    x = torch.ones(2)
    assert step(STATE, (x, x))[1].tolist() == [3.0, 3.0]
    assert step(STATE, (x, 3 * x))[1].tolist() == [7.0, 7.0]
    assert len(step.compilations) == 1


def test_what_comes_back_as_it_was_given_is_the_very_same():
    step = step_of(lambda state, batch: (state, {"batch": batch, "view": batch[0], "params": state.params}))
    batch = torch.ones(3)
    state, output = step(STATE, batch)
    assert state is STATE and output["batch"] is batch and output["params"]["w"] is STATE.params["w"]
    assert output["view"].untyped_storage().data_ptr() != batch.untyped_storage().data_ptr()


def test_params_that_change_places_are_donated():
    def swap(state: tnt.State, batch: Any) -> Any:
        return state.replace(params={"a": state.params["b"], "b": state.params["a"]}), {}

    step = step_of(swap).donating()
    state = STATE.replace(params={"a": torch.zeros(2), "b": torch.ones(2)})
    after, _ = step(state, None)
    assert (after.params["a"].tolist(), after.params["b"].tolist()) == ([1.0, 1.0], [0.0, 0.0])


@pytest.mark.parametrize(
    ("function", "error", "match"),
    [
        (
            lambda state, batch: (state, {"x": batch.sum().item()}),
            ContractError,
            "looks at the value of a tensor; .*line",
        ),
        (lambda state, batch: (state, {}) if batch.sum() > 0 else None, ContractError, "looks at the value"),
        (lambda state, batch: (state, {"seed": state.key.seed}), ContractError, "reads state.key"),
        (lambda state, batch: (state, {"n": state.progress.train.steps}), ContractError, "reads state.progress"),
        (
            lambda state, batch: (state, {"x": state.memory["other"] + 1}),
            ContractError,
            r"reads state.memory\['other'\]",
        ),
        (lambda state, batch: (state.remember("new", batch), {}), StructureError, r"wrote state.memory\['new'\]"),
        (lambda state, batch: (state.request_stop("enough"), {}), ContractError, "stopping is for hooks"),
        (lambda state, batch: state, ContractError, "returned State"),
    ],
    ids=["item", "branch", "key", "progress", "memory", "new slot", "stop", "no output"],
)
def test_what_a_compiled_step_must_not_do(function: Any, error: type[Exception], match: str):
    with pytest.raises(error, match=match):
        step_of(function)(STATE.remember("other", torch.ones(1)), torch.ones(3))


def test_a_step_that_cannot_be_compiled_runs_as_it_is_only_where_that_is_allowed():
    step = step_of(lambda state, batch: (state, {"x": batch.sum().item()}), fallback=True)
    with pytest.warns(FallbackWarning, match="train_step runs as it is, for train_step looks at the value of a tensor"):
        assert step(STATE, torch.ones(3))[1] == {"x": 3.0}
    assert step(STATE, torch.ones(4))[1] == {"x": 4.0} and not step.compilations


def test_a_state_that_requires_grad_is_refused():
    state = STATE.replace(params={"w": torch.ones(2, requires_grad=True)})
    with pytest.raises(UsageError, match=r"params\['w'\], which requires grad"):
        step_of(lambda state, batch: (state, {}))(state, None)


def test_compilations_are_counted_and_told():
    told: list[Any] = []
    unit = compiled(
        tnt.TrainUnit(train_step=lambda state, batch: (state, batch + 1)), backend="aot_eager", on_compile=told.append
    )
    with pytest.raises(TreeError, match="train_step: compiled for the first time\n1 graphs were compiled"):
        with tnt.asserts.assert_max_compilations(0):
            unit.train_step(STATE, torch.ones(2))
    assert [(each.step, each.done) for each in told] == [("train_step", False), ("train_step", True)]


def test_draws_are_those_of_the_scope():
    step = step_of(lambda state, batch: (state, {"noise": torch.rand_like(batch)}))
    outputs = []
    for _ in range(2):
        with tnt.rng.scope(tnt.key(3)):
            outputs.append(step(STATE, torch.ones(3))[1]["noise"])
    with tnt.rng.scope(tnt.key(3)):
        assert all(torch.equal(torch.rand(3), noise) for noise in outputs[:1])
    assert torch.equal(*outputs)


def test_a_size_of_one_is_a_structure_of_its_own():
    step = step_of(lambda state, batch: (state, {"mean": batch.mean()}))
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        outputs = [step(STATE, torch.ones(n))[1]["mean"].item() for n in (4, 1, 3, 1)]
    assert outputs == [1.0] * 4 and len(step.compilations) == 2


@pytest.mark.parametrize(
    "tree",
    [{"a": 1, "b": {"c": (2, [3])}}, [], (1, (2, 3)), STATE, {"x": tnt.optim.sgd(0.1).init({"w": torch.ones(2)})}],
    ids=["dicts", "empty", "tuples", "State", "OptState"],
)
def test_trees_are_taken_apart_as_torch_does_and_put_together_again(tree: Any):
    leaves = tnt.pytree.leaves(tree)
    taken = taking({"x": tree})({"x": tree})
    assert taken is not None and len(taken) == len(leaves) and all(map(operator.is_, taken, leaves))
    assert tnt.pytree.equal(giving({"x": (tree, [("old", n) for n in range(len(leaves))])})([], leaves)["x"], tree)
    assert taking({"x": tree})({"x": {"other": tree}}) is None


def test_a_plan_is_for_what_it_was_made_for():
    plan = Plan(lambda parts: {"y": parts["x"].T @ parts["x"]}, {"x": torch.ones(3, 2)}, backend="aot_eager")
    assert plan.take({"x": torch.ones(2, 3).T}) is None
    assert plan.take({"x": torch.ones(3, 2, dtype=torch.float64)}) is None
    assert plan.take({"x": [torch.ones(3, 2)]}) is None


def test_a_part_is_donated_inside_a_graph():
    unit, state = fit_unit()
    focused = tnt.focus(unit.train_unit, "part")
    wide = {name: {"part": getattr(state, name)} for name in ("params", "buffers", "opt_state")}
    state = state.replace(**wide)
    donated = compiled(tnt.donate(focused), backend="aot_eager"), tnt.donate(compiled(focused, backend="aot_eager"))
    expected = tnt.train(compiled(focused, backend="aot_eager"), state, data(), max_epochs=2)
    for fast in donated:
        tnt.asserts.assert_trees_equal(tnt.train(fast, state, data(), max_epochs=2), expected)


def test_a_step_that_draws_nothing_is_not_seeded_until_a_structure_that_draws_comes(monkeypatch: pytest.MonkeyPatch):
    def step(state: tnt.State, batch: torch.Tensor) -> Any:
        noise = torch.rand(3) if batch.dim() == 2 else torch.zeros(3)
        return state.replace(params=state.params + batch.sum() + noise), {}

    eager = tnt.TrainUnit(train_step=step)
    first = tnt.State(params=torch.zeros(3), key=tnt.key(0))
    batches = [torch.ones(2), torch.ones(2), torch.ones(2, 2), torch.ones(2), torch.ones(2, 2)]
    seeds: list[Any] = []
    monkeypatch.setattr("tnt_func.rng.seed", lambda *args, seed=tnt.rng.seed: (seeds.append(args), seed(*args)))
    expected = tnt.train(eager, first, batches, max_epochs=1)
    each = len(seeds) // len(batches)
    for donate in (False, True):
        seeds.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RecompilationWarning)
            fast = compiled(eager, backend="aot_eager")
            got = tnt.train(fast, first, batches, max_epochs=1, donate=donate)
        tnt.asserts.assert_trees_equal(got.params, expected.params)
        assert each == 1 and len(seeds) == 4  # The second step alone draws nothing for certain.


@pytest.mark.parametrize("members", [0, 3])
def test_what_many_elements_share_is_calculated_once(members: int):
    from torch.fx.experimental.proxy_tensor import make_fx

    optimizer = tnt.optim.adamw(1e-2)

    def update(w: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        return optimizer.update({"w": grad}, optimizer.init({"w": w}), {"w": w})[0]["w"]

    shape = (members, 8, 8) if members else (8, 8)
    given = torch.linspace(-1, 1, 64 * max(members, 1)).view(shape), torch.ones(shape)
    module = make_fx(torch.vmap(update) if members else update)(*given)
    expected = module(*given)
    assert settle(module) > 0 and torch.equal(module(*given), expected)


def test_biases_are_parted_where_that_rounds_no_more():
    from torch.fx.experimental.proxy_tensor import make_fx

    torch.manual_seed(0)
    for dtype, parted in ((torch.float32, 1), (torch.float64, 1), (torch.bfloat16, 0)):
        given = torch.randn(2, dtype=dtype), torch.randn(3, 4, dtype=dtype), torch.randn(4, 2, dtype=dtype)
        module = make_fx(torch.addmm)(*given)
        expected = module(*given)
        assert part_biases(module) == parted
        torch.testing.assert_close(module(*given), expected, rtol=1e-6, atol=1e-6)
        module = make_fx(lambda *args: torch.addmm(*args, beta=2))(*given)
        assert part_biases(module) == 0

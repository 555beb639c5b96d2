import math
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tnt_func as tnt
from tnt_func import callbacks, ensembles, optim, pytree, transforms
from tnt_func.ensembles import spread, stop_members
from tnt_func.errors import ContractError, DataError, StructureError, UsageError
from tnt_func.metrics import Metric
from tnt_func.testing import check_ensemble, check_unit

RATES = (0.02, 0.1, 0.5)


def network(seed: int, *inside: nn.Module) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), *inside, nn.Tanh(), nn.Linear(4, 2)).double()


def data(count: int, *leading: int) -> list[Any]:
    noise = torch.Generator().manual_seed(1)
    inputs = [torch.randn(*leading, 6, 3, generator=noise, dtype=torch.float64) for _ in range(count)]
    return [(x, torch.randint(0, 2, (*leading, 6), generator=noise)) for x in inputs]


def accuracy(output: Any, targets: Any) -> Any:
    return (output.argmax(-1) == targets).double().mean()


def members(optimizer: optim.Optimizer, *inside: nn.Module) -> tuple[tnt.FitUnit, list[tnt.State]]:
    made = [
        tnt.supervised(
            network(seed, *inside), F.cross_entropy, optimizer, key=tnt.key(0), metrics={"accuracy": accuracy}
        )
        for seed in range(len(RATES))
    ]
    states = [
        state.replace(opt_state=optim.set_hyperparameters(state.opt_state, lr=rate))
        for (_, state), rate in zip(made, RATES, strict=True)
    ]
    return made[0][0], states


def test_what_was_stacked_comes_out_as_it_was():
    memory = {"counts": {"n": 3, "best": 0.1, "done": True, "name": "same", "none": None}}
    states = [
        tnt.State(params={"w": torch.rand(2)}, key=tnt.key(0), memory={**memory, "ema": torch.tensor(x)}, buffers=[x])
        for x in (1, 2)
    ]
    for before, after in zip(states, tnt.unstack(tnt.stack(states)), strict=True):
        assert pytree.diff(before, after, "state") == []
    prepared = [tnt.prepare(unit, state) for unit, state in [(members(optim.sgd(0.1))[0], states[0])] * 2]
    assert pytree.equal(tnt.member(tnt.stack(prepared), 1), prepared[1])


def test_a_member_shares_no_memory_with_the_ensemble():
    state = tnt.stack([tnt.State(params=torch.zeros(2), key=tnt.key(0))] * 2)
    tnt.member(state, 0).params.fill_(1.0)
    assert torch.equal(state.params, torch.zeros(2, 2))


IDLE = tnt.TrainUnit(train_step=lambda state, batch: (state, {}))
SOME = tnt.State(params=torch.zeros(2), key=tnt.key(0))
OTHERS: dict[str, tuple[Any, tnt.State]] = {
    "the keys": (UsageError, SOME.replace(key=tnt.key(1))),
    "go in step": (UsageError, SOME.request_stop("enough")),
    "ensembles are not nested": (UsageError, tnt.stack([SOME])),
    r"params: float32\[2\] and float32\[3\]": (StructureError, SOME.replace(params=torch.zeros(3))),
    "the structure of params": (StructureError, SOME.replace(params={"w": torch.zeros(2)})),
}


@pytest.mark.parametrize("words", OTHERS)
def test_states_that_do_not_belong_together_are_refused(words: str):
    error, state = OTHERS[words]
    with pytest.raises(error, match=words):
        tnt.stack([SOME, state])
    assert tnt.stack([SOME, SOME.replace(key=tnt.key(1))], key=tnt.key(2)).key == tnt.key(2)


WRONG: dict[str, Callable[[], Any]] = {
    "given no state": lambda: tnt.stack([]),
    "has 1 members. Write 0": lambda: tnt.member(tnt.stack([SOME]), 1),
    r"Write tnt.stack\(\[state": lambda: tnt.unstack(SOME),
    "size=0": lambda: tnt.ensemble(IDLE, 0),
    "chunk_size=0": lambda: tnt.ensemble(IDLE, 1, chunk_size=0),
    "a bool for each": lambda: stop_members(tnt.stack([SOME]), torch.tensor([1.0])),
    "write over each other": lambda: tnt.ensemble(tnt.donate(members(optim.sgd(0.1))[0]), 2),
    r"Write tnt.donate\(tnt.compiled\(tnt.ensemble\(": lambda: tnt.donate(tnt.ensemble(members(optim.sgd(0.1))[0], 2)),
    "given float32": lambda: spread(torch.tensor(1.0)),
    "a state of 3 members": lambda: tnt.train(
        tnt.ensemble(members(optim.sgd(0.1))[0].train_unit, 2),
        tnt.stack(members(optim.sgd(0.1))[1]),
        data(1),
        max_epochs=1,
    ),
    "Write tnt.stack": lambda: tnt.train(tnt.ensemble(IDLE, 2), SOME, [1], max_epochs=1),
}


@pytest.mark.parametrize("words", WRONG)
def test_what_cannot_work_is_refused(words: str):
    with pytest.raises(UsageError, match=words):
        WRONG[words]()


def test_a_batch_of_each_needs_an_axis_of_members():
    unit, states = members(optim.sgd(0.1))
    whole = tnt.ensemble(unit.train_unit, 3, batch="own")
    with pytest.raises(StructureError, match="batch\\[0\\] is float64\\[6, 3\\], and the ensemble has 3 members"):
        tnt.train(whole, tnt.stack(states), data(1), max_epochs=1)


@pytest.mark.parametrize("loop", [False, True])
def test_an_ensemble_keeps_every_law(loop: bool):
    unit, states = members(optim.adamw(0.01), nn.Dropout(0.2))
    unit = transforms.ema(tnt.attach(unit, callbacks.early_stopping("loss", patience=1)), 0.5)
    whole = tnt.ensemble(unit.train_unit if loop else unit, 3, loop=loop)
    check_unit(whole, tnt.stack(states), data(2), callbacks=[stopping_at(0.3)], max_epochs=2)


def stopping_at(accuracy: float) -> tnt.Callback:
    """A callback of the whole run, which sees all members at once."""
    return tnt.Callback(
        name="good_enough",
        on_train_step_end=lambda state: stop_members(state, state.output["accuracy"] > accuracy, "good enough"),
    )


def test_a_member_goes_on_alone_where_the_ensemble_left_it():
    unit, states = members(optim.adamw(0.01))
    unit = tnt.attach(unit, callbacks.keep_best("loss"))
    whole, state = tnt.ensemble(unit, 3), tnt.stack(states)
    answers = iter([False] * 5 + [True])
    paused = tnt.fit(whole, state, data(3), data(1), max_epochs=3, pause_when=lambda: next(answers))
    assert paused.progress.train.is_open
    whole_end = tnt.fit(whole, paused, data(3), data(1), max_epochs=3)
    alone = tnt.fit(unit, tnt.member(paused, 1), data(3), data(1), max_epochs=3)
    for part in ("params", "opt_state", "metrics", "memory"):
        one, other = getattr(tnt.member(whole_end, 1), part), getattr(alone, part)
        tnt.asserts.assert_trees_close(one, other, rtol=0, atol=1e-12)


def test_a_checkpoint_brings_every_member_back():
    unit, states = members(optim.adamw(0.01))
    unit = tnt.attach(unit, callbacks.early_stopping("loss"), callbacks.reduce_lr_on_plateau("loss"))
    whole, state = tnt.ensemble(unit, 3), tnt.stack(states)
    half = tnt.fit(whole, state, data(2), data(1), max_epochs=2)
    with tempfile.TemporaryDirectory() as directory:
        tnt.checkpoint.save(f"{directory}/half", half)
        back = tnt.checkpoint.restore(f"{directory}/half", like=tnt.prepare(whole, state))
        listed = tnt.checkpoint.inspect(f"{directory}/half").metrics["eval"]
    assert pytree.diff(half, back) == []
    losses = tnt.metrics.compute(half, "eval")["loss"]
    assert listed["loss"] == losses.mean().item() and listed["loss.2"] == losses[2].item()


@pytest.mark.parametrize("loop", [False, True])
def test_a_member_that_stops_stands_still_and_the_rest_goes_on(loop: bool):
    unit, states = members(optim.sgd(0.1, momentum=0.9))
    first = tnt.Callback(
        name="first",
        on_train_step_end=lambda state: stop_members(
            state, torch.tensor([state.progress.train.steps == 2, False, False])
        ),
    )
    whole, state = tnt.ensemble(unit.train_unit, 3, loop=loop), tnt.stack(states)
    seen = [
        tnt.unstack(event.state)
        for event in tnt.train_events(whole, state, data(4), max_epochs=2, callbacks=[first])
        if event.point == "step_done"
    ]
    assert len(seen) == 8
    two, last = seen[1][0], seen[-1][0]
    assert pytree.equal((two.params, two.opt_state), (last.params, last.opt_state))
    assert not pytree.equal(seen[1][1].params, seen[-1][1].params)
    assert not pytree.equal(two.metrics, last.metrics)


def test_when_all_have_stopped_so_does_the_run_until_they_are_revived():
    unit, states = members(optim.sgd(0.1))
    unit = tnt.attach(unit, callbacks.early_stopping("accuracy", stopping_threshold=-1.0, mode="max"))
    whole = tnt.ensemble(unit, 3)
    events = [*tnt.fit_events(whole, tnt.stack(states), data(2), data(1), max_epochs=5)]
    end = events[-1].state
    assert end.progress.train.epochs == 1 and ensembles.stopped(end).all()
    assert events[-1].reason is not None and events[-1].reason.startswith("all 3 members have stopped: early_stopping:")
    with pytest.raises(UsageError, match="all 3 members of the ensemble have stopped already"):
        tnt.fit(whole, end, data(2), data(1), max_epochs=5)
    assert tnt.fit(whole, ensembles.revive(end), data(2), data(1), max_epochs=5).progress.train.epochs == 2


def test_nan_in_one_member_touches_no_other():
    unit, states = members(optim.chain(optim.clip_by_global_norm(1.0), optim.adam(0.01)))
    spoilt = pytree.map(lambda leaf: leaf * math.nan, states[1].params)
    whole = tnt.ensemble(unit, 3)
    clean = tnt.fit(whole, tnt.stack(states), data(2), data(1), max_epochs=2)
    stops = tnt.Callback(
        name="nan", on_train_step_end=lambda state: stop_members(state, ~state.output["loss"].isfinite())
    )
    broken = tnt.stack([states[0], states[1].replace(params=spoilt), states[2]])
    for given in ([], [stops]):
        end = tnt.fit(whole, broken, data(2), data(1), max_epochs=2, callbacks=given)
        assert tnt.metrics.compute(end, "eval")["loss"].isnan().tolist() == [False, True, False]
        for index in (0, 2):
            assert pytree.equal(tnt.member(end, index).params, tnt.member(clean, index).params)
    skipping = tnt.ensemble(transforms.skip_nonfinite(unit), 3)
    end = tnt.fit(skipping, broken, data(2), data(1), max_epochs=2)
    assert tnt.member(end, 1).memory["skip_nonfinite"]["skipped"] == 4


def test_optimizers_that_do_not_run_under_vmap_are_looped_over_and_it_is_said():
    unit, states = members(
        optim.chain(optim.clip_by_value(1.0), optim.from_torch(torch.optim.AdamW, lr=0.1, fused=True))
    )
    with pytest.warns(UserWarning, match="3 members one after another: their optimizer does not run") as said:
        tnt.ensemble(unit, 3)
    assert [warning.filename for warning in said] == [__file__]
    whole = tnt.ensemble(unit, 3, loop=True)
    end = tnt.fit(whole, tnt.stack(states), data(2), data(1), max_epochs=2)
    for index, state in enumerate(states):
        alone, member = tnt.fit(unit, state, data(2), data(1), max_epochs=2), tnt.member(end, index)
        assert pytree.equal((member.params, member.opt_state), (alone.params, alone.opt_state))


def test_a_step_that_vmap_does_not_take_is_told_what_to_do():
    def step(state: tnt.State, batch: Any) -> Any:
        return (state if state.params.sum() > 0 else state.replace(params=-state.params)), {}

    unit = tnt.TrainUnit(train_step=step)
    with pytest.raises(RuntimeError, match="data-dependent control flow") as caught:
        tnt.train(tnt.ensemble(unit, 2), tnt.stack([SOME, SOME]), [1], max_epochs=1)
    assert "ensemble(..., loop=True)" in caught.value.__notes__[0]
    tnt.train(tnt.ensemble(unit, 2, loop=True), tnt.stack([SOME, SOME]), [1], max_epochs=1)


def test_an_error_that_is_not_of_vmap_is_not_laid_to_it():
    unit, states = members(optim.sgd(0.1))
    with pytest.raises(DataError, match="a dict of 1") as caught:
        tnt.train(tnt.ensemble(unit, 3).train_unit, tnt.stack(states), [{"x": torch.ones(2, 3)}], max_epochs=1)
    assert not hasattr(caught.value, "__notes__")


def test_a_hook_that_returns_no_state_is_named():
    nothing: Any = lambda state: None  # noqa: E731
    unit = tnt.TrainUnit(train_step=lambda state, batch: (state, {}), on_train_step_end=nothing)
    with pytest.raises(ContractError, match="TrainUnit.on_train_step_end returned None for a member"):
        tnt.train(tnt.ensemble(unit, 1), tnt.stack([SOME]), [1], max_epochs=1)


def test_a_step_that_touches_the_key_is_found_out():
    unit = tnt.TrainUnit(train_step=lambda state, batch: (state.replace(key=tnt.key(5)), {}))
    with pytest.raises(ContractError, match="changed state.key"):
        tnt.train(tnt.ensemble(unit, 1), tnt.stack([SOME]), [1], max_epochs=1)


def test_numbers_of_python_are_counted_for_each_member():
    unit = tnt.TrainUnit(
        train_step=lambda state, batch: (state.remember("steps", state.memory["steps"] + 1), {}),
        on_train_step_end=lambda state: state.remember("seen", {"n": state.memory["seen"]["n"] + 1, "at": 0.5}),
        memory={"steps": lambda state: 0, "seen": lambda state: {"n": 0, "at": 0.0}},
    )
    end = tnt.train(tnt.ensemble(unit, 2), tnt.stack([SOME, SOME]), [1, 2, 3], max_epochs=1)
    assert tnt.member(end, 1).memory["steps"] == 3
    assert tnt.member(end, 1).memory["seen"] == {"n": 3, "at": 0.5} and type(tnt.member(end, 1).memory["steps"]) is int


def test_a_metric_that_is_not_elementwise_reads_each_members_output():
    worst = Metric(lambda: tnt.metrics.Maximum(torch.tensor(0.0)), lambda o: tnt.metrics.Maximum(o["rows"].max()))
    vectors = tnt.metrics.mean("rows", weight="loss")
    unit = tnt.TrainUnit(
        train_step=lambda state, batch: (state, {"rows": state.params * batch, "loss": state.params.sum()}),
        metrics={"worst": worst, "vectors": vectors},
    )
    states = [SOME.replace(params=torch.tensor(x)) for x in ([1.0, 2.0], [5.0, 4.0])]
    end = tnt.train(tnt.ensemble(unit, 2), tnt.stack(states), [1.0, 3.0], max_epochs=1)
    found = tnt.metrics.compute(end, "train")
    assert found["worst"].tolist() == [6.0, 15.0] and found["vectors"].tolist() == [[2.0, 4.0], [10.0, 8.0]]


def test_members_may_have_batches_of_their_own():
    unit, states = members(optim.adamw(0.01))
    check_ensemble(unit, states, data(3, 3), batch="own", max_epochs=1)


def test_batchnorm_and_every_kind_of_chunk():
    unit, states = members(optim.sgd(0.1, momentum=0.9), nn.BatchNorm1d(4))
    ends = [
        tnt.fit(tnt.ensemble(unit, 3, chunk_size=chunk), tnt.stack(states), data(2), data(1), max_epochs=2)
        for chunk in (None, 1, 2, 5)
    ]
    for end in ends[1:]:
        tnt.asserts.assert_trees_close(end.buffers, ends[0].buffers, rtol=0, atol=1e-13)
        tnt.asserts.assert_trees_close(end.params, ends[0].params, rtol=0, atol=1e-13)


def test_predictions_have_an_axis_of_members():
    unit, states = members(optim.sgd(0.1))
    whole = tnt.ensemble(unit, 3)
    assert whole.predict_unit is not None and unit.predict_unit is not None
    (outputs,) = tnt.predict(whole.predict_unit, tnt.stack(states), data(1))[1]
    (alone,) = tnt.predict(unit.predict_unit, states[2], data(1))[1]
    assert outputs.shape == (3, 6, 2) and torch.allclose(outputs[2], alone)


def test_records_have_the_mean_and_every_member():
    unit, states = members(optim.sgd(0.1))
    history = tnt.observers.History()
    recording = tnt.observers.recorder(history, every_n_steps=1, hyperparameters=["lr"])
    end = tnt.fit(tnt.ensemble(unit, 3), tnt.stack(states), data(1), data(1), max_epochs=1, observers=[recording])
    step, evaluated = history[0], history[-1]
    assert set(step.metrics) >= {"loss", "loss.std", "loss.0", "loss.1", "loss.2", "optim.lr.0", "optim.lr.2"}
    assert step.metrics["optim.lr.2"] == 0.5
    found = spread(tnt.metrics.compute(end, "eval")["loss"], quantiles=(0.0, 1.0))
    rows = {row.phase: row.metrics for row in history if row.kind == "epoch"}
    assert rows["eval"]["loss"] == pytest.approx(found.mean.item())
    assert rows["eval"]["loss.std"] == pytest.approx(found.std.item())
    losses = [rows["eval"][f"loss.{index}"] for index in range(3)]
    assert (min(losses), max(losses)) == pytest.approx((found.quantiles[0.0].item(), found.quantiles[1.0].item()))
    assert evaluated.metrics["loss.0"] > 0


def test_a_compiled_and_donated_ensemble_gives_the_same_numbers_and_is_compiled_once():
    unit, states = members(optim.adamw(0.01), nn.Dropout(0.2))
    unit = tnt.attach(transforms.skip_nonfinite(unit), callbacks.early_stopping("loss", patience=1, min_delta=0.01))
    whole, state = tnt.ensemble(unit, 3), tnt.stack(states)
    compiled = tnt.donate(tnt.compiled(whole, dynamic=False, backend="aot_eager"))
    ends = [tnt.fit(one, state, data(3), data(1), max_epochs=4) for one in (whole, compiled)]
    assert ensembles.stopped(ends[0]).any()
    for part in ("params", "buffers", "opt_state", "metrics", "memory"):
        one, other = (getattr(end, part) for end in ends)
        tnt.asserts.assert_trees_close(one, other, rtol=0, atol=1e-12)
    steps: list[Any] = [compiled.train_unit.train_step, compiled.eval_unit.eval_step]
    assert [len(step.compilations) for step in steps] == [1, 1]


def test_the_console_tells_mean_and_deviation(capsys: pytest.CaptureFixture[str]):
    unit, states = members(optim.sgd(0.1))
    unit, console = tnt.ensemble(unit.train_unit, 3), tnt.observers.console()
    tnt.train(unit, tnt.stack(states), data(1), max_epochs=1, observers=[console])
    names = [part.split()[0] for part in capsys.readouterr().out.partition(": ")[2].split(", ")]
    assert names == ["loss", "loss.std", "accuracy", "accuracy.std"]


def test_one_member_spreads_by_nothing():
    assert spread(torch.tensor([2.0])).std == 0.0

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tnt_func as tnt
from tnt_func.errors import ConsumedError, ContractError, StructureError, UsageError
from tnt_func.testing.fusing import check_fused

Batch = tuple[torch.Tensor, torch.Tensor]


def data(*sizes: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 4, generator=generator), torch.randn(n, 3, generator=generator)) for n in sizes]


def fit_unit(*layers: nn.Module, **options: Any) -> tuple[tnt.FitUnit, tnt.State]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), *layers, nn.Tanh(), nn.Linear(6, 3))
    optimizer = tnt.optim.adamw(tnt.schedules.cosine(1e-2, steps=20))
    return tnt.supervised(net, F.mse_loss, optimizer, key=tnt.key(0), **options)


UNIT, STATE = fit_unit()
FAST = tnt.compiled(UNIT, backend="aot_eager")
SIX = data(5, 5, 5, 5, 5, 3)


def counted(state: tnt.State) -> tnt.State:
    return state.remember("seen", state.memory["seen"] + state.output["loss"] * state.metrics["train"]["loss"].value())


SEEN = tnt.Callback(name="seen", memory=lambda state: torch.zeros((), dtype=torch.float64), on_train_step_end=counted)


def told(events: Iterator[tnt.Event]) -> list[Any]:
    """What every step tells: the point, the counters, the batch, the output and the metrics."""
    return sorted(
        (event.state.progress.train, event.point, tnt.digest((event.batch, event.state.output, event.state.metrics)))
        for event in events
        if event.point in ("step_start", "step_end", "epoch_end")
    )


@pytest.mark.parametrize(("fuse", "donate"), [(2, False), (3, True), (4, True), (100, False)])
def test_blocks_are_their_steps(fuse: int, donate: bool):
    options: Any = {"max_epochs": 3, "max_steps": 15, "max_train_steps_per_epoch": 5, "callbacks": [SEEN]}
    every: Any = {**options, "evaluate_every_n_steps": 4}
    expected = tnt.fit(FAST, STATE, SIX, data(3, 3), **every)
    tnt.asserts.assert_trees_equal(tnt.fit(FAST, STATE, SIX, data(3, 3), fuse=fuse, donate=donate, **every), expected)
    ours = told(tnt.fit_events(FAST, STATE, SIX, data(3), fuse=fuse, donate=donate, **options))
    assert ours == told(tnt.fit_events(FAST, STATE, SIX, data(3), **options))


def test_the_events_of_a_block():
    events = tnt.train_events(FAST.train_unit, STATE, data(5, 5, 5), max_epochs=1, fuse=2)
    points = ["start", "epoch_start", *["fetched"] * 2, *["step_start", "step_end"] * 2, "step_done"]
    points += ["fetched", "step_start", "step_end", "step_done", "epoch_end", "epoch_done", "end"]
    seen = []
    for event in events:
        seen.append(event.point)
        if event.point == "step_end" and event.state.progress.train.steps == 1:
            assert "between fused steps" in repr(event.state)
            for name in ("params", "buffers", "opt_state"):
                with pytest.raises(ConsumedError, match=f"state.{name} was read between two fused steps"):
                    getattr(event.state, name)
        elif event.point == "step_end":
            assert event.state.params.keys() == STATE.params.keys()
    assert seen == points


def test_a_run_goes_on_from_every_block_end():
    expected = tnt.train(FAST.train_unit, STATE, SIX, max_epochs=2)
    ends = [
        event.state for event in tnt.train_events(FAST.train_unit, STATE, SIX, max_epochs=2, fuse=4) if event.resumable
    ]
    assert [state.progress.train.steps for state in ends] == [4, 6, 6, 8, 12, 12]
    for state in ends:
        for fuse in (1, 4):
            tnt.asserts.assert_trees_equal(tnt.train(FAST.train_unit, state, SIX, max_epochs=2, fuse=fuse), expected)
    asked = iter([False, True])
    paused = tnt.train(FAST.train_unit, STATE, SIX, max_epochs=2, fuse=2, pause_when=lambda: next(asked))
    assert paused.progress.train.steps == 4


@pytest.mark.parametrize("donate", [False, True])
def test_an_error_inside_a_block_leaves_the_state_before_it(donate: bool):
    seen = list[tnt.Event]()

    def stumble(event: tnt.Event) -> None:
        seen.append(event)
        if event.point == "step_end" and event.state.progress.train.steps == 3:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        tnt.train(FAST.train_unit, STATE, SIX, max_epochs=1, fuse=2, observers=[stumble], donate=donate)
    assert seen[-1].point == "failed" and seen[-1].resumable is not donate
    assert donate or seen[-1].state.progress.train.steps == 2


def test_an_ensemble_is_fused():
    unit, state = tnt.supervised(nn.Linear(4, 3), F.mse_loss, tnt.optim.adamw(1e-2), key=tnt.key(0))
    states = tnt.stack([state, state.replace(params=tnt.treemath.scale(state.params, 2.0))])
    fast = tnt.compiled(tnt.ensemble(unit, 2), backend="aot_eager").train_unit
    expected = tnt.train(fast, states, SIX, max_epochs=2)
    history = tnt.observers.History()
    observers = [tnt.observers.recorder(history, every_n_steps=1)]
    got = tnt.train(fast, states, SIX, max_epochs=2, fuse=4, observers=observers)
    tnt.asserts.assert_trees_equal(got, expected)
    assert [row.metrics["loss.1"] > 0 for row in history if row.kind == "step"] == [True] * 12


def test_an_average_is_fused_and_compiled_once():
    fast = tnt.compiled(tnt.transforms.ema(UNIT.train_unit, 0.9), backend="aot_eager")
    expected = tnt.train(fast, STATE, SIX, max_epochs=2)
    with tnt.asserts.assert_max_compilations(1):
        for _ in range(2):
            tnt.asserts.assert_trees_equal(tnt.train(fast, STATE, SIX, max_epochs=2, fuse=4), expected)


def test_a_rate_that_follows_a_metric_is_compiled_once_and_its_numbers_stay_numbers():
    unit, state = tnt.supervised(nn.Linear(4, 3), F.mse_loss, tnt.optim.adamw(1e-2), key=tnt.key(0))
    fast = tnt.compiled(unit, backend="aot_eager")
    plateau = tnt.callbacks.reduce_lr_on_plateau("loss", patience=0, threshold=0.5)
    options: Any = {"max_epochs": 5, "callbacks": [plateau]}
    with tnt.asserts.assert_max_compilations(2):  # With the evaluation's.
        got = tnt.fit(fast, state, SIX, data(5, 5), fuse=4, **options)
    assert float(tnt.optim.get(got.opt_state, "lr")) == pytest.approx(1e-5)
    assert [*map(type, got.memory["reduce_lr_on_plateau"].values())] == [float, int, int, int]
    tnt.asserts.assert_trees_equal(got, tnt.fit(fast, state, SIX, data(5, 5), **options))


def test_metrics_outside_of_the_graph_are_told_of_every_step():
    fast = tnt.compiled(UNIT.train_unit, metrics=False, backend="aot_eager")
    assert told(tnt.train_events(fast, STATE, SIX, max_epochs=1, fuse=4)) == told(
        tnt.train_events(fast, STATE, SIX, max_epochs=1)
    )


def test_a_slot_that_is_as_large_as_the_batch():
    def train_step(state: tnt.State, batch: torch.Tensor) -> Any:
        return state.remember("last", batch), {"sum": batch.sum() + state.memory["last"].sum()}

    unit = tnt.TrainUnit(train_step=train_step, memory={"last": lambda state: torch.zeros(3)}, draws=())
    fast = tnt.compiled(unit, backend="aot_eager")
    batches = [torch.full((n,), float(n)) for n in (3, 3, 3, 5, 5, 5, 3, 3)]
    with pytest.warns(UserWarning, match="compiled again"):
        expected = told(tnt.train_events(fast, STATE, batches, max_epochs=1))
    assert told(tnt.train_events(fast, STATE, batches, max_epochs=1, fuse=8)) == expected


def hook(function: Any, **options: Any) -> tnt.Callback:
    return tnt.Callback(name="mine", on_train_step_end=function, **options)


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (lambda state: state if state.progress.train.steps % 2 else state, "reads state.progress"),
        (lambda state: state.replace(params=[state.key.seed]), "reads state.key"),
        (lambda state: state if state.output["loss"] > 0 else state, "looks at the value of a tensor; .*test_fusing"),
        (lambda state: state.request_stop("enough"), "requests a stop"),
        (lambda state: state.remember("mine", torch.rand(2)), r"draws random numbers \(aten.rand\)"),
        (lambda state: state.remember("mine", 2), r"changed state.memory\['mine'\], an int"),
        (lambda state: state.remember("other", torch.ones(2)), r"wrote state.memory\['other'\]"),
        (lambda state: state.remember("data", state.memory["data"]["length"]), r"reads state.memory\['data'\]"),
        (lambda state: None, "returned None"),
    ],
    ids=["progress", "key", "value", "stop", "draws", "count", "slot", "data", "nothing"],
)
def test_what_cannot_be_fused_is_refused_by_name(function: Any, match: str):
    callbacks = [hook(function, memory=lambda state: 1)]
    with pytest.raises((ContractError, StructureError), match=rf"callback 'mine' on_train_step_end {match}"):
        tnt.train(FAST.train_unit, STATE, SIX, max_epochs=1, fuse=2, callbacks=callbacks)


def test_what_is_asked_of_a_fused_unit():
    for fuse in (0, True):
        with pytest.raises(UsageError, match=rf"fuse={fuse} was given; it is a number of steps"):
            tnt.train(FAST.train_unit, STATE, SIX, max_epochs=1, fuse=fuse)
    with pytest.raises(UsageError, match=r"Write tnt.train\(tnt.compiled\(unit\)"):
        tnt.train(UNIT.train_unit, STATE, SIX, max_epochs=1, fuse=2)
    unit, state = fit_unit(nn.Dropout(0.5))
    with pytest.raises(ContractError, match=r"train_step draws random numbers \(aten\.\w+\)"):
        tnt.train(tnt.compiled(unit, backend="aot_eager").train_unit, state, SIX, max_epochs=1, fuse=2)


def test_observers_of_a_fused_run(tmp_path: Any):
    history = tnt.observers.History()
    saving = tnt.observers.checkpointer(tmp_path / "saved", every_n_steps=3)
    recorder = tnt.observers.recorder(history, hyperparameters=[], measures=[tnt.observers.timing()], every_n_steps=1)
    bar = tnt.observers.progress_bar()
    tnt.train(FAST.train_unit, STATE, SIX * 2, max_epochs=1, fuse=4, observers=[saving, recorder, bar])
    # 3 is met at the end of its block, 4, and 6 and 9 likewise.
    assert [
        tnt.checkpoint.inspect(path).static["progress"].train.steps
        for path in tnt.checkpoint.checkpoints(saving.directory)
    ] == [
        4,
        8,
        12,
    ]
    assert [row.step for row in history if row.kind == "step"] == [*range(1, 13)]
    recorder = tnt.observers.recorder(tnt.observers.History(), hyperparameters=["lr"], every_n_steps=3)
    with pytest.raises(ConsumedError, match="opt_state was read between two fused steps"):
        tnt.train(FAST.train_unit, STATE, SIX, max_epochs=1, fuse=4, observers=[recorder])


def exchanging(state: tnt.State, batch: Any) -> Any:
    x, place = batch
    a, b = state.params["a"], state.params["b"]
    state = state.replace(params={"a": b * 0.5 + x.sum(), "b": a}).remember("last", x[0])
    output = {
        "sum": x.mean() + state.memory["last"].sum(),
        "size": x.shape[0],
        "x": x,
        "place": torch.arange(4.0)[place[:, None]],
    }
    return state, output


def test_steps_that_follow_each_other_in_one_call_of_machine_code():
    unit = tnt.TrainUnit(
        train_step=exchanging,
        memory={"last": lambda state: torch.zeros(2)},
        metrics={"sum": tnt.metrics.mean("sum", weight="size")},
        draws=(),
    )
    state = tnt.State(params={"a": torch.zeros(3), "b": torch.ones(3)}, key=tnt.key(0))
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(n, 2, generator=generator), torch.tensor([1])) for n in (4, 4, 4, 4, 5, 5, 5, 4)]
    fast = tnt.compiled(unit)
    check_fused(fast, state, batches, fuse=8, max_epochs=2)
    expected = tnt.train(fast, state, batches, max_epochs=2)
    donated = tnt.donate(fast)
    tnt.asserts.assert_trees_equal(tnt.train(donated, state, batches, max_epochs=2, fuse=4), expected)
    batches[3] = batches[3][0], torch.tensor([9])
    with pytest.raises(RuntimeError, match="out of bounds"):
        tnt.train(donated, state, batches, max_epochs=1, fuse=8)

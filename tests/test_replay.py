"""What a record gives back: states, first steps, differences, branches."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from replay_runs import COUNTING, FIT, FIT_OPTIONS, LOADER, OPTIONS, START, TRAIN, keeping, noisy, steps, trained
from torch import nn

import tnt_func as tnt
from tnt_func.errors import CheckpointError, StructureError, UsageError, UsageTypeError
from tnt_func.replay import Change, Record, bisect, diff, record, replay, what_if


def resumed(directory: Path, **more: Any) -> tnt.State:
    state = tnt.checkpoint.resume(directory / "checkpoints", tnt.prepare(TRAIN, START, [COUNTING]))
    return tnt.train(TRAIN, state, LOADER, **OPTIONS, observers=[record(directory, **CADENCE)], **more)


CADENCE: dict[str, Any] = {"digest_every_n_steps": 2, "checkpoint_every_n_steps": 4}


# Replaying


@pytest.mark.parametrize("every", [1, 3, 4, 100])
def test_every_state_comes_back_to_the_bit(every: int, tmp_path: Path):
    states = trained(tmp_path, digest_every_n_steps=every, checkpoint_every_n_steps=every)
    for step, state in states.items():
        assert tnt.digest(replay(tmp_path, TRAIN, START, LOADER, step, **OPTIONS)) == tnt.digest(state)
    first = replay(tmp_path, TRAIN, START, LOADER, 0, **OPTIONS)
    assert tnt.digest(first) == tnt.digest(tnt.prepare(TRAIN, START, [COUNTING]))
    assert list(states) == steps(tmp_path) == list(range(1, 16))


def test_a_fit_comes_back_with_its_evaluations(tmp_path: Path):
    states, options = {}, dict(FIT_OPTIONS)
    observers = [record(tmp_path, checkpoint_every_n_steps=4), keeping(states)]
    tnt.fit(FIT, START, LOADER, options.pop("eval_data"), **options, observers=observers)
    for step, state in states.items():
        assert tnt.digest(replay(tmp_path, FIT, START, LOADER, step, **FIT_OPTIONS)) == tnt.digest(state)
    rows = [row.numbers for row in Record.read(tmp_path).rows if row.row == "step"]
    assert set(rows[0] or {}) == {"loss"} and set(rows[1] or {}) == {"loss", "eval.gap"}


def test_a_run_of_several_calls_with_limits_of_their_own_comes_back(tmp_path: Path):
    states: dict[int, tnt.State] = {}
    state = START
    calls: list[dict[str, Any]] = [{"max_steps": 3}, {"max_steps": 9, "max_steps_per_epoch": 2}, {"max_epochs": 7}]
    for limits in calls:
        watching = [record(tmp_path, checkpoint_every_n_steps=5), keeping(states)]
        state = tnt.train(TRAIN, state, LOADER, callbacks=[COUNTING], **limits, observers=watching)
    assert list(states) == steps(tmp_path)
    for step, state in states.items():
        assert tnt.digest(replay(tmp_path, TRAIN, START, LOADER, step, **OPTIONS)) == tnt.digest(state)


def test_a_state_changed_by_hand_between_calls_is_where_the_next_steps_come_from(tmp_path: Path):
    states = trained(tmp_path)
    changed = {}
    doubled = states[15].replace(params={**START.params, "w": torch.full((3,), 7.0)})
    doubled = tnt.end_epoch(TRAIN, doubled)
    more = {**OPTIONS, "max_epochs": 4}
    tnt.train(TRAIN, doubled, LOADER, **more, observers=[record(tmp_path), keeping(changed)])
    for step, state in {**states, **changed}.items():
        assert tnt.digest(replay(tmp_path, TRAIN, START, LOADER, step, **OPTIONS)) == tnt.digest(state)


def test_what_cannot_be_replayed_is_refused(tmp_path: Path):
    trained(tmp_path, **CADENCE)
    with pytest.raises(UsageError, match="step 16 was asked for, and the record .* has the steps from 0 to 15"):
        replay(tmp_path, TRAIN, START, LOADER, 16, **OPTIONS)
    with pytest.raises(CheckpointError, match="has no record"):
        replay(tmp_path / "nowhere", TRAIN, START, LOADER, 1)
    with pytest.raises(UsageError, match="an iterator gives its batches once"):
        replay(tmp_path, TRAIN, START, iter([]), 1)
    with pytest.raises(UsageError, match="a FitUnit without eval_data"):
        replay(tmp_path, FIT, START, LOADER, 1)
    with pytest.raises(StructureError, match="w"):
        replay(tmp_path, TRAIN, START.replace(params={"v": torch.ones(3)}), LOADER, 1)
    other = replace(TRAIN, train_step=lambda state, batch: (noisy(state, batch)[0], {"loss": 1.0}))
    other = replace(other, on_train_step_end=lambda s: s.replace(params={**s.params, "w": s.params["w"] + 1}))
    with pytest.raises(UsageError, match="the state after step 6 is not the one that was recorded"):
        replay(tmp_path, other, START, LOADER, 6, **OPTIONS)
    short = [torch.tensor([1.0])] * 4
    with pytest.raises(UsageError, match="the record goes on to step 5"):
        trained(tmp_path / "list", data=[*short, *short[:1]])
        replay(tmp_path / "list", TRAIN, START, short, 5, **OPTIONS)


# Searching


def test_a_nan_in_a_thousand_steps_is_found_in_one_segment(tmp_path: Path):
    batches = [(torch.full((2, 2), math.sin(i)), torch.ones(2, 1)) for i in range(1_000)]
    batches[136] = (torch.full((2, 2), float("nan")), torch.ones(2, 1))
    torch.manual_seed(0)
    fit_unit, state = tnt.supervised(nn.Linear(2, 1), nn.functional.mse_loss, tnt.optim.sgd(0.1), key=tnt.key(0))
    taken: list[int] = []

    def counted(state: tnt.State, batch: Any) -> Any:
        taken.append(state.progress.train.steps + 1)
        return fit_unit.train_unit.train_step(state, batch)

    unit = replace(fit_unit.train_unit, train_step=counted)
    tnt.train(unit, state, batches, max_epochs=1, observers=[record(tmp_path, checkpoint_every_n_steps=50)])
    taken.clear()
    found = bisect(tmp_path, unit, state, batches, lambda state: not tnt.treemath.all_finite(state.params))
    assert found is not None and found.before is not None
    assert (found.step, found.at, found.operation) == (137, "step", "MseLossBackward0")
    assert found.batch is batches[136] and found.before.progress.train.steps == 136
    assert found.restored <= math.ceil(math.log2(1_000 / 50 + 2)) and found.replayed == 1
    assert taken == [*range(101, 138), 137]
    assert "MseLossBackward0 gave the first NaN" in str(found)
    assert bisect(tmp_path, unit, state, batches, lambda state: False) is None


def test_what_an_epochs_end_or_a_call_brought_about_is_found_there(tmp_path: Path):
    states = trained(tmp_path)
    found = bisect(tmp_path, TRAIN, START, LOADER, lambda state: state.memory["count"] >= 12, **OPTIONS)
    assert found is not None and (found.step, found.at, found.operation) == (10, "epoch", None)
    found = bisect(tmp_path, TRAIN, START, LOADER, lambda state: True, **OPTIONS)
    assert found is not None and (found.step, found.at, found.before) == (0, "call", None)
    changed = tnt.end_epoch(TRAIN, states[15].replace(params={**START.params, "b": torch.full((2, 2), -1.0)}))
    tnt.train(TRAIN, changed, LOADER, **{**OPTIONS, "max_epochs": 4}, observers=[record(tmp_path)])
    found = bisect(tmp_path, TRAIN, START, LOADER, lambda state: state.params["b"].min() < 0, **OPTIONS)
    assert found is not None and (found.step, found.at) == (15, "call")


# Differences


def test_a_swapped_batch_is_named_by_its_step_and_the_first_leaf(tmp_path: Path):
    data = [torch.tensor([float(i)]) for i in range(5)]
    trained(tmp_path / "a", data=data, digest_every_n_steps=1)
    trained(tmp_path / "b", data=[*data[:2], data[3], data[2], data[4]], digest_every_n_steps=1)
    found = diff(tmp_path / "a", tmp_path / "b")
    assert found is not None and (found.step, found.path, found.a) == (3, ".params['w']", "float32[3]")
    assert str(found) == "step 3: state.params['w']: batches, numbers, states differ"
    trained(tmp_path / "c", data=[*data[:2], data[3], data[2], data[4]], digest_every_n_steps=4)
    found = diff(tmp_path / "a", tmp_path / "c")
    assert found is not None and (found.step, found.path) == (3, ".params['w']")
    assert found.said == "batches, numbers differ, states at the digest of step 4"
    assert diff(tmp_path / "b", tmp_path / "c") is None


def test_a_run_that_is_longer_differs_where_the_other_ends(tmp_path: Path):
    trained(tmp_path / "a")
    tnt.train(TRAIN, START, LOADER, callbacks=[COUNTING], max_epochs=2, observers=[record(tmp_path / "b")])
    for a, b, which in (("a", "b", "first"), ("b", "a", "second")):
        assert str(diff(tmp_path / a, tmp_path / b)) == f"step 11: it is in the {which} record alone"


def test_of_two_states_the_first_leaf_is_named_with_shapes_and_size():
    b = START.params["b"].clone()
    b[1, 0] = 0.25
    found = diff(START, START.replace(params={**START.params, "b": b}))
    assert found is not None and (found.path, found.a, found.b) == (".params['b']", "float32[2, 2]", "float32[2, 2]")
    assert str(found) == "state.params['b']: float32[2, 2]: 1 of 4 elements differ, by at most 0.25"
    reshaped = START.replace(params={"w": torch.ones(4), "b": START.params["b"]})
    assert str(diff(START, reshaped)) == "state.params['w']: float32[3] became float32[4]"
    assert str(diff(START, START.replace(params={"w": START.params["w"]}))).endswith("float32[2, 2] and nothing")
    assert str(diff(START, START.replace(key=tnt.key(4)))) == "state.key: Key(seed=3) became Key(seed=4)"
    assert diff(START, START.replace(params=dict(START.params))) is None


def test_two_checkpoints_are_compared_without_their_code(tmp_path: Path):
    for name, w in (("a", 1.0), ("b", 1.0), ("c", 1.5)):
        tnt.checkpoint.save(tmp_path / name, START.replace(params={"w": torch.full((3,), w)}))
    assert diff(tmp_path / "a", tmp_path / "b") is None
    assert str(diff(tmp_path / "a", tmp_path / "c")) == (
        "state.params['w']: float32[3]: 3 of 3 elements differ, by at most 0.5"
    )
    with pytest.raises(UsageTypeError, match="a State and a checkpoint; it takes two of one kind"):
        diff(START, tmp_path / "a")
    with pytest.raises(CheckpointError, match="has no record"):
        diff(tmp_path / "nowhere", tmp_path / "nothing")


# Branches


def test_a_branch_without_a_change_is_the_run(tmp_path: Path):
    states = trained(tmp_path)
    branches = what_if(tmp_path, TRAIN, START, LOADER, 3, Change(), steps=6, **OPTIONS)
    assert branches.was.numbers == branches.now.numbers and list(branches.was.numbers) == [4, 5, 6, 7, 8, 9]
    assert tnt.digest(branches.was.state) == tnt.digest(branches.now.state) == tnt.digest(states[9])


def test_one_change_makes_the_other_branch(tmp_path: Path):
    trained(tmp_path)

    def scaled(state: tnt.State) -> tnt.State:
        return state.replace(params={**state.params, "w": state.params["w"] * 2})

    def branch(change: Change) -> dict[int, Any]:
        return dict(what_if(tmp_path, TRAIN, START, LOADER, 4, change, steps=3, **OPTIONS).now.numbers)

    was = branch(Change())
    assert branch(Change(state=scaled)) != was
    assert branch(Change(unit=replace(TRAIN, on_train_step_start=scaled))) != was
    left_out = what_if(tmp_path, TRAIN, START, LOADER, 4, Change(without={5, 6}), steps=3, **OPTIONS)
    assert {step: bool(found) for step, found in left_out.now.numbers.items()} == {5: False, 6: False, 7: True}
    before = replay(tmp_path, TRAIN, START, LOADER, 4, **OPTIONS)
    assert float(left_out.now.state.params["b"][0, 0]) == float(before.params["b"][0, 0]) + 1
    assert str(left_out).splitlines()[1].split()[2] == "-"
    with pytest.raises(UsageError, match=r"not among those taken, \[3\]; they go from 5 on"):
        branch(Change(without=[3]))


def test_the_branch_that_leaves_a_batch_out_draws_and_reads_as_the_other(tmp_path: Path):
    def seen(state: tnt.State, batch: torch.Tensor) -> tuple[tnt.State, dict[str, Any]]:
        return state, {"batch": batch, "draw": torch.rand(())}

    unit = tnt.TrainUnit(train_step=seen)
    tnt.train(unit, START, LOADER, max_epochs=2, observers=[record(tmp_path)])
    branches = what_if(tmp_path, unit, START, LOADER, 0, Change(without=[1, 3, 5, 6]))
    assert branches.now.numbers == {s: {} if s in (1, 3, 5, 6) else n for s, n in branches.was.numbers.items()}

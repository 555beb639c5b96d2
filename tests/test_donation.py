"""Consumed states: what is taken of them, what is copied first, what a run that donates still promises."""

import copy
import importlib
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tnt_func as tnt
import tnt_func.testing
from tnt_func import optim
from tnt_func.donation import consumed, separated, take
from tnt_func.errors import ConsumedError, UsageError
from tnt_func.events import Event
from tnt_func.unit import FitUnit

checkpointer = importlib.import_module("tnt_func.observers.checkpointer")
BATCHES = [(torch.full((2, 3), x), torch.tensor([0, 1])) for x in (0.5, -1.0, 2.0)]


def made(optimizer: optim.Optimizer | None = None) -> tuple[FitUnit, tnt.State]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    return tnt.supervised(network, F.cross_entropy, optimizer or optim.adamw(0.1), key=tnt.key(0))


def pointers(tree: Any) -> set[int]:
    return {leaf.data_ptr() for leaf in tnt.pytree.tensors(tree)}


def test_a_donating_step_updates_in_place_and_takes_no_new_memory():
    unit, state = made()
    train_unit = tnt.donate(unit).train_unit
    state = tnt.step(train_unit, tnt.prepare(unit, state), BATCHES[0])
    at = pointers(state.params) | pointers(state.opt_state)
    params, opt_state = state.params, state.opt_state
    for batch in BATCHES:
        state = tnt.step(train_unit, state, batch)
    assert state.params is params and state.opt_state is opt_state
    assert pointers(state.params) | pointers(state.opt_state) == at


def test_the_state_of_the_caller_is_copied_or_given():
    unit, state = made()
    before = tnt.digest(state)
    end = tnt.train(unit.train_unit, state, BATCHES, max_epochs=1, donate=True)
    assert tnt.digest(state) == before
    assert not pointers(end) & pointers(state)
    at = pointers(state.params)
    given = tnt.train(unit.train_unit, state, BATCHES, max_epochs=1, donate="given")
    assert tnt.pytree.equal(given, end) and pointers(given.params) == at
    with pytest.raises(ConsumedError, match=r"state.params was read after a donating step had consumed the state"):
        _ = state.params


def test_a_unit_that_donates_already_is_treated_the_same():
    unit, state = made()
    before, donating = tnt.digest(state), tnt.donate(unit)
    end = tnt.fit(donating, state, BATCHES, BATCHES[:1], max_epochs=2)
    assert tnt.digest(state) == before
    assert tnt.pytree.equal(end, tnt.fit(unit, state, BATCHES, BATCHES[:1], max_epochs=2))
    assert tnt.donate(donating).train_unit == donating.train_unit


def test_states_that_the_loop_handed_out_can_be_read_until_the_next_step():
    unit, state = made()
    kept: dict[str, tnt.State] = {}
    for event in tnt.train_events(unit.train_unit, state, BATCHES, max_steps=2, donate=True):
        assert event.donated and event.state.params
        if event.point in ("fetched", "step_start", "step_done") and event.point not in kept:
            kept[event.point] = event.state
    for gone in kept.values():
        with pytest.raises(ConsumedError, match="kept = tnt.keep"):
            tnt.pytree.leaves(gone)
        assert "consumed" in repr(gone) and "consumed" in gone._repr_html_()
        assert gone.progress.train.steps < 2 and gone.key is not None


def test_a_state_has_no_other_fields_than_it_says():
    with pytest.raises(AttributeError, match="a State has no 'parms'"):
        _ = tnt.State(params=1.0, key=tnt.key(0)).parms  # pyright: ignore[reportAttributeAccessIssue]


def test_what_is_kept_stays():
    unit, state = made()
    kept: list[tuple[tnt.State, str]] = []

    def keep(event: Event) -> None:
        if event.point == "step_done":
            kept.append((tnt.keep(event.state), tnt.digest(event.state)))

    tnt.train(unit.train_unit, state, BATCHES, max_epochs=1, donate=True, observers=[keep])
    assert len({was for _, was in kept}) == 3
    assert all(tnt.digest(state) == was for state, was in kept)


def test_a_kept_state_shares_no_memory_inside_it_either():
    w = torch.ones(3)
    kept = tnt.keep(tnt.State(params={"a": w, "b": w[:2]}, key=tnt.key(0), memory={"first": w}))
    assert len({leaf.untyped_storage().data_ptr() for leaf in tnt.pytree.tensors(kept)}) == 3


def test_leaves_that_share_memory_are_told_apart_before_the_first_step():
    w = torch.ones(4)
    shared = {"a": w, "b": w, "part": w[1:3], "wide": torch.ones(1).expand(3)}
    state = tnt.State(params=shared, key=tnt.key(0), memory={"a": w, "other": torch.zeros(1)}, buffers={"half": w[:2]})
    apart, storages = separated(state)
    assert apart.params["a"] is w and apart.memory["other"] is state.memory["other"]
    assert tnt.pytree.equal(apart, state)
    assert len(storages.pointers) == 4
    others = tnt.pytree.tensors((apart.memory, apart.buffers))
    assert not {leaf.untyped_storage().data_ptr() for leaf in others} & {*storages.pointers}
    apart.params["wide"].add_(torch.arange(3))
    assert separated(apart)[0] is apart and separated(apart.replace(output=1))[1] is storages


def test_what_is_known_of_a_states_memory_does_not_go_with_its_copies():
    state, storages = separated(tnt.State(params={"w": torch.ones(1)}, key=tnt.key(0)))
    for other in (copy.deepcopy(state), pickle.loads(pickle.dumps(state)), tnt.keep(state)):
        found = separated(other)[1]
        assert not {*found.pointers} & {*storages.pointers}


def test_an_output_and_buffers_that_are_the_parameters_are_those_of_before_the_update():
    def objective(params: Any, state: tnt.State, batch: Tensor) -> Any:
        value = (params["w"] * batch).sum()
        count = state.opt_state.slots["count"]
        return value, ({"target": state.params["w"]}, {"w": params["w"], "row": params["w"][0], "count": count})

    optimizer, params = optim.adam(0.1), {"w": torch.ones(2)}
    state = tnt.State(
        params=params, opt_state=optimizer.init(params), buffers={"target": torch.zeros(2)}, key=tnt.key(0)
    )
    step = tnt.minimize(objective, optimizer).donating()
    after, output = step(state, torch.tensor([1.0, -1.0]))
    assert not after.params["w"].equal(torch.ones(2))
    assert output["w"].equal(torch.ones(2)) and output["row"] == 1 and after.buffers["target"].equal(torch.ones(2))
    assert output["count"].equal(torch.zeros(1, dtype=torch.int64))


class Refusal(Exception):
    """What user code raises."""


def failing(where: str) -> tuple[FitUnit, tnt.State, dict[str, Any]]:
    """A run that fails at its third step, in some place."""
    inner = optim.sgd(0.1)

    def refuse(*args: Any) -> Any:
        raise Refusal

    def consume(grads: Any, opt_state: Any, params: Any) -> Any:
        if int(opt_state.step) == 2 and where == "update":
            params["weight"].zero_()
            raise Refusal
        assert inner.consume is not None
        return inner.consume(grads, opt_state, params)

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        large = output.detach().abs().max() > 50
        return refuse() if where == "objective" and large else F.cross_entropy(output, targets)

    def hook(state: tnt.State) -> tnt.State:
        return refuse() if state.progress.train.steps == (3 if where == "step_end" else 2) else state

    network = nn.Linear(3, 2)
    unit, state = tnt.supervised(
        network, loss, optim.Optimizer(inner.init, inner.update, consume=consume), key=tnt.key(0)
    )
    hooks: dict[str, Any] = {f"on_train_{where}": hook} if where.startswith("step") else {}
    return unit, state, {"callbacks": [tnt.Callback(name="refusing", **hooks)]}


def fed(where: str) -> Iterator[Any]:
    yield from BATCHES[:2]
    if where == "data":
        raise Refusal
    yield (torch.full((2, 3), 1e4), torch.tensor([0, 1])) if where == "objective" else BATCHES[2]


@pytest.mark.parametrize("where", ["data", "step_start", "objective", "update", "step_end"])
def test_a_failed_event_has_the_last_state_where_no_step_has_consumed_it(where: str, tmp_path: Path):
    unit, state, more = failing(where)
    events: list[Event] = []
    saved = tnt.observers.checkpointer(tmp_path, every_n_steps=1, asynchronous=True)
    with pytest.raises(Refusal) as raised:
        tnt.train(
            unit.train_unit,
            state,
            lambda epoch: fed(where),
            max_epochs=1,
            donate=True,
            observers=[lambda event: events.append(event) if event.point == "failed" else None, saved],
            **more,
        )
    (failed,) = events
    consumed_it = where in ("update", "step_end")
    assert (failed.state is None) == consumed_it and failed.resumable != consumed_it
    if consumed_it:
        assert any("The last checkpoint is" in note and "step-000000000002" in note for note in raised.value.__notes__)
    else:
        assert failed.state.progress.train.steps == 2 and failed.state.params
    resumed = tnt.checkpoint.resume(tmp_path, tnt.prepare(unit.train_unit, state))
    whole = tnt.train(unit.train_unit, state, BATCHES[:2], max_steps=2)
    assert resumed.progress.train.steps == 2
    assert tnt.pytree.equal(resumed.params, whole.params)


def test_checkpoints_in_the_background_are_of_the_state_they_were_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Though the next step is taken before the thread has read a byte."""
    unit, state = made()
    gate, digests = threading.Event(), dict[int, str]()
    save_in = checkpointer.save_in

    def late(*args: Any) -> Path:
        assert gate.wait(600)
        return save_in(*args)

    def note(event: Event) -> None:
        gate.set()
        if event.point == "step_done":
            digests[event.state.progress.train.steps] = tnt.digest(event.state)
            if event.state.progress.train.steps % 2 == 0:
                gate.clear()

    monkeypatch.setattr(checkpointer, "save_in", late)
    saving = tnt.observers.checkpointer(tmp_path, every_n_steps=2, asynchronous=True)
    tnt.train(unit.train_unit, state, BATCHES, max_epochs=2, donate=True, observers=[note, saving])
    like = tnt.prepare(unit.train_unit, state)
    found = [tnt.checkpoint.restore(path, like) for path in tnt.checkpoint.checkpoints(tmp_path)]
    steps = [state for state in found if state.progress.train.is_open]
    assert {2, 4} <= {state.progress.train.steps for state in steps}
    assert all(tnt.digest(state) == digests[state.progress.train.steps] for state in steps)


def test_pausing_inside_an_evaluation_waits_for_its_end_and_changes_no_number():
    unit, state = made()
    options: dict[str, Any] = {"max_epochs": 2, "evaluate_every_n_steps": 1}
    whole = tnt.fit(unit, state, BATCHES, BATCHES, **options)
    asked = 0

    def pause() -> bool:
        nonlocal asked
        asked += 1
        return asked % 2 == 0

    paused, rounds = state, 0
    while rounds < 20 and paused.progress.train.epochs < 2:
        *_, last = tnt.fit_events(unit, paused, BATCHES, BATCHES, pause_when=pause, donate=True, **options)
        paused, rounds = last.state, rounds + 1
        assert last.point in ("paused", "end")
    assert rounds > 2
    assert tnt.pytree.equal(paused, whole)


def test_records_go_on_where_a_step_failed(tmp_path: Path):
    unit, state, more = failing("update")
    with pytest.raises(Refusal) as raised:
        recording = tnt.replay.record(tmp_path, digest_every_n_steps=1, checkpoint_every_n_steps=1)
        tnt.train(unit.train_unit, state, BATCHES, max_epochs=1, donate=True, observers=[recording], **more)
    assert not getattr(raised.value, "__notes__", [])


def test_nothing_of_a_run_is_kept_alive_by_its_unit():
    import gc
    import weakref

    unit, state = made()
    end = tnt.train(unit.train_unit, state, BATCHES, max_epochs=1, donate=True)
    leaf = weakref.ref(end.params["0.weight"])
    del end
    gc.collect()
    assert leaf() is None


def test_a_step_that_cannot_donate_is_refused():
    with pytest.raises(UsageError, match="donate was given the step <function"):
        tnt.donate(tnt.TrainUnit(train_step=lambda state, batch: (state, {})))
    with pytest.raises(UsageError, match="a function cannot"):
        tnt.train(
            tnt.TrainUnit(train_step=lambda state, batch: (state, {})),
            tnt.State(params=0, key=tnt.key(0)),
            [1],
            max_epochs=1,
            donate=True,
        )


def test_what_is_taken_is_not_there_and_what_is_not_consumed_is():
    state = tnt.State(params={"w": 1.0}, key=tnt.key(0))
    assert not consumed(state) and not consumed(None)
    take(state)
    assert state.stop is None and state.progress.train.steps == 0
    with pytest.raises(ConsumedError):
        _ = state.memory


def test_laws_are_asked_of_the_step_that_does_not_donate():
    unit, state = made()
    with pytest.raises(UsageError, match="Pass the unit as it is without tnt.donate"):
        tnt.testing.check_purity(tnt.donate(unit), state, BATCHES)  # pyright: ignore
    with pytest.raises(UsageError, match="check_donation"):
        tnt.testing.check_resume(unit, state, BATCHES, donate=True)  # pyright: ignore

"""train, fit, evaluate, predict and their event twins: a real module, real loaders, and whatever surrounds them."""

import copy
import functools
import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler

import tnt_func as tnt
from tnt_func import pytree as trees
from tnt_func.errors import ContractError, DataError, ResumeError, UsageError
from tnt_func.metrics import last, mean
from tnt_func.state import State, digest
from tnt_func.unit import Callback, EvalUnit, FitUnit, PredictUnit, TrainUnit

# A regression with batch normalisation and dropout, its step written by hand.

with tnt.rng.scope(tnt.key(1)):
    MODULE = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.ReLU(), nn.Linear(4, 1))
    INPUTS, TARGETS = torch.randn(12, 3), torch.randn(12, 1)
JUDGE = copy.deepcopy(MODULE).eval()
PARAMS = {name: parameter.detach() for name, parameter in MODULE.named_parameters()}


def loss_of(module: nn.Module, params: Any, buffers: Any, batch: Any) -> Tensor:
    return nn.functional.mse_loss(functional_call(module, {**params, **buffers}, (batch[0],)), batch[1])


def train_step(state: State, batch: Any) -> tuple[State, dict[str, Any]]:
    params = {name: leaf.detach().requires_grad_() for name, leaf in state.params.items()}
    buffers = {name: leaf.clone() for name, leaf in state.buffers.items()}
    loss = loss_of(MODULE, params, buffers, batch)
    grads = dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))
    momentum = trees.map(lambda m, g: 0.9 * m + g, state.opt_state["momentum"], grads)
    updated = trees.map(lambda p, m: p - state.opt_state["lr"] * m, state.params, momentum)
    opt_state = {**state.opt_state, "momentum": momentum}
    return state.replace(params=updated, buffers=buffers, opt_state=opt_state), {"loss": loss, "n": len(batch[0])}


def eval_step(state: State, batch: Any) -> tuple[State, dict[str, Any]]:
    return state, {"loss": loss_of(JUDGE, state.params, state.buffers, batch), "n": len(batch[0])}


def predict_step(state: State, batch: Any) -> tuple[State, Tensor]:
    return state, functional_call(JUDGE, {**state.params, **state.buffers}, (batch[0],)) + torch.rand(())


def jitter(state: State) -> State:
    noise = torch.rand(()) * 1e-3 + np.random.rand() * 1e-3
    return state.replace(opt_state={**state.opt_state, "lr": state.opt_state["lr"] + noise})


METRICS = {"loss": mean("loss", weight="n"), "last": last("loss")}
TRAIN = TrainUnit(train_step=train_step, metrics=METRICS)
EVAL = EvalUnit(eval_step=eval_step, metrics=METRICS)
PREDICT = PredictUnit(predict_step=predict_step)
FIT = FitUnit(train_unit=TRAIN, eval_unit=EVAL)
JITTER = Callback(name="jitter", on_train_epoch_start=jitter, on_train_step_start=jitter, on_train_epoch_end=jitter)


def start() -> State:
    momentum = trees.map(torch.zeros_like, PARAMS)
    buffers = {name: buffer.clone() for name, buffer in MODULE.named_buffers()}
    opt_state = {"momentum": momentum, "lr": torch.tensor(0.1)}
    return State(params=PARAMS, buffers=buffers, opt_state=opt_state, key=tnt.key(7))


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Noise of every generator on every item."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return INPUTS[index] + torch.rand(3) + float(np.random.rand()) + random.random(), TARGETS[index]


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        items = Augmented()
        return (items[index] for index in random.sample(range(12), 12))


def loader(workers: int = 0) -> DataLoader[Any]:
    return DataLoader(Augmented(), batch_size=4, shuffle=True, num_workers=workers)


PLAIN = [(INPUTS[i : i + 4], TARGETS[i : i + 4]) for i in range(0, 12, 4)]
LOADERS: dict[str, Callable[[], Any]] = {
    "list": lambda: PLAIN,
    "loader": loader,
    "two workers": lambda: loader(2),
    "stream": lambda: DataLoader(Stream(), batch_size=4),
    "batch sampler": lambda: DataLoader(
        Augmented(), batch_sampler=BatchSampler(RandomSampler(Augmented()), 4, drop_last=False)
    ),
    "function": lambda: lambda epoch: DataLoader(Stream(), batch_size=4),
}


def stand() -> tuple[Any, ...]:
    """Where the global generators and the gradient mode stand."""
    numpy: Any = np.random.get_state(legacy=False)
    numbers = torch.get_rng_state().numpy().tobytes()
    return numbers, id(np.random.mtrand._rand), str(numpy), random.getstate(), torch.is_grad_enabled()


# Four ways to write the same run


def by_hand(unit: TrainUnit, state: State, data: Any, epochs: int) -> State:
    state = tnt.prepare(unit, state)
    while state.progress.train.epochs < epochs:
        state = tnt.start_epoch(unit, state)
        for batch in tnt.batches(data, state):
            state = tnt.step(unit, state, batch)
        state = tnt.end_epoch(unit, state)
    return state


@pytest.mark.parametrize("name", [name for name in LOADERS if name != "two workers"])
def test_train_is_its_events_is_a_loop_by_hand(name: str):
    data = LOADERS[name]()
    state = tnt.train(TRAIN, start(), data, max_epochs=2, callbacks=[JITTER])
    *_, end = tnt.train_events(TRAIN, start(), data, max_epochs=2, callbacks=[JITTER])
    assert digest(end.state) == digest(state)
    assert digest(by_hand(tnt.attach(TRAIN, JITTER), start(), data, 2)) == digest(state)
    assert digest(state) != digest(start()) and state.progress.train.steps == 6


def test_train_is_a_reduce_of_step_where_no_epoch_hook_acts():
    state = tnt.train(TRAIN, start(), loader(), max_epochs=1)
    reduced = functools.reduce(functools.partial(tnt.step, TRAIN), tnt.batches(loader(), start()), start())
    for part in ("params", "buffers", "opt_state"):
        assert trees.equal(getattr(reduced, part), getattr(state, part))
    assert reduced.progress.train.steps_in_epoch == 3


def test_callbacks_given_to_a_run_are_callbacks_attached():
    attached = tnt.train(tnt.attach(TRAIN, JITTER), start(), PLAIN, max_epochs=2)
    assert digest(tnt.train(TRAIN, start(), PLAIN, max_epochs=2, callbacks=[JITTER])) == digest(attached)
    assert digest(attached) != digest(tnt.train(TRAIN, start(), PLAIN, max_epochs=2))


def test_fit_is_its_events_and_is_train_with_evaluations_in_between():
    state = tnt.fit(FIT, start(), loader(), PLAIN, max_epochs=2)
    *_, end = tnt.fit_events(FIT, start(), loader(), PLAIN, max_epochs=2)
    assert digest(end.state) == digest(state)
    by_parts = start()
    for epoch in (1, 2):
        by_parts = tnt.evaluate(EVAL, tnt.train(TRAIN, by_parts, loader(), max_epochs=epoch), PLAIN)
    assert digest(by_parts) == digest(state)


def test_evaluate_is_its_events_and_its_metric_does_not_depend_on_the_batches():
    state = tnt.evaluate(EVAL, start(), PLAIN)
    *_, end = tnt.evaluate_events(EVAL, start(), PLAIN)
    assert digest(end.state) == digest(state)
    uneven = [(INPUTS[:7], TARGETS[:7]), (INPUTS[7:], TARGETS[7:])]
    loss = [tnt.metrics.compute(s, "eval")["loss"] for s in (state, tnt.evaluate(EVAL, start(), uneven))]
    torch.testing.assert_close(loss[0], loss[1], rtol=1e-6, atol=0)


def test_predict_returns_every_output_in_order_as_the_step_end_hooks_leave_it():
    state, outputs = tnt.predict(PREDICT, start(), PLAIN)
    events = list(tnt.predict_events(PREDICT, start(), PLAIN))
    assert trees.equal([event.state.output for event in events if event.point == "step_end"], outputs)
    assert digest(events[-1].state) == digest(state) and [len(output) for output in outputs] == [4, 4, 4]
    assert state.output is None and not any(output.requires_grad for output in outputs)
    shifted = Callback(name="shift", on_predict_step_end=lambda s: s.replace(output=s.output + 1))
    assert trees.equal(tnt.predict(PREDICT, start(), PLAIN, callbacks=[shifted])[1], [out + 1 for out in outputs])
    seen: list[Any] = []
    tnt.predict(PREDICT, start(), PLAIN, observers=[lambda event: seen.append(event.state.output)])
    assert trees.equal([output for output in seen if output is not None], outputs)


# Resuming


@pytest.mark.parametrize("name", LOADERS)
def test_a_run_resumed_in_the_middle_of_an_epoch_ends_on_the_same_bits(name: str):
    whole = tnt.train(TRAIN, start(), LOADERS[name](), max_epochs=2)
    for pause_at in (0, 1, 5) if name != "two workers" else (1,):
        asked = iter(range(99))
        paused = tnt.train(TRAIN, start(), LOADERS[name](), max_epochs=2, pause_when=lambda: next(asked) == pause_at)  # noqa: B023
        assert paused.progress.train.steps_in_epoch > 0
        assert digest(tnt.train(TRAIN, paused, LOADERS[name](), max_epochs=2)) == digest(whole)


def paused_after_two(data: Any) -> State:
    *_, paused = tnt.train_events(TRAIN, start(), data, max_epochs=1, pause_when=iter([False, True]).__next__)
    return paused.state


OWN: dict[str, dict[str, Any]] = {
    "persistent_workers": {"num_workers": 1, "persistent_workers": True},
    "generator=": {"generator": torch.Generator()},
}


@pytest.mark.parametrize("name", OWN)
def test_a_loader_that_cannot_be_replayed_is_refused_at_resume_unless_that_is_wanted(name: str):
    state = tnt.train(TRAIN, start(), PLAIN, max_epochs=1)
    own = DataLoader(Augmented(), batch_size=4, **OWN[name])
    for run in (
        lambda **more: tnt.train(TRAIN, state, own, max_epochs=1, **more),
        lambda **more: list(tnt.train_events(TRAIN, state, own, max_epochs=1, **more)),
        lambda **more: tnt.fit(FIT, state, own, PLAIN, max_epochs=1, **more),
        lambda **more: list(tnt.fit_events(FIT, state, own, PLAIN, max_epochs=1, **more)),
        lambda **more: tnt.fit(FIT, tnt.evaluate(EVAL, state, PLAIN), PLAIN, own, max_epochs=1, **more),
    ):
        with pytest.raises(ResumeError, match=f"DataLoader has {name}"):
            run()
        run(allow_inexact_resume=True)
    tnt.train(TRAIN, start(), own, max_epochs=0)


def test_another_loader_is_refused_inside_an_epoch_unless_that_is_wanted():
    state = paused_after_two(loader())
    other = DataLoader(Augmented(), batch_size=3, shuffle=True)
    with pytest.raises(ResumeError, match="began with length=3, batch_size=4 and goes on with length=4, batch_size=3"):
        tnt.train(TRAIN, state, other, max_epochs=1)
    assert tnt.train(TRAIN, state, other, max_epochs=1, allow_inexact_resume=True).progress.train.steps == 4
    assert (
        tnt.train(TRAIN, tnt.train(TRAIN, state, loader(), max_epochs=1), other, max_epochs=2).progress.train.epochs
        == 2
    )


def test_what_an_open_epoch_of_training_reads_is_not_asked_of_the_eval_data():
    half = next(event.state for event in tnt.evaluate_events(EVAL, start(), PLAIN) if event.point == "step_end")
    state = tnt.train(TRAIN, half, PLAIN, max_epochs=1, pause_when=lambda: True)
    assert state.progress.train.is_open and state.progress.eval.is_open
    assert tnt.fit(FIT, state, PLAIN, loader(), max_epochs=1).progress.eval.steps == 3


def test_data_shorter_than_the_position_is_an_error():
    state = paused_after_two(lambda epoch: PLAIN)
    with pytest.raises(
        DataError, match="train data ended after 1 batches, and the state has 2 steps of epoch 0 behind it"
    ):
        tnt.train(TRAIN, state, lambda epoch: PLAIN[:1], max_epochs=1)


def test_a_one_shot_iterator_is_an_error_at_the_second_epoch():
    with pytest.raises(DataError, match="train data is a one-shot list_iterator"):
        tnt.train(TRAIN, start(), iter(PLAIN), max_epochs=2)
    with pytest.raises(DataError, match="eval data is a one-shot list_iterator"):
        tnt.fit(FIT, start(), PLAIN, iter(PLAIN), max_epochs=2)
    assert tnt.train(TRAIN, start(), iter(PLAIN), max_epochs=1).progress.train.steps == 3


# Whatever surrounds a run


def part_of(events: Iterator[Any]) -> str:
    """Eight events of a run, which is then dropped."""
    return digest([event.state for event in itertools.islice(events, 8)])


ENTRIES: dict[str, Callable[[], Any]] = {
    "train": lambda: digest(tnt.train(TRAIN, start(), loader(), max_epochs=2, callbacks=[JITTER])),
    "fit": lambda: digest(tnt.fit(FIT, start(), loader(), loader(), max_epochs=1)),
    "evaluate": lambda: digest(tnt.evaluate(EVAL, start(), loader())),
    "predict": lambda: digest(tnt.predict(PREDICT, start(), loader())[1]),
    "train_events": lambda: part_of(tnt.train_events(TRAIN, start(), loader(), max_epochs=1)),
    "fit_events": lambda: part_of(tnt.fit_events(FIT, start(), loader(), loader(), max_epochs=1)),
    "evaluate_events": lambda: part_of(tnt.evaluate_events(EVAL, start(), loader())),
    "predict_events": lambda: part_of(tnt.predict_events(PREDICT, start(), loader())),
    "batches": lambda: digest(list(tnt.batches(loader(), start()))),
    "some batches": lambda: digest(next(tnt.batches(loader(), start()))),
    "step": lambda: digest(tnt.step(tnt.attach(TRAIN, JITTER), start(), PLAIN[0])),
    "start_epoch": lambda: digest(tnt.start_epoch(tnt.attach(TRAIN, JITTER), start())),
    "end_epoch": lambda: digest(tnt.end_epoch(tnt.attach(TRAIN, JITTER), start())),
    "prepare": lambda: digest(
        tnt.prepare(TrainUnit(train_step=train_step, memory={"r": lambda s: torch.rand(2)}), start())
    ),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_the_global_generators_are_left_where_they_stood_and_decide_nothing(name: str):
    results: set[Any] = set()
    for bits, seed in ((np.random.MT19937(0), 0), (np.random.MT19937(1), 1), (np.random.Philox(2), 2)):
        legacy: Any = np.random
        mine = legacy.get_bit_generator()
        legacy.set_bit_generator(bits)
        try:
            torch.manual_seed(seed)
            random.seed(seed)
            _ = np.random.standard_normal(), torch.randn(()), random.gauss(0, 1)
            before = stand()
            results.add(ENTRIES[name]())
            assert stand() == before
        finally:
            legacy.set_bit_generator(mine)
    assert len(results) == 1


@pytest.mark.parametrize("name", ["train", "fit", "train_events"])
def test_gradients_that_are_off_outside_change_nothing(name: str):
    expected = ENTRIES[name]()
    with torch.no_grad():
        assert ENTRIES[name]() == expected
        assert not torch.is_grad_enabled()


def test_an_error_leaves_the_generators_and_the_gradient_mode_as_they_were():
    def fail(event: Any) -> None:
        if event.point == "step_end":
            raise ValueError("mine")

    before = stand()
    with torch.no_grad():
        with pytest.raises(ValueError, match="mine"):
            tnt.train(TRAIN, start(), loader(), max_epochs=1, observers=[fail])
        assert not torch.is_grad_enabled()
    assert stand() == before


def test_a_run_may_be_begun_inside_a_step_of_another():
    inner_unit = TrainUnit(train_step=lambda s, b: (s.replace(params=s.params + torch.rand(()) * b), {}))

    def nested(train: Callable[..., State] | None) -> Callable[..., Any]:
        def step(state: State, batch: Any) -> Any:
            before = torch.rand(()) + np.random.rand()
            inner = State(params=torch.zeros(()), key=tnt.fold_in(state.key, state.progress.train.steps))
            gained = train(inner).params if train is not None else torch.zeros(())
            return state.replace(params=state.params + before + torch.rand(()) + np.random.rand()), {"gained": gained}

        return step

    def folded(state: State) -> State:
        return tnt.train(inner_unit, state, [1.0, 2.0], max_epochs=2)

    def listed(state: State) -> State:
        return list(tnt.train_events(inner_unit, state, [1.0, 2.0], max_epochs=2))[-1].state

    outer = State(params=torch.zeros(()), key=tnt.key(0))
    ends, gains = [], []
    for train in (folded, listed, None):
        unit = TrainUnit(train_step=nested(train), metrics={"gained": last("gained")})
        for state in (
            tnt.train(unit, outer, range(3), max_epochs=1),
            list(tnt.train_events(unit, outer, range(3), max_epochs=1))[-1].state,
        ):
            ends.append(state.params)
            gains.append(float(tnt.metrics.compute(state, "train")["gained"]))
    assert trees.equal(ends, [ends[0]] * 6)
    assert len(set(gains[:4])) == 1 and gains[0] > 0


@pytest.mark.parametrize("name", ["train", "fit", "evaluate", "predict", "train_events", "evaluate_events"])
def test_a_run_is_not_begun_under_inference_mode(name: str):
    with torch.inference_mode(), pytest.raises(UsageError, match=r"under torch.inference_mode\(\); .* Call it outside"):
        ENTRIES[name]()


def test_the_users_module_state_and_data_are_never_written_to():
    state, data = start(), [(x.clone(), y.clone()) for x, y in PLAIN]
    before = digest([state, MODULE.state_dict(), JUDGE.state_dict(), data])
    modes = [part.training for part in (*MODULE.modules(), *JUDGE.modules())]
    tnt.fit(FIT, state, data, data, max_epochs=2, callbacks=[JITTER])
    tnt.train(TRAIN, state, data, max_epochs=1)
    tnt.evaluate(EVAL, state, data)
    tnt.predict(PREDICT, state, data)
    assert digest([state, MODULE.state_dict(), JUDGE.state_dict(), data]) == before
    assert [part.training for part in (*MODULE.modules(), *JUDGE.modules())] == modes
    assert all(parameter.grad is None and parameter.requires_grad for parameter in MODULE.parameters())


def test_an_evaluation_that_writes_to_the_model_is_an_error():
    careless = EvalUnit(eval_step=lambda s, b: (s.replace(buffers=dict(s.buffers)), {}))
    with pytest.raises(ContractError, match=r"eval_step changed state.buffers; evaluation and prediction are reads"):
        tnt.evaluate(careless, start(), PLAIN)


def test_observers_watch_and_do_not_matter():
    seen: list[Any] = []
    expected = digest(tnt.fit(FIT, start(), loader(), PLAIN, max_epochs=1))
    observers = [seen.append, lambda event: (torch.rand(3), np.random.rand(3), random.random())]
    assert digest(tnt.fit(FIT, start(), loader(), PLAIN, max_epochs=1, observers=observers)) == expected
    events = list(tnt.fit_events(FIT, start(), loader(), PLAIN, max_epochs=1))
    assert [(e.phase, e.point, digest(e.state)) for e in seen] == [(e.phase, e.point, digest(e.state)) for e in events]

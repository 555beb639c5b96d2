"""What whole runs must not depend on: what is outside the state (laws 2, 5), who watches (6), evaluations (7)."""

import time
from collections.abc import Callable
from typing import Any

import torch

from tnt_func import metrics
from tnt_func.state import State
from tnt_func.testing.broken.control import (
    EVERYWHERE,
    Subject,
    batches,
    control,
    descend,
    first_state,
    fitted,
    read,
    trained,
    with_w,
)
from tnt_func.testing.case import Case
from tnt_func.testing.pieces import draw
from tnt_func.unit import Callback, FitUnit, PredictUnit, TrainUnit

# Law 2, determinism.


@control("determinism", "train_step is where it begins", "state.params['w']", "state.memory", also=EVERYWHERE)
def hidden_counter(broken: bool) -> Subject:
    seen: list[Any] = []

    def train_step(state: State, batch: Any) -> Any:
        seen.append(batch)
        return descend(state, batch * (len(seen) if broken else state.progress.train.steps))

    return trained(train_step)


@control("determinism", "train_step is where it begins", "second run from the same state", also=EVERYWHERE)
def clock(broken: bool) -> Subject:
    # The time of day would be too large a number for float32 to tell two calls apart.
    now = (lambda: time.perf_counter_ns() % 1_000_003 / 1e3) if broken else (lambda: 1.0)
    return trained(lambda state, batch: descend(state, batch + now()))


@control("determinism", "train_step is where it begins", "second run", also=EVERYWHERE)
def own_generator(broken: bool) -> Subject:
    own = torch.Generator().manual_seed(0)
    return trained(lambda state, batch: descend(state, batch + torch.rand(2, generator=own if broken else None)))


def _undeclared(generator: Any, declared: tuple[Any, ...]) -> Callable[[bool], Subject]:
    def make(broken: bool) -> Subject:
        draws = declared if broken else (*declared, generator)
        return trained(lambda state, batch: descend(state, batch + draw(generator)), draws=draws)

    make.__name__ = f"undeclared_{generator}"
    return make


for _generator, _declared in (("torch", ()), ("numpy", ("torch",)), ("random", ("torch", "numpy"))):
    _said = f"train_step drew from {_generator}'s global generator"
    _write = f"Write draws={(*_declared, _generator)!r}"
    control("determinism", _said, _write, also=EVERYWHERE)(_undeclared(_generator, _declared))


@control("determinism", "found torch's global generator elsewhere", "train_step")
def reads_generator(broken: bool) -> Subject:
    def train_step(state: State, batch: Any) -> Any:
        return descend(state, batch + (torch.initial_seed() % 7 if broken else state.key.seed))

    return trained(train_step, draws=())


@control("determinism", "the train data is where it begins", "batch", also=EVERYWHERE)
def data_that_counts(broken: bool) -> Subject:
    epochs: list[int] = []

    def data(epoch: int) -> Any:
        epochs.append(epoch)
        return [torch.full((2,), float(len(epochs) if broken else epoch))] * 2

    return trained(data=data)


@control("determinism", "callback 'tired' on_train_step_end is where it begins", "memory['tired']", also=EVERYWHERE)
def callback_with_a_list(broken: bool) -> Subject:
    losses: list[Any] = []

    def worse(state: State) -> State:
        losses.append(state.output["loss"])
        return state.remember("tired", state.memory["tired"] + (len(losses) if broken else 1))

    return trained(callbacks=[Callback(name="tired", memory=lambda state: 0, on_train_step_end=worse)])


@control("determinism", "a memory function is where it begins", "state.memory['run']", also=EVERYWHERE[1:])
def memory_that_counts(broken: bool) -> Subject:
    runs: list[Any] = []

    def first(state: State) -> int:
        runs.append(state)
        return len(runs) if broken else 0

    return trained(memory={"run": first})


# Law 5, resume. Whatever is kept outside and set anew where a run begins looks deterministic.


@control(
    "resume", "split after train step_done (epoch 0, step 1)", "train_step is where it begins", "state.params['w']"
)
def hidden_momentum(broken: bool) -> Subject:
    velocity = torch.zeros(2)

    def train_step(state: State, batch: Any) -> Any:
        nonlocal velocity
        if state.progress.train.steps == 0:
            velocity = torch.zeros(2)
        velocity = (velocity * 0.9 if broken else 0.0) + batch
        return with_w(state, state.params["w"] - 0.1 * velocity), {}

    return trained(train_step)


@control(
    "resume", "callback 'best' on_train_epoch_end is where it begins", "state.memory['patience']", "memory function"
)
def hidden_patience(broken: bool) -> Subject:
    worse = 0

    def reset(state: State) -> State:
        nonlocal worse
        worse = 0
        return state

    def count(state: State) -> State:
        nonlocal worse
        worse += 1
        return state.remember("patience", worse if broken else state.memory["patience"] + 1)

    memory = {"patience": lambda state: 0}
    return trained(callbacks=[Callback(name="best", on_train_start=reset, on_train_epoch_end=count)], memory=memory)


@control(
    "resume", "TrainUnit.on_train_start changes the state", "state.memory['calls']: int 1 became int 2", "Start hooks"
)
def start_that_counts(broken: bool) -> Subject:
    def start(state: State) -> State:
        return state.remember("calls", state.memory["calls"] + 1 if broken else 1)

    return trained(on_train_start=start, memory={"calls": lambda state: 0})


@control("resume", "TrainUnit.on_train_start changes the state", "state.opt_state['lr']", "set a value only where")
def start_that_resets(broken: bool) -> Subject:
    def start(state: State) -> State:
        fresh = broken or state.progress.train.steps == 0
        return state.replace(opt_state={"lr": torch.tensor(0.5, dtype=torch.float64)}) if fresh else state

    def halve(state: State) -> State:
        return state.replace(opt_state={"lr": state.opt_state["lr"] / 2})

    return trained(on_train_start=start, on_train_epoch_end=halve)


@control("resume", "a call on the final state", "TrainUnit.on_train_end", "state.params['w']", "end hooks")
def end_that_halves(broken: bool) -> Subject:
    def end(state: State) -> State:
        return with_w(state, state.params["w"] / 2 if broken else state.params["w"].clamp(-1, 1))

    return trained(on_train_end=end)


@control("resume", "the train data is where it begins", "batch", "function of the epoch")
def data_with_a_position(broken: bool) -> Subject:
    order: list[int] = []

    def data(epoch: int) -> Any:
        order[:] = [0, 1, 2] if epoch == 0 else [*order[1:], order[0]]
        turn = order if broken else [(epoch + index) % 3 for index in range(3)]
        return [torch.full((2,), float(index)) for index in turn]

    return trained(data=data)


# Law 6, observers.


def _observed(observer: Any) -> Subject:
    case = trained().case
    return Subject(case, observers=[observer])


@control("observers", "the observer", "wrote into the event", "state.params['w']")
def observer_in_place(broken: bool) -> Subject:
    def zero(event: Any) -> None:
        w = event.state.params["w"]
        w = w.zero_() if broken else w.clone().zero_()

    return _observed(zero)


@control("observers", "at train fetched (epoch 0, step 0)", "wrote into the event", "batch", also=EVERYWHERE[:0])
def observer_of_batches(broken: bool) -> Subject:
    def zero(event: Any) -> None:
        if event.point == "fetched":
            (event.batch if broken else event.batch.clone()).zero_()

    return _observed(zero)


@control("observers", "drew from the global generator of numpy", "generator of its own")
def observer_that_draws(broken: bool) -> Subject:
    own = torch.Generator()
    return _observed(lambda event: draw("numpy") if broken else torch.rand(1, generator=own))


# Law 7, evaluation.


@control("evaluation", "the loop itself says so", "eval_step changed state.params", "reads")
def evaluation_that_trains(broken: bool) -> Subject:
    def eval_step(state: State, batch: Any) -> Any:
        return with_w(state, state.params["w"] + 1) if broken else state, {}

    return fitted(eval_step=eval_step)


@control("evaluation", "eval end (epoch 1, step 1)", "EvalUnit.on_eval_end changed", "state.metrics", also=("resume",))
def evaluation_that_clears_metrics(broken: bool) -> Subject:
    def clear(state: State) -> State:
        cleared = {phase: {} for phase in state.metrics} if broken else {**state.metrics, "eval": {}}
        return state.replace(metrics=cleared)

    subject = fitted(on_eval_end=clear)
    assert subject.case is not None and isinstance(subject.case.unit, FitUnit)
    train_unit = TrainUnit(train_step=descend, metrics={"loss": metrics.mean("loss")})
    unit = FitUnit(train_unit=train_unit, eval_unit=subject.case.unit.eval_unit)
    return Subject(Case.of(unit, first_state(), batches(), batches()[:1]))


@control("evaluation", "without the evaluations", "training goes another way", "state.params['w']", also=("resume",))
def evaluation_that_tells_training(broken: bool) -> Subject:
    told = 1.0

    def train_step(state: State, batch: Any) -> Any:
        nonlocal told
        told = 1.0 if state.progress.train.steps == 0 else told
        return descend(state, batch * (told if broken else 1.0))

    def eval_step(state: State, batch: Any) -> Any:
        nonlocal told
        told = 0.5
        return read(state, batch)

    return fitted(train_step, eval_step=eval_step)


@control("purity", "predict step (epoch 0, step 0): predict_step wrote", "state.params['w']", also=("evaluation",))
def prediction_in_place(broken: bool) -> Subject:
    def predict_step(state: State, batch: Any) -> Any:
        w = state.params["w"]
        return state, w.add_(1) if broken else w.add(1)

    return Subject(Case.of(PredictUnit(predict_step=predict_step), first_state(), batches()))

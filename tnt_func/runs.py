"""The four runs: train, fit, evaluate, predict. Each is a fold of its event generator.

`train_events` and its like are the loop, lazily; `train` and its like hand every event to the observers and return
the last state. Both give the same bits; the folds save and restore the global generators once a call, not once a step.

Laws:
    The generators of torch, NumPy and `random` stand afterwards where they stood, and nothing depends on where that is.
    A paused or interrupted run, continued from its last resumable state, ends on the bits of one that never stopped.
    Observers do not matter. See `tnt_func.testing`.

Example:
    >>> unit = TrainUnit(train_step=lambda state, batch: (state.replace(params=state.params + batch), {}))
    >>> train(unit, State(params=0, key=rng.key(0)), [1, 2, 3], max_epochs=2).params
    12
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeAlias, cast

import torch

from tnt_func import rng
from tnt_func.data.cursors import BLANK, Cursor, check_resume
from tnt_func.donation import donates, take
from tnt_func.errors import UsageError
from tnt_func.events import Event, Observer, fold
from tnt_func.loop import Due, Limits, Run, evaluating, limit, training
from tnt_func.state import State, keep
from tnt_func.transforms.donating import donate as donated
from tnt_func.transitions import Transitions, expects, prepare
from tnt_func.types import Limit, Output, typed
from tnt_func.unit import RESERVED, Callback, EvalUnit, FitUnit, PredictUnit, TrainUnit, attach

Pause = Callable[[], bool]
Donation: TypeAlias = bool | Literal["given", "debug"]


@expects(TrainUnit)
@typed
def train_events(
    unit: TrainUnit,
    state: State,
    data: Any,
    *,
    max_epochs: Limit = None,
    max_steps: Limit = None,
    max_steps_per_epoch: Limit = None,
    callbacks: Sequence[Callback] = (),
    pause_when: Pause | None = None,
    allow_inexact_resume: bool = False,
    donate: Donation = False,
    fuse: int = 1,
) -> Iterator[Event]:
    """The events of `train`, lazily: the run goes as far as it is iterated, and may be dropped at any event.

    Arguments, errors and laws are those of `train`; no observers, for the caller watches.

    Example:
        >>> unit = TrainUnit(train_step=lambda state, batch: (state, {}))
        >>> [event.point for event in train_events(unit, State(params=0, key=rng.key(0)), [1], max_steps=1)]
        ['start', 'epoch_start', 'fetched', 'step_start', 'step_end', 'step_done', 'epoch_end', 'epoch_done', 'end']
    """
    limits = Limits.of(max_epochs, max_steps, max_steps_per_epoch)
    return _training(False, True, unit, state, data, limits, callbacks, pause_when, allow_inexact_resume, donate, fuse)


@expects(TrainUnit)
@typed
def train(
    unit: TrainUnit,
    state: State,
    data: Any,
    *,
    max_epochs: Limit = None,
    max_steps: Limit = None,
    max_steps_per_epoch: Limit = None,
    callbacks: Sequence[Callback] = (),
    observers: Sequence[Observer] = (),
    pause_when: Pause | None = None,
    allow_inexact_resume: bool = False,
    donate: Donation = False,
    fuse: int = 1,
) -> State:
    """Train: fold the unit over the data, epoch after epoch.

    Args:
        unit: what a step does.
        state: where to begin or continue: a first State, a returned one, or one out of a checkpoint.
        data: any iterable of batches, a function `epoch -> iterable`, or a `Pipeline`.
        max_epochs: epochs of the lifetime, those of earlier calls counted; `math.inf` for no limit.
        max_steps: steps of the lifetime, likewise. One of the two is needed.
        max_steps_per_epoch: steps after which an epoch is closed.
        callbacks: attached to the unit in this order; they may change the state.
        observers: called with every event in this order; they watch, and are closed at the end.
        pause_when: asked after every step and epoch; True pauses: the epoch stays open, the returned state resumes.
        allow_inexact_resume: continue even on a loader that cannot be brought to the exact position.
        donate: whether steps write over the states before them: the same bits in less memory and time, see
            `tnt.donate`. True copies `state` first; "given" consumes it too; "debug" is True, and every tensor of a
            consumed state raises an error where it is used. Observers that hold on to a state keep a copy of it,
            `tnt.keep`. A run that fails within a step has no state to go on from: resume from a checkpoint.
        fuse: steps that run as one block, of a compiled unit whose steps draw nothing: the same numbers, and less
            between the steps. The hooks around a step run inside its graph, so they look at no values, read neither
            `progress` nor `key`, and what they calculate may round otherwise, in its last bit; numbers that they
            remember are tensors there. A block ends where the lifetime's steps are a multiple of `fuse`, and before at
            a limit, an evaluation or the end of an epoch. Its batches are fetched first; then come `step_start` and
            `step_end` of every step, with its output and metrics, and after the last one `step_done`. Only there is the
            rest of the state, so what saves or reads parameters does so every multiple of `fuse`; and only there is
            `pause_when` asked.

    Returns:
        The state of the last event.

    Raises:
        UsageError, UsageTypeError, ResumeError: an argument cannot work; nothing has run.
        ContractError, StructureError: the step or a hook returned the wrong thing.
        DataError: the data is used up, shorter than the state's position, or has no batch where `max_steps` alone ends
            the run. With `max_epochs`, an epoch without a batch is one: see `observers.warn_on_empty_data`.

    Example:
        >>> unit = TrainUnit(train_step=lambda state, batch: (state.replace(params=state.params + batch), {}))
        >>> state = train(unit, State(params=0, key=rng.key(0)), [1, 2, 3], max_steps=4)
        >>> state.params, state.progress.train
        (7, Progress(epochs=2, steps=4, steps_in_epoch=0))
    """
    limits = Limits.of(max_epochs, max_steps, max_steps_per_epoch)
    with rng.preserved():
        how = (callbacks, pause_when, allow_inexact_resume, donate, fuse)
        return fold(_training(True, bool(observers), unit, state, data, limits, *how), observers)


@expects(FitUnit)
@typed
def fit_events(
    unit: FitUnit,
    state: State,
    train_data: Any,
    eval_data: Any,
    *,
    max_epochs: Limit = None,
    max_steps: Limit = None,
    max_train_steps_per_epoch: Limit = None,
    max_eval_steps_per_epoch: Limit = None,
    evaluate_every_n_epochs: int | None = None,
    evaluate_every_n_steps: int | None = None,
    callbacks: Sequence[Callback] = (),
    pause_when: Pause | None = None,
    allow_inexact_resume: bool = False,
    donate: Donation = False,
    fuse: int = 1,
) -> Iterator[Event]:
    """The events of `fit`, lazily, those of its evaluations among them.

    Example:
        >>> step = lambda state, batch: (state, {})
        >>> unit = FitUnit(train_unit=TrainUnit(train_step=step), eval_unit=EvalUnit(eval_step=step))
        >>> events = fit_events(unit, State(params=0, key=rng.key(0)), [1], [2], max_epochs=1)
        >>> [event.phase for event in events if event.point == "end"]
        ['eval', 'train']
    """
    limits = Limits.of(max_epochs, max_steps, max_train_steps_per_epoch, "max_train_steps_per_epoch")
    every = (max_eval_steps_per_epoch, evaluate_every_n_epochs, evaluate_every_n_steps)
    rest = (callbacks, pause_when, allow_inexact_resume, donate, fuse, eval_data, every)
    return _training(False, True, unit, state, train_data, limits, *rest)


@expects(FitUnit)
@typed
def fit(
    unit: FitUnit,
    state: State,
    train_data: Any,
    eval_data: Any,
    *,
    max_epochs: Limit = None,
    max_steps: Limit = None,
    max_train_steps_per_epoch: Limit = None,
    max_eval_steps_per_epoch: Limit = None,
    evaluate_every_n_epochs: int | None = None,
    evaluate_every_n_steps: int | None = None,
    callbacks: Sequence[Callback] = (),
    observers: Sequence[Observer] = (),
    pause_when: Pause | None = None,
    allow_inexact_resume: bool = False,
    donate: Donation = False,
    fuse: int = 1,
) -> State:
    """Train, and evaluate whenever it is due: after every epoch, if nothing else is said.

    Args:
        unit: a train and an eval unit.
        state, max_epochs, max_steps, callbacks, observers, allow_inexact_resume, donate, fuse: as in `train`.
        train_data, eval_data: as in `train`.
        max_train_steps_per_epoch, max_eval_steps_per_epoch: steps after which a train or eval epoch is closed.
        evaluate_every_n_epochs: after every n-th epoch of the lifetime; 0 is never; None is 1 where no step cadence is
            given, else never.
        evaluate_every_n_steps: after every n-th step of the lifetime; 0 and None are never.
        pause_when: as in `train`; asked after evaluation steps too, where it abandons the evaluation and the step it
            followed, which are done again on resume. Where data is an iterator, or states are donated, evaluations
            are finished first.

    Returns:
        The state of the last event.

    Raises:
        As `train`.

    Example:
        >>> train_unit = TrainUnit(train_step=lambda state, batch: (state.replace(params=state.params + batch), {}))
        >>> eval_unit = EvalUnit(eval_step=lambda state, batch: (state, {"gap": batch - state.params}))
        >>> unit = FitUnit(train_unit=train_unit, eval_unit=eval_unit)
        >>> fit(unit, State(params=0, key=rng.key(0)), [1, 2], [5], max_epochs=2).progress.eval
        Progress(epochs=2, steps=2, steps_in_epoch=0)
    """
    limits = Limits.of(max_epochs, max_steps, max_train_steps_per_epoch, "max_train_steps_per_epoch")
    every = (max_eval_steps_per_epoch, evaluate_every_n_epochs, evaluate_every_n_steps)
    rest = (callbacks, pause_when, allow_inexact_resume, donate, fuse, eval_data, every)
    with rng.preserved():
        return fold(_training(True, bool(observers), unit, state, train_data, limits, *rest), observers)


@expects(EvalUnit)
@typed
def evaluate_events(
    unit: EvalUnit,
    state: State,
    data: Any,
    *,
    max_steps_per_epoch: Limit = None,
    callbacks: Sequence[Callback] = (),
) -> Iterator[Event]:
    """The events of `evaluate`, lazily.

    Example:
        >>> unit = EvalUnit(eval_step=lambda state, batch: (state, batch * 10))
        >>> events = evaluate_events(unit, State(params=0, key=rng.key(0)), [1, 2])
        >>> [event.state.output for event in events if event.point == "step_end"]
        [10, 20]
    """
    return _evaluating(False, unit, state, data, max_steps_per_epoch, callbacks)


@expects(EvalUnit)
@typed
def evaluate(
    unit: EvalUnit,
    state: State,
    data: Any,
    *,
    max_steps_per_epoch: Limit = None,
    callbacks: Sequence[Callback] = (),
    observers: Sequence[Observer] = (),
) -> State:
    """Evaluate: one pass over the data without gradients. Parameters, buffers and optimizer state stay as they are.

    Args:
        unit, state, data, callbacks, observers: as in `train`.
        max_steps_per_epoch: steps after which the pass ends.

    Returns:
        The state with its eval counters and metrics moved; `metrics.compute(state, "eval")` reads them.

    Raises:
        As `train`, and ContractError where the step writes to the model.

    Example:
        >>> from tnt_func.metrics import compute, mean
        >>> unit = EvalUnit(eval_step=lambda state, batch: (state, {"loss": batch}), metrics={"loss": mean("loss")})
        >>> compute(evaluate(unit, State(params=0, key=rng.key(0)), [1.0, 3.0]), "eval")
        {'loss': tensor(2., dtype=torch.float64)}
    """
    with rng.preserved():
        return fold(_evaluating(True, unit, state, data, max_steps_per_epoch, callbacks), observers)


@expects(PredictUnit)
@typed
def predict_events(
    unit: PredictUnit,
    state: State,
    data: Any,
    *,
    max_steps_per_epoch: Limit = None,
    callbacks: Sequence[Callback] = (),
) -> Iterator[Event]:
    """The events of `predict`, lazily: the way to predict on more than memory holds.

    Example:
        >>> unit = PredictUnit(predict_step=lambda state, batch: (state, batch + state.params))
        >>> events = predict_events(unit, State(params=1, key=rng.key(0)), [1, 2])
        >>> [event.state.output for event in events if event.point == "step_end"]
        [2, 3]
    """
    return _evaluating(False, unit, state, data, max_steps_per_epoch, callbacks)


@expects(PredictUnit)
@typed
def predict(
    unit: PredictUnit,
    state: State,
    data: Any,
    *,
    max_steps_per_epoch: Limit = None,
    callbacks: Sequence[Callback] = (),
    observers: Sequence[Observer] = (),
) -> tuple[State, list[Output]]:
    """Predict: one pass over the data without gradients, outputs kept.

    Args:
        unit, state, data, max_steps_per_epoch, callbacks, observers: as in `evaluate`.

    Returns:
        The state with its predict counters moved, and the output of every step in order.

    Example:
        >>> unit = PredictUnit(predict_step=lambda state, batch: (state, batch + state.params))
        >>> predict(unit, State(params=1, key=rng.key(0)), [1, 2])[1]
        [2, 3]
    """
    outputs: list[Output] = []

    def collect(event: Event) -> None:
        if event.point == "step_end":
            outputs.append(event.state.output)

    with rng.preserved():
        events = _evaluating(True, unit, state, data, max_steps_per_epoch, callbacks)
        return fold(events, (collect, *observers)), outputs


def _training(
    kept: bool,
    watched: bool,
    unit: TrainUnit | FitUnit,
    state: State,
    data: Any,
    limits: Limits,
    callbacks: Sequence[Callback],
    pause_when: Pause | None,
    allow_inexact_resume: bool,
    donate: Donation,
    fuse: int,
    eval_data: Any = None,
    every: tuple[Limit, int | None, int | None] | None = None,
) -> Iterator[Event]:
    _check_surroundings()
    if isinstance(fuse, bool) or fuse < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise UsageError(
            f"fuse={fuse!r} was given; it is a number of steps, 1 for steps on their own. Write fuse=100, say."
        )
    unit = attach(unit, *callbacks)
    if donate:
        unit = donated(cast(Any, unit), debug=donate == "debug")
    donating = donates((unit.train_unit if isinstance(unit, FitUnit) else unit).train_step)
    # An iterator does not give the batches again that a pause inside an evaluation takes back.
    abandons = not any(isinstance(read, Iterator) for read in (data, eval_data))
    first = prepare(unit, state)
    if donating and donate == "given":
        take(state)
    elif donating:
        first = keep(first)
    del state
    run = Run(first, pause_when, abandons=abandons, donates=donating)
    cursor = Cursor(data, "train", kept)
    if not allow_inexact_resume:
        check_resume(data, run.last.memory[RESERVED], run.last.progress.train, "train")
    if not isinstance(unit, FitUnit):
        return run.events("train", training(run, Transitions(unit, kept, fuse, watched), cursor, limits))
    assert every is not None
    eval_run, eval_cursor = Transitions(unit.eval_unit, kept), Cursor(eval_data, "eval", kept)
    if not allow_inexact_resume:
        check_resume(eval_data, BLANK, run.last.progress.eval, "eval")
    max_eval_steps = limit("max_eval_steps_per_epoch", every[0])
    due = Due(lambda state: evaluating(run, eval_run, eval_cursor, max_eval_steps, state), *every[1:])
    return run.events("train", training(run, Transitions(unit.train_unit, kept, fuse, watched), cursor, limits, due))


def _evaluating(
    kept: bool,
    unit: EvalUnit | PredictUnit,
    state: State,
    data: Any,
    max_steps_per_epoch: Limit,
    callbacks: Sequence[Callback],
) -> Iterator[Event]:
    _check_surroundings()
    max_steps = limit("max_steps_per_epoch", max_steps_per_epoch)
    unit = attach(unit, *callbacks)
    run = Run(prepare(unit, state))
    cursor = Cursor(data, unit.phase, kept)
    return run.events(unit.phase, evaluating(run, Transitions(unit, kept), cursor, max_steps, run.last))


def _check_surroundings() -> None:
    if torch.is_inference_mode_enabled():
        raise UsageError(
            "a run was begun under torch.inference_mode(); tensors made there can never be differentiated, which would "
            "spoil the state. Call it outside; evaluation and prediction turn gradients off themselves."
        )

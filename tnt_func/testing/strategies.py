"""Hypothesis strategies for whole runs: a state, data, a unit out of random pure pieces, callbacks, limits.

A drawn `Case` obeys every law, so a check that fails on it has found a bug. Sizes are tiny: up to three parameters of
up to four numbers, up to three batches, up to three epochs. Of choices the most telling comes first, for Hypothesis
takes the first ones more often: a run of a few steps before one of none.

Example:
    >>> from hypothesis import given, settings
    >>> from tnt_func.testing import check_grammar
    >>> @settings(max_examples=3, database=None)
    ... @given(cases())
    ... def test_grammar(case): case.check(check_grammar)
    >>> test_grammar()
"""

import functools
import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from tnt_func import metrics, rng
from tnt_func import pytree as trees
from tnt_func.metrics import Metric
from tnt_func.progress import Progress, RunProgress
from tnt_func.state import State
from tnt_func.testing.case import Case
from tnt_func.testing.pieces import (
    SLOT,
    Add,
    Clamp,
    Count,
    Decay,
    Descend,
    Differentiate,
    Draw,
    Dropout,
    Follow,
    Momentum,
    Noise,
    PerEpoch,
    Piece,
    Reads,
    Seekable,
    Set,
    Steps,
    StopEvery,
    blank,
    floats,
)
from tnt_func.types import Generator, Phase
from tnt_func.unit import POINTS, Callback, EvalUnit, FitUnit, Hook, PredictUnit, TrainUnit

GENERATORS: tuple[Generator, ...] = rng.ALL
READS = st.sampled_from((None, *GENERATORS)).map(Reads)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool)
SHAPES = ((), (2,), (0,), (2, 2), (1, 3))


@functools.cache
def tensors(dtypes: Sequence[torch.dtype] = DTYPES) -> st.SearchStrategy[torch.Tensor]:
    """Small tensors of many dtypes, 0-d and empty ones among them.

    Example:
        >>> from hypothesis import find
        >>> find(tensors(), lambda tensor: tensor.ndim == 2).shape
        torch.Size([2, 2])
    """

    def tensor(choice: int) -> torch.Tensor:
        rest, shape = divmod(choice, len(SHAPES))
        seed, dtype = divmod(rest, len(dtypes))
        values = torch.rand(SHAPES[shape], generator=torch.Generator().manual_seed(seed))
        return (values * 4 - 2).to(dtypes[dtype])

    # One choice and not three: a run draws dozens of tensors.
    return st.integers(0, 10 * len(SHAPES) * len(dtypes) - 1).map(tensor)


def trees_of(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Nested dicts, lists and tuples over one to three leaves.

    Example:
        >>> from hypothesis import find
        >>> find(trees_of(st.just(0)), lambda tree: isinstance(tree, dict) and len(tree) == 2)
        {'a': (0, 0), 'b': 0}
    """
    shapes: tuple[Any, ...] = ({"a": 0}, 0, [0, 0], {"a": (0, 0), "b": 0}, {"a": {"b": [0]}}, ({}, 0))

    def filled(choice: tuple[Any, list[Any]]) -> Any:
        rest = iter(choice[1])
        return trees.map(lambda _: next(rest), choice[0])

    return st.tuples(st.sampled_from(shapes), st.tuples(leaves, leaves, leaves).map(list)).map(filled)


@functools.cache
def progresses() -> st.SearchStrategy[Progress]:
    """Counters between two epochs, mostly of a fresh run.

    Example:
        >>> from hypothesis import find
        >>> find(progresses(), lambda progress: progress.epochs > 0)
        Progress(epochs=1, steps=0, steps_in_epoch=0)
    """
    return st.just(Progress()) | st.builds(Progress, st.integers(0, 2), st.integers(0, 5), st.just(0))


@functools.cache
def states(*, train: int = 0, other: int = 0) -> st.SearchStrategy[State]:
    """States for units out of pieces.

    Args:
        train, other: how many steps of an open epoch of training, or of the other phases, are behind the state.

    Example:
        >>> from hypothesis import find
        >>> find(states(), lambda state: True).progress.train
        Progress(epochs=0, steps=0, steps_in_epoch=0)
    """

    def after(closed: Progress, behind: int) -> Progress:
        return closed._replace(steps=closed.steps + behind, steps_in_epoch=behind)

    def state(params: Any, seed: int, *closed: Progress) -> State:
        return State(
            params=params,
            key=rng.key(seed),
            buffers={"count": torch.tensor(0)},
            opt_state={"momentum": floats(torch.zeros_like, params), "lr": torch.tensor(0.1, dtype=torch.float64)},
            progress=RunProgress(*(after(*pair) for pair in zip(closed, (train, other, other), strict=True))),
        )

    return st.builds(state, trees_of(tensors()), st.integers(0, 2**64 - 1), *[progresses()] * 3)


@functools.cache
def data(length: int) -> st.SearchStrategy[Any]:
    """Data of as many batches an epoch, of every kind that the loop takes and that starts anew each epoch.

    Example:
        >>> from hypothesis import find
        >>> find(data(2), lambda batches: isinstance(batches, DataLoader)).batch_size
        2
    """
    values = [float(index * index - 2) for index in range(length)]
    rows = torch.tensor([[value, 1.0] for value in values]).reshape(length, 2)
    kinds: list[Callable[[], Any]] = [
        lambda: PerEpoch(length),
        lambda: [{"x": row.clone(), "n": 2} for row in rows],
        lambda: rows.clone(),
        lambda: Seekable(length),
        lambda: tuple(values),
        lambda: list(values),
    ]
    if "numpy" in sys.modules:
        kinds.insert(0, lambda: rows.numpy().copy())
    if length:
        pairs = TensorDataset(torch.arange(2.0 * length))
        kinds.insert(0, lambda: DataLoader(pairs, batch_size=2, shuffle=True))
    return st.sampled_from(kinds).map(lambda make: make())


@functools.cache
def metric_sets() -> st.SearchStrategy[dict[str, Metric]]:
    """Metrics of what units out of pieces return, by name.

    Example:
        >>> from hypothesis import find
        >>> list(find(metric_sets(), lambda chosen: len(chosen) == 1))
        ['loss']
    """
    every = {
        "loss": metrics.mean("loss"),
        "weighted": metrics.mean("loss", weight="num_samples"),
        "vector": metrics.mean("vector"),
        "samples": metrics.total("num_samples"),
        "least": metrics.minimum("loss"),
        "most": metrics.maximum("vector"),
        "last": metrics.last("loss"),
    }
    return st.lists(st.sampled_from(list(every)), max_size=2, unique=True).map(
        lambda names: {name: every[name] for name in names}
    )


@functools.cache
def pieces() -> st.SearchStrategy[Piece]:
    """What a training step can do.

    Example:
        >>> from hypothesis import find
        >>> find(pieces(), lambda piece: isinstance(piece, Noise))
        Noise(draws='torch')
    """
    return st.one_of(
        st.sampled_from((Descend(0.5), Descend(-0.25), Differentiate(), Momentum(0.5), Count(), Dropout())),
        st.sampled_from(GENERATORS).map(Noise),
    )


@functools.cache
def hooks(phase: Phase, slot: str) -> st.SearchStrategy[dict[str, Hook]]:
    """Hooks of one phase at some of its points, by field name. Those of training that bracket a call are idempotent.

    Args:
        phase: whose hooks.
        slot: the slot of memory they use.

    Example:
        >>> from hypothesis import find
        >>> find(hooks("train", "unit"), lambda found: "on_train_start" in found)
        {'on_train_start': Set(slot='unit')}
    """
    anywhere: list[Hook] = [StopEvery(phase, "steps", 4), Follow(slot), StopEvery(phase, "epochs", 2)]
    anywhere += [Draw(slot, generator) for generator in GENERATORS]
    anywhere += [Decay(0.5)] if phase == "train" else []
    anywhere += [Add(slot), Set(slot), *(StopEvery(phase, "steps", every) for every in (3, 2, 5, 1))]
    few: dict[str, list[Hook]] = {"on_train_start": [Set(slot)], "on_train_end": [Set(slot), Clamp()]}
    # All points are as likely, however many hooks there are for each.
    placed = [
        (name, hook)
        for name in (f"on_{phase}_{point}" for point in reversed(POINTS))
        for hook in itertools.islice(itertools.cycle(few.get(name, anywhere)), len(anywhere))
    ]
    return st.lists(st.sampled_from(placed), max_size=3, unique_by=lambda pair: pair[0]).map(dict)


@functools.cache
def train_units() -> st.SearchStrategy[TrainUnit]:
    """Training units out of pieces.

    Example:
        >>> from hypothesis import find
        >>> find(train_units(), lambda unit: True).train_step
        Steps(pieces=())
    """

    def unit(pieces: list[Piece], metrics: dict[str, Metric], hooks: dict[str, Any]) -> TrainUnit:
        step = Steps(tuple(pieces))
        return TrainUnit(train_step=step, metrics=metrics, memory={SLOT: blank}, draws=GENERATORS, **hooks)

    return st.builds(unit, st.lists(pieces(), max_size=3), metric_sets(), hooks("train", SLOT))


@functools.cache
def eval_units() -> st.SearchStrategy[EvalUnit]:
    """Evaluation units out of pieces.

    Example:
        >>> from hypothesis import find
        >>> find(eval_units(), lambda unit: True).eval_step
        Reads(draws=None)
    """

    def unit(step: Reads, metrics: dict[str, Metric], hooks: dict[str, Any]) -> EvalUnit:
        return EvalUnit(eval_step=step, metrics=metrics, memory={SLOT: blank}, draws=GENERATORS, **hooks)

    return st.builds(unit, READS, metric_sets(), hooks("eval", SLOT))


@functools.cache
def predict_units() -> st.SearchStrategy[PredictUnit]:
    """Prediction units out of pieces.

    Example:
        >>> from hypothesis import find
        >>> find(predict_units(), lambda unit: True).predict_step
        Reads(draws=None)
    """

    def unit(step: Reads, metrics: dict[str, Metric], hooks: dict[str, Any]) -> PredictUnit:
        return PredictUnit(predict_step=step, metrics=metrics, memory={SLOT: blank}, draws=GENERATORS, **hooks)

    return st.builds(unit, READS, metric_sets(), hooks("predict", SLOT))


@functools.cache
def callback_lists(*phases: Phase) -> st.SearchStrategy[tuple[Callback, ...]]:
    """Up to two callbacks with hooks of these phases, and memory.

    Example:
        >>> from hypothesis import find
        >>> [callback.name for callback in find(callback_lists("eval"), lambda found: len(found) == 2)]
        ['a', 'b']
    """

    def callback(name: str, *found: dict[str, Any]) -> Callback:
        merged = {point: hook for part in found for point, hook in part.items()}
        return Callback(name=name, memory=blank, draws=GENERATORS, **merged)

    a, b = (st.builds(callback, st.just(name), *(hooks(phase, name) for phase in phases)) for name in "ab")
    return st.tuples(a, b) | st.tuples(a) | st.just(())


@st.composite
def train_cases(draw: st.DrawFn) -> Case:
    """Runs of `train`.

    Example:
        >>> from hypothesis import Phase, find, settings
        >>> find(train_cases(), lambda case: True, settings=settings(phases=[Phase.generate])).unit.phase
        'train'
    """
    length = draw(LENGTHS)
    state = draw(states(train=draw(open_at(length))))
    options = _from(state, draw(limits(length, "max_steps_per_epoch")))
    return Case.of(draw(train_units()), state, draw(data(length)), None, draw(callback_lists("train")), options)


@st.composite
def fit_cases(draw: st.DrawFn) -> Case:
    """Runs of `fit`, with evaluations after steps, epochs or both.

    Example:
        >>> from hypothesis import Phase, find, settings
        >>> find(fit_cases(), lambda case: True, settings=settings(phases=[Phase.generate])).unit.eval_unit.phase
        'eval'
    """
    length, eval_length = draw(LENGTHS), draw(LENGTHS)
    state = draw(states(train=draw(open_at(length)), other=draw(open_at(eval_length))))
    options = _from(state, draw(limits(length, "max_train_steps_per_epoch"))) | draw(CADENCES)
    unit = FitUnit(train_unit=draw(train_units()), eval_unit=draw(eval_units()))
    callbacks = draw(callback_lists("train", "eval"))
    return Case.of(unit, state, draw(data(length)), draw(data(eval_length)), callbacks, options)


@st.composite
def pass_cases(draw: st.DrawFn) -> Case:
    """Runs of `evaluate` and `predict`.

    Example:
        >>> from hypothesis import Phase, find, settings
        >>> found = find(pass_cases(), lambda case: True, settings=settings(phases=[Phase.generate]))
        >>> found.unit.phase in ("eval", "predict")
        True
    """
    unit, length = draw(PASSES), draw(LENGTHS)
    state = draw(states(other=draw(open_at(length))))
    return Case.of(unit, state, draw(data(length)), None, draw(callback_lists(unit.phase)), draw(PASS_LIMITS))


def cases() -> st.SearchStrategy[Case]:
    """Runs of every entry point."""
    return train_cases() | fit_cases() | pass_cases()


@functools.cache
def open_at(length: int) -> st.SearchStrategy[int]:
    """How many steps of an open epoch a state has behind it; mostly none, at most as many as the epoch has batches."""
    return st.sampled_from((0, 0, 0, *range(1, length + 1)))


@functools.cache
def limits(length: int, per_epoch: str) -> st.SearchStrategy[dict[str, int]]:
    """Limits that end a run, counted from where it begins.

    Args:
        length: batches in an epoch; without any, a limit of epochs is needed.
        per_epoch: what the limit of steps in an epoch is called.

    Example:
        >>> from hypothesis import find
        >>> find(limits(0, "max_steps_per_epoch"), lambda found: "max_steps" in found)
        {'max_epochs': 2, 'max_steps': 4}
    """
    some: Callable[[Sequence[int]], st.SearchStrategy[int]] = st.sampled_from
    epochs: dict[str, st.SearchStrategy[int]] = {"max_epochs": some((2, 1, 3, 0))}
    steps: dict[str, st.SearchStrategy[int]] = {"max_steps": some((4, 5, 3, 6, 2, 1, 0))}
    by_epochs, both = (
        st.fixed_dictionaries(named, optional={per_epoch: some((2, 1, 3, 0))}) for named in (epochs, epochs | steps)
    )
    by_steps = st.fixed_dictionaries(steps, optional={per_epoch: some((2, 1, 3))})
    return by_steps | both | by_epochs if length else by_epochs | both


def _from(state: State, limits: dict[str, int]) -> dict[str, int]:
    """Limits as lifetime totals."""
    done = {"max_epochs": state.progress.train.epochs, "max_steps": state.progress.train.steps}
    return {name: count + done.get(name, 0) for name, count in limits.items()}


LENGTHS = st.sampled_from((2, 3, 1, 2, 3, 0))
CADENCES = st.fixed_dictionaries(
    {
        "evaluate_every_n_steps": st.sampled_from((2, None, 1, 3, 0)),
        "evaluate_every_n_epochs": st.sampled_from((1, None, 2, 0)),
        "max_eval_steps_per_epoch": st.sampled_from((None, 1, 2, 0)),
    }
)
PASS_LIMITS = st.fixed_dictionaries({}, optional={"max_steps_per_epoch": st.sampled_from((2, 1, 3, 0))})
PASSES: st.SearchStrategy[EvalUnit | PredictUnit] = eval_units() | predict_units()

"""Hypothesis strategies for whole runs: a state, data, a unit out of random pure pieces, callbacks, limits.

A drawn `Case` obeys every law, so a check that fails on it has found a bug. Sizes are tiny: up to three parameters of
up to four numbers, up to three batches, up to three epochs.

Example:
    >>> from hypothesis import given, settings
    >>> from tnt_func.testing import check_grammar
    >>> @settings(max_examples=3, database=None)
    ... @given(cases())
    ... def test_grammar(case): case.check(check_grammar)
    >>> test_grammar()
"""

from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from tnt_func import metrics, rng
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
    StopAt,
    blank,
    floats,
)
from tnt_func.types import Generator, Phase
from tnt_func.unit import POINTS, Callback, EvalUnit, FitUnit, Hook, PredictUnit, TrainUnit

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool)
SHAPES = ((), (2,), (0,), (2, 2), (1, 3))


@st.composite
def tensors(draw: st.DrawFn, dtypes: Sequence[torch.dtype] = DTYPES) -> torch.Tensor:
    """Small tensors of many dtypes, 0-d and empty ones among them.

    Example:
        >>> from hypothesis import find
        >>> find(tensors(), lambda tensor: tensor.ndim == 2).shape
        torch.Size([2, 2])
    """
    shape, dtype = draw(st.sampled_from(SHAPES)), draw(st.sampled_from(dtypes))
    values = torch.rand(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))) * 4 - 2
    return values.to(dtype)


def trees_of(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Nested dicts, lists and tuples over leaves.

    Example:
        >>> from hypothesis import find
        >>> find(trees_of(st.just(0)), lambda tree: isinstance(tree, dict) and len(tree) == 2)
        {'a': 0, 'b': 0}
    """
    several = st.lists(leaves, min_size=1, max_size=2)
    named = st.dictionaries(st.sampled_from("ab"), several.map(tuple) | leaves, min_size=1, max_size=2)
    return named | several | leaves


NO_STEPS = st.just(0)


def progresses() -> st.SearchStrategy[Progress]:
    """Counters between two epochs, mostly of a fresh run.

    Example:
        >>> from hypothesis import find
        >>> find(progresses(), lambda progress: progress.epochs > 0)
        Progress(epochs=1, steps=0, steps_in_epoch=0)
    """
    return st.just(Progress()) | st.builds(Progress, st.integers(0, 2), st.integers(0, 5), st.just(0))


@st.composite
def states(draw: st.DrawFn, *, open_steps: st.SearchStrategy[int] = NO_STEPS) -> State:
    """States for units out of pieces.

    Args:
        open_steps: how many steps of an open epoch are behind the state.

    Example:
        >>> from hypothesis import find
        >>> find(states(), lambda state: True).progress.train
        Progress(epochs=0, steps=0, steps_in_epoch=0)
    """
    params = draw(trees_of(tensors()))
    train, behind = draw(progresses()), draw(open_steps)
    return State(
        params=params,
        key=rng.key(draw(st.integers(0, 2**64 - 1))),
        buffers={"count": torch.tensor(0)},
        opt_state={"momentum": floats(torch.zeros_like, params), "lr": torch.tensor(0.1, dtype=torch.float64)},
        progress=RunProgress(train._replace(steps=train.steps + behind, steps_in_epoch=behind), draw(progresses())),
    )


@st.composite
def data(draw: st.DrawFn, length: int) -> Any:
    """Data of as many batches an epoch, of every kind that the loop takes and that starts anew each epoch.

    Example:
        >>> from hypothesis import find
        >>> find(data(2), lambda batches: isinstance(batches, DataLoader)).batch_size
        2
    """
    values = [float(draw(st.integers(-3, 3))) for _ in range(length)]
    kind = draw(st.sampled_from(("list", "tuple", "tensor", "array", "loader", "dicts", "per epoch", "seekable")))
    if kind == "loader" and length:
        return DataLoader(TensorDataset(torch.arange(2.0 * length)), batch_size=2, shuffle=True)
    if kind == "array":
        import numpy

        return numpy.array([[value, 1.0] for value in values]).reshape(length, 2)
    if kind == "tensor":
        return torch.tensor([[value, 1.0] for value in values]).reshape(length, 2)
    if kind == "dicts":
        return [{"x": torch.tensor([value, 2.0]), "n": 2} for value in values]
    if kind == "per epoch":
        return PerEpoch(length)
    return Seekable(length) if kind == "seekable" else tuple(values) if kind == "tuple" else values


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


GENERATORS: tuple[Generator, ...] = rng.ALL


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


@st.composite
def hooks(draw: st.DrawFn, phase: Phase, slot: str, stops: bool = True) -> dict[str, Hook]:
    """Hooks of one phase at some of its points, by field name. Those of training that bracket a call are idempotent.

    Args:
        phase: whose hooks.
        slot: the slot of memory they use.
        stops: whether they may request one.

    Example:
        >>> from hypothesis import find
        >>> find(hooks("train", "unit"), lambda found: "on_train_start" in found)
        {'on_train_start': Set(slot='unit')}
    """
    found: dict[str, Hook] = {}
    for point in draw(st.lists(st.sampled_from(POINTS), max_size=3, unique=True)):
        if phase == "train" and point in ("start", "end"):
            choice: list[Any] = [Set(slot)] if point == "start" else [Set(slot), Clamp()]
        else:
            stop = StopAt(phase, draw(st.sampled_from(("epochs", "steps"))), draw(st.integers(0, 4)))
            choice = [Add(slot), Set(slot), Follow(slot), *(Draw(slot, generator) for generator in GENERATORS)]
            choice += [Decay(0.5)] * (phase == "train") + [stop] * stops
        found[f"on_{phase}_{point}"] = draw(st.sampled_from(choice))
    return found


@st.composite
def train_units(draw: st.DrawFn) -> TrainUnit:
    """Training units out of pieces.

    Example:
        >>> from hypothesis import find
        >>> find(train_units(), lambda unit: True).train_step
        Steps(pieces=())
    """
    step = Steps(tuple(draw(st.lists(pieces(), max_size=3))))
    return TrainUnit(
        train_step=step,
        metrics=draw(metric_sets()),
        memory={SLOT: blank},
        draws=GENERATORS,
        **draw(hooks("train", SLOT)),
    )


@st.composite
def eval_units(draw: st.DrawFn, *, stops: bool = True) -> EvalUnit:
    """Evaluation units out of pieces.

    Example:
        >>> from hypothesis import find
        >>> find(eval_units(), lambda unit: True).eval_step
        Reads(draws=None)
    """
    step = Reads(draw(st.sampled_from((None, *GENERATORS))))
    found = draw(hooks("eval", SLOT, stops))
    return EvalUnit(eval_step=step, metrics=draw(metric_sets()), memory={SLOT: blank}, draws=GENERATORS, **found)


@st.composite
def predict_units(draw: st.DrawFn) -> PredictUnit:
    """Prediction units out of pieces.

    Example:
        >>> from hypothesis import find
        >>> find(predict_units(), lambda unit: True).predict_step
        Reads(draws=None)
    """
    step = Reads(draw(st.sampled_from((None, *GENERATORS))))
    found = draw(hooks("predict", SLOT))
    return PredictUnit(predict_step=step, metrics=draw(metric_sets()), memory={SLOT: blank}, draws=GENERATORS, **found)


@st.composite
def callback_lists(draw: st.DrawFn, phases: Sequence[Phase]) -> tuple[Callback, ...]:
    """Up to two callbacks with hooks of these phases, and memory.

    Example:
        >>> from hypothesis import find
        >>> [callback.name for callback in find(callback_lists(["eval"]), lambda found: len(found) == 2)]
        ['a', 'b']
    """
    names = "ab"[: draw(st.integers(0, 2))]
    return tuple(
        Callback(name=name, memory=blank, draws=GENERATORS, **_merged(draw(hooks(phase, name)) for phase in phases))
        for name in names
    )


def _merged(found: Any) -> Any:
    return {name: hook for part in found for name, hook in part.items()}


@st.composite
def train_cases(draw: st.DrawFn) -> Case:
    """Runs of `train`.

    Example:
        >>> from hypothesis import find
        >>> find(train_cases(), lambda case: True).options
        {'max_epochs': 0}
    """
    length = draw(st.integers(0, 3))
    state = draw(states(open_steps=NO_STEPS | st.integers(0, length)))
    options = draw(_limits(state, length, "max_steps_per_epoch"))
    callbacks = draw(callback_lists(["train"]))
    return Case.of(draw(train_units()), state, draw(data(length)), None, callbacks, options)


@st.composite
def fit_cases(draw: st.DrawFn) -> Case:
    """Runs of `fit`, with evaluations after steps, epochs or both.

    Example:
        >>> from hypothesis import find
        >>> find(fit_cases(), lambda case: True).options
        {'max_epochs': 0}
    """
    length = draw(st.integers(0, 3))
    state = draw(states(open_steps=NO_STEPS | st.integers(0, length)))
    options = draw(_limits(state, length, "max_train_steps_per_epoch"))
    cadences = {
        "evaluate_every_n_epochs": st.sampled_from((1, 2, 0)),
        "evaluate_every_n_steps": st.sampled_from((1, 2, 3, 0)),
        "max_eval_steps_per_epoch": st.integers(0, 2),
    }
    options |= draw(st.fixed_dictionaries({}, optional=cadences))
    unit = FitUnit(train_unit=draw(train_units()), eval_unit=draw(eval_units()))
    callbacks = draw(callback_lists(["train", "eval"]))
    eval_data = draw(data(draw(st.integers(0, 2))))
    return Case.of(unit, state, draw(data(length)), eval_data, callbacks, options)


@st.composite
def _limits(draw: st.DrawFn, state: State, length: int, per_epoch: str) -> dict[str, int]:
    """Limits that end the run."""
    progress, limits = state.progress.train, dict[str, int]()
    if draw(st.booleans()) and draw(st.booleans()):
        limits[per_epoch] = draw(st.integers(0, 3))
    steps = draw(st.booleans())
    if steps:
        limits["max_steps"] = progress.steps + draw(st.integers(0, 5))
    if not steps or draw(st.booleans()) or length == 0 or limits.get(per_epoch) == 0:
        limits["max_epochs"] = progress.epochs + draw(st.integers(0, 2))
    return limits


@st.composite
def pass_cases(draw: st.DrawFn) -> Case:
    """Runs of `evaluate` and `predict`.

    Example:
        >>> from hypothesis import find
        >>> find(pass_cases(), lambda case: True).options
        {}
    """
    unit = draw(eval_units() | predict_units())
    options = draw(st.fixed_dictionaries({}, optional={"max_steps_per_epoch": st.integers(0, 3)}))
    feed = draw(data(draw(st.integers(0, 3))))
    return Case.of(unit, draw(states()), feed, None, draw(callback_lists([unit.phase])), options)


def cases() -> st.SearchStrategy[Case]:
    """Runs of every entry point.

    Example:
        >>> from hypothesis import find
        >>> find(cases(), lambda case: isinstance(case.unit, FitUnit)).options
        {'max_epochs': 0}
    """
    return train_cases() | fit_cases() | pass_cases()

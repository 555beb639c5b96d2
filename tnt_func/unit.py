"""Units say what a step does and what happens around it; callbacks are units without a step.

A unit is a frozen dataclass of pure functions, all of two shapes: a `Step` takes a state and a batch and gives a state
and an output, a `Hook` takes a state and gives a state. Attaching a callback to a unit gives a unit.

Laws:
    `attach(unit)` is the unit. `attach(attach(unit, a), b)` is `attach(unit, a, b)`, and `train(unit, ...,
    callbacks=[a, b])` trains it. At every point the unit goes first, then the callbacks in order.

Example:
    >>> halve = TrainUnit(train_step=lambda state, batch: (state.replace(params=state.params / 2), {"batch": batch}))
    >>> count = Callback(name="count", memory=lambda state: 0,
    ...                  on_train_step_end=lambda state: state.remember("count", state.memory["count"] + 1))
    >>> list(attach(halve, count).memory)
    ['count']
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeAlias, TypeVar

from tnt_func.errors import UsageError, UsageTypeError, kind_of
from tnt_func.factories import Brief
from tnt_func.metrics import Metric
from tnt_func.rng import ALL
from tnt_func.state import State
from tnt_func.types import Batch, Generator, Output, Phase, PyTree, typed

Hook: TypeAlias = Callable[[State], State]
Step: TypeAlias = Callable[[State, Batch], tuple[State, Output]]
Memory: TypeAlias = Callable[[State], PyTree]

PHASES: tuple[Phase, ...] = ("train", "eval", "predict")
POINTS = ("start", "epoch_start", "step_start", "step_end", "epoch_end", "end")
RESERVED = "data"
"""The slot of `state.memory` in which the loop notes what data an open epoch reads."""


def identity(state: State) -> State:
    """The hook that does nothing.

    Example:
        >>> identity(1)
        1
    """
    return state


@dataclass(frozen=True, repr=False)
class Chain(Brief):
    """Hooks one after another as one hook, each with the name that an error will give it.

    Example:
        >>> Chain((("one", identity), ("two", identity)))(3)
        3
    """

    links: tuple[tuple[str, Hook], ...]

    def __call__(self, state: State) -> State:
        """Every hook on the result of the one before."""
        for _, hook in self.links:
            state = hook(state)
        return state


def links(hook: Hook, name: str) -> tuple[tuple[str, Hook], ...]:
    """The hooks that a hook is made of, each with its name; none for the identity.

    Example:
        >>> links(identity, "TrainUnit.on_train_start")
        ()
    """
    if hook is identity:
        return ()
    return hook.links if isinstance(hook, Chain) else ((name, hook),)


def then(*named: tuple[str, Hook]) -> Hook:
    """One hook that runs the given ones in order; the identity where there is nothing to run.

    Example:
        >>> then() is identity, then(("a", identity)) is identity
        (True, True)
    """
    flat = tuple(link for name, hook in named for link in links(hook, name))
    return Chain(flat) if flat else identity


@dataclass(frozen=True, kw_only=True, repr=False)
class TrainUnit(Brief):
    """What one training step does, and the hooks around it.

    Args:
        train_step: `(state, batch) -> (state, output)`; keeps structure, shapes and dtypes, and leaves `key`,
            `progress` and `stop` alone. Read counters from `state.progress.train`.
        on_train_start ... on_train_end: `state -> state`.
        metrics: what to accumulate over an epoch, by name, from the step's output.
        memory: the first value of each slot of `state.memory` that the unit uses, by name.
        draws: the global generators that the step and hooks draw from; they are seeded for it. `()` costs nothing.

    Example:
        >>> def train_step(state, batch):
        ...     return state.replace(params=state.params + batch), {"batch": batch}
        >>> TrainUnit(train_step=train_step, draws=()).phase
        'train'
    """

    phase: ClassVar[Phase] = "train"

    train_step: Step
    on_train_start: Hook = identity
    on_train_epoch_start: Hook = identity
    on_train_step_start: Hook = identity
    on_train_step_end: Hook = identity
    on_train_epoch_end: Hook = identity
    on_train_end: Hook = identity
    metrics: Mapping[str, Metric] = field(default_factory=dict[str, Metric])
    memory: Mapping[str, Memory] = field(default_factory=dict[str, Memory])
    draws: tuple[Generator, ...] = ("torch", "numpy")

    def __post_init__(self) -> None:
        _check(self, self.memory)


@dataclass(frozen=True, kw_only=True, repr=False)
class EvalUnit(Brief):
    """What one evaluation step does, and the hooks around it. Evaluation is a read: nothing of the model changes.

    Args:
        eval_step: `(state, batch) -> (state, output)`, run without gradients.
        on_eval_start ... on_eval_end: `state -> state`; may change memory and request a stop.
        metrics, memory, draws: as in `TrainUnit`.

    Example:
        >>> EvalUnit(eval_step=lambda state, batch: (state, {"batch": batch})).phase
        'eval'
    """

    phase: ClassVar[Phase] = "eval"

    eval_step: Step
    on_eval_start: Hook = identity
    on_eval_epoch_start: Hook = identity
    on_eval_step_start: Hook = identity
    on_eval_step_end: Hook = identity
    on_eval_epoch_end: Hook = identity
    on_eval_end: Hook = identity
    metrics: Mapping[str, Metric] = field(default_factory=dict[str, Metric])
    memory: Mapping[str, Memory] = field(default_factory=dict[str, Memory])
    draws: tuple[Generator, ...] = ("torch", "numpy")

    def __post_init__(self) -> None:
        _check(self, self.memory)


@dataclass(frozen=True, kw_only=True, repr=False)
class PredictUnit(Brief):
    """What one prediction step does, and the hooks around it; `predict` collects the outputs.

    Args:
        predict_step: `(state, batch) -> (state, output)`, run without gradients.
        on_predict_start ... on_predict_end: `state -> state`.
        metrics, memory, draws: as in `TrainUnit`.

    Example:
        >>> PredictUnit(predict_step=lambda state, batch: (state, batch * 2)).phase
        'predict'
    """

    phase: ClassVar[Phase] = "predict"

    predict_step: Step
    on_predict_start: Hook = identity
    on_predict_epoch_start: Hook = identity
    on_predict_step_start: Hook = identity
    on_predict_step_end: Hook = identity
    on_predict_epoch_end: Hook = identity
    on_predict_end: Hook = identity
    metrics: Mapping[str, Metric] = field(default_factory=dict[str, Metric])
    memory: Mapping[str, Memory] = field(default_factory=dict[str, Memory])
    draws: tuple[Generator, ...] = ("torch", "numpy")

    def __post_init__(self) -> None:
        _check(self, self.memory)


@dataclass(frozen=True, kw_only=True, repr=False)
class FitUnit(Brief):
    """A train and an eval unit of one state together, for `fit`.

    Example:
        >>> step = lambda state, batch: (state, {})
        >>> FitUnit(train_unit=TrainUnit(train_step=step), eval_unit=EvalUnit(eval_step=step)).predict_unit is None
        True
    """

    train_unit: TrainUnit
    eval_unit: EvalUnit
    predict_unit: PredictUnit | None = None

    def __post_init__(self) -> None:
        for kind in (TrainUnit, EvalUnit, PredictUnit):
            part: Any = getattr(self, f"{kind.phase}_unit")
            if not isinstance(part, kind) and (kind is not PredictUnit or part is not None):
                raise UsageTypeError(
                    f"FitUnit was given {kind_of(part)} as its {kind.phase}_unit; that is a {kind.__name__}. "
                    f"Write {kind.phase}_unit=tnt.{kind.__name__}({kind.phase}_step=...)."
                )


PhaseUnit: TypeAlias = TrainUnit | EvalUnit | PredictUnit
Unit: TypeAlias = PhaseUnit | FitUnit
U = TypeVar("U", bound=Unit)


@dataclass(frozen=True, kw_only=True, repr=False)
class Callback(Brief):
    """A bundle of hooks with a name and a memory: a unit without a step. Pure; it decides, observers watch.

    Args:
        name: names the slot `state.memory[name]`, so it is unique in a run.
        memory: the slot's first value, from the state at the start; None for a callback that remembers nothing.
        draws: the global generators that the hooks draw from, beside those of the unit it is attached to.
        on_train_start ... on_predict_end: `state -> state`.

    Example:
        >>> stop_at_two = Callback(name="stop_at_two", on_train_step_end=lambda state:
        ...     state.request_stop("two steps") if state.progress.train.steps == 2 else state)
        >>> stop_at_two.phases()
        ('train',)
    """

    name: str
    memory: Memory | None = None
    draws: tuple[Generator, ...] = ()
    on_train_start: Hook = identity
    on_train_epoch_start: Hook = identity
    on_train_step_start: Hook = identity
    on_train_step_end: Hook = identity
    on_train_epoch_end: Hook = identity
    on_train_end: Hook = identity
    on_eval_start: Hook = identity
    on_eval_epoch_start: Hook = identity
    on_eval_step_start: Hook = identity
    on_eval_step_end: Hook = identity
    on_eval_epoch_end: Hook = identity
    on_eval_end: Hook = identity
    on_predict_start: Hook = identity
    on_predict_epoch_start: Hook = identity
    on_predict_step_start: Hook = identity
    on_predict_step_end: Hook = identity
    on_predict_epoch_end: Hook = identity
    on_predict_end: Hook = identity

    def __post_init__(self) -> None:
        _check(self, {} if self.memory is None else {self.name: self.memory})

    def phases(self) -> tuple[Phase, ...]:
        """The phases in which it has hooks.

        Example:
            >>> Callback(name="idle").phases()
            ()
        """
        return tuple(phase for phase in PHASES if any(hook_of(self, phase, p) is not identity for p in POINTS))


def _check(owner: Any, memory: Mapping[str, Any]) -> None:
    """Refuse what no run could use where it is written, not where a run comes to it."""
    kind = type(owner).__name__
    functions = {name: value for name, value in vars(owner).items() if name.startswith("on_") or name.endswith("_step")}
    functions |= {f"memory[{name!r}]": first for name, first in memory.items()}
    for name, function in functions.items():
        if not callable(function):
            rule = "steps, hooks and what makes a slot's first value are functions. Write a def, or a lambda."
            raise UsageTypeError(f"{kind} was given {kind_of(function)} as its {name}; {rule}")
    if RESERVED in memory:
        rule = "the loop notes there what data an open epoch reads. Give the slot another name."
        raise UsageError(f"{kind} was given memory[{RESERVED!r}]; {rule}")
    for name, metric in getattr(owner, "metrics", {}).items():
        if not isinstance(metric, Metric):
            rule = f"that is a Metric. Write metrics={{{name!r}: tnt.metrics.mean(...)}}."
            raise UsageTypeError(f"{kind} was given {kind_of(metric)} as its metric {name!r}; {rule}")
    if not isinstance(owner.draws, tuple) or not set(ALL).issuperset(owner.draws):
        rule = f"it is a tuple of some of {ALL}, which can be seeded. Write draws=('torch',)."
        raise UsageError(f"{kind} was given draws={owner.draws!r}; {rule}")


def hook_of(owner: PhaseUnit | Callback, phase: Phase, point: str) -> Hook:
    """The hook that a unit or callback has at a point of a phase.

    Example:
        >>> hook_of(Callback(name="idle"), "eval", "epoch_end") is identity
        True
    """
    return getattr(owner, f"on_{phase}_{point}")


def step_of(unit: PhaseUnit) -> Step:
    """A unit's step.

    Example:
        >>> step_of(PredictUnit(predict_step=max)) is max
        True
    """
    return getattr(unit, f"{unit.phase}_step")


def parts(unit: Unit) -> tuple[PhaseUnit, ...]:
    """The units of one phase each that a unit consists of.

    Example:
        >>> unit = TrainUnit(train_step=max)
        >>> parts(unit) == (unit,)
        True
    """
    if not isinstance(unit, FitUnit):
        return (unit,)
    return tuple(part for part in (unit.train_unit, unit.eval_unit, unit.predict_unit) if part is not None)


def memories(unit: Unit) -> dict[str, Memory]:
    """The slots of memory that a unit uses, with what makes their first values.

    Raises:
        UsageError: the parts of a FitUnit use one name for two things.

    Example:
        >>> memories(TrainUnit(train_step=max, memory={"average": lambda state: state.params})).keys()
        dict_keys(['average'])
    """
    found: dict[str, Memory] = {}
    for part in parts(unit):
        for name, memory in part.memory.items():
            if found.setdefault(name, memory) is not memory:
                raise UsageError(
                    f"the slot memory[{name!r}] is given two first values by the parts of a FitUnit; a name means one "
                    "thing in a run. Give both parts the same function, or two names."
                )
    return found


@typed
def attach(unit: U, *callbacks: Callback) -> U:
    """The unit with callbacks' hooks after its own, and their memory among its own.

    Args:
        unit: any unit. A callback's train, eval and predict hooks go to the part of a FitUnit that has that phase.
        callbacks: in the order in which they shall run.

    Raises:
        UsageError: a name is taken, or a callback has hooks of a phase that the unit has not.

    Example:
        >>> unit = TrainUnit(train_step=max)
        >>> attach(unit) == unit
        True
    """
    names = [callback.name for callback in callbacks]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"the callbacks are named {names}; {twice[0]!r} is there twice. Give one another name=.")
    for callback in callbacks:
        unit = _attach_one(unit, callback)
    return unit


def _attach_one(unit: U, callback: Callback) -> U:
    have = [part.phase for part in parts(unit)]
    if strange := [phase for phase in callback.phases() if phase not in have]:
        whole = "FitUnit with a predict_unit" if "predict" in strange else "FitUnit"
        raise UsageError(
            f"callback {callback.name!r} has {' and '.join(strange)} hooks, and {kind_of(unit)} runs "
            f"{' and '.join(have)} only; they would never be called. Attach it to the {whole}: "
            f"tnt.fit(unit, ..., callbacks=[{callback.name}])."
        )
    if callback.memory is not None and callback.name in memories(unit):
        raise UsageError(
            f"the name {callback.name!r} is taken in state.memory; each callback and unit transform has a slot of its "
            "own. Give one of them another name=."
        )
    if not isinstance(unit, FitUnit):
        return _attach_to_part(unit, callback)
    changed: dict[str, Any] = {f"{part.phase}_unit": _attach_to_part(part, callback) for part in parts(unit)}
    return replace(unit, **changed)


def _attach_to_part(unit: Any, callback: Callback) -> Any:
    phase: Phase = unit.phase
    hooks = {
        f"on_{phase}_{point}": then(
            (f"{type(unit).__name__}.on_{phase}_{point}", hook_of(unit, phase, point)),
            (f"callback {callback.name!r} on_{phase}_{point}", hook_of(callback, phase, point)),
        )
        for point in POINTS
    }
    memory = {callback.name: callback.memory} if callback.memory is not None else {}
    draws = (*unit.draws, *(draw for draw in callback.draws if draw not in unit.draws))
    return replace(unit, **hooks, memory={**unit.memory, **memory}, draws=draws)

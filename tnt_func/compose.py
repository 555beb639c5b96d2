"""Units out of units: one after another, in turns, on a part of a larger state.

Laws:
    `sequence` is associative; a unit whose step changes nothing and returns {} is its identity.
    `focus(unit, name)` touches nothing outside its part.

Example:
    >>> double = TrainUnit(train_step=lambda state, batch: (state.replace(params=state.params * 2), {}))
    >>> add = TrainUnit(train_step=lambda state, batch: (state.replace(params=state.params + batch), {"added": batch}))
    >>> train_step = sequence(double, add).train_step
    >>> state, output = train_step(State(params=3, key=key(0)), 1)
    >>> state.params, output
    (7, {'added': 1})
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, TypeVar

from tnt_func.donation import consumed, donates, donating, noted, separated, spend
from tnt_func.errors import ContractError, UsageError, UsageTypeError
from tnt_func.factories import factory
from tnt_func.metrics import Metric
from tnt_func.optim.layout import is_traced
from tnt_func.rng import key
from tnt_func.state import State
from tnt_func.types import Batch, Generator, Output
from tnt_func.unit import (
    POINTS,
    EvalUnit,
    Hook,
    PhaseUnit,
    PredictUnit,
    Step,
    TrainUnit,
    hook_of,
    identity,
    step_of,
    then,
)

__all__ = ["alternate", "focus", "key", "sequence"]

V = TypeVar("V", TrainUnit, EvalUnit, PredictUnit)
"""One of the units of one phase."""


@factory
def sequence(*units: V) -> V:
    """The unit whose step is each unit's step on the same batch, one after another, and whose hooks are theirs.

    Args:
        units: of one phase. Outputs are mappings with different names, and are merged; so are metrics and memory.

    Raises:
        UsageTypeError: there is none, or they are of different phases.
        UsageError: two of them use one name for a metric or a slot of memory.
        ContractError: at a step, where outputs are no mappings or share a name.

    Example:
        >>> one = TrainUnit(train_step=lambda state, batch: (state, {"one": 1}))
        >>> two = TrainUnit(train_step=lambda state, batch: (state, {"two": 2}))
        >>> sequence(one, two).train_step(None, None)[1]
        {'one': 1, 'two': 2}
    """
    _check_one_phase("sequence", units)
    step = Several(tuple(step_of(unit) for unit in units))
    hooks = {point: then(*(_named(unit, point) for unit in units)) for point in POINTS}
    metrics = _union("metric", [unit.metrics for unit in units])
    return _composed(units, step, hooks, metrics)


@factory
def alternate(*units: V, turns: Sequence[int] | None = None) -> V:
    """The unit that takes a step of one unit at a time, in turns: a critic and a generator, say.

    The step number of the lifetime decides, so the turns go on across epochs and resumes. Step hooks run for the unit
    whose turn it is, all other hooks for every unit. A metric sees only the steps of its own unit.

    Args:
        units: of one phase; their outputs are mappings, to which `"turn"`, the unit's index, is added.
        turns: indices of units, repeated over the steps; each once in order if not given. `(0, 0, 0, 1)` is three
            steps of the first for each of the second.

    Raises:
        UsageTypeError: there is no unit, or they are of different phases.
        UsageError: a turn names no unit, or two units use one name for a metric or a slot of memory.

    Example:
        >>> units = [TrainUnit(train_step=lambda state, batch, i=i: (state.replace(params=i), {})) for i in (0, 1)]
        >>> alternate(*units, turns=(1, 0)).train_step(State(params=None, key=key(0)), None)[1]
        {'turn': 1}

    References:
        Goodfellow et al., Generative Adversarial Nets, 2014, algorithm 1.
    """
    _check_one_phase("alternate", units)
    order = tuple(range(len(units)) if turns is None else turns)
    if not order or not set(order) <= set(range(len(units))):
        raise UsageError(
            f"turns={order} was given for {len(units)} units; turns are indices of units from 0 to {len(units) - 1}, "
            "at least one. Write turns=(0, 1), say."
        )
    phase = units[0].phase

    def turn(state: State, taken: int) -> int:
        return order[(state.progress.of(phase).steps - taken) % len(order)]

    step = Turns(tuple(step_of(unit) for unit in units), lambda state: turn(state, 0))

    def on_turn(point: str, taken: int) -> Hook:
        hooks = [then(_named(unit, point)) for unit in units]
        return identity if set(hooks) == {identity} else lambda state: hooks[turn(state, taken)](state)

    hooks = {point: then(*(_named(unit, point) for unit in units)) for point in POINTS}
    hooks |= {"step_start": on_turn("step_start", 0), "step_end": on_turn("step_end", 1)}
    metrics = [{n: _of_turn(metric, i) for n, metric in unit.metrics.items()} for i, unit in enumerate(units)]
    return _composed(units, step, hooks, _union("metric", metrics))


@factory
def focus(unit: V, name: str) -> V:
    """The unit at work on a part of a larger state.

    It sees `params[name]`, `buffers[name]` and `opt_state[name]` as its own, where there is such an entry, and its
    metrics, memory and outputs under their own names, which outside begin with `name/`.

    Args:
        unit: of one phase; its outputs are mappings.
        name: the part's name.

    Raises:
        ContractError: at a step, where `state.params` has no such part.

    Example:
        >>> halve = TrainUnit(train_step=lambda state, x: (state.replace(params=state.params / 2), {"batch": x}))
        >>> state = State(params={"left": 8.0, "right": 8.0}, key=key(0))
        >>> state, output = focus(halve, "left").train_step(state, 1)
        >>> state.params, output
        ({'left': 4.0, 'right': 8.0}, {'left/batch': 1})
    """
    prefix = f"{name}/"

    def zoomed(state: State) -> State:
        if not isinstance(state.params, Mapping) or name not in state.params:
            have = sorted(state.params) if isinstance(state.params, Mapping) else type(state.params).__name__
            raise ContractError(
                f"focus(unit, {name!r}) was given a state whose params have {have}; they need the entry {name!r}. "
                f"Write tnt.State(params={{{name!r}: ...}}, ...)."
            )
        parts = {part: getattr(state, part)[name] for part in _PARTS if name in getattr(state, part)}
        return state.replace(
            **parts,
            memory=_under(state.memory, prefix),
            metrics={phase: _under(metrics, prefix) for phase, metrics in state.metrics.items()},
            output=_under(state.output, prefix) if isinstance(state.output, Mapping) else state.output,
        )

    def put_back(outer: State, before: State, after: State) -> State:
        """What changed in the part, changed in the whole; what did not stays the very same object."""
        changes = {
            part: {**getattr(outer, part), name: getattr(after, part)}
            for part in _PARTS
            if getattr(after, part) is not getattr(before, part)
        }
        if after.memory is not before.memory:
            changes["memory"] = {**outer.memory, **_over(after.memory, prefix)}
        return outer.replace(**changes, stop=after.stop)

    step = Focused(step_of(unit), zoomed, put_back, prefix)

    def focused(hook: Hook) -> Hook:
        def hooked(state: State) -> State:
            before = zoomed(state)
            return put_back(state, before, hook(before))

        return hooked

    chains = {point: then(_named(unit, point)) for point in POINTS}
    hooks = {
        point: then(*((f"{owner} of {name!r}", focused(hook)) for owner, hook in getattr(chain, "links", ())))
        for point, chain in chains.items()
    }
    memory = {f"{prefix}{slot}": _zoomed_memory(first, zoomed) for slot, first in unit.memory.items()}
    metrics = {f"{prefix}{metric_name}": _of_part(metric, prefix) for metric_name, metric in unit.metrics.items()}
    return replace(_composed((unit,), step, hooks, metrics), memory=memory)


_PARTS = ("params", "buffers", "opt_state")


def _donating_some(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """The steps, donating where they can; refused where none can."""
    found: list[Step] = []
    refusal: UsageError | None = None
    for step in steps:
        try:
            found.append(donating(step))
        except UsageError as error:
            refusal = error
            found.append(step)
    if refusal is not None and not any(map(donates, found)):
        raise refusal
    return tuple(found)


@dataclass(frozen=True)
class Several:
    """The step of `sequence`. It donates where one of its steps does."""

    steps: tuple[Step, ...]

    @property
    def donates(self) -> bool:
        """Whether one of the steps consumes the states that it is given."""
        return any(map(donates, self.steps))

    def donating(self) -> Self:
        """The same of steps that do; plain functions among them stay as they are."""
        return replace(self, steps=_donating_some(self.steps))

    def __call__(self, state: State, batch: Batch) -> tuple[State, Output]:
        """Every step on the state of the one before, and on the same batch."""
        given, merged = state, dict[str, Any]()
        for step in self.steps:
            before = state
            try:
                state, output = step(before, batch)
            finally:
                if consumed(before):
                    spend(given)
            for name, value in _mapping("sequence", output).items():
                if name in merged:
                    raise ContractError(
                        f"two steps of a sequence return the output {name!r}; merged outputs need different names. "
                        "Rename one, or write tnt.focus(unit, name), which prefixes them."
                    )
                merged[name] = value
        return state, merged


@dataclass(frozen=True)
class Turns(Several):
    """The step of `alternate`: which of the steps, `turn` says."""

    turn: Callable[[State], int]

    def __call__(self, state: State, batch: Batch) -> tuple[State, Output]:
        """The step whose turn it is."""
        now = self.turn(state)
        state, output = self.steps[now](state, batch)
        return state, {**_mapping("alternate", output), "turn": now}


@dataclass(frozen=True)
class Focused:
    """The step of `focus`: on the part of a state, which is then put back into the whole."""

    inner: Step
    zoomed: Callable[[State], State]
    put_back: Callable[[State, State, State], State]
    prefix: str

    @property
    def donates(self) -> bool:
        """Whether the step inside consumes the states that it is given."""
        return donates(self.inner)

    def donating(self) -> Self:
        """The same of a step that does."""
        return replace(self, inner=donating(self.inner))

    def __call__(self, state: State, batch: Batch) -> tuple[State, Output]:
        """The step on the part."""
        given, storages = state, None
        if self.donates and not is_traced(()):
            # The step inside does not see what else there is.
            state, storages = separated(state)
        before = self.zoomed(state)
        if storages is not None:
            noted(before, storages.pointers)
        try:
            after, output = self.inner(before, batch)
            return self.put_back(state, before, after), _over(_mapping("focus", output), self.prefix)
        finally:
            if consumed(before):
                spend(given)


def _composed(units: Sequence[V], step: Step, hooks: Mapping[str, Hook], metrics: Mapping[str, Metric]) -> V:
    phase = units[0].phase
    draws: tuple[Generator, ...] = tuple(dict.fromkeys(draw for unit in units for draw in unit.draws))
    changes: dict[str, Any] = {f"on_{phase}_{point}": hook for point, hook in hooks.items()}
    changes[f"{phase}_step"] = step
    memory = _union("slot of memory", [unit.memory for unit in units])
    return replace(units[0], **changes, metrics=metrics, memory=memory, draws=draws)


def _named(unit: PhaseUnit, point: str) -> tuple[str, Hook]:
    return f"{type(unit).__name__}.on_{unit.phase}_{point}", hook_of(unit, unit.phase, point)


def _check_one_phase(name: str, units: Sequence[PhaseUnit]) -> None:
    kinds = [type(unit).__name__ for unit in units]
    if len(set(kinds)) != 1:
        raise UsageTypeError(
            f"{name} was given {kinds or 'no unit'}; it takes units of one phase, at least one. Compose the "
            "train units and the eval units of FitUnits apart."
        )


def _union(what: str, named: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    union: dict[str, Any] = {}
    for entries in named:
        for name, entry in entries.items():
            if union.setdefault(name, entry) is not entry:
                raise UsageError(
                    f"two of the units have a {what} named {name!r}; a composed unit has one of a name. Rename one, or "
                    "write tnt.focus(unit, name), which prefixes them."
                )
    return union


def _mapping(name: str, output: Output) -> Mapping[str, Any]:
    if not isinstance(output, Mapping):
        raise ContractError(
            f"a step under {name} returned a {type(output).__name__} as its output; composed outputs are mappings. "
            "Return (state, {'loss': loss})."
        )
    return output


def _of_turn(metric: Metric, index: int) -> Metric:
    return Metric(metric.empty, lambda output: metric.of(output) if output["turn"] == index else metric.empty())


def _of_part(metric: Metric, prefix: str) -> Metric:
    return Metric(metric.empty, lambda output: metric.of(_under(output, prefix)))


def _zoomed_memory(first: Callable[[State], Any], zoomed: Callable[[State], State]) -> Callable[[State], Any]:
    return lambda state: first(zoomed(state))


def _under(entries: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): entry for name, entry in entries.items() if name.startswith(prefix)}


def _over(entries: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {f"{prefix}{name}": entry for name, entry in entries.items()}

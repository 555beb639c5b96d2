"""The transitions that a run is made of: open an epoch, take a step, close an epoch. The loop strings them together.

Every call of user code is made here: under its seed scope, with gradients on in training and off elsewhere, with its
result checked by identity, which costs a fraction of a microsecond. Structure, shapes and dtypes are compared on the
first step only.

Laws:
    The key of a step's scope is a function of the phase and the steps completed, that of any other hook of the phase,
    the epochs completed and the point. So a transition is a function of the state and the batch.

Example:
    >>> unit = TrainUnit(train_step=lambda state, batch: (state.replace(params=state.params + batch), {}))
    >>> state = start_epoch(unit, prepare(unit, State(params=0, key=rng.key(0))))
    >>> state = end_epoch(unit, step(unit, step(unit, state, 1), 2))
    >>> state.params, state.progress.train
    (3, Progress(epochs=1, steps=2, steps_in_epoch=0))
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ParamSpec, TypeVar

import torch

from tnt_func import pytree as trees
from tnt_func import rng
from tnt_func.arguments import expects
from tnt_func.compiling import Compiled, Unseeded
from tnt_func.compiling.fusing import fused
from tnt_func.data.cursors import BLANK
from tnt_func.donation import Unchanged, between, take_consumed
from tnt_func.errors import ContractError, StructureError, call, kind_of
from tnt_func.state import State
from tnt_func.types import Batch, Output, Phase, typed
from tnt_func.unit import (
    POINTS,
    RESERVED,
    Callback,
    EvalUnit,
    FitUnit,
    Hook,
    PhaseUnit,
    PredictUnit,
    TrainUnit,
    Unit,
    attach,
    hook_of,
    links,
    memories,
    parts,
    step_of,
)

P = ParamSpec("P")
R = TypeVar("R")
U = TypeVar("U")

MODEL = ("params", "buffers", "opt_state")


@expects(TrainUnit, EvalUnit, PredictUnit, FitUnit)
@typed
def prepare(unit: Unit, state: State, callbacks: Sequence[Callback] = ()) -> State:
    """The state of a run's first event: every slot of memory and every accumulator is there.

    It is what a checkpoint of the run looks like, so the `like` to restore one into. Slots already there are kept.

    Args:
        unit: any unit.
        state: the state that the run is to begin or continue from.
        callbacks: as they will be given to the run.

    Raises:
        StructureError: the state has a leaf that no checkpoint could hold.
        UsageError: a name is used twice, or a callback does not fit the unit.

    Example:
        >>> unit = TrainUnit(train_step=max, memory={"average": lambda state: state.params})
        >>> sorted(prepare(unit, State(params=1.0, key=rng.key(0))).memory)
        ['average', 'data']
    """
    unit = attach(unit, *callbacks)
    trees.check_leaves(state.replace(output=None), "state")
    memory = {RESERVED: BLANK, **state.memory}
    for name, first in memories(unit).items():
        if name not in memory:
            with rng.scope(rng.fold_in(rng.fold_in(state.key, "memory"), name)):
                memory[name] = call(f"the memory function of {name!r}", first, state)
    metrics = dict(state.metrics)
    for part in parts(unit):
        have = metrics.get(part.phase, {})
        metrics[part.phase] = {
            name: have[name] if name in have else metric.empty() for name, metric in part.metrics.items()
        }
    state = state.replace(memory=memory, metrics=metrics, output=None)
    trees.check_leaves(state, "state")
    return state


@expects(TrainUnit, EvalUnit, PredictUnit)
@typed
def step(unit: PhaseUnit, state: State, batch: Batch) -> State:
    """One whole transition, the function that the loop folds: step_start hooks, step, counters, step_end hooks.

    Args:
        unit: a unit of one phase.
        state: a prepared state.
        batch: what the step takes.

    Raises:
        ContractError: the step or a hook returned the wrong thing.
        StructureError: the step changed structure, shapes or dtypes.
        ConsumedError: later, where a state that a donating unit was given is read again.

    Example:
        >>> unit = TrainUnit(train_step=lambda state, batch: (state.replace(params=state.params * batch), {}))
        >>> step(unit, State(params=3.0, key=rng.key(0)), 2.0).params
        6.0
    """
    run = Transitions(unit)
    begun = run.hooks("step_start", state)
    after = run.hooks("step_end", run.step(begun, batch)).replace(output=None)
    take_consumed(begun, state)
    return after


@expects(TrainUnit, EvalUnit, PredictUnit)
@typed
def start_epoch(unit: PhaseUnit, state: State) -> State:
    """Open an epoch: metrics are emptied, epoch_start hooks run. An epoch that is open already is left as it is.

    Example:
        >>> unit = TrainUnit(train_step=max, on_train_epoch_start=lambda state: state.replace(params=1))
        >>> start_epoch(unit, State(params=0, key=rng.key(0))).params
        1
    """
    return state if state.progress.of(unit.phase).is_open else Transitions(unit).open_epoch(state)


@expects(TrainUnit, EvalUnit, PredictUnit)
@typed
def end_epoch(unit: PhaseUnit, state: State) -> State:
    """Close the open epoch: counters move, epoch_end hooks run.

    Example:
        >>> unit = TrainUnit(train_step=max)
        >>> end_epoch(unit, State(params=0, key=rng.key(0))).progress.train.epochs
        1
    """
    return Transitions(unit).close_epoch(state)


class Transitions:
    """The transitions of one unit, made ready to run many times.

    Args:
        unit: a unit of one phase, callbacks attached.
        kept: whether the caller preserves the global generators, so that seeding them is enough.
        fuse: steps that run as one block at most.
        watched: whether anybody would see what is told of a step inside a block.

    Example:
        >>> Transitions(TrainUnit(train_step=max)).close_epoch(State(params=0, key=rng.key(0))).progress.train.epochs
        1
    """

    def __init__(self, unit: PhaseUnit, kept: bool = False, fuse: int = 1, watched: bool = True):
        self.phase: Phase = unit.phase
        self.fuse, self.watched = fuse, watched
        self._fused = fused(unit) if fuse > 1 and isinstance(unit, TrainUnit) else None
        self._kind = type(unit).__name__
        self._trains = unit.phase == "train"
        step, self._step_name = step_of(unit), f"{unit.phase}_step"
        self._merges = isinstance(step, Compiled) and step.metrics is unit.metrics
        self._step = step.merging if isinstance(step, Compiled) and self._merges else step
        self._graphs = step if isinstance(step, Compiled) else None
        self._unseeded = functools.partial(self._step, seeded=False)
        self._hooks = {
            point: links(hook_of(unit, unit.phase, point), f"{self._kind}.on_{unit.phase}_{point}") for point in POINTS
        }
        self._metrics, self._draws, self._kept = unit.metrics, unit.draws, kept
        self._compared = False
        self._key: rng.Key | None = None
        self._keys: dict[str, rng.Key] = {}

    def hooks(self, point: str, state: State) -> State:
        """The state after the hooks of a point."""
        hooks = self._hooks[point]
        if not hooks:
            return state
        progress = state.progress.of(self.phase)
        count = progress.steps if point.startswith("step") else progress.epochs
        return self._drawing(state.key, point, count, self._hook_each, hooks, state)

    def open_epoch(self, state: State) -> State:
        """The state with empty metrics, after the epoch_start hooks."""
        if self._metrics:
            empty = {name: metric.empty() for name, metric in self._metrics.items()}
            state = state.replace(metrics={**state.metrics, self.phase: empty})
        return self.hooks("epoch_start", state)

    def close_epoch(self, state: State) -> State:
        """The state with its counters moved and no data noted, after the epoch_end hooks."""
        progress = state.progress.put(self.phase, state.progress.of(self.phase).after_epoch())
        state = state.replace(progress=progress)
        if self._trains and state.memory.get(RESERVED, BLANK) is not BLANK:
            state = state.remember(RESERVED, BLANK)
        return self.hooks("epoch_end", state)

    def step(self, state: State, batch: Batch) -> State:
        """The state after the step, its counters and metrics moved, with the step's output."""
        progress = state.progress.of(self.phase)
        result = self._taken(state, batch, progress.steps)
        if type(result) is not tuple or len(result) != 2 or not isinstance(result[0], State):
            raise ContractError(
                f"{self._step_name} returned {_shown(result)}; a step returns the new state and its output. "
                "Write return state.replace(...), {'loss': loss}."
            )
        after, output = result
        self._check(self._step_name, state, after)
        if after.stop is not state.stop:
            raise ContractError(
                f"{self._step_name} set state.stop to {after.stop!r}; stopping is for hooks. Request it in "
                f"on_{self.phase}_step_end: return state.request_stop(reason)."
            )
        if not self._compared:
            _check_structure(self._step_name, state, after)
            self._compared = True
        moved = state.progress.put(self.phase, progress.after_step())
        if self._merges or not self._metrics:
            return after.replace(progress=moved, output=output)
        return after.replace(progress=moved, output=output, metrics=self._merged(after, output))

    def _taken(self, state: State, batch: Batch, count: int) -> Any:
        """What the step returns, seeded where it may draw."""
        if self._draws and self._graphs is not None and not self._graphs.draws:
            try:
                return self._differentiating(call, self._step_name, self._unseeded, state, batch)
            except Unseeded:
                pass  # The graph is new, and draws: the same again, seeded.
        return self._drawing(state.key, "step", count, call, self._step_name, self._step, state, batch)

    def block(self, state: State, batches: Sequence[Batch]) -> Iterator[State]:
        """The states at the ends of steps that run as one, hooks included; only the last of them is whole.

        Where nobody watches and no metric waits for outputs, it is the last alone.
        """
        assert self._fused is not None
        each = self.watched or bool(self._metrics and not self._merges)
        after, told = self._differentiating(call, self._step_name, self._fused.block, state, batches, each)
        if not self._compared:
            _check_structure(self._step_name, state, after)
            self._compared = True
        left = Unchanged({name: its for name, its in state.memory.items() if after.memory[name] is its})
        skipped, progress = len(batches) - len(told), state.progress.of(self.phase)
        progress = progress._replace(steps=progress.steps + skipped, steps_in_epoch=progress.steps_in_epoch + skipped)
        begun = between(state, memory=left, progress=state.progress.put(self.phase, progress))
        return self._told(begun, after, told)

    def _told(self, inner: State, after: State, told: Sequence[tuple[Output, Any]]) -> Iterator[State]:
        for place, (output, merged) in enumerate(told, 1):
            progress = inner.progress.put(self.phase, inner.progress.of(self.phase).after_step())
            metrics = inner.metrics if merged is None else {**inner.metrics, self.phase: merged}
            if self._metrics and not self._merges:
                metrics = self._merged(inner, output)
            if place == len(told):
                yield after.replace(progress=progress, output=output, metrics=metrics)
            else:
                inner = between(inner, progress=progress, output=output, metrics=metrics, memory=inner.memory)
                yield inner

    def _merged(self, state: State, output: Output) -> dict[str, Any]:
        merged = dict(state.metrics.get(self.phase, {}))
        with torch.no_grad():
            for name, metric in self._metrics.items():
                accumulator = call(f"the metric {name!r}", metric.of, output)
                merged[name] = merged[name].merge(accumulator) if name in merged else accumulator
        return {**state.metrics, self.phase: merged}

    def _drawing(self, key: rng.Key, name: str, count: int, function: Callable[..., Any], *args: Any) -> Any:
        """Call user code with its generators seeded."""
        if not self._draws:
            return self._differentiating(function, *args)
        if key is not self._key:
            self._key, self._keys = key, {}
        if name not in self._keys:
            self._keys[name] = rng.fold_in(rng.fold_in(key, self.phase), name)
        key = rng.fold_in(self._keys[name], count)
        return rng.drawing(key, self._draws, self._kept, self._differentiating, function, *args)

    def _differentiating(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call user code with gradients on in training and off elsewhere, whatever they are outside."""
        if torch.is_grad_enabled() is self._trains:
            return function(*args)
        with torch.set_grad_enabled(self._trains):
            return function(*args)

    def _hook_each(self, hooks: tuple[tuple[str, Hook], ...], state: State) -> State:
        for name, hook in hooks:
            state = self._hook(name, hook, state)
        return state

    def _hook(self, name: str, hook: Hook, state: State) -> State:
        after: Any = call(name, hook, state)
        if not isinstance(after, State):
            raise ContractError(
                f"{name} returned {_shown(after)}; a hook takes a State and returns one. End it with "
                "`return state` or `return state.replace(...)`."
            )
        self._check(name, state, after)
        return after

    def _check(self, name: str, before: State, after: State) -> None:
        """What must be the very same object afterwards, is."""
        if after.key is not before.key or after.progress is not before.progress:
            changed = "key" if after.key is not before.key else "progress"
            raise ContractError(
                f"{name} changed state.{changed}; the loop alone moves counters and keys. Keep a number of your own "
                "in state.memory, and derive keys with tnt.fold_in(state.key, name)."
            )
        if self._trains:
            return
        for part in MODEL:
            if getattr(after, part) is not getattr(before, part):
                raise ContractError(
                    f"{name} changed state.{part}; evaluation and prediction are reads. Return state as it came, and "
                    "put what you computed into the output or state.memory."
                )


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return f"a tuple of {', '.join(type(item).__name__ for item in value) or 'nothing'}"  # pyright: ignore
    return kind_of(value)


def _check_structure(name: str, before: State, after: State) -> None:
    for part in (*MODEL, "memory"):
        old, new = getattr(before, part), getattr(after, part)
        if old is new or _kinds(old) == _kinds(new):
            continue
        here, there = dict(trees.named_leaves(old)), dict(trees.named_leaves(new))
        lines = [
            f"state.{part}{path} from {_kind(here[path]) if path in here else 'nothing'} to "
            f"{_kind(there[path]) if path in there else 'nothing'}"
            for path in {**here, **there}
            if path not in here or path not in there or _kind(here[path]) != _kind(there[path])
        ] or [f"the containers of state.{part} from {trees.structure(old)} to {trees.structure(new)}"]
        raise StructureError(
            f"{name} changed {'; '.join(lines)}. A step keeps structure, shapes, dtypes and devices. Cast the update "
            "(update.to(param.dtype)), and put what grows or appears into the first state or a memory function."
        )


def _kinds(tree: Any) -> tuple[Any, list[str]]:
    leaves, structure = trees.flatten(tree)
    return structure, [_kind(leaf) for leaf in leaves]


def _kind(leaf: Any) -> str:
    return trees.describe(leaf) if isinstance(leaf, torch.Tensor) else type(leaf).__name__

"""One run that the laws repeat in many ways, and the watching of every step and hook in it.

Example:
    >>> from tnt_func.rng import key
    >>> unit = TrainUnit(train_step=lambda state, batch: (state.replace(params=state.params + batch), {}))
    >>> case = Case.of(unit, State(params=0, key=key(0)), [1, 2], options={"max_steps": 3})
    >>> [event.state.params for event in case.events() if event.resumable]
    [1, 3, 3, 4, 4]
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias

from tnt_func import pytree as trees
from tnt_func.donation import donates
from tnt_func.errors import ContractError, LawError, ResumeError, StructureError, UsageError
from tnt_func.events import Event
from tnt_func.runs import evaluate_events, fit_events, predict_events, train_events
from tnt_func.state import State
from tnt_func.testing.snapshot import freeze, thaw
from tnt_func.types import Phase
from tnt_func.unit import (
    PHASES,
    POINTS,
    Callback,
    Chain,
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
    parts,
    step_of,
)

LAWS = ("purity", "determinism", "structure", "grammar", "resume", "observers", "evaluation", "composition")
"""Their names, in the order of their numbers, which begin with 1."""

_ENTRIES: dict[type, Callable[..., Iterator[Event]]] = {
    TrainUnit: train_events,
    EvalUnit: evaluate_events,
    PredictUnit: predict_events,
    FitUnit: fit_events,
}


class Call(NamedTuple):
    """One call of a user's step or hook, to be made with `call.make()`.

    Args:
        owner: `"train_step"`, `"TrainUnit.on_train_end"`, `"callback 'ema' on_train_end"`.
        phase, point: where in the run; the point of a step is "step".
        function: the step or hook itself.
        args: a state, and a batch for a step.
        declared: the generators that the unit says it draws from.
    """

    owner: str
    phase: Phase
    point: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    declared: tuple[str, ...]

    def make(self) -> Any:
        """What the step or hook returns."""
        return self.function(*self.args)

    def where(self) -> str:
        """The place, in words."""
        return where(self.phase, self.point, self.args[0])


Watch: TypeAlias = Callable[[Call], Any]
"""Called in place of every step and hook; returns what the call returns."""


@dataclass(frozen=True)
class Case:
    """A unit, a first state, data and limits: all that a run is a function of.

    Args:
        unit: without the callbacks.
        state: where every run begins.
        data: iterable more than once, or a function of the epoch, or a Pipeline.
        eval_data: of a FitUnit.
        callbacks: attached to the unit, in order.
        options: what else the entry point is given: limits, cadences.
    """

    unit: Unit
    state: State
    data: Any
    eval_data: Any = None
    callbacks: tuple[Callback, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @classmethod
    def of(
        cls,
        unit: Unit,
        state: State,
        batches: Any,
        eval_batches: Any = None,
        callbacks: Sequence[Callback] = (),
        options: Mapping[str, Any] | None = None,
    ) -> "Case":
        """The case that the arguments of a check describe; where no limit is given, two epochs more than the state has.

        Raises:
            UsageError: the data is an iterator, which gives its batches to the first of many runs.
        """
        options = dict(options or {})
        trees.check_leaves(state, "state")
        if options.get("donate") or (isinstance(unit, TrainUnit | FitUnit) and donates(step_of(parts(unit)[0]))):
            raise UsageError(
                "a unit that donates was given, or donate=...; its step writes into the state that it is given, which "
                "the laws ask of no step. Pass the unit as it is without tnt.donate: check_donation(unit, ...) finds "
                "whether it goes the same way with."
            )
        if isinstance(unit, TrainUnit | FitUnit) and not {"max_epochs", "max_steps"} & options.keys():
            options["max_epochs"] = state.progress.train.epochs + 2
        for name, data in (("batches", batches), ("eval_batches", eval_batches)):
            if isinstance(data, Iterator):
                raise UsageError(
                    f"{name} is a one-shot {type(data).__name__}; the laws run a unit many times, on the same batches. "
                    f"Pass a list, a DataLoader, or a function of the epoch: {name}=lambda epoch: make_batches(epoch)."
                )
        if isinstance(unit, FitUnit) and eval_batches is None:
            eval_batches = batches
        return cls(unit, state, batches, eval_batches, tuple(callbacks), options)

    def check(self, law: Callable[..., None], **more: Any) -> None:
        """Hold a law's check against this case."""
        law(
            self.unit,
            self.state,
            self.data,
            eval_batches=self.eval_data,
            callbacks=self.callbacks,
            **{**self.options, **more},
        )

    @functools.cached_property
    def first(self) -> Any:
        """The state where every run begins, frozen, so that no run can spoil it for the next."""
        return freeze(self.state)

    @property
    def whole(self) -> Unit:
        """The unit with the callbacks attached."""
        return attach(self.unit, *self.callbacks)

    @property
    def feeds(self) -> tuple[Any, ...]:
        """The data as an entry point takes it."""
        return (self.data, self.eval_data) if isinstance(self.unit, FitUnit) else (self.data,)

    def run(
        self,
        watch: Watch | None = None,
        *,
        unit: Unit | None = None,
        callbacks: Sequence[Callback] = (),
        state: State | None = None,
        **changed: Any,
    ) -> Iterator[Event]:
        """The events of a run of this case, or of one that differs from it as said, as the entry point gives them.

        Args:
            watch: called in place of every step and hook.
            unit, callbacks: run instead of the whole unit.
            state: begin here, and not on a copy of the first state.
            changed: options that differ.
        """
        unit = self.whole if unit is None else unit
        if watch is not None:
            unit, callbacks = watched(unit, watch), [watched(callback, watch) for callback in callbacks]
        state = thaw(self.first) if state is None else state
        options = {**self.options, **changed, "callbacks": callbacks}
        return _ENTRIES[type(unit)](unit, state, *self.feeds, **options)

    def events(self, watch: Watch | None = None, /, **changed: Any) -> Iterator[Event]:
        """The events of `run`, the `failed` one excepted; what the loop finds broken is named as a law.

        Raises:
            LawError: the loop found the unit to break its contract, or the data not to be resumable.
        """
        last = "before the first event"
        try:
            for event in self.run(watch, **changed):
                if event.point == "failed":
                    continue  # the error itself comes next
                yield event
                last = f"after {where(event.phase, event.point, event.state)}"
        except (ContractError, StructureError) as error:
            raise LawError(f"law {_law_of(error)} is broken {last}, and the loop itself says so: {error}") from error
        except ResumeError as error:
            raise LawError(f"law {_named('resume')} is broken {last}: {error}") from error


def law_error(law: str, at: str, said: str, lines: Sequence[str], advice: str) -> LawError:
    """The error that says which law broke where, who broke it, on which leaves, and what to write instead.

    Example:
        >>> print(law_error("purity", "at train step", "it wrote", ["state.params: int 1 became int 2"], "Copy."))
        law 1 (purity) is broken at train step: it wrote
          state.params: int 1 became int 2
        Copy.
    """
    return LawError("\n  ".join([f"law {_named(law)} is broken {at}: {said}", *lines]) + f"\n{advice}")


def where(phase: Phase, point: str, state: State) -> str:
    """A place in a run: phase, point, and the epochs and steps completed there.

    Example:
        >>> from tnt_func.rng import key
        >>> where("train", "step_end", State(params=0, key=key(0)))
        'train step_end (epoch 0, step 0)'
    """
    progress = state.progress.of(phase)
    return f"{phase} {point} (epoch {progress.epochs}, step {progress.steps})"


def watched(unit: Any, watch: Watch) -> Any:
    """A unit, or a callback, every step and hook of which is called by `watch`.

    Example:
        >>> unit = watched(TrainUnit(train_step=lambda state, batch: (state, batch)), lambda call: call.owner)
        >>> unit.train_step("state", "batch")
        'train_step'
    """
    if isinstance(unit, FitUnit):
        parts = {f"{phase}_unit": getattr(unit, f"{phase}_unit") for phase in PHASES}
        return replace(unit, **{name: watched(part, watch) for name, part in parts.items() if part is not None})
    if isinstance(unit, Callback):
        return replace(
            unit,
            **{f"on_{phase}_{point}": _watched_hook(unit, phase, point, watch) for phase in PHASES for point in POINTS},
        )
    step, name, phase, draws = step_of(unit), f"{unit.phase}_step", unit.phase, unit.draws
    hooks = {f"on_{phase}_{point}": _watched_hook(unit, phase, point, watch) for point in POINTS}
    return replace(
        unit, **hooks, **{name: lambda state, batch: watch(Call(name, phase, "step", step, (state, batch), draws))}
    )


def _watched_hook(owner: PhaseUnit | Callback, phase: Phase, point: str, watch: Watch) -> Hook:
    hook = hook_of(owner, phase, point)
    kind = f"callback {owner.name!r} " if isinstance(owner, Callback) else f"{type(owner).__name__}."
    named = links(hook, f"{kind}on_{phase}_{point}")

    def watched_link(name: str, link: Hook) -> Hook:
        return lambda state: watch(Call(name, phase, point, link, (state,), owner.draws))

    return Chain(tuple((name, watched_link(name, link)) for name, link in named)) if named else hook


def _named(law: str) -> str:
    return f"{LAWS.index(law) + 1} ({law})"


def _law_of(error: Exception) -> str:
    """The law that the loop's own checks are part of."""
    if isinstance(error, StructureError):
        return _named("structure")
    return _named("evaluation" if "are reads" in str(error) else "grammar")

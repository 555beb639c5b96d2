"""Many members trained as one: the step of a unit, vmapped over its State.

`ensemble(unit, size)` is again a unit: `train`, `fit`, callbacks, observers, checkpoints and the laws take it as any
other. Its State is that of all members, `stack([state, ...])`.

When it pays: the CPU time of a member and step with AdamW, as a part of its step alone in the imperative loop with a
fused kernel, on one thread. Compiled and donated is `tnt.donate(tnt.compiled(tnt.ensemble(unit, size)))`.

    members                                       8     32    128
    MLP 64-32-32-10, batch 32, eager           1.10   0.40   0.17
        compiled and donated                   0.04   0.07   0.03
    MLP 64-256-256-10, batch 64, eager         1.61   1.33   2.06
        compiled and donated                   0.59   0.63   0.71

So it is worth it where a step is mostly overhead: small models, small batches, many members. With 85,000 parameters,
the lower rows, what is left is what a machine busy with other work takes from the imperative step; on a calm one expect
nothing. There, members one after another are as fast and need less memory; `chunk_size` bounds the memory, at a price.

Example:
    >>> from tnt_func.descent import minimize
    >>> from tnt_func.ensembles.stacking import stack
    >>> from tnt_func.optim import sgd
    >>> from tnt_func.rng import key
    >>> from tnt_func.unit import TrainUnit
    >>> optimizer = sgd(0.5)
    >>> def objective(w, state, batch): return (w - batch) ** 2, (state.buffers, {})
    >>> unit = TrainUnit(train_step=minimize(objective, optimizer))
    >>> members = [torch.tensor(w) for w in (1.0, 2.0)]
    >>> state = stack([State(params=w, key=key(0), opt_state=optimizer.init(w)) for w in members])
    >>> ensemble(unit, 2).train_step(state, 3.0)[0].params
    tensor([3., 3.])
"""

import functools
import warnings
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self, TypeAlias

import torch

from tnt_func.descent import Descent
from tnt_func.donation import donates
from tnt_func.ensembles.calls import Batches, Call, looped, vmapped
from tnt_func.ensembles.members import stacked, taken
from tnt_func.ensembles.metrics import per_member
from tnt_func.ensembles.stacking import PREFIX, SLOT, inside, size_of, stop_members
from tnt_func.errors import ContractError, TntError, UsageError, call, kind_of
from tnt_func.factories import Brief, factory
from tnt_func.optim.layout import is_traced
from tnt_func.state import State
from tnt_func.transforms.seams import inside as seen_through
from tnt_func.types import Batch, Output, Phase, PyTree
from tnt_func.unit import (
    POINTS,
    FitUnit,
    Hook,
    Memory,
    PhaseUnit,
    Step,
    U,
    hook_of,
    links,
    memories,
    parts,
    step_of,
    then,
)

Sharing: TypeAlias = Literal["shared", "own"]


@factory
def ensemble(
    unit: U, size: int, *, batch: Sharing = "shared", chunk_size: int | None = None, loop: bool | None = None
) -> U:
    """The unit that trains as many members at once.

    One key, one progress; everything else of a State each member has of its own: initialisation, hyper-parameters,
    averages. A metric has a value for each, float64 [members]: `spread` gives mean, deviation and quantiles, and
    records have "loss" for the mean, "loss.std", and "loss.0", "loss.1", ...

    Hooks of the unit, and of callbacks attached to it before, run for each member. Those of steps are vmapped; where
    one looks at values, and all others, it runs for one member after another. So `early_stopping` attached inside stops
    single members: from then on a member's params, buffers, opt_state and slots stay as they are (its metrics go on to
    measure them), and when all have stopped, so does the run. One that stops within an epoch closes it with the others,
    at their counters. Callbacks given to `train` see all members at once, and
    stop some by `stop_members`.

    A member's numbers are those of its run alone but for rounding, about 1e-12 in float64; Adam amplifies it where a
    gradient is zero but for rounding (a bias before BatchNorm). Not so what draws: a vmapped step draws once for all
    members, for each another part, and NumPy's draws are one for all. A parameter that the loss does not use has the
    gradient zero here, and none alone.

    Compile the whole, not the members: `tnt.compiled(tnt.ensemble(unit, size))`, where there is dropout with
    dynamic=False, since torch does not vmap it over sizes that may vary.

    Args:
        unit: of one member.
        size: members.
        batch: whether all are given the same batch, or each one of its own: [members, batch, ...].
        chunk_size: members that are stepped at once, where memory is short; all, if not given.
        loop: whether to step one member after another, for steps that torch.func.vmap does not take: the same numbers
            at the price of single runs. If not given, where the optimizer does not run under vmap (`traceable`), as
            those of `optim.from_torch` do not, and with a warning.

    Raises:
        UsageError: an argument is out of range, or the step donates; or, later, the state is not stacked or has another
            size, or the step cannot be vmapped.

    Example:
        >>> from tnt_func.unit import TrainUnit
        >>> ensemble(TrainUnit(train_step=max), 8).memory.keys()
        dict_keys(['ensemble'])
    """
    for name, number in (("size", size), ("chunk_size", chunk_size)):
        if number is not None and number < 1:
            raise UsageError(f"ensemble was given {name}={number}; it is at least 1. Write {name}=8, say.")
    if any(donates(step_of(part)) for part in parts(unit)):
        raise UsageError(
            "ensemble was given a unit that donates, whose members would write over each other. Donate the whole: "
            "tnt.donate(tnt.compiled(tnt.ensemble(unit, size)))."
        )
    looping = {part.phase: not _vmaps(step_of(part)) if loop is None else loop for part in parts(unit)}
    if loop is None and any(looping.values()):
        warnings.warn(
            f"ensemble takes the {size} members one after another: their optimizer does not run under torch.func.vmap. "
            "Write tnt.optim.adamw(...) or another native one, or loop=True to say that this is meant.",
            stacklevel=5,  # Above it are `factory` and `typed`.
        )
    slots = {SLOT: functools.partial(_unstacked, size)}
    slots |= {f"{PREFIX}{name}": _FirstOfEach(first, name, size) for name, first in memories(unit).items()}
    changed: dict[str, Any] = {}
    for part in parts(unit):
        step = EnsembleStep(step_of(part), part.phase, size, batch == "own", chunk_size, looping[part.phase])
        changed[f"{part.phase}_unit"] = _ensembled(part, step, slots)
    whole: Any = replace(unit, **changed) if isinstance(unit, FitUnit) else changed[f"{unit.phase}_unit"]
    return whole


@dataclass(frozen=True, repr=False)
class EnsembleStep(Brief):
    """The step of an ensemble.

    Args:
        inner: that of a member.
        phase: train, eval or predict.
        size, own, chunk_size, loop: as `ensemble` was given.
    """

    inner: Step
    phase: Phase
    size: int
    own: bool = False
    chunk_size: int | None = None
    loop: bool = False
    donates: ClassVar[bool] = False

    def donating(self) -> Self:
        """Refused: no update that writes over what it is given runs under vmap. A graph of the whole writes."""
        raise UsageError(
            f"donate was given an ensemble of {self.size} members, whose steps are vmapped, out of place; the graph of "
            "all of them can donate. Write tnt.donate(tnt.compiled(tnt.ensemble(unit, size)))."
        )

    def __call__(self, state: State, batch: Batch) -> tuple[State, Output]:
        """The state after a step of every member that has not stopped, and all their outputs."""
        _check_size(state, self.size)
        done = self._taken(state, Batches(batch, self.own))
        still = state.memory[SLOT]["stopped" if self.phase == "train" else "closed"]
        after = done.merged(state, still if is_traced(()) or bool(still.any()) else None)
        asked = next((stop for stop in done.stops if stop is not None), state.stop)
        return after.replace(key=done.after.key, progress=done.after.progress, stop=asked), done.output

    def _taken(self, state: State, batches: Batches) -> Call:
        if self.loop:
            return looped(self.inner, state, batches)
        try:
            return vmapped(self.inner, state, batches, chunk_size=self.chunk_size)
        except TntError:
            raise  # It says itself what holds.
        except Exception as error:
            error.add_note(
                f"It was raised as torch.func.vmap took the {self.phase}_step of {self.size} members, where no value "
                "may be looked at, and nothing drawn but by torch. Write it with torch.where, take a native optimizer, "
                "or write ensemble(..., loop=True), which takes one member after another."
            )
            raise


@dataclass(frozen=True)
class _HookOfEach:
    """The hooks of a point, run for every member that they are for."""

    links: tuple[tuple[str, Hook], ...]
    phase: Phase
    point: str
    size: int

    def __call__(self, state: State) -> State:
        _check_size(state, self.size)
        still = self._still(state)
        at_step = self.point.startswith("step")
        done = self._vmapped(state) if at_step else None
        if done is None:
            done = looped(self._run, state, Batches(None), runs=[not out for out in still.tolist()])
        after = done.merged(state, still if bool(still.any()) else None)
        after = after.replace(key=done.after.key, progress=done.after.progress)
        stops = [None if out else stop for stop, out in zip(done.stops, still.tolist(), strict=True)]
        if not any(stop is not None for stop in stops):
            return after
        last = next(stop for stop in reversed(stops) if stop is not None)
        return stop_members(after, torch.tensor([stop is not None for stop in stops]), last)

    def _still(self, state: State) -> torch.Tensor:
        """The members that it is not for: those that have stopped, or had when the epoch opened."""
        slot = state.memory[SLOT]
        if self.phase == "train" and self.point == "end":
            return torch.zeros_like(slot["closed"])
        return slot["stopped" if self.phase == "train" and self.point.startswith("step") else "closed"]

    def _vmapped(self, state: State) -> Call | None:
        try:
            return vmapped(self._run, state, Batches(None), agreed=True)
        except Exception:
            # It looks at values, or is wrong: then it is wrong for a single member too, and says so better.
            return None

    def _run(self, state: State, batch: Batch) -> tuple[State, Output]:
        for name, hook in self.links:
            after: Any = call(name, hook, state)
            if not isinstance(after, State):
                raise ContractError(
                    f"{name} returned {kind_of(after)} for a member; a hook takes a State and returns one. End it with "
                    "`return state` or `return state.replace(...)`."
                )
            state = after
        return state, None


@dataclass(frozen=True)
class _FirstOfEach:
    """What makes the first value of a slot of every member."""

    first: Memory
    name: str
    size: int

    def __call__(self, state: State) -> PyTree:
        _check_size(state, self.size)
        mine = inside(state)
        firsts = [self.first(state.replace(**taken(mine, index))) for index in range(self.size)]
        return stacked(firsts, f"memory[{self.name!r}]")


def _vmaps(step: Step) -> bool:
    """Whether nothing is known to keep a step from being vmapped."""
    found: list[Descent] = []
    seen_through(step, Descent, lambda descent: (found.append(descent), descent)[1])
    return all(descent.optimizer.traceable for descent in found)


def _ensembled(unit: PhaseUnit, step: EnsembleStep, slots: dict[str, Memory]) -> PhaseUnit:
    phase, kind = unit.phase, type(unit).__name__
    changed: dict[str, Any] = {}
    for point in POINTS:
        name = f"on_{phase}_{point}"
        chain = links(hook_of(unit, phase, point), f"{kind}.{name}")
        each = ((f"{kind}.{name} of each member", _HookOfEach(chain, phase, point, step.size)),) if chain else ()
        own = (("ensemble", _open),) if name == "on_train_epoch_start" else ()
        changed[name] = then(*own, *each)
    changed[f"{phase}_step"] = step
    changed["metrics"] = {name: per_member(metric, step.size) for name, metric in unit.metrics.items()}
    changed["memory"] = {name: slots[name] for name in (SLOT, *(f"{PREFIX}{name}" for name in unit.memory))}
    return replace(unit, **changed)


def _open(state: State) -> State:
    """The members that have stopped run no further hooks; where nobody goes on, no epoch begins."""
    slot = state.memory[SLOT]
    if bool(slot["stopped"].all()):
        raise UsageError(
            f"all {len(slot['stopped'])} members of the ensemble have stopped already; nothing is left to train. "
            "Write tnt.ensembles.revive(state), with which they go on."
        )
    return state.remember(SLOT, {**slot, "closed": slot["stopped"].clone()})


def _unstacked(size: int, state: State) -> PyTree:
    size_of(state)
    raise UsageError(f"the state has no slot {SLOT!r}. Write tnt.stack([state, ...]) of {size} states.")


def _check_size(state: State, size: int) -> None:
    if size_of(state) != size:
        raise UsageError(
            f"ensemble(unit, {size}) was given a state of {size_of(state)} members. Write tnt.ensemble(unit, "
            f"{size_of(state)}), or stack {size} states."
        )

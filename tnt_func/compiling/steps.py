"""A step that runs as one graph: State in, State out, and what is no tensor goes round it."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from tnt_func import pytree as trees
from tnt_func import rng
from tnt_func.asserts import record_compilation
from tnt_func.compiling.backends import Backend
from tnt_func.compiling.plans import Plan
from tnt_func.compiling.refusals import Unreadable, explained
from tnt_func.compiling.templates import Parts
from tnt_func.descent import Descent, Objective, Slope
from tnt_func.donation import separated, spend
from tnt_func.errors import ContractError, StructureError, UsageError
from tnt_func.factories import Brief
from tnt_func.metrics import Metric
from tnt_func.state import State
from tnt_func.transforms.seams import inside
from tnt_func.types import Batch, Output, Phase, PyTree
from tnt_func.unit import Step

MODEL = ("params", "buffers", "opt_state")
LARGE = 10_000_000
"""Parameters from which on memory is what a step waits for, and one graph of the whole needs more of it."""
SLOT = "memory "


class RecompilationWarning(UserWarning):
    """A compiled step met a structure that it was not compiled for."""


class FallbackWarning(UserWarning):
    """A step could not be compiled and runs as it is, as `fallback=True` allows."""


class Unseeded(Exception):
    """A step that drew nothing so far would draw, and was called without seeding."""


@dataclass(frozen=True)
class Compilation:
    """One compilation of a step.

    Args:
        step: "train_step", "eval_step" or "predict_step".
        number: which one of this step, from 1.
        reason: what made it necessary, where it is not the first.
        done: whether it is over.

    Example:
        >>> Compilation("train_step", 1, None).done
        False
    """

    step: str
    number: int
    reason: str | None
    done: bool = False


OnCompile: TypeAlias = Callable[[Compilation], None]
listeners: list[OnCompile] = []
"""Called where a step has no `on_compile` of its own; `tnt_func` puts an observer here that tells a terminal."""
Form: TypeAlias = Literal["auto", "step", "gradients"]


@dataclass(frozen=True)
class Memo:
    """What a compiled step has compiled so far; it changes no number, only how long a step takes."""

    plans: dict[bool, list[Plan]] = field(default_factory=dict[bool, list[Plan]])
    forms: dict[Form, Any] = field(default_factory=dict[Form, Any])
    hooked: dict[tuple[int, ...], Any] = field(default_factory=dict[tuple[int, ...], Any])
    done: list[Compilation] = field(default_factory=list[Compilation])
    refused: list[str] = field(default_factory=list[str])


@dataclass(frozen=True, repr=False)
class Compiled(Brief):
    """A step as one graph for each structure of state and batch that it meets. Made by `compiled`.

    Args:
        step: what is compiled.
        phase: of the unit that the step is from.
        metrics: those of the unit; `merging` merges them inside the graph.
        slots: of `state.memory` that the step may read and write.
        form: what is one graph: the whole "step", or its "gradients", which the optimizer is then given as it is.
        dynamic: whether the first dimension of the batch's tensors may vary.
        donates: whether the new params and opt_state are written over the old ones.
        backend, options: see `compiled`.
        fallback: whether a step that cannot be compiled runs as it is.
        on_compile: called before and after each compilation; None is `listeners`.
        memo: what was compiled.
    """

    step: Step
    phase: Phase
    metrics: Mapping[str, Metric] = field(default_factory=dict[str, Metric])
    slots: tuple[str, ...] = ()
    form: Form = "step"
    dynamic: bool = True
    donates: bool = False
    backend: Backend = "inductor"
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    fallback: bool = False
    on_compile: OnCompile | None = None
    memo: Memo = field(default_factory=Memo, compare=False, repr=False)

    @property
    def compilations(self) -> tuple[Compilation, ...]:
        """Those done so far, each with its reason."""
        return tuple(self.memo.done)

    def donating(self) -> "Compiled":
        """The same step, writing the new params and opt_state over those that it is given."""
        return self if self.donates else replace(self, donates=True, memo=Memo())

    @property
    def draws(self) -> bool:
        """Whether it may draw random numbers: until it is compiled, and then where a graph does."""
        plans = [plan for those in self.memo.plans.values() for plan in those]
        return not plans or bool(self.memo.refused) or any(plan.draws for plan in plans)

    def __call__(self, state: State, batch: Batch, *, seeded: bool = True) -> tuple[State, Output]:
        """The new state and the output; metrics are left alone, as by any step.

        Raises:
            Unseeded: `seeded` is False, and the graph, which is new, draws random numbers.
        """
        by = self._by_gradients(state)
        return self._stepped(state, batch, False, seeded) if by is None else by(state, batch)

    def merging(self, state: State, batch: Batch, *, seeded: bool = True) -> tuple[State, Output]:
        """The new state, the step's own metrics merged in, and the output."""
        by = self._by_gradients(state)
        if by is None:
            return self._stepped(state, batch, bool(self.metrics), seeded)
        return self._with_metrics(*by(state, batch), bool(self.metrics))

    def _by_gradients(self, state: State) -> Step | None:
        """The step of which only the gradients are a graph, where that is the form."""
        if self.form == "step":
            return None
        if self.form not in self.memo.forms:
            wanted = self.form == "gradients" or _elements(state.params) >= LARGE
            self.memo.forms[self.form] = self.gradients_alone() if wanted else None
        return self.memo.forms[self.form]

    def gradients_alone(self) -> Step | None:
        """The step of which the gradients alone are a graph, and the update as it is; None where none is inside that
        `minimize` made.

        Raises:
            UsageError: there is none, and the form is "gradients".
        """
        memo = replace(self.memo, plans={})

        def changed(descent: Descent) -> Descent:
            slope = replace(self, step=Sloping(descent), metrics={}, form="step", donates=False, memo=memo)
            return replace(descent, differentiate=Gradients(slope), donates=self.donates)

        found = inside(self.step, Descent, changed)
        if found is None and self.form == "gradients":
            raise UsageError(
                f"form='gradients' was given for the step {self.step!r}; it reaches into steps that tnt.minimize "
                "makes. Write tnt.compiled(unit), which makes one graph of any step."
            )
        return found

    def _stepped(self, given: State, batch: Batch, merges: bool, seeded: bool) -> tuple[State, Output]:
        if self.memo.refused:
            return self._as_it_is(given, batch, merges)
        state = separated(given)[0] if self.donates else given
        try:
            plan, leaves = self._found(state, batch, merges)
        except Exception as error:
            if not self.fallback:
                raise
            warnings.warn(f"{self.phase}_step runs as it is, for {error}", FallbackWarning, stacklevel=3)
            self.memo.refused.append(str(error))
            if not seeded:
                raise Unseeded from error
            return self._as_it_is(given, batch, merges)
        if not seeded and plan.draws:
            raise Unseeded
        if not self.donates:
            return self._put(state, plan.run(leaves))
        try:
            return self._put(state, plan.run(leaves))
        finally:
            spend(given)

    def _as_it_is(self, state: State, batch: Batch, merges: bool) -> tuple[State, Output]:
        return self._with_metrics(*self.step(state, batch), merges)

    def _with_metrics(self, after: State, output: Output, merges: bool) -> tuple[State, Output]:
        if not merges:
            return after, output
        metrics = self._merged(after.metrics.get(self.phase, {}), output)
        return after.replace(metrics={**after.metrics, self.phase: metrics}), output

    def _found(self, state: State, batch: Batch, merges: bool) -> tuple[Plan, list[Any]]:
        """The plan for a state and a batch, compiled where there is none, and the leaves that it takes of them."""
        parts = self._parts(state, batch, merges)
        plans = self.memo.plans.setdefault(merges, [])
        for place, plan in enumerate(plans):
            leaves = plan.take(parts)
            if leaves is not None:
                if place:
                    plans.insert(0, plans.pop(place))
                break
        else:
            plan = self._compiled(state, parts, merges, plans[0] if plans else None)
            plans.insert(0, plan)
            leaves = plan.take(parts)
            assert leaves is not None
        return plan, leaves

    def _parts(self, state: State, batch: Batch, merges: bool) -> Parts:
        parts: Parts = {"params": state.params, "buffers": state.buffers, "opt_state": state.opt_state, "batch": batch}
        if merges:
            parts["metrics"] = state.metrics.get(self.phase, {})
        for name in self.slots:
            if name in state.memory:
                parts[SLOT + name] = state.memory[name]
        return parts

    def _put(self, state: State, new: Parts) -> tuple[State, Output]:
        output = new.pop("output")
        if not new:
            return state, output
        if "metrics" in new:
            new["metrics"] = {**state.metrics, self.phase: new["metrics"]}
        if slots := [name for name in new if name.startswith(SLOT)]:
            new["memory"] = {**state.memory, **{name.removeprefix(SLOT): new.pop(name) for name in slots}}
        return state.replace(**new), output

    def _compiled(self, state: State, parts: Parts, merges: bool, last: Plan | None) -> Plan:
        name = f"{self.phase}_step"
        self._check(name, parts)
        reason = None if last is None else _difference(last.described, Plan.describe(parts))
        compilation = Compilation(name, len(self.memo.done) + 1, reason)
        if reason is not None:
            warnings.warn(
                f"{name} is compiled again: {reason}. Keep containers, shapes and dtypes the same, and give as a "
                "tensor what varies.",
                RecompilationWarning,
                stacklevel=4,
            )
        self._tell(compilation)
        with rng.preserved(), explained(name, self.step):
            plan = Plan(
                lambda parts: self._inside(state, parts, merges),
                parts,
                varies=("batch",) if self.dynamic else (),
                donated=("params", "opt_state") if self.donates else (),
                backend=self.backend,
                options=self.options,
            )
        record_compilation(f"{name}: {reason or 'compiled for the first time'}")
        done = replace(compilation, done=True)
        self.memo.done.append(done)
        self._tell(done)
        return plan

    def _tell(self, compilation: Compilation) -> None:
        for tell in listeners if self.on_compile is None else (self.on_compile,):
            tell(compilation)

    def _check(self, name: str, parts: Parts) -> None:
        for part, tree in parts.items():
            for path, leaf in trees.named_leaves(tree):
                if isinstance(leaf, Tensor) and leaf.requires_grad:
                    raise UsageError(
                        f"{name} was given {part}{path}, which requires grad; a compiled step gives no graph to go "
                        "back through. Detach the state, or differentiate through the step that is not compiled."
                    )

    def _inside(self, state: State, parts: Parts, merges: bool) -> Parts:
        """The step on what stands for tensors; whatever else it would read refuses."""
        count = "A count that a step needs is a tensor in opt_state or in a slot of memory"
        key = Unreadable("state.key", "The loop has seeded torch from it: draw with torch.randn and the like")
        progress = Unreadable(
            "state.progress", f"{count}, and steps in turns are tnt.alternate(tnt.compiled(a), tnt.compiled(b))"
        )
        slots = {name.removeprefix(SLOT): tree for name, tree in parts.items() if name.startswith(SLOT)}
        others = {
            name: Unreadable(
                f"state.memory[{name!r}]", f"A step reads slots of its own: TrainUnit(memory={{{name!r}: ...}})"
            )
            for name in state.memory
            if name not in slots
        }
        before = State(
            **{part: parts[part] for part in MODEL},
            key=key,  # pyright: ignore[reportArgumentType]
            progress=progress,  # pyright: ignore[reportArgumentType]
            metrics={**state.metrics, **({self.phase: parts["metrics"]} if merges else {})},
            memory={**others, **slots},
        )
        returned: Any = self.step(before, parts["batch"])
        if type(returned) is not tuple or len(returned) != 2 or not isinstance(returned[0], State):
            raise ContractError(
                f"{self.phase}_step returned {trees.describe(returned)}; a step returns the new state and its output. "
                "Write return state.replace(...), {'loss': loss}."
            )
        after, output = returned
        if after.key is not key or after.progress is not progress or after.stop is not None:
            raise ContractError(
                f"{self.phase}_step changed state.key, state.progress or state.stop; those are the loop's, and "
                "stopping is for hooks. Write return state.request_stop(reason) in a hook."
            )
        if strange := [
            name
            for name in after.memory
            if name not in before.memory or (name in others and after.memory[name] is not others[name])
        ]:
            raise StructureError(
                f"{self.phase}_step wrote state.memory[{strange[0]!r}], which it does not have; a step writes slots of "
                f"its own. Write TrainUnit(..., memory={{{strange[0]!r}: lambda state: ...}})."
            )
        new = {part: getattr(after, part) for part in MODEL}
        if merges:
            new["metrics"] = self._merged(parts["metrics"], output)
        return {**new, **{SLOT + name: after.memory[name] for name in slots}, "output": output}

    def _merged(self, metrics: Mapping[str, Any], output: Output) -> dict[str, Any]:
        merged = dict(metrics)
        with torch.no_grad():
            for name, metric in self.metrics.items():
                one = metric.of(output)
                merged[name] = metrics[name].merge(one) if name in metrics else one
        return merged


@dataclass(frozen=True)
class Sloping:
    """The slope that a descent goes down, as a step: its output is the value, the output and the gradient."""

    descent: Descent

    def __call__(self, state: State, batch: Batch) -> tuple[State, Output]:
        """The state with new buffers, and the slope."""
        descent = self.descent
        params = state.params if descent.part is None else state.params[descent.part]
        slope = descent.differentiate(descent.objective, params, state, batch)
        return state.replace(buffers=slope.buffers), (slope.value, slope.output, slope.grads)


@dataclass(frozen=True)
class Gradients:
    """What finds the gradient of a descent, as one graph."""

    slope: Compiled

    def __call__(self, objective: Objective, params: PyTree, state: State, batch: Batch) -> Slope:
        """The slope of the descent that it was made of; objective and params are that one's."""
        after, (value, output, grads) = self.slope(state, batch)
        return Slope(value, after.buffers, output, grads)


def _elements(tree: PyTree) -> int:
    return sum(leaf.numel() for leaf in trees.tensors(tree))


def _difference(before: Mapping[str, str], after: Mapping[str, str]) -> str:
    """The first leaf that another structure has otherwise."""
    for path in {**before, **after}:
        was, now = before.get(path, "nothing"), after.get(path, "nothing")
        if was != now:
            return f"{path} was {was} and is {now}"
    return "containers, static fields or a mode of torch (autocast, say) are others"

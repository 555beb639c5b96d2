"""Steps that run as one block: the graph of one step, again and again, and no Python of the step's around it.

The guard is asked once for a block and the state taken apart once; from then on each run of the graph is given what
the one before made, and the leaves of its own batch. The hooks around a step are inside of its graph. (Unrolled, ten
steps of a small network take minutes to compile; as torch's `scan` they are no faster than this, for it copies.)

Laws:
    A block is its steps, one after another: the same bits where the graph is the same, which it is without hooks around
    the step, and up to rounding where hooks are in it that were not (law 12).
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tnt_func import pytree as trees
from tnt_func.compiling.refusals import Unreadable, explained
from tnt_func.compiling.repeats import Repeat, Told
from tnt_func.compiling.steps import MODEL, SLOT, Compiled
from tnt_func.compiling.templates import Parts
from tnt_func.donation import separated, spend
from tnt_func.errors import ContractError, StructureError, UsageError, kind_of
from tnt_func.state import State
from tnt_func.types import Batch, PyTree
from tnt_func.unit import Hook, TrainUnit, hook_of, links, memories

Links: TypeAlias = tuple[tuple[str, Hook], ...]


def fused(unit: TrainUnit) -> "Fused":
    """A unit's step with the hooks around it, to be run in blocks.

    Raises:
        UsageError: the step is not compiled.

    Example:
        >>> fused(TrainUnit(train_step=max))
        Traceback (most recent call last):
        tnt_func.errors.UsageError: fuse was given a unit whose train_step is a builtin_function_or_method; ...
    """
    step = unit.train_step
    if not isinstance(step, Compiled):
        raise UsageError(
            f"fuse was given a unit whose train_step is {kind_of(step)}; a block repeats the graph of a compiled step, "
            "and tnt.compiled comes last, after all transforms. Write tnt.train(tnt.compiled(unit), ..., fuse=100)."
        )
    before, after = (
        links(hook_of(unit, "train", point), f"TrainUnit.on_train_{point}") for point in ("step_start", "step_end")
    )
    memo = step.memo
    if before or after:
        # By identity, for a hook need not be hashable; they are held, so that no other gets the same.
        hooks = (*(hook for _, hook in before), None, *(hook for _, hook in after))
        _, memo = memo.hooked.setdefault(tuple(map(id, hooks)), (hooks, replace(memo, plans={})))
    its = {one.name: getattr(step, one.name) for one in fields(Compiled)}
    merges = step.metrics is unit.metrics
    known = {
        "form": "step",
        "slots": (*memories(unit),) if before or after else step.slots,
        "metrics": step.metrics if merges else {},
        "memo": memo,
    }
    return Fused(
        **{**its, **known}, before=before, after=after, own=step.slots, sees_metrics=merges or not unit.metrics
    )


@dataclass(frozen=True, repr=False)
class Fused(Compiled):
    """A compiled step that runs many times a call. Made by `fused`.

    Args:
        before, after: the hooks around the step, with the names that errors give them.
        own: slots of memory that the step may read and write; the hooks may all of `slots`.
        sees_metrics: whether what the hooks would read of the metrics is inside the graph.
    """

    before: Links = ()
    after: Links = ()
    own: tuple[str, ...] = ()
    sees_metrics: bool = True
    repeats: dict[int, "Repeat"] = field(default_factory=dict[int, "Repeat"], compare=False, repr=False)

    def block(self, given: State, batches: Sequence[Batch], each: bool = True) -> tuple[State, list[Told]]:
        """The state after all steps, with the metrics that the graph merges, and what the steps told.

        Args:
            given: consumed where the step donates.
            batches: one a step; one of another structure or size is looked at anew.
            each: whether each step is asked, not the last alone.

        Raises:
            ContractError: the step draws random numbers.
        """
        begun = state = self._with_tensors(given)
        told, last, done = list[Told](), None, 0
        while done < len(batches):
            if self.donates:
                state = separated(state)[0]
            plan, leaves = self._found(state, batches[done], bool(self.metrics))
            if plan.draws:
                raise ContractError(
                    f"fuse was given, and {self.phase}_step draws random numbers ({', '.join(plan.draws)}); inside a "
                    "block torch is not seeded for each step. Leave fuse out, or give the noise in the batch."
                )
            if id(plan) not in self.repeats:
                self.repeats[id(plan)] = Repeat(plan)
            repeat = self.repeats[id(plan)]
            if last is not None and last[0] is plan:
                # It takes what it made, so it will again.
                repeat.closed.add(last[1])
            last = plan, repeat.sizes(leaves)
            count = len(batches) if last[1] in repeat.closed else done + 1
            try:
                new, known, steps = repeat.run(leaves, batches[done:count], each)
            finally:
                if self.donates:
                    spend(given)
            state, done = self._put(state, new)[0], done + steps
            told = [*told, *known] if each else known
        return self._with_numbers(state, given, begun), told

    @property
    def _hidden(self) -> list[str]:
        """The slots that the hooks alone may read and write."""
        return [name for name in self.slots if name not in self.own]

    def _with_tensors(self, state: State) -> State:
        """The state with what hooks count in as tensors: as numbers they would be part of the graph."""
        slots = {name: trees.map(_as_tensor, state.memory[name]) for name in self._hidden if name in state.memory}
        slots = {name: slot for name, slot in slots.items() if not _is_same(slot, state.memory[name])}
        return state.replace(memory={**state.memory, **slots}) if slots else state

    def _with_numbers(self, state: State, given: State, begun: State) -> State:
        """The state with numbers where there were some before; a slot that was left alone is the very one."""
        changed = [name for name, slot in begun.memory.items() if slot is not given.memory[name]]
        if not changed:
            return state
        slots = {
            name: given.memory[name]
            if state.memory[name] is begun.memory[name]
            else _as_numbers(given.memory[name], state.memory[name])
            for name in changed
        }
        return state.replace(memory={**state.memory, **slots})

    def _inside(self, state: State, parts: Parts, merges: bool) -> Parts:
        hidden = [SLOT + name for name in self._hidden]
        parts = self._hooked(self.before, state, {**parts, "output": None})
        seen = {name: tree for name, tree in parts.items() if name not in hidden}
        parts = self._hooked(self.after, state, {**parts, **super()._inside(state, seen, merges)})
        return {name: tree for name, tree in parts.items() if name != "batch"}

    def _hooked(self, hooks: Links, state: State, parts: Parts) -> Parts:
        for name, hook in hooks:
            parts = {**parts, **self._after(name, hook, state, parts)}
        return parts

    def _after(self, name: str, hook: Hook, state: State, parts: Parts) -> Parts:
        """The parts after a hook, that it may change."""
        key, progress = (
            Unreadable(f"state.{what}", "A count that a hook needs is a tensor in a slot of memory", by=name)
            for what in ("key", "progress")
        )
        slots = {slot.removeprefix(SLOT): tree for slot, tree in parts.items() if slot.startswith(SLOT)}
        others = {
            slot: Unreadable(f"state.memory[{slot!r}]", "A hook reads what the unit and callbacks remember", by=name)
            for slot in state.memory
            if slot not in slots
        }
        metrics: Any = {self.phase: parts.get("metrics", {})}
        if not self.sees_metrics:
            metrics = Unreadable("state.metrics", "Write tnt.compiled(unit, metrics=True)", by=name)
        before = State(
            **{part: parts[part] for part in (*MODEL, "output")},
            key=key,  # pyright: ignore[reportArgumentType]
            progress=progress,  # pyright: ignore[reportArgumentType]
            metrics=metrics,
            memory={**others, **slots},
        )
        try:
            with explained(name, hook), _Drawing(name):
                after: Any = hook(before)
        except ContractError as error:
            raise ContractError(f"fuse was given. {error}{_ADVICE}") from error
        if not isinstance(after, State):
            raise ContractError(f"{name} returned {kind_of(after)}; a hook takes a State and returns one.")
        if after.key is not key or after.progress is not progress or after.stop is not None:
            changed = "requests a stop" if after.stop is not None else "changed state.key or state.progress"
            raise ContractError(f"fuse was given, and {name} {changed}; nobody sees that before a block ends.{_ADVICE}")
        if strange := [
            slot for slot, tree in after.memory.items() if slot not in slots and tree is not others.get(slot)
        ]:
            raise StructureError(
                f"{name} wrote state.memory[{strange[0]!r}], which no unit or callback has. Give it a first value: "
                f"memory={{{strange[0]!r}: lambda state: ...}}."
            )
        for slot in slots:
            was = dict(trees.named_leaves(slots[slot]))
            for path, leaf in trees.named_leaves(after.memory[slot]):
                if path in was and not isinstance(leaf, Tensor) and not trees.same_leaf(was[path], leaf):
                    raise ContractError(
                        f"fuse was given, and {name} changed state.memory[{slot!r}]{path}, {kind_of(leaf)}; inside a "
                        f"block that is a tensor. Write torch.tensor(...), as its first value too.{_ADVICE}"
                    )
        new = {part: getattr(after, part) for part in (*MODEL, "output")}
        if "metrics" in parts:
            new["metrics"] = after.metrics[self.phase]
        return {**new, **{SLOT + slot: after.memory[slot] for slot in slots}}


def _as_tensor(leaf: Any) -> Any:
    if isinstance(leaf, float):
        return torch.tensor(leaf, dtype=torch.float64)
    return torch.tensor(leaf) if isinstance(leaf, int) and leaf.bit_length() < 64 else leaf


def _as_numbers(before: PyTree, after: PyTree) -> PyTree:
    if trees.structure(before) != trees.structure(after):
        return after
    pairs = zip(trees.leaves(before), trees.leaves(after), strict=True)
    leaves = [
        type(was)(now.item()) if isinstance(was, int | float) and isinstance(now, Tensor) else now for was, now in pairs
    ]
    return trees.unflatten(leaves, trees.structure(after))


def _is_same(a: PyTree, b: PyTree) -> bool:
    return all(map(operator.is_, trees.leaves(a), trees.leaves(b)))


class _Drawing(TorchDispatchMode):
    """Refuses what draws random numbers, in the name of a hook."""

    def __init__(self, name: str):
        super().__init__()
        self._name = name

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise ContractError(
                f"{self._name} draws random numbers ({func.overloadpacket}); inside a block torch is not seeded."
            )
        return func(*args, **(kwargs or {}))


_ADVICE = (
    " The hooks around a step are inside of its block, as one graph. Leave fuse out, or let it be a hook of epochs."
)

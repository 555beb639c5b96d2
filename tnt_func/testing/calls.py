"""Laws of every single call: steps and hooks write to nothing (1), and keep the structure of the state (3)."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tnt_func import pytree as trees
from tnt_func.arguments import expects
from tnt_func.events import Event
from tnt_func.state import State
from tnt_func.testing.case import Call, Case, law_error, where
from tnt_func.testing.snapshot import SHOWN, changes, freeze
from tnt_func.unit import Callback, EvalUnit, FitUnit, PredictUnit, TrainUnit, Unit

NAMES = ("state", "batch")
PARTS = ("params", "buffers", "opt_state", "memory")


@expects(TrainUnit, EvalUnit, PredictUnit, FitUnit)
def check_purity(
    unit: Unit,
    state: State,
    batches: Any,
    *,
    eval_batches: Any = None,
    callbacks: Sequence[Callback] = (),
    **options: Any,
) -> None:
    """Law 1. Steps and hooks leave the state and the batch they were given as they were.

    Compared by value, on copies: in-place writes, entries added to a dict, `requires_grad_()` and `.grad` are all
    seen, at the call that makes them; so is a later write to a state that was handed out before.

    Args:
        unit, state, batches, eval_batches, callbacks, options: as in `check_unit`.

    Raises:
        LawError: a step or hook wrote; the message names it and the leaf.

    Example:
        >>> from tnt_func.rng import key
        >>> unit = TrainUnit(train_step=lambda state, batch: (state.replace(params=state.params.sub_(batch)), {}))
        >>> check_purity(unit, State(params=torch.zeros(2), key=key(0)), [1.0])
        Traceback (most recent call last):
        tnt_func.errors.LawError: law 1 (purity) is broken at train step (epoch 0, step 0): train_step wrote into ...
          state.params: 2 of 2 elements differ, by at most 1
        ...
    """
    case = Case.of(unit, state, batches, eval_batches, callbacks, options)
    kept = list[tuple[Event, Any, Any]]()
    for event in case.events(pure):
        kept.append((event, freeze(event.state), freeze(event.batch)))
    for event, *before in kept:
        for name, was, now in zip(NAMES, before, (event.state, event.batch), strict=True):
            if lines := changes(was, freeze(now), name):
                at = f"after {where(event.phase, event.point, event.state)}"
                said = f"something wrote into the {name} of that event later on"
                raise law_error("purity", at, said, lines, _ADVICE)


def pure(call: Call) -> Any:
    """Make a call, and find it to leave what it is given as it was."""
    before, grads = [freeze(arg) for arg in call.args], _grads(call.args)
    result = call.make()
    for name, was, now, grads_were in zip(NAMES, before, call.args, grads, strict=False):
        lines = changes(was, freeze(now), name)
        lines = lines or [f"{name}{path}.grad: written" for path in _grads((now,))[0] - grads_were]
        if lines:
            said = f"{call.owner} wrote into the {name} it was given"
            raise law_error("purity", f"at {call.where()}", said, lines, _ADVICE)
    return result


_ADVICE = (
    "What a step or hook is given stays as it was. Return new tensors: state.replace(params=params - lr * grads), not "
    "params.sub_(lr * grads); torch.autograd.grad(loss, leaves) of detached leaves, not loss.backward(); clone what "
    "must be written in place."
)


def _grads(args: tuple[Any, ...]) -> list[set[str]]:
    """The paths of leaves that hold a gradient, argument by argument."""
    return [
        {
            path
            for path, leaf in trees.named_leaves(arg)
            if isinstance(leaf, torch.Tensor) and leaf.is_leaf and leaf.grad is not None
        }
        if any(leaf.requires_grad for leaf in trees.tensors(arg))
        else set()
        for arg in args
    ]


@expects(TrainUnit, EvalUnit, PredictUnit, FitUnit)
def check_structure(
    unit: Unit,
    state: State,
    batches: Any,
    *,
    eval_batches: Any = None,
    callbacks: Sequence[Callback] = (),
    **options: Any,
) -> None:
    """Law 3. Steps and hooks keep tree structure, shapes, dtypes, devices and placements, at every step.

    Of `params`, `buffers`, `opt_state` and `memory`; and no leaf begins to require a gradient, which would keep every
    step's graph alive. The loop itself compares the first step of a call only, and no hooks.

    Args:
        unit, state, batches, eval_batches, callbacks, options: as in `check_unit`.

    Raises:
        LawError: a step or hook changed one of these; the message names it and the leaf.

    Example:
        >>> from tnt_func.rng import key
        >>> unit = TrainUnit(
        ...     train_step=lambda state, batch: (state, {}),
        ...     on_train_epoch_end=lambda state: state.replace(params=state.params.double()),
        ... )
        >>> check_structure(unit, State(params=torch.zeros(2), key=key(0)), [1.0])
        Traceback (most recent call last):
        tnt_func.errors.LawError: law 3 (structure) is broken at train epoch_end (epoch 1, step 1): TrainUnit.on_...
          state.params: float32[2] became float64[2]
        ...
    """
    case = Case.of(unit, state, batches, eval_batches, callbacks, options)
    for _ in case.events(structured):
        pass


def structured(call: Call) -> Any:
    """Make a call, and find it to keep the structure of the state."""
    result = call.make()
    before, after = call.args[0], result[0] if call.point == "step" and isinstance(result, tuple) else result
    if isinstance(after, State):
        lines = [line for part in PARTS for line in reshaped(getattr(before, part), getattr(after, part), part)]
        if lines:
            said = f"{call.owner} changed the structure of the state"
            raise law_error("structure", f"at {call.where()}", said, lines[:SHOWN], _STRUCTURE_ADVICE)
    return result


_STRUCTURE_ADVICE = (
    "Structure, shapes, dtypes and devices stay as they are in the first state. Cast what is computed: "
    "update.to(param.dtype); detach what is kept: loss.detach(); put what grows or appears into the first state, or "
    "into a memory function of the unit or callback."
)


def reshaped(before: Any, after: Any, part: str) -> list[str]:
    if before is after:
        return []
    here, there = _kinds(before), _kinds(after)
    lines = [
        f"state.{part}{path}: {here.get(path, 'nothing')} became {there.get(path, 'nothing')}"
        for path in {**here, **there}
        if here.get(path) != there.get(path)
    ]
    if not lines and trees.structure(before) != trees.structure(after):
        lines = [f"state.{part}: containers differ: {trees.structure(before)} became {trees.structure(after)}"]
    return lines


def _kinds(tree: Any) -> Mapping[str, str]:
    return {path: _kind(leaf) for path, leaf in trees.named_leaves(tree)}


def _kind(leaf: Any) -> str:
    if not isinstance(leaf, torch.Tensor):
        return type(leaf).__name__
    return f"{trees.describe(leaf)}{_placed(leaf)}{' that requires grad' if leaf.requires_grad else ''}"


def _placed(leaf: Any) -> str:
    distributed = sys.modules.get("torch.distributed.tensor")
    return f" placed {leaf.placements}" if distributed and isinstance(leaf, distributed.DTensor) else ""

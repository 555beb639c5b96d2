"""Law 12: a compiled step is the step, compiled once a structure; donated is not donated, to the bit."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tnt_func import asserts
from tnt_func import pytree as trees
from tnt_func.arguments import expects
from tnt_func.compiling import Compiled, RecompilationWarning, compiled
from tnt_func.compiling.backends import Backend
from tnt_func.compiling.steps import Form
from tnt_func.errors import LawError, TreeError
from tnt_func.state import State, keep
from tnt_func.transitions import prepare, start_epoch, step
from tnt_func.types import Batch
from tnt_func.unit import EvalUnit, FitUnit, PhaseUnit, PredictUnit, TrainUnit, Unit, parts, step_of


@expects(TrainUnit, EvalUnit, PredictUnit, FitUnit)
def check_compiled(
    unit: Unit,
    state: State,
    batches: Sequence[Batch],
    *,
    rtol: float = 1e-5,
    atol: float = 1e-6,
    compilations: int = 1,
    form: Form = "step",
    backend: Backend = "aot_eager",
) -> None:
    """Law 12. From every state of a run, the compiled step leads where the step leads, up to rounding.

    Donating, it leads to the very bits that it leads to otherwise. There are no more compilations than structures.

    Args:
        unit: of any kind; every part of a FitUnit is tried.
        state: where the run begins; it is left as it is.
        batches: what the steps are given, one after another.
        rtol, atol: how far floating leaves may differ, as in `asserts.assert_trees_close`.
        compilations: how many structures the batches are of.
        form: see `tnt.compiled`.
        backend: "aot_eager" tries all but the code that is generated; "inductor" that too.

    Raises:
        LawError: the law is broken; the message says by which step, and on which leaves.
        ContractError: a step cannot be compiled.

    Example:
        >>> import torch
        >>> from tnt_func.rng import key
        >>> calls = []
        >>> def train_step(state, batch):
        ...     calls.append(batch)
        ...     return state.replace(params=state.params + len(calls) * batch), {}
        >>> check_compiled(TrainUnit(train_step=train_step), State(params=torch.zeros(2), key=key(0)), [torch.ones(2)])
        Traceback (most recent call last):
        tnt_func.errors.LawError: law 12 (compiled) is broken: train_step 0, compiled, is not the step
          state.params: 2 of 2 elements differ by more than atol=1e-06 + rtol=1e-05, by at most 1
        ...
    """
    for one in parts(unit):
        _check_part(one, prepare(unit, state), batches, rtol, atol, compilations, form, backend)


def _check_part(
    unit: PhaseUnit,
    state: State,
    batches: Sequence[Batch],
    rtol: float,
    atol: float,
    compilations: int,
    form: Form,
    backend: Backend,
) -> None:
    name = f"{unit.phase}_step"
    fast: Any = compiled(unit, form=form, backend=backend)
    its: Any = step_of(fast)
    assert isinstance(its, Compiled)
    donating: Any = replace(fast, **{name: its.donating()}) if unit.phase == "train" else None
    state = start_epoch(unit, state)
    for index, batch in enumerate(batches):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RecompilationWarning)
            after, got = step(unit, state, batch), step(fast, state, batch)
            _compare(f"{name} {index}, compiled, is not the step", got, after, rtol, atol)
            if donating is not None:
                donated = step(donating, keep(state), batch)
                if lines := trees.diff(_seen(got), _seen(donated), "state"):
                    raise _broken(f"{name} {index}, donating, is not what it is otherwise", lines)
        state = after
    if len(its.compilations) > compilations:
        reasons = [each.reason or "compiled for the first time" for each in its.compilations]
        raise _broken(f"{name} was compiled {len(reasons)} times for {compilations} structures", reasons)


def _compare(what: str, got: State, expected: State, rtol: float, atol: float) -> None:
    try:
        asserts.assert_trees_close(_seen(got), _seen(expected), rtol=rtol, atol=atol, name="state")
    except TreeError as error:
        raise _broken(what, str(error).splitlines()[:-1]) from error


def _seen(state: State) -> State:
    """What a step leads to."""
    return state.replace(output=None)


def _broken(what: str, lines: Sequence[str]) -> LawError:
    return LawError("\n  ".join([f"law 12 (compiled) is broken: {what}", *lines]) + _ADVICE)


_ADVICE = (
    "\nA compiled step is traced: what Python reads that is neither state nor batch is read once. Put what varies into "
    "the state or the batch, as a tensor, and raise rtol and atol where the difference is rounding."
)

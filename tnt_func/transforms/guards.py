"""What keeps watch over the numbers of a step: skip what is not finite, measure gradients, find where NaN began.

Example:
    >>> from tnt_func import optim, rng
    >>> from tnt_func.descent import minimize
    >>> from tnt_func.transitions import prepare, step
    >>> from tnt_func.unit import TrainUnit
    >>> def objective(params, state, batch): return params * batch, (state.buffers, {})
    >>> unit = skip_nonfinite(TrainUnit(train_step=minimize(objective, optim.sgd(1.0))))
    >>> w = torch.tensor(1.0)
    >>> state = prepare(unit, State(params=w, key=rng.key(0), opt_state=optim.sgd(1.0).init(w)))
    >>> state = step(unit, step(unit, state, float("nan")), 0.5)
    >>> state.params, state.memory["skip_nonfinite"]
    (tensor(0.5000), {'skipped': tensor(1)})
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tnt_func import treemath
from tnt_func.descent import Amending, Guard, Slope
from tnt_func.errors import ContractError, kind_of
from tnt_func.factories import factory
from tnt_func.state import State
from tnt_func.transforms.seams import Around, U, amended, device_of, kept_unless, on_train_step, with_slot
from tnt_func.types import Batch, Output


@factory
def skip_nonfinite(unit: U, *, name: str = "skip_nonfinite") -> U:
    """A step whose value or gradient is not finite leaves params, buffers and opt_state as they were.

    The output is reported as it is. Skipped steps are counted in `state.memory[name]["skipped"]`, int64 [].

    Args:
        unit: its train step is made by `minimize`.
        name: of the slot of memory.

    Raises:
        UsageError: the step is not made by `minimize`, or the name is taken.

    Example:
        >>> from tnt_func import optim
        >>> from tnt_func.descent import minimize
        >>> from tnt_func.unit import TrainUnit
        >>> skip_nonfinite(TrainUnit(train_step=minimize(max, optim.sgd(0.1)))).memory.keys()
        dict_keys(['skip_nonfinite'])

    References:
        optax.apply_if_finite.
    """
    unit = amended(unit, "skip_nonfinite", lambda descent: SkipNonfinite(name))
    return with_slot(unit, name, lambda state: {"skipped": torch.tensor(0, device=device_of(state))})


@dataclass(frozen=True)
class SkipNonfinite(Guard):
    """The amendment of `skip_nonfinite`."""

    name: str

    def allows(self, before: State, slope: Slope) -> Tensor:
        """Whether the slope is finite."""
        return treemath.all_finite((slope.value, slope.grads))

    def settle(self, before: State, after: State, allowed: Tensor) -> State:
        """The old state where it is not."""
        skipped = before.memory[self.name]["skipped"] + ~allowed
        after = kept_unless(allowed, before, after, ("params", "buffers", "opt_state"))
        return after.remember(self.name, {"skipped": skipped})


@factory
def with_gradient_stats(unit: U) -> U:
    """The output has `grad_norm`, `update_norm` and `param_norm` too: 2-norms of all leaves as one vector, each [].

    The gradient is the one that the optimizer is given, before it is clipped; the update is that of the parameters,
    after all transforms that were applied before; the parameters are those before the update.

    Args:
        unit: its train step is made by `minimize`, and its output is a mapping.

    Raises:
        UsageError: the step is not made by `minimize`.
        ContractError: at a step, where the output is no mapping or has such an entry.

    Example:
        >>> from tnt_func import optim, rng
        >>> from tnt_func.descent import minimize
        >>> from tnt_func.unit import TrainUnit
        >>> def objective(params, state, batch): return (params * batch).sum(), (state.buffers, {})
        >>> unit = with_gradient_stats(TrainUnit(train_step=minimize(objective, optim.sgd(0.1))))
        >>> w = torch.ones(1)
        >>> unit.train_step(State(params=w, key=rng.key(0), opt_state=optim.sgd(0.1).init(w)), 2.0)[1]
        {'grad_norm': tensor(2.), 'update_norm': tensor(0.2000), 'param_norm': tensor(1.)}

    References:
        torch.nn.utils.clip_grad_norm_, which returns grad_norm: the same bits.
    """
    return amended(unit, "with_gradient_stats", lambda descent: GradientStats(descent.part))


@dataclass(frozen=True)
class GradientStats(Amending):
    """The amendment of `with_gradient_stats`."""

    part: str | None
    reads: ClassVar = ("params",)

    def __call__(self, before: State, after: State, slope: Slope) -> tuple[State, Slope]:
        """The state as it is, and more output."""
        old, new = (state.params if self.part is None else state.params[self.part] for state in (before, after))
        stats = {
            "grad_norm": treemath.global_norm(slope.grads),
            "update_norm": treemath.global_norm(treemath.subtract(new, old)),
            "param_norm": treemath.global_norm(old),
        }
        return after, _reporting("with_gradient_stats", slope, stats)


@factory
def with_gradients(unit: U) -> U:
    """The output has `grads` too: the gradient that the optimizer is given, a tree like the parameters.

    For what looks at single tensors, histograms in TensorBoard say; for norms, `with_gradient_stats` is smaller.

    Args:
        unit: its train step is made by `minimize`, and its output is a mapping.

    Raises:
        UsageError: the step is not made by `minimize`.
        ContractError: at a step, where the output is no mapping or has such an entry.

    Example:
        >>> from tnt_func import optim, rng
        >>> from tnt_func.descent import minimize
        >>> from tnt_func.unit import TrainUnit
        >>> def objective(params, state, batch): return (params["w"] * batch).sum(), (state.buffers, {})
        >>> unit = with_gradients(TrainUnit(train_step=minimize(objective, optim.sgd(0.1))))
        >>> params = {"w": torch.ones(1)}
        >>> state = State(params=params, key=rng.key(0), opt_state=optim.sgd(0.1).init(params))
        >>> unit.train_step(state, 2.0)[1]
        {'grads': {'w': tensor([2.])}}
    """
    return amended(unit, "with_gradients", lambda descent: Gradients())


@dataclass(frozen=True)
class Gradients(Amending):
    """The amendment of `with_gradients`."""

    reads: ClassVar = ()

    def __call__(self, before: State, after: State, slope: Slope) -> tuple[State, Slope]:
        """The state as it is, and more output."""
        return after, _reporting("with_gradients", slope, {"grads": slope.grads})


def _reporting(said: str, slope: Slope, more: Mapping[str, Any]) -> Slope:
    """The slope with more in its output."""
    if not isinstance(slope.output, Mapping) or more.keys() & slope.output.keys():
        given = sorted(slope.output) if isinstance(slope.output, Mapping) else kind_of(slope.output)
        raise ContractError(
            f"{said} was given the output {given}; it adds {sorted(more)} to a mapping that has none of them. Return "
            "{'loss': loss} from the objective, and rename what collides."
        )
    return slope._replace(output={**slope.output, **more})


@factory
def detect_anomaly(unit: U) -> U:
    """Where the backward pass makes a NaN, the step raises an error that names the operation; for debugging, slow.

    torch also warns with the traceback of the forward call. Afterwards torch's own mode is as it was. An overflow that
    a loss scale would skip is found too.

    Args:
        unit: with any train step.

    Raises:
        RuntimeError: torch's own, at a step, with a note on what to do.

    Example:
        >>> from tnt_func import optim, rng
        >>> from tnt_func.descent import minimize
        >>> from tnt_func.unit import TrainUnit
        >>> def objective(params, state, batch): return (params * 0).sqrt() * 0, (state.buffers, {})
        >>> unit = detect_anomaly(TrainUnit(train_step=minimize(objective, optim.sgd(0.1))))
        >>> w = torch.tensor(1.0)
        >>> import warnings
        >>> with warnings.catch_warnings(action="ignore"):
        ...     unit.train_step(State(params=w, key=rng.key(0), opt_state=optim.sgd(0.1).init(w)), None)
        Traceback (most recent call last):
        RuntimeError: Function 'SqrtBackward0' returned nan values in its 0th output.
        ...

    References:
        torch.autograd.set_detect_anomaly.
    """
    return on_train_step(unit, Anomalous)


@dataclass(frozen=True)
class Anomalous(Around):
    """A step whose backward passes look for NaN."""

    def __call__(self, state: State, batch: Batch) -> tuple[State, Output]:
        """The step."""
        with torch.autograd.set_detect_anomaly(True):
            try:
                return self.inner(state, batch)
            except RuntimeError as error:
                if "returned nan values" in str(error):
                    error.add_note(
                        f"It was at step {state.progress.train.steps}, counted from 0; a backward pass of finite "
                        "numbers has no NaN. Keep the operation away from where it has no derivative "
                        "(x.clamp(min=eps).sqrt(), say), or write tnt.transforms.skip_nonfinite(unit)."
                    )
                raise

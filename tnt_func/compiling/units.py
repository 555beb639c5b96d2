"""A unit whose steps are compiled."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

from tnt_func.compiling.backends import Backend
from tnt_func.compiling.steps import Compiled, Form, OnCompile
from tnt_func.compose import Turns
from tnt_func.donation import donates
from tnt_func.factories import factory
from tnt_func.metrics import Metric
from tnt_func.unit import FitUnit, PhaseUnit, Unit, step_of

U = TypeVar("U", bound=Unit)


@factory
def compiled(
    unit: U,
    *,
    form: Form = "auto",
    dynamic: bool = True,
    metrics: bool = True,
    backend: Backend = "inductor",
    options: Mapping[str, Any] | None = None,
    fallback: bool = False,
    on_compile: OnCompile | None = None,
) -> U:
    """The unit whose steps run as one graph each: of a FitUnit, all of them.

    Args:
        unit: its steps are functions of params, buffers, opt_state, the batch and the unit's own slots of memory.
            Transforms come before: `compiled(ema(microbatch(unit, 4)))`. Of `alternate`, each turn is a graph.
        form: "step" is one graph of the whole step; "gradients" one of what `tnt.minimize` differentiates, followed by
            the optimizer as it is; "auto" is the first up to 10 million parameters, where it is the faster one.
        dynamic: whether one graph serves batches of any size from 2 on. If not, each size is compiled.
        metrics: whether metrics are merged inside; write False for one that grows, or that looks at values.
        backend: "inductor", or "aot_eager", which traces and checks the same and generates no code.
        options: of inductor, over those of `backends.OPTIONS`: {"fallback_random": False} draws inside the kernels,
            faster and other numbers than the step as it was.
        fallback: whether a step that cannot be compiled runs as it is, with a warning that says why, instead of
            raising.
        on_compile: called with a `Compilation` before and after each. Without it both are told on the standard error,
            as by `tnt.observers.compilations()`, where that is a terminal.

    Raises:
        ContractError: at the first step, where it looks at values, or reads `key`, `progress` or a foreign slot.

    Example:
        >>> from tnt_func.unit import EvalUnit
        >>> compiled(EvalUnit(eval_step=max)).eval_step.phase
        'eval'

    References:
        jax.jit; torch.fx.experimental.proxy_tensor.make_fx; torch._inductor.
    """

    def graph(one: PhaseUnit, step: Any, merged: Mapping[str, Metric]) -> Any:
        if isinstance(step, Compiled):
            return step
        if isinstance(step, Turns):
            # Whose turn it is, a counter of the loop says, which no graph reads.
            return replace(step, steps=tuple(graph(one, each, {}) for each in step.steps))
        return Compiled(
            step,
            one.phase,
            merged,
            tuple(one.memory),
            form=form if one.phase == "train" else "step",
            dynamic=dynamic,
            donates=donates(step),
            backend=backend,
            options=options or {},
            fallback=fallback,
            on_compile=on_compile,
        )

    def part(one: PhaseUnit) -> Any:
        return replace(one, **{f"{one.phase}_step": graph(one, step_of(one), one.metrics if metrics else {})})

    if not isinstance(unit, FitUnit):
        return part(unit)
    changes: dict[str, Any] = {
        name: part(getattr(unit, name))
        for name in ("train_unit", "eval_unit", "predict_unit")
        if getattr(unit, name) is not None
    }
    return replace(unit, **changes)

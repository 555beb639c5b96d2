"""Reasons to stop: a metric that no longer improves, a number that is no number.

Example:
    >>> early_stopping("accuracy", mode="max", patience=5).phases(), stop_on_nonfinite("loss").phases()
    (('eval',), ('train',))
"""

import math
from collections.abc import Mapping
from typing import Any

from tnt_func import pytree as trees
from tnt_func import treemath
from tnt_func.callbacks.monitors import (
    Interval,
    Monitor,
    MonitoredPhase,
    Number,
    ThresholdMode,
    better,
    check_not_negative,
    worst,
)
from tnt_func.errors import UsageError, kind_of
from tnt_func.factories import factory
from tnt_func.state import State
from tnt_func.types import Mode
from tnt_func.unit import Callback


@factory
def early_stopping(
    monitor: str,
    *,
    phase: MonitoredPhase = "eval",
    mode: Mode = "min",
    patience: int = 3,
    min_delta: Number = 0.0,
    threshold_mode: ThresholdMode = "abs",
    check_finite: bool = True,
    stopping_threshold: Number | None = None,
    divergence_threshold: Number | None = None,
    interval: Interval = "epoch",
    interval_freq: int = 1,
    name: str = "early_stopping",
) -> Callback:
    """Stop where a metric no longer improves, is good enough, diverges, or is not finite.

    The first of these rules that holds decides, better meaning less in mode "min" and more in mode "max":

        check_finite and the value is NaN or infinite           stop
        value better than stopping_threshold                    stop
        -value better than -divergence_threshold                stop
        value better than best, by more than delta              best = value, wait = 0
        otherwise                                               wait += 1, stop if wait >= patience

    delta is `min_delta`, times the best value in threshold_mode "rel", which is meant for values above 0. A value by
    which a threshold stops is not taken for the best. The memory is not emptied by a stop: in a further run on the
    final state, the first value that does not improve stops again.

    Args:
        monitor: the metric of the phase; with interval "step", the entry of the step's output.
        phase: whose metric.
        mode: whether less or more is better.
        patience: looks in a row without improvement, at the last of which the run stops.
        min_delta: what an improvement must exceed.
        threshold_mode: whether `min_delta` is absolute, or relative to the best value.
        check_finite: whether NaN and infinity stop.
        stopping_threshold: what is good enough.
        divergence_threshold: what is too bad.
        interval, interval_freq: when to look, at the end of every so many epochs or steps of the phase.
        name: of the slot, `{"best": float, "wait": int}`.

    Raises:
        UsageError: `patience` or `min_delta` is negative; in the run, there is no such metric.

    Example:
        >>> stop = early_stopping("loss", patience=1, interval="step", phase="train")
        >>> from tnt_func.rng import key
        >>> state = State(params={}, key=key(0), memory={"early_stopping": {"best": 0.5, "wait": 0}})
        >>> stop.on_train_step_end(state.replace(output={"loss": 0.75})).stop
        'early_stopping: train loss 0.75 is no improvement on 0.5, 1 time in a row'

    References:
        torchtnt.utils.early_stop_checker.EarlyStopChecker, with which it agrees on every stream of values;
        lightning.pytorch.callbacks.EarlyStopping.
    """
    check_not_negative("early_stopping", patience=patience, min_delta=min_delta)
    watched = Monitor("early_stopping", monitor, phase, interval, interval_freq)
    delta = min_delta if mode == "max" else -min_delta

    def decide(state: State) -> State:
        best, wait = state.memory[name]["best"], state.memory[name]["wait"]
        value = watched.read(state)
        said = f"{name}: {watched} {value:g}"
        if check_finite and not math.isfinite(value):
            return state.request_stop(f"{said} is not finite")
        if stopping_threshold is not None and better(value, stopping_threshold, mode):
            return state.request_stop(f"{said} is better than {stopping_threshold:g}, which is good enough")
        if divergence_threshold is not None and better(-value, -divergence_threshold, mode):
            return state.request_stop(f"{said} is worse than {divergence_threshold:g}, so it diverges")
        scale = 1.0 if threshold_mode == "abs" else best if math.isfinite(best) else 0.0
        if better(value - delta * scale, best, mode):
            return state.remember(name, {"best": value, "wait": 0})
        wait += 1
        state = state.remember(name, {"best": best, "wait": wait})
        if wait < patience:
            return state
        return state.request_stop(f"{said} is no improvement on {best:g}, {wait} time{'s'[: wait > 1]} in a row")

    return Callback(name=name, memory=lambda state: {"best": worst(mode), "wait": 0}, **watched.hooks(decide))


@factory
def stop_on_nonfinite(
    *names: str, params: bool = False, phase: MonitoredPhase = "train", name: str = "stop_on_nonfinite"
) -> Callback:
    """Stop after a step that gave NaN or infinity. The open epoch is closed, as after any stop.

    It looks after every step, which waits for the device; `early_stopping` looks once an epoch.

    Args:
        names: the entries of the step's output to look at; every number in it, if none is named.
        params: whether to look at `state.params` too.
        phase: after whose steps.
        name: of the callback; it remembers nothing.

    Raises:
        UsageError: in the run, the output has no such entry, or nothing to look at.

    Example:
        >>> from tnt_func.rng import key
        >>> state = State(params={}, key=key(0), output={"loss": math.nan, "rows": 3})
        >>> stop_on_nonfinite().on_train_step_end(state).stop
        "stop_on_nonfinite: output['loss'] is not finite after train step 0"

    References:
        keras.callbacks.TerminateOnNaN.
    """

    def look(state: State) -> State:
        output: Any = state.output
        have = sorted(output, key=str) if isinstance(output, Mapping) else []
        missing = [entry for entry in names if entry not in have]
        if missing or not (names or params or have or trees.tensors(output)):
            raise UsageError(
                f"stop_on_nonfinite looks at {missing or 'every number'} in the output of the {phase} step, which has "
                f"{have or kind_of(output)}. Name an entry that is there, return it, or write params=True."
            )
        looked = {"output": {entry: output[entry] for entry in names} if names else output}
        looked |= {"params": state.params} if params else {}
        if bool(treemath.all_finite(looked)):
            return state
        bad = [
            f"{part}{path}"
            for part, tree in looked.items()
            for path, leaf in trees.named_leaves(tree)
            if not bool(treemath.all_finite(leaf))
        ]
        steps = state.progress.of(phase).steps
        return state.request_stop(
            f"{name}: {', '.join(bad)} {'is' if len(bad) == 1 else 'are'} not finite after {phase} step {steps}"
        )

    hooks: dict[str, Any] = {f"on_{phase}_step_end": look}
    return Callback(name=name, **hooks)

"""The best parameters so far, kept inside the State.

Example:
    >>> keep_best("accuracy", mode="max").phases()
    ('eval',)
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch

from tnt_func import pytree as trees
from tnt_func.callbacks.monitors import Interval, Monitor, MonitoredPhase, better, worst
from tnt_func.errors import UsageError
from tnt_func.factories import factory
from tnt_func.state import State
from tnt_func.types import Mode, PyTree, typed
from tnt_func.unit import Callback

Part: TypeAlias = Literal["params", "buffers", "opt_state"]


@factory
def keep_best(
    monitor: str,
    *,
    phase: MonitoredPhase = "eval",
    mode: Mode = "min",
    parts: Sequence[Part] = ("params", "buffers", "opt_state"),
    interval: Interval = "epoch",
    interval_freq: int = 1,
    name: str = "keep_best",
) -> Callback:
    """Keep a copy of the model as it was where a metric was best; `best` gives it back.

    The first value is the best so far, and any that is strictly better afterwards; NaN never is. The copy is in memory
    from the start, so it costs that much: `parts=("params", "buffers")` leaves the optimizer's state out.

    Args:
        monitor: the metric of the phase; with interval "step", the entry of the step's output.
        phase: whose metric. That of an evaluation is of the parameters that are kept; a train metric is a mean over
            the steps that led to them.
        mode: whether less or more is better.
        parts: what to keep.
        interval, interval_freq: when to look, at the end of every so many epochs or steps of the phase.
        name: of the slot, `{"value": float, "steps": int, "kept": bool, "model": {part: tree}}`, the steps being those
            of training behind it.

    Raises:
        UsageError: in the run, there is no such metric.

    Example:
        >>> from tnt_func.rng import key
        >>> callback = keep_best("loss", phase="train", interval="step")
        >>> state = State(params=1.0, key=key(0), output={"loss": 0.5})
        >>> state = callback.on_train_step_end(state.remember("keep_best", callback.memory(state)))
        >>> state = callback.on_train_step_end(state.replace(params=2.0, output={"loss": 0.75}))
        >>> state.params, best(state).params
        (2.0, 1.0)
    """
    watched = Monitor("keep_best", monitor, phase, interval, interval_freq)

    def slot(state: State, value: float, kept: bool) -> PyTree:
        # Copies: what is kept shares no memory with what a later step may be allowed to write over.
        model = {part: trees.map(_copied, getattr(state, part)) for part in parts}
        return {"value": value, "steps": state.progress.train.steps, "kept": kept, "model": model}

    def decide(state: State) -> State:
        value, old = watched.read(state), state.memory[name]
        first = not old["kept"] and not math.isnan(value)
        if not (first or better(value, old["value"], mode)):
            return state
        return state.remember(name, slot(state, value, kept=True))

    return Callback(name=name, memory=lambda state: slot(state, worst(mode), kept=False), **watched.hooks(decide))


@typed
def best(state: State, name: str = "keep_best") -> State:
    """The state with the model that `keep_best` kept in place of its own; counters, memory and the rest stay.

    Args:
        state: of a run with `keep_best`.
        name: the slot.

    Raises:
        UsageError: the state has no such slot, or nothing has been kept yet.

    Example:
        >>> from tnt_func.rng import key
        >>> kept = {"value": 0.5, "steps": 3, "kept": True, "model": {"params": 1.0}}
        >>> best(State(params=2.0, key=key(0), memory={"keep_best": kept})).params
        1.0
    """
    slot: Any = state.memory.get(name)
    if not isinstance(slot, dict) or slot.keys() != {"value", "steps", "kept", "model"}:
        raise UsageError(
            f"best was given {name!r}, and the state's memory has {sorted(state.memory)}; it takes the slot of a "
            "keep_best that the run was given. Write callbacks=[tnt.callbacks.keep_best(...)], or best(state, name)."
        )
    if not slot["kept"]:
        raise UsageError(
            f"best was given {name!r}, which has seen no number that it could call the best; there is one after the "
            "first epoch or step that it looks at. Train further, or use the state as it is."
        )
    return state.replace(**slot["model"])


def _copied(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf

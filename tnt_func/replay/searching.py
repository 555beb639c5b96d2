"""The first step at which something holds, found in a record.

the checkpoints at which it does not hold yet, and those at which it does, are told apart by bisection: log2(n) of
them are restored; the steps between the last one and the first one are replayed, once
"""

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from tnt_func import treemath
from tnt_func.replay.replaying import Passed, Rerun
from tnt_func.replay.rows import Directory
from tnt_func.state import State
from tnt_func.transforms import detect_anomaly
from tnt_func.types import Batch, typed
from tnt_func.unit import FitUnit, TrainUnit


@dataclass(frozen=True, kw_only=True)
class Found:
    """What `bisect` finds.

    Args:
        step: after which it holds, of the lifetime.
        at: a "step", the end of an "epoch", or the "call" that began with it.
        before, after: the states around; before is None where a call began with it.
        batch: of the step.
        operation: whose backward pass gave the first NaN, as torch's anomaly detection names it. Where the forward pass
            had it already, from a batch with a NaN say, that is the loss's; None where there was none.
        numbers: of the step's output.
        restored: how many checkpoints were.
        replayed: how many segments between two checkpoints were.
    """

    step: int
    at: Literal["step", "epoch", "call"]
    before: State | None
    after: State
    batch: Batch
    operation: str | None
    numbers: Mapping[str, Any]
    restored: int
    replayed: int

    def __str__(self) -> str:
        where = {"step": "at", "epoch": "when an epoch was closed after", "call": "where a call began, after"}[self.at]
        named = f"; {self.operation} gave the first NaN" if self.operation else ""
        cost = f"{self.restored} checkpoints restored, {self.replayed} segments replayed"
        return f"first {where} step {self.step}{named} ({cost})"


@typed
def bisect(
    directory: Directory,
    unit: TrainUnit | FitUnit,
    state: State,
    data: Any,
    predicate: Callable[[State], Any],
    **options: Any,
) -> Found | None:
    """The first step of a recorded run after which something holds, the first NaN say; None where it never does.

    What holds once is taken to hold ever after; where it does not, a step is found at which it began to. The step found
    is taken once more under torch's anomaly detection, which names the operation where a NaN arose.

    Args:
        directory, unit, state, data, options: as in `replay`.
        predicate: `State -> bool`.

    Raises:
        As `replay`.

    Example:
        >>> import tempfile
        >>> import tnt_func as tnt
        >>> unit = TrainUnit(train_step=lambda state, batch: (state.replace(params=state.params + batch), {}))
        >>> first, data = State(params=0, key=tnt.key(0)), list(range(10))
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     _ = tnt.train(unit, first, data, max_epochs=1, observers=[tnt.replay.record(directory)])
        ...     found = bisect(directory, unit, first, data, lambda state: state.params > 20)
        >>> found.step, found.before.params, found.batch
        (7, 15, 6)
    """
    rerun = Rerun.of(directory, unit, state, data, options)
    saved = rerun.record.checkpoints()
    low, high, restored = -1, len(saved), 0
    before = after = None
    while high - low > 1:
        middle = (low + high) // 2
        found, restored = rerun.restored(saved[middle]), restored + 1
        if predicate(found):
            high, after = middle, found
        else:
            low, before = middle, found
    counts: dict[str, Any] = {"restored": restored, "replayed": 0}
    blank: dict[str, Any] = {"at": "call", "before": None, "batch": None, "operation": None, "numbers": {}}
    if before is not None:
        rows = rerun.record.after(saved[low], saved[high] if high < len(saved) else None)
        counts["replayed"] = 1 if rows else 0
        for passed in rerun.walk(before, rows):
            if predicate(passed.state):
                return _found(rerun, before, passed, counts)
            before = passed.state
    if after is None:
        return None
    return Found(step=rerun.record.rows[saved[high]].step, after=after, **blank, **counts)


def _found(rerun: Rerun, before: State, passed: Passed, counts: Mapping[str, int]) -> Found:
    return Found(
        step=passed.row.step,
        at="step" if passed.row.row == "step" else "epoch",
        before=before,
        after=passed.state,
        batch=passed.batch,
        operation=_operation(rerun, before, passed),
        numbers=passed.numbers,
        **counts,
    )


def _operation(rerun: Rerun, before: State, passed: Passed) -> str | None:
    """The operation in whose backward pass a step's first NaN arose."""
    after = passed.state
    if passed.row.row != "step" or treemath.all_finite((after.params, after.buffers, after.opt_state)):
        return None
    unit: Any = rerun.unit
    watching = replace(rerun, unit=detect_anomaly(unit))
    with warnings.catch_warnings(action="ignore"):
        try:
            for _ in watching.walk(before, [passed.row]):
                pass
        except RuntimeError as error:
            named = re.search(r"Function '(\w+)' returned nan values", str(error))
            if named is None:
                raise
            return named[1]
    return None

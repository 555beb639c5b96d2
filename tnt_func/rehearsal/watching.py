"""What watches a rehearsal: observers that keep what steps put out, and a probe of the gradient."""

from time import perf_counter
from typing import Any

import torch

from tnt_func import pytree as trees
from tnt_func.descent import Descent, Slope
from tnt_func.errors import UsageError
from tnt_func.events import Event
from tnt_func.rehearsal.findings import nonfinite, several, shapes
from tnt_func.replay.marks import numbers
from tnt_func.state import State
from tnt_func.transforms.seams import amended


class Outputs:
    """An observer that keeps what steps put out: their numbers, the shapes of the first, the first not finite.

    Attributes:
        numbers: of every step.
        shapes: of the first output, in words.
        findings: the first output that is not finite.
        reason: why the run stopped, or None.
    """

    def __init__(self) -> None:
        self.numbers: list[dict[str, Any]] = []
        self.shapes = "none"
        self.findings: list[str] = []
        self.reason: str | None = None

    def __call__(self, event: Event) -> None:
        """Keep the output of a step."""
        self.reason = self.reason or event.state.stop
        if event.point != "step_end":
            return
        output = event.state.output
        self.shapes = self.shapes if self.numbers else shapes(output)
        self.numbers.append(numbers(output))
        found = [] if self.findings else nonfinite(output, "output")
        if found:
            verb = "is" if len(found) == 1 else "are"
            self.findings = [f"{several(found)} of {event.phase} step {len(self.numbers)} {verb} not finite."]


class Watch:
    """Two observers, before and after all others, that take the time of steps and keep what they put out.

    Args:
        waits: whether the work of a step goes on on an accelerator when it has returned.
    """

    def __init__(self, waits: bool):
        self._waits, self._since, self._step = waits, perf_counter(), 0.0
        self.outputs: dict[str, Outputs] = {"train": Outputs(), "eval": Outputs()}
        self.seconds: dict[str, list[float]] = {"train": [], "eval": []}

    def arrived(self, event: Event) -> None:
        """Take the time of what led to an event."""
        if self._waits:
            torch.accelerator.synchronize()
        taken = perf_counter() - self._since
        if event.point == "step_start":
            self._step = taken
        elif event.point == "step_end":
            self.seconds[event.phase].append(self._step + taken)
        self.outputs[event.phase](event)

    def left(self, event: Event) -> None:
        """Begin to take the time of what leads to the next event."""
        self._since = perf_counter()


class Gradients:
    """Notes which parameters get no gradient, of a step that `minimize` made; of another, nothing is known."""

    def __init__(self) -> None:
        self.missing: set[str] = set()

    def watched(self, unit: Any) -> Any:
        """The unit, watched where it can be; what its step gives is the same."""
        try:
            return amended(unit, "fast_dev_run", lambda descent: lambda *args: self._noted(descent, *args))
        except UsageError:
            return unit

    def _noted(self, descent: Descent, before: State, after: State, slope: Slope) -> tuple[State, Slope]:
        if not torch.compiler.is_compiling():
            part = "" if descent.part is None else f"[{descent.part!r}]"
            self.missing |= {f"{part}{path}" for path, grad in trees.named_leaves(slope.grads) if grad is None}
        return after, slope

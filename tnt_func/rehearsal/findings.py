"""What a rehearsal found, as a value, and the words for it.

Example:
    >>> print(Rehearsal("fast_dev_run", {"ran": "1 train step"}, ("params['w'] did not change in 1 step.",), {}))
    fast_dev_run: 1 finding
      ran: 1 train step
    - params['w'] did not change in 1 step.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tnt_func import pytree as trees
from tnt_func.checkpoint.saving import numbers as metrics_of
from tnt_func.replay.marks import numbers
from tnt_func.state import State
from tnt_func.types import Batch, Output, Phase, PyTree

SHOWN = 4
"""Leaves that a sentence names."""

MODEL = ("params", "buffers", "opt_state")


@dataclass(frozen=True, repr=False)
class Rehearsal:
    """What a rehearsal found. Its text, `print(rehearsal)`, says it in plain words.

    Args:
        name: of the function.
        facts: what ran, on what, and what it cost, by name.
        findings: what to look at before a long run, a sentence each; none where all is well.
        numbers: seconds, losses and the like, by name.

    Example:
        >>> Rehearsal("fast_dev_run", {}, (), {"step_seconds": 0.5}).ok
        True
    """

    name: str
    facts: Mapping[str, str]
    findings: tuple[str, ...]
    numbers: Mapping[str, float]

    @property
    def ok(self) -> bool:
        """Whether there is nothing to look at."""
        return not self.findings

    def __str__(self) -> str:
        count = counted(len(self.findings), "finding") if self.findings else "no findings"
        facts = [f"  {name}: {text}" for name, text in self.facts.items()]
        return "\n".join([f"{self.name}: {count}", *facts, *(f"- {finding}" for finding in self.findings)])

    __repr__ = __str__


def several(items: Sequence[str]) -> str:
    """The first few of some things, and how many more there are.

    Example:
        >>> several(["a", "b"]), several(list("abcdef"))
        ('a, b', 'a, b, c, d and 2 more')
    """
    more = f" and {len(items) - SHOWN:,} more" if len(items) > SHOWN else ""
    return f"{', '.join(items[:SHOWN])}{more}"


def shapes(batch: Batch) -> str:
    """What a batch or an output is made of: shapes and dtypes by path.

    Example:
        >>> shapes((torch.ones(4, 2), {"y": torch.ones(4)})), shapes(torch.ones(2))
        ("[0] float32[4, 2], [1]['y'] float32[4]", 'float32[2]')
    """
    leaves = trees.named_leaves(tree_of(batch))
    kinds = [
        (path, trees.describe(leaf) if isinstance(leaf, torch.Tensor) else type(leaf).__name__) for path, leaf in leaves
    ]
    return several([f"{path} {kind}".lstrip() for path, kind in kinds]) or "nothing"


def tree_of(batch: Batch) -> PyTree:
    """A batch as a tree, where it is a mapping that is none.

    Example:
        >>> from collections import UserDict
        >>> tree_of(UserDict(a=1))
        {'a': 1}
    """
    return dict(batch) if isinstance(batch, Mapping) else batch


def course(outputs: Sequence[Output]) -> str:
    """How the numbers of steps' outputs went, from the first step to the last.

    Example:
        >>> course([{"loss": 1.0, "rows": 4}, {"loss": 0.5, "rows": 4}])
        'loss 1 -> 0.5, rows 4'
    """
    first, last = (numbers(outputs[index]) if outputs else {} for index in (0, -1))
    return several([f"{name} {change(value, last.get(name, value))}" for name, value in first.items()])


def change(before: Any, after: Any) -> str:
    """Two numbers, or one where they are the same.

    Example:
        >>> change(1.0, 0.25), change(1, 1)
        ('1 -> 0.25', '1')
    """
    was, now = (f"{float(value):.4g}" for value in (before, after))
    return was if was == now else f"{was} -> {now}"


def counted(count: int, what: str, ending: str = "s") -> str:
    """A number of things.

    Example:
        >>> counted(1, "step"), counted(2, "batch", "es")
        ('1 step', '2 batches')
    """
    return f"{count:,} {what}{ending if count != 1 else ''}"


def said(numbers: Mapping[str, float]) -> str:
    """The first few of some numbers with their names.

    Example:
        >>> said({"eval loss": 0.123456})
        'eval loss 0.1235'
    """
    return several([f"{name} {value:.4g}" for name, value in numbers.items()])


def metrics(state: State, *phases: Phase) -> dict[str, float]:
    """The metrics of a state's phases that are one number, with their phase.

    Example:
        >>> from tnt_func.metrics import mean
        >>> from tnt_func.rng import key
        >>> metrics(State(params={}, key=key(0), metrics={"eval": {"loss": mean("loss").of({"loss": 0.5})}}), "eval")
        {'eval loss': 0.5}
    """
    found = metrics_of(state)
    return {f"{phase} {name}": value for phase in phases for name, value in found.get(phase, {}).items()}


def nonfinite(tree: PyTree, name: str) -> list[str]:
    """The leaves with NaN or infinity in them. Minus infinity alone is a mask, and none of them.

    Example:
        >>> nonfinite({"w": torch.tensor([1.0, torch.nan]), "mask": torch.tensor(-torch.inf)}, "params")
        ["params['w'] (1 of 2 numbers)"]
    """
    found: list[str] = []
    for path, leaf in trees.named_leaves(tree):
        if isinstance(leaf, float) or (isinstance(leaf, torch.Tensor) and _may_be_nan(leaf)):
            values = torch.as_tensor(leaf).detach()
            bad = ~values.isfinite() if values.is_complex() else values.isnan() | values.isposinf()
            if bad.any():
                bad = ~values.isfinite()
                found.append(f"{name}{path} ({int(bad.sum()):,} of {values.numel():,} numbers)")
    return found


def spoilt(before: State, after: State, taken: str) -> list[str]:
    """What is to be said of a model that some steps have made not finite.

    Example:
        >>> from tnt_func.rng import key
        >>> state = State(params={"w": torch.ones(2)}, key=key(0))
        >>> spoilt(state, state.replace(params={"w": torch.full((2,), torch.nan)}), "2 steps")
        ["After 2 steps params['w'] (2 of 2 numbers) is not finite. tnt.transforms.detect_anomaly says where it began."]
    """
    was = {one for part in MODEL for one in nonfinite(getattr(before, part), part)}
    now = [one for part in MODEL for one in nonfinite(getattr(after, part), part) if one not in was]
    advice = "tnt.transforms.detect_anomaly says where it began."
    return [f"After {taken} {several(now)} {'is' if len(now) == 1 else 'are'} not finite. {advice}"] if now else []


def _may_be_nan(leaf: torch.Tensor) -> bool:
    return (leaf.is_floating_point() or leaf.is_complex()) and leaf.layout is torch.strided and not leaf.is_meta


def unchanged(before: State, after: State, taken: str, without_gradient: Iterable[str]) -> list[str]:
    """What is to be said of parameters that training left to the bit as they were.

    Args:
        before, after: training.
        taken: how many steps it was, in words.
        without_gradient: paths in `params` of those that got no gradient.

    Example:
        >>> from tnt_func.rng import key
        >>> state = State(params={"a": torch.ones(1), "b": torch.ones(1)}, key=key(0))
        >>> later = state.replace(params={"a": torch.zeros(1), "b": torch.ones(1)})
        >>> unchanged(state, later, "2 steps", ["['b']"])
        ["params['b'] got no gradient in 2 steps: the objective does not use it. Use it, or leave it out."]
    """
    named, now = trees.named_leaves(before.params), dict(trees.named_leaves(after.params))
    floating = [(path, leaf) for path, leaf in named if isinstance(leaf, torch.Tensor) and _may_be_nan(leaf)]
    still = [f"params{path}" for path, leaf in floating if path in now and trees.same_leaf(leaf, now[path])]
    lacking = {f"params{path}" for path in without_gradient}
    if still and len(still) == len(floating) and not lacking:
        return [
            f"No parameter changed in {taken}. Is lr 0, is a window of accumulate longer than that, and does the step "
            "return state.replace(params=...)?"
        ]
    unused, rest = [path for path in still if path in lacking], [path for path in still if path not in lacking]
    found = []
    if unused:
        them = "it" if len(unused) == 1 else "them"
        said = f"got no gradient in {taken}: the objective does not use {them}. Use {them}, or leave {them} out."
        found.append(f"{several(unused)} {said}")
    if rest:
        found.append(
            f"{several(rest)} did not change in {taken}. Is that meant (frozen)? Otherwise the gradient is zero, or "
            "the update is lost in rounding: keep parameters in float32."
        )
    return found

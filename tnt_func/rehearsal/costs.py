"""What a step takes, and so an epoch and a run.

Example:
    >>> train = Pace(first_step=0.9, step=0.25, first_batch=0.5, batch=0.05, overlaps=False, length=1000)
    >>> measured, facts = ahead({"train": train}, epochs=10, steps=math.inf)
    >>> facts
    {'epoch': '1,000 train steps, about 5 min', 'run': 'about 50 min to go'}
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from tnt_func import pytree as trees
from tnt_func.rehearsal.feeds import Feed
from tnt_func.state import State


class Pace(NamedTuple):
    """How fast one phase goes. What is first warms up, and is kept apart from the median of the rest.

    Args:
        first_step, step: seconds that a step takes, its hooks included.
        first_batch, batch: seconds until a batch is read.
        overlaps: whether batches are read while steps are taken.
        length: batches in an epoch, or None where nobody knows.
    """

    first_step: float
    step: float
    first_batch: float
    batch: float
    overlaps: bool
    length: int | None

    @property
    def seconds(self) -> float:
        """From step to step."""
        return max(self.step, self.batch) if self.overlaps else self.step + self.batch


def pace(feed: Feed, steps: Sequence[float]) -> Pace:
    """The pace of a phase.

    Args:
        feed: what was read.
        steps: seconds of each step, one at least.
    """
    reads = [read.seconds for read in feed.reads]
    return Pace(steps[0], _later(steps), reads[0], _later(reads), feed.overlaps, feed.length)


def _later(seconds: Sequence[float]) -> float:
    """The median of all but the first."""
    later = sorted(seconds[1:] or seconds)
    return later[len(later) // 2]


def measured(paces: Mapping[str, Pace]) -> tuple[dict[str, float], dict[str, str]]:
    """The times as numbers and in words; those of training without a prefix."""
    numbers: dict[str, float] = {}
    facts: dict[str, str] = {}
    for name, its in paces.items():
        prefix = "" if name == "train" else f"{name}_"
        numbers |= {f"{prefix}first_step_seconds": its.first_step, f"{prefix}step_seconds": its.step}
        numbers |= {f"{prefix}batch_seconds": its.batch}
        facts[f"{name} step"] = (
            f"{duration(its.step)} (the first {duration(its.first_step)}), a batch is read in {duration(its.batch)} "
            f"(the first {duration(its.first_batch)})"
        )
    return numbers, facts


def ahead(paces: Mapping[str, Pace], *, epochs: float, steps: float) -> tuple[dict[str, float], dict[str, str]]:
    """What an epoch takes, with an evaluation at its end, and what is left of the run.

    Args:
        paces: by phase.
        epochs, steps: of training, that are left; infinity where there is no limit.
    """
    train = paces["train"]
    known = all(its.length is not None for its in paces.values())
    epoch = sum((its.length or 0) * its.seconds for its in paces.values()) if known else math.nan
    if not known:
        numbers, facts = {}, {"epoch": "of unknown length, for the data has no len()"}
    else:
        counts = " and ".join(f"{its.length:,} {name} step{'s' * (its.length != 1)}" for name, its in paces.items())
        numbers, facts = {"epoch_seconds": epoch}, {"epoch": f"{counts}, about {duration(epoch)}"}
    a_step = epoch / train.length if known and train.length else train.seconds
    # An unknown epoch says nothing of epochs.
    runs = [epochs * epoch if epochs < math.inf else math.inf, steps * a_step if steps < math.inf else math.inf]
    run = min((seconds for seconds in runs if not math.isnan(seconds)), default=math.inf)
    if run < math.inf:
        numbers["run_seconds"], facts["run"] = run, f"about {duration(run)} to go"
    return numbers, facts


def held(state: State) -> dict[str, str]:
    """How much there is of a state, and of the memory of its devices."""
    params, whole = trees.tensors(state.params), trees.tensors(state)
    saved = sum(leaf.numel() * leaf.element_size() for leaf in whole)
    facts = {"state": f"{sum(leaf.numel() for leaf in params):,} parameters, {saved:,} bytes with all that is saved"}
    for device in sorted({leaf.device for leaf in params if leaf.is_cuda}, key=str):
        used, there = torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
        facts[f"memory of {device}"] = f"at most {used / 2**30:.3g} of {there / 2**30:.3g} GiB so far"
    return facts


def duration(seconds: float) -> str:
    """A time in words, to two figures or so.

    Example:
        >>> [duration(seconds) for seconds in (0.0000123, 0.0123, 7.04, 100, 7500, 400_000)]
        ['12 us', '12 ms', '7.0 s', '1 min 40 s', '2 h 5 min', '4 d 15 h']
    """
    for size, unit, part, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        whole, rest = divmod(round(seconds / part), size // part)
        if whole:
            return f"{whole:,} {unit} {rest} {smaller}" if rest else f"{whole:,} {unit}"
    scale, unit = (1, "s") if seconds >= 1 else (1e3, "ms") if seconds >= 1e-3 else (1e6, "us")
    return f"{seconds * scale:.{0 if seconds * scale >= 10 else 1}f} {unit}"

"""A warning of the rank that the others wait for.

Example:
    >>> warn_on_slow_rank(every_n_steps=50)
    warn_on_slow_rank(every_n_steps=50)
"""

import time
import warnings
from collections.abc import Callable

import torch

from tnt_func.errors import UsageError
from tnt_func.events import Event, Observer
from tnt_func.observers.combinators import needs_all
from tnt_func.observers.measures import Stopwatch
from tnt_func.types import typed


@typed
def warn_on_slow_rank(
    *, every_n_steps: int = 100, share: int | float = 0.1, clock: Callable[[], float] = time.perf_counter
) -> Observer:
    """An observer that warns where one rank is longer between its train steps than another: the others wait for it.

    Inside a step the ranks wait for each other, so they leave it together; what a rank then spends on its data, its
    hooks and its observers is its own. Every n steps of the lifetime the ranks tell each other how long that was, and
    rank 0 warns where the longest exceeds the shortest by more than a share of all the time. A rank that computes more
    slowly inside the step shows in a profile, as waiting in the collectives of the others.

    It belongs on every rank, since all of them take part. Where no process group is initialised it is silent.

    Args:
        every_n_steps: from one message to the next; the first one covers the start of workers and is not judged.
        share: of the time, 0 to 1, above which it warns.
        clock: as in `timing`.

    Raises:
        UsageError: every_n_steps is below 1, or share not between 0 and 1.

    Example:
        >>> observers = [warn_on_slow_rank(every_n_steps=500, share=0.05)]

    References:
        torchtnt.framework.callbacks.SlowRankDetector.
    """
    if every_n_steps < 1 or not 0 < share < 1:
        raise UsageError(
            f"warn_on_slow_rank(every_n_steps={every_n_steps}, share={share}) was given; steps are at least 1, and the "
            "share is above 0 and below 1. Write every_n_steps=100, share=0.1."
        )
    return _SlowRank(every_n_steps, share, clock)


class _SlowRank:
    def __init__(self, every_n_steps: int, share: float, clock: Callable[[], float]):
        self._every, self._share, self._watch = every_n_steps, share, Stopwatch(clock)
        self._judges = False

    def __repr__(self) -> str:
        return f"warn_on_slow_rank(every_n_steps={self._every})"

    check_part = needs_all

    def close(self) -> None:
        """Begin anew with the next run."""
        self._judges = False

    def __call__(self, event: Event) -> None:
        self._watch(event)
        if event.phase != "train" or event.point != "step_end" or event.state.progress.train.steps % self._every:
            return
        groups = torch.distributed
        if not (groups.is_available() and groups.is_initialized()):
            return
        since, _ = self._watch.take(event)
        waited, other = since.data_wait, since.seconds - since.step - since.data_wait
        rows = _gathered([waited, other, since.seconds])
        judged, self._judges = self._judges, True
        if judged and groups.get_rank() == 0:
            self._judge(rows, event)

    def _judge(self, rows: list[list[float]], event: Event) -> None:
        own = [waited + other for waited, other, _ in rows]
        slow, fast = own.index(max(own)), own.index(min(own))
        seconds = rows[slow][2]
        if own[slow] - own[fast] <= self._share * seconds:
            return
        waited, other, _ = rows[slow]
        part = max(waited, other) / own[slow]
        what = "waiting for data" if waited >= other else "hooks, observers and the loop"
        warnings.warn(
            f"rank {slow} holds the others up: of the {seconds:.3g} s up to step {event.state.progress.train.steps} it "
            f"spent {own[slow]:.3g} s between steps, rank {fast} {own[fast]:.3g} s; {part:.0%} "
            f"of that was {what}. Look at its machine's disk and processor, cut the data evenly, and leave to other "
            "ranks what rank 0 alone does.",
            stacklevel=2,
        )


def _gathered(numbers: list[float]) -> list[list[float]]:
    """The numbers of every rank, in rank order."""
    groups = torch.distributed
    device = torch.accelerator.current_accelerator() if "nccl" in groups.get_backend() else None
    mine = torch.tensor(numbers, dtype=torch.float64, device=device)
    rows = [torch.empty_like(mine) for _ in range(groups.get_world_size())]
    groups.all_gather(rows, mine)
    return [row.tolist() for row in rows]

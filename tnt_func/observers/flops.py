"""Floating point operations: how many a step takes, and what part of the device's they make use of.

A step is a function, so it is counted by calling it once more; nothing of the run is touched.

Example:
    >>> import tnt_func as tnt
    >>> from torch import nn
    >>> unit, state = tnt.supervised(nn.Linear(4, 2), nn.functional.mse_loss, tnt.optim.sgd(0.1), key=tnt.key(0))
    >>> batch = (torch.ones(8, 4), torch.ones(8, 2))
    >>> count_flops(unit.train_unit, state, batch)  # 2 * 8 * 4 * 2 forward, as many for the gradient of the weight
    256
"""

import re
import time
from collections.abc import Callable
from typing import Any

import torch

from tnt_func.arguments import expects
from tnt_func.errors import UsageError
from tnt_func.observers.measures import Pace, Totals
from tnt_func.state import State
from tnt_func.transitions import prepare, step
from tnt_func.types import Batch, typed
from tnt_func.unit import EvalUnit, PredictUnit, TrainUnit

PEAK_FLOPS = {
    "V100-PCIE": 112e12,
    "V100-SXM2": 125e12,
    "T4": 65e12,
    "A10": 125e12,
    "A100": 312e12,
    "L4": 121e12,
    "L40S": 362e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100 80GB HBM3": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "B200": 2250e12,
}
"""Operations a second of the tensor cores in half precision, dense, by NVIDIA's data sheets; by words of the name."""


@expects(TrainUnit, EvalUnit, PredictUnit)
@typed
def count_flops(unit: TrainUnit | EvalUnit | PredictUnit, state: State, batch: Batch) -> int:
    """The floating point operations of one step: products of matrices, convolutions and attention, backward included.

    The step is taken once, hooks and all, and forgotten. It is taken eagerly: what a compiled graph or a kernel of
    one's own does is not seen.

    Args:
        unit: whose step.
        state: that the step could begin from; prepared if it is not yet.
        batch: as the step takes it. A batch half as large has half the operations, as a rule.

    Example:
        >>> from tnt_func.rng import key
        >>> unit = EvalUnit(eval_step=lambda state, batch: (state, batch @ state.params))
        >>> count_flops(unit, State(params=torch.ones(4, 2), key=key(0)), torch.ones(8, 4))
        128

    References:
        torch.utils.flop_counter.FlopCounterMode.
    """
    from torch.utils.flop_counter import FlopCounterMode  # Imports Triton, where that is installed.

    state = prepare(unit, state)
    with FlopCounterMode(display=False) as counter:
        step(unit, state, batch)
    return counter.get_total_flops()


@typed
def mfu(
    flops: int | float, *, peak_flops: int | float | None = None, clock: Callable[[], float] = time.perf_counter
) -> Pace:
    """A measure of operations a second, and of the part of the device's that they are: model FLOPs utilization.

    Its numbers, over the steps since last read: "throughput.flops_per_second", and "throughput.mfu", 0 to 1. The clock
    is the host's, and waiting for data and overhead count, as in `throughput`.

    Args:
        flops: of a step, by `count_flops` say, of this process.
        peak_flops: operations a second that the device could do at best; if not given, those of the current CUDA device
            in half precision. In float32 or TF32 it is less.
        clock: as in `timing`.

    Raises:
        UsageError: a number is not above 0; peak_flops is not given, and the device is not known.

    Example:
        >>> mfu(6 * 124e6 * 8 * 1024, peak_flops=312e12)
        mfu()

    References:
        Chowdhery et al., PaLM: Scaling Language Modeling with Pathways, 2022, appendix B.
    """
    peak = _peak_of_device() if peak_flops is None else peak_flops
    if not (flops > 0 and peak > 0):
        raise UsageError(
            f"mfu({flops}, peak_flops={peak_flops}) was given; both are above 0. Write "
            "mfu(count_flops(unit, state, batch), peak_flops=312e12), say."
        )

    def numbers(since: Totals, run: Totals) -> dict[str, float]:
        rate = flops * since.batches / since.seconds
        return {"throughput.flops_per_second": rate, "throughput.mfu": rate / peak}

    return Pace("mfu()", numbers, clock)


def _peak_of_device() -> float:
    name: Any = torch.cuda.get_device_name() if torch.cuda.is_available() else "the CPU"
    known = [words for words in PEAK_FLOPS if re.search(rf"\b{words}\b", name)]
    if not known:
        raise UsageError(
            f"mfu() was given no peak_flops, and runs on {name}, of which it knows none; it knows "
            f"{', '.join(PEAK_FLOPS)}. Write mfu(flops, peak_flops=...) with the operations a second of its data sheet."
        )
    return PEAK_FLOPS[max(known, key=len)]

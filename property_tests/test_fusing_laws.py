"""Law 12 of fused steps: blocks of any size, over epochs, limits and evaluations of any length."""

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn
from torch.nn import functional as F

import tnt_func as tnt
from tnt_func.errors import LawError
from tnt_func.testing.fusing import check_fused

few = settings(max_examples=settings.default.max_examples // 10 if settings.default else 10, deadline=None)


def fast(net: nn.Module) -> tuple[tnt.FitUnit, tnt.State]:
    torch.manual_seed(0)
    unit, state = tnt.supervised(net, F.mse_loss, tnt.optim.adamw(1e-2), key=tnt.key(0))
    return tnt.compiled(tnt.transforms.ema(unit, 0.9), backend="aot_eager"), state


UNIT, STATE = fast(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)))
limits = st.none() | st.integers(1, 9)


@few
@given(
    fuse=st.integers(2, 7),
    sizes=st.lists(st.sampled_from([2, 5]), min_size=1, max_size=7),
    steps=limits,
    per_epoch=limits,
    every=st.integers(0, 5),
)
def test_a_block_is_its_steps(fuse: int, sizes: list[int], steps: int | None, per_epoch: int | None, every: int):
    generator = torch.Generator().manual_seed(0)
    data = [(torch.randn(n, 3, generator=generator), torch.randn(n, 2, generator=generator)) for n in sizes]
    options: Any = {"max_steps": steps, "max_train_steps_per_epoch": per_epoch, "evaluate_every_n_steps": every}
    check_fused(UNIT, STATE, data, eval_batches=data[:1], fuse=fuse, max_epochs=2, **options)


def test_a_hook_that_remembers_outside_of_the_state_is_found():
    seen = list[int]()

    def count(state: tnt.State) -> tnt.State:
        seen.append(1)
        return state.replace(params=state.params + len(seen))

    unit = tnt.TrainUnit(train_step=lambda state, batch: (state, {"sum": state.params.sum()}), on_train_step_end=count)
    state = tnt.State(params=torch.zeros(2), key=tnt.key(0))
    with pytest.raises(LawError, match=r"law 12 \(fused\) is broken at train step_end"):
        check_fused(tnt.compiled(unit, backend="aot_eager"), state, [torch.ones(2)] * 4, fuse=2)


def test_what_a_hook_rounds_otherwise_is_let_pass_up_to_the_tolerance():
    traced = list[int]()

    def drift(state: tnt.State) -> tnt.State:
        traced.append(1)
        return state.replace(params=state.params + 1e-9 * len(traced))

    unit = tnt.TrainUnit(train_step=lambda state, batch: (state, {}), on_train_step_end=drift)
    fast = tnt.compiled(unit, backend="aot_eager")
    state = tnt.State(params=torch.zeros(2, dtype=torch.float64), key=tnt.key(0))
    check_fused(fast, state, [torch.ones(2)] * 4, fuse=2, max_epochs=1)
    with pytest.raises(LawError, match="Raise rtol and atol where hooks differ by rounding"):
        check_fused(fast, state, [torch.ones(2)] * 4, fuse=2, max_epochs=1, rtol=0.0, atol=0.0)

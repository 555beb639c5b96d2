from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tnt_func as tnt
from tnt_func.errors import ConsumedError

Batch = tuple[torch.Tensor, torch.Tensor]


def data(*sizes: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 4, generator=generator), torch.randn(n, 3, generator=generator)) for n in sizes]


def fit_unit(*layers: nn.Module, **options: Any) -> tuple[tnt.FitUnit, tnt.State]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), *layers, nn.Tanh(), nn.Linear(6, 3))
    optimizer = tnt.optim.adamw(tnt.schedules.cosine(1e-2, steps=20))
    return tnt.supervised(net, F.mse_loss, optimizer, key=tnt.key(0), **options)


UNIT, STATE = fit_unit()
FAST = tnt.compiled(UNIT, backend="aot_eager")
SIX = data(5, 5, 5, 5, 5, 3)


def counted(state: tnt.State) -> tnt.State:
    return state.remember("seen", state.memory["seen"] + state.output["loss"] * state.metrics["train"]["loss"].value())


SEEN = tnt.Callback(name="seen", memory=lambda state: torch.zeros((), dtype=torch.float64), on_train_step_end=counted)


def told(events: Iterator[tnt.Event]) -> list[Any]:
    """What every step tells: the point, the counters, the batch, the output and the metrics."""
    return sorted(
        (event.state.progress.train, event.point, tnt.digest((event.batch, event.state.output, event.state.metrics)))
        for event in events
        if event.point in ("step_start", "step_end", "epoch_end")
    )


@pytest.mark.parametrize("fuse", [2, 3, 4, 100])
@pytest.mark.parametrize("donate", [False, True])
def test_blocks_are_their_steps(fuse: int, donate: bool):
    options: Any = {"max_epochs": 3, "max_steps": 15, "max_train_steps_per_epoch": 5, "callbacks": [SEEN]}
    every: Any = {**options, "evaluate_every_n_steps": 4}
    expected = tnt.fit(FAST, STATE, SIX, data(3, 3), **every)
    tnt.asserts.assert_trees_equal(tnt.fit(FAST, STATE, SIX, data(3, 3), fuse=fuse, donate=donate, **every), expected)
    ours = told(tnt.fit_events(FAST, STATE, SIX, data(3), fuse=fuse, donate=donate, **options))
    assert ours == told(tnt.fit_events(FAST, STATE, SIX, data(3), **options))


def test_the_events_of_a_block():
    events = tnt.train_events(FAST.train_unit, STATE, data(5, 5, 5), max_epochs=1, fuse=2)
    points = ["start", "epoch_start", *["fetched"] * 2, *["step_start", "step_end"] * 2, "step_done"]
    points += ["fetched", "step_start", "step_end", "step_done", "epoch_end", "epoch_done", "end"]
    seen = []
    for event in events:
        seen.append(event.point)
        if event.point == "step_end" and event.state.progress.train.steps == 1:
            assert "between fused steps" in repr(event.state)
            for name in ("params", "buffers", "opt_state", "memory"):
                with pytest.raises(ConsumedError, match=f"state.{name} was read between two fused steps"):
                    getattr(event.state, name)
        elif event.point == "step_end":
            assert event.state.params.keys() == STATE.params.keys()
    assert seen == points

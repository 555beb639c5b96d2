"""Early stopping is TorchTNT's and the plateau torch's, on streams of any values; and streams can tell."""

import math
import random
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from callback_states import first, shown, started
from hypothesis import find, given, settings
from hypothesis import strategies as st
from torch import nn

from tnt_func import callbacks, optim

NAN, INF = math.nan, math.inf
INSTALLED = find_spec("torchtnt") is not None
needs_torchtnt = pytest.mark.skipif(not INSTALLED, reason="TorchTNT is not installed: pip install 'tnt-func[oracle]'")

# TorchTNT keeps its thresholds in float32, so that is what is drawn.
narrow = st.floats(-4.0, 4.0, width=32)
values = st.sampled_from([0.0, 1.0, -1.0, 0.5, 2.0, INF, -INF, NAN]) | narrow | st.floats()
streams = st.lists(values, max_size=8)
stopping = st.fixed_dictionaries(
    {"mode": st.sampled_from(["min", "max"]), "patience": st.integers(0, 3)},
    optional={
        "min_delta": st.sampled_from([0.0, 0.5]) | st.floats(0.0, 4.0, width=32),
        "threshold_mode": st.sampled_from(["rel", "abs"]),
        "check_finite": st.booleans(),
        "stopping_threshold": narrow,
        "divergence_threshold": narrow,
    },
)
plateaus = st.fixed_dictionaries(
    {"mode": st.sampled_from(["min", "max"]), "patience": st.integers(0, 2)},
    optional={
        "factor": st.sampled_from([0.0, 0.1, 0.5, 0.99]),
        "threshold": st.sampled_from([0.0, 0.5]) | st.floats(0.0, 2.0),
        "threshold_mode": st.sampled_from(["rel", "abs"]),
        "cooldown": st.integers(0, 2),
        "min_lr": st.sampled_from([0.0, 0.01]) | st.lists(st.floats(0.0, 0.1), min_size=2, max_size=2),
        "eps": st.sampled_from([0.0, 1e-8, 0.03]),
    },
)


def follows_torchtnt(values: list[float], given: dict[str, Any], theirs: dict[str, Any] | None = None) -> bool:
    from torchtnt.utils.early_stop_checker import EarlyStopChecker

    checker = EarlyStopChecker(**(theirs or given))
    ours = callbacks.early_stopping("loss", phase="train", interval="step", **given)
    state = started(ours, first())
    for value in values:
        stops = checker.check(torch.tensor([value], dtype=torch.float64))
        state = shown(ours, state, value)
        told = checker.state_dict()
        same = state.memory["early_stopping"] == {"best": float(told["best_value"]), "wait": told["patience_count"]}
        if (state.stop is not None) is not stops or not same:
            return False
    return True


# Of the differences below, the rarest shows in one stream of twenty-five.
@needs_torchtnt
@settings(max_examples=600)
@given(streams, stopping)
def test_early_stopping_is_torchtnts(values: list[float], given: dict[str, Any]):
    assert follows_torchtnt(values, given)


CONTROLS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "patience": ({"patience": 1}, {"patience": 2}),
    "mode": ({"mode": "min"}, {"mode": "max"}),
    "delta": ({"min_delta": 0.5}, {"min_delta": 0.25}),
    "relative": ({"min_delta": 0.5, "threshold_mode": "rel"}, {"min_delta": 0.5}),
    "finite": ({"check_finite": True}, {"check_finite": False}),
    "stopping": ({"stopping_threshold": 0.0}, {"stopping_threshold": 1.0}),
    "divergence": ({"divergence_threshold": 0.0}, {"divergence_threshold": 1.0}),
}


@needs_torchtnt
@pytest.mark.parametrize("name", CONTROLS)
def test_streams_tell_one_early_stopping_from_another(name: str):
    ours, theirs = ({"mode": "min", "patience": 2, **changed} for changed in CONTROLS[name])
    find(streams, lambda values: not follows_torchtnt(values, ours, theirs))  # Raises where there is none.


def follows_torch(values: list[float], given: dict[str, Any], seed: int, theirs: dict[str, Any] | None = None) -> bool:
    """Two groups; some of the decisions meet a train step before the next one, some do not."""
    weights = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    imperative = torch.optim.SGD([{"params": weights[:1], "lr": 0.5}, {"params": weights[1:], "lr": 0.03}])
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(imperative, **(theirs or given))
    pure = optim.grouped(optim.sgd(0.03), [(lambda path: "a" in path, {"lr": 0.5})])
    ours = callbacks.reduce_lr_on_plateau("loss", phase="train", interval="step", **given)
    state = started(ours, first(opt_state=pure.init({"a": torch.zeros(1), "b": torch.zeros(1)})))
    steps = random.Random(seed)
    for value in values:
        scheduler.step(value)
        state = shown(ours, state, value)
        applied = ours.on_train_step_start(state)
        rates = [float(values["lr"]) for values in optim.hyperparameters(applied.opt_state)]
        if rates != [group["lr"] for group in imperative.param_groups]:
            return False
        # A step carries out no more than four, and torch all at once: here one comes in time.
        state = applied if steps.random() < 0.5 or state.memory["reduce_lr_on_plateau"]["pending"] == 4 else state
    slot = state.memory["reduce_lr_on_plateau"]
    kept = {"best": scheduler.best, "num_bad_epochs": scheduler.num_bad_epochs}
    return all(slot[name] == value for name, value in kept.items()) and (
        slot["cooldown_counter"] == scheduler.cooldown_counter
    )


@settings(max_examples=600)
@given(streams, plateaus, st.integers(0, 99))
def test_reduce_lr_on_plateau_is_torchs(values: list[float], given: dict[str, Any], seed: int):
    assert follows_torch(values, given, seed)


PLATEAU_CONTROLS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "patience": ({"patience": 0}, {"patience": 1}),
    "factor": ({"factor": 0.5}, {"factor": 0.25}),
    "mode": ({"mode": "min"}, {"mode": "max"}),
    "threshold": ({"threshold": 0.5}, {"threshold": 0.25}),
    "relative": ({"threshold": 0.5, "threshold_mode": "abs"}, {"threshold": 0.5}),
    "cooldown": ({"cooldown": 1}, {"cooldown": 0}),
    "min_lr": ({"min_lr": [0.01, 0.0]}, {"min_lr": 0.0}),
    "eps": ({"eps": 0.04}, {"eps": 0.0}),
}


@pytest.mark.parametrize("name", PLATEAU_CONTROLS)
def test_streams_tell_one_plateau_from_another(name: str):
    ours, theirs = ({"mode": "min", "patience": 0, **changed} for changed in PLATEAU_CONTROLS[name])
    find(streams, lambda values: not follows_torch(values, ours, 0, theirs))

"""States as a callback sees them, for tests that call its hooks by hand."""

from typing import Any

import torch

import tnt_func as tnt
from tnt_func import Callback


def first(**changes: Any) -> tnt.State:
    return tnt.State(**{"params": {"w": torch.ones(2)}, "key": tnt.key(0), **changes})


def started(callback: Callback, state: tnt.State) -> tnt.State:
    assert callback.memory is not None
    return state.remember(callback.name, callback.memory(state))


def shown(callback: Callback, state: tnt.State, value: Any) -> tnt.State:
    """The state after a train step whose output is such a loss; a stop before it is forgotten."""
    return callback.on_train_step_end(state.replace(output={"loss": value}, stop=None))

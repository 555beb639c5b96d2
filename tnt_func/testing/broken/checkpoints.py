"""What breaks law 15: a class that is not made again of its fields, and ways to save and restore that lose something.

Example:
    >>> sorted(CHECKPOINTS)[:2]
    ['counting_class', 'forgotten_key']
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tnt_func import pytree as trees
from tnt_func import rng
from tnt_func.checkpoint import restore, save
from tnt_func.errors import CheckpointError
from tnt_func.pytree import pytree
from tnt_func.state import State


@pytree
@dataclass(frozen=True)
class Counting:
    """A class that counts how often it is made."""

    count: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "count", self.count + 1)


@dataclass(frozen=True)
class Broken:
    """One way to break law 15.

    Args:
        words: what the message has in it.
        state: what is saved.
        save, restore: what saves it.
    """

    words: tuple[str, ...]
    state: State
    save: Callable[..., Any] = save
    restore: Callable[..., State] = restore


def _state(**memory: Any) -> State:
    return State(params={"w": torch.tensor([-0.0, 2.0])}, key=rng.key(1), memory=memory)


def _forgetting(path: Any, like: State) -> State:
    return restore(path, like).replace(key=like.key)


def _rounding(path: Any, like: State) -> State:
    return trees.map(lambda leaf: leaf + 0 if isinstance(leaf, torch.Tensor) else leaf, restore(path, like))


def _trusting(path: Any, like: State) -> State:
    try:
        return restore(path, like)
    except CheckpointError:
        return like


def _overwriting(path: Any, like: State) -> State:
    found = restore(path, like)
    trees.map(lambda mine, leaf: mine.copy_(leaf), like.params, found.params)
    return found


def _early(path: Any, like: State) -> State:
    trees.map(lambda leaf: leaf.zero_().add_(7), like.params) if not (path / "checkpoint.json").exists() else None
    return restore(path, like)


def _without_memory(path: Any, state: State) -> None:
    save(path, state.replace(memory={}))


def _with_new_slots(path: Any, like: State) -> State:
    return restore(path, like, new_slots=True).replace(memory=dict.fromkeys(like.memory))


CHECKPOINTS = {
    "counting_class": Broken(("state.memory['n'].count: int",), _state(n=Counting(0))),
    "forgotten_key": Broken(("static fields",), _state(), restore=_forgetting),
    "rounded_zero": Broken(("state.params['w']: 1 of 2 elements differ",), _state(), restore=_rounding),
    "lost_memory": Broken(("state.memory['n']",), _state(n=1), _without_memory, _with_new_slots),
    "written_like": Broken(("wrote into a state",), _state(), restore=_overwriting),
    "trusted_damage": Broken(("checkpoint.json was missing",), _state(), restore=_trusting),
    "half_loaded": Broken(("half-loaded",), _state(), restore=_early),
}
"""Every control by its name."""

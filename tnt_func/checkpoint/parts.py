"""The parts of a State, as a checkpoint tells them apart: three fields, slots of memory, accumulators.

A part is a tree with a prefix: `.params`, `.memory['ema']`, `.metrics['train']['loss']`. The name of a leaf is its
path in the State, which begins with the prefix of its part.

Example:
    >>> from tnt_func.rng import key
    >>> [part.prefix for part in parts(State(params=1.0, key=key(0), memory={"ema": 2.0}))]
    ['.params', '.buffers', '.opt_state', ".memory['ema']"]
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from tnt_func import pytree as trees
from tnt_func.checkpoint.manifest import outline
from tnt_func.checkpoint.values import Json
from tnt_func.pytree import pytree
from tnt_func.state import State
from tnt_func.types import PyTree

MODEL = ("params", "buffers", "opt_state")


@pytree(static=("text",))
@dataclass(frozen=True)
class Opaque:
    """A slot of memory out of a checkpoint that nobody here knows: it is kept, and saved again unchanged.

    Args:
        leaves: by path in the slot.
        text: the outline of its containers, as JSON.

    Example:
        >>> trees.leaves(Opaque({"": 0.5}, '"leaf"'))
        [0.5]
    """

    leaves: dict[str, Any]
    text: str


class Part(NamedTuple):
    """A tree of a State and the prefix of its leaves' names.

    Example:
        >>> Part(".params", {"w": 1}).leaves()
        {".params['w']": 1}
    """

    prefix: str
    tree: PyTree

    def leaves(self) -> dict[str, Any]:
        """The leaves by name."""
        pairs = self.tree.leaves.items() if isinstance(self.tree, Opaque) else trees.named_leaves(self.tree)
        return {self.prefix + path: leaf for path, leaf in pairs}

    def outline(self) -> Json:
        """The containers."""
        if isinstance(self.tree, Opaque):
            return json.loads(self.tree.text)
        return outline(trees.structure(self.tree), self.prefix)


def parts(state: State) -> Iterator[Part]:
    """Every part of a state.

    Example:
        >>> from tnt_func.rng import key
        >>> len(list(parts(State(params=1.0, key=key(0)))))
        3
    """
    for name in MODEL:
        yield Part(f".{name}", getattr(state, name))
    for name, slot in state.memory.items():
        yield Part(f".memory[{name!r}]", slot)
    for phase, accumulators in state.metrics.items():
        for name, accumulator in accumulators.items():
            yield Part(f".metrics[{phase!r}][{name!r}]", accumulator)


def rebuilt(state: State, build: Callable[[Part], PyTree]) -> State:
    """A state with every part built anew.

    Example:
        >>> from tnt_func.rng import key
        >>> rebuilt(State(params=1.0, key=key(0)), lambda part: part.prefix).params
        '.params'
    """
    trees_of: Mapping[str, PyTree] = {part.prefix: build(part) for part in parts(state)}
    return state.replace(
        **{name: trees_of[f".{name}"] for name in MODEL},
        memory={name: trees_of[f".memory[{name!r}]"] for name in state.memory},
        metrics={
            phase: {name: trees_of[f".metrics[{phase!r}][{name!r}]"] for name in accumulators}
            for phase, accumulators in state.metrics.items()
        },
    )

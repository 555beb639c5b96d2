"""The containers of a tree, ready to take trees of the same containers apart and to put them together.

A step takes half a dozen trees apart, and puts as many together, every time. What their containers are is found out
once; afterwards a flat dict is one comparison of its keys.

Example:
    >>> template = Template.of({"a": 1, "b": (2, 3)})
    >>> template.take({"a": 4, "b": (5, 6)}), template.take({"b": (5, 6), "a": 4})
    ([4, 5, 6], None)
    >>> template.give([7, 8, 9])
    {'a': 7, 'b': (8, 9)}
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

from tnt_func import pytree as trees
from tnt_func.types import PyTree

Take: TypeAlias = Callable[[Any, list[Any]], bool]
"""Appends the leaves of a tree to a list, and says whether it has the containers."""

Give: TypeAlias = Callable[[Iterator[Any]], Any]
"""The tree whose leaves come next."""


@dataclass(frozen=True)
class Template:
    """The containers of a tree.

    Args:
        structure: as torch tells it.
        takes: appends the leaves of a tree to a list; False where it has other containers.
    """

    structure: trees.Structure
    takes: Take
    _give: Give

    @classmethod
    def of(cls, tree: PyTree) -> "Template":
        """The template of a tree."""
        structure = trees.structure(tree)
        return cls(structure, *_code(structure))

    def take(self, tree: PyTree) -> list[Any] | None:
        """The leaves in order; None where the tree has other containers, keys, or static fields."""
        leaves: list[Any] = []
        return leaves if self.takes(tree, leaves) else None

    def give(self, leaves: Iterable[Any]) -> PyTree:
        """The tree with these leaves."""
        return self._give(iter(leaves))


def _code(structure: trees.Structure) -> tuple[Take, Give]:
    if structure.is_leaf():
        return _take_leaf, next
    kind, context, children = structure.type, structure.context, structure.children()
    if kind is dict:
        if all(child.is_leaf() for child in children):
            return _flat_dict(tuple(context))
        return _dict(tuple(context), [_code(child) for child in children])
    if kind is list or kind is tuple:
        return _sequence(kind, [_code(child) for child in children])
    if isinstance(context, trees.Static) and not context.values and _is_plain(kind):
        return _dataclass(kind, [_code(child) for child in children])
    return _other(structure)


def _is_plain(kind: Any) -> bool:
    """Whether a dataclass does nothing when it is made but to keep its fields."""
    return not hasattr(kind, "__post_init__") and "__slots__" not in vars(kind)


def _take_leaf(tree: Any, leaves: list[Any]) -> bool:
    leaves.append(tree)
    return True


def _flat_dict(keys: tuple[Any, ...]) -> tuple[Take, Give]:
    count = len(keys)

    def take(tree: Any, leaves: list[Any]) -> bool:
        if type(tree) is not dict or tuple(tree) != keys:
            return False
        leaves.extend(tree.values())
        return True

    return take, lambda leaves: dict(zip(keys, itertools.islice(leaves, count), strict=True))


def _dict(keys: tuple[Any, ...], inner: list[tuple[Take, Give]]) -> tuple[Take, Give]:
    takes, gives = [take for take, _ in inner], [*zip(keys, (give for _, give in inner), strict=True)]

    def take(tree: Any, leaves: list[Any]) -> bool:
        if type(tree) is not dict or tuple(tree) != keys:
            return False
        return all(of(child, leaves) for of, child in zip(takes, tree.values(), strict=True))

    return take, lambda leaves: {key: give(leaves) for key, give in gives}


def _sequence(kind: type, inner: list[tuple[Take, Give]]) -> tuple[Take, Give]:
    takes, gives = [take for take, _ in inner], [give for _, give in inner]

    def take(tree: Any, leaves: list[Any]) -> bool:
        if type(tree) is not kind or len(tree) != len(takes):
            return False
        return all(of(child, leaves) for of, child in zip(takes, tree, strict=True))

    return take, lambda leaves: kind([give(leaves) for give in gives])


def _dataclass(kind: type, inner: list[tuple[Take, Give]]) -> tuple[Take, Give]:
    named = [*zip((field.name for field in fields(kind)), inner, strict=True)]

    def take(tree: Any, leaves: list[Any]) -> bool:
        if type(tree) is not kind:
            return False
        values = vars(tree)
        return all(of(values[name], leaves) for name, (of, _) in named)

    def give(leaves: Iterator[Any]) -> Any:
        new = object.__new__(kind)
        vars(new).update([(name, of(leaves)) for name, (_, of) in named])
        return new

    return take, give


def _other(structure: trees.Structure) -> tuple[Take, Give]:
    """Containers that torch knows and this module does not: namedtuples, ordered dicts, those with static fields."""
    count = structure.num_leaves

    def take(tree: Any, leaves: list[Any]) -> bool:
        found, its = trees.flatten(tree)
        leaves.extend(found)
        return its == structure and list(trees.static_fields(its)) == list(trees.static_fields(structure))

    return take, lambda leaves: trees.unflatten([*itertools.islice(leaves, count)], structure)

"""The containers of trees, as code that takes such trees apart and puts them together.

A step takes half a dozen trees apart and puts as many together, every time. What their containers are is found out
once, and written as one function without a loop: a flat dict is one comparison of its keys.

Example:
    >>> take = taking({"x": {"a": 1, "b": (2, 3)}})
    >>> take({"x": {"a": 4, "b": (5, 6)}}), take({"x": {"b": (5, 6), "a": 4}})
    ([4, 5, 6], None)
    >>> giving({"y": ([0, 0], [("new", 1), ("old", 0)])})([7, 8], [9])
    {'y': [8, 9]}
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from typing import Any, TypeAlias

from tnt_func import pytree as trees
from tnt_func.types import PyTree

Parts: TypeAlias = dict[str, PyTree]
"""Trees by name: what a function is given, or what it returns."""

Source: TypeAlias = tuple[str, Any]
"""Where a leaf of the result comes from: ("new", a place among what the graph returns), ("old", a place among what was
given), ("constant", the leaf itself)."""


def taking(parts: Parts) -> Callable[[Parts], list[Any] | None]:
    """What takes parts with the containers of these apart: their leaves in order, or None where containers, keys or
    static fields are others."""
    code = _Code()
    leaves = [leaf for name, tree in parts.items() for leaf in code.taken(f"parts[{name!r}]", trees.structure(tree))]
    return code.function("parts", [*code.lines, f"return [{', '.join(leaves)}]"])


def giving(parts: Mapping[str, tuple[PyTree, list[Source]]]) -> Callable[[list[Any], list[Any]], Parts]:
    """What puts parts together, `(new, old) -> parts`: each like a tree, of leaves that come from somewhere else."""
    code = _Code()
    given = [f"{name!r}: {code.given(trees.structure(tree), iter(sources))}" for name, (tree, sources) in parts.items()]
    return code.function("new, old", [f"return {{{', '.join(given)}}}"])


class _Code:
    """The body of a function, and the objects that it refers to."""

    def __init__(self):
        self.lines: list[str] = []
        self._objects: dict[str, Any] = {}
        self._numbers = itertools.count()

    def function(self, arguments: str, lines: list[str]) -> Any:
        """The function."""
        source = f"def function({arguments}):\n" + "\n".join(f"    {line}" for line in lines)
        exec(compile(source, "<containers>", "exec"), self._objects)
        return self._objects["function"]

    def taken(self, tree: str, structure: trees.Structure) -> list[str]:
        """Write what checks the containers of a tree; expressions of its leaves."""
        if structure.is_leaf():
            return [tree]
        name, kind, children = f"x{next(self._numbers)}", structure.type, structure.children()
        self.lines.append(f"{name} = {tree}")
        if kind is dict:
            self._check(f"type({name}) is not dict or tuple({name}) != {self._object(tuple(structure.context))}")
            if all(child.is_leaf() for child in children):
                return [f"*{name}.values()"]
            return self._unpacked(f"{name}.values()", children)
        if kind is list or kind is tuple:
            self._check(f"type({name}) is not {kind.__name__} or len({name}) != {len(children)}")
            return self._unpacked(name, children)
        if _is_plain(structure):
            self._check(f"type({name}) is not {self._object(kind)}")
            inner = [self.taken(f"{name}.{field}", child) for field, child in _named(structure)]
            return [leaf for leaves in inner for leaf in leaves]
        found, its = f"{name}_leaves", f"{name}_structure"
        self.lines.append(f"{found}, {its} = {self._object(trees.flatten)}({name})")
        self._check(f"not {self._object(_same_structure)}({its}, {self._object(structure)})")
        return [f"*{found}"]

    def _unpacked(self, tree: str, children: list[trees.Structure]) -> list[str]:
        names = [f"x{next(self._numbers)}" for _ in children]
        if names:
            self.lines.append(f"{', '.join(names)}, = {tree}")
        inner = [self.taken(name, child) for name, child in zip(names, children, strict=True)]
        return [leaf for leaves in inner for leaf in leaves]

    def _check(self, differs: str) -> None:
        self.lines += [f"if {differs}:", "    return None"]

    def given(self, structure: trees.Structure, sources: Iterator[Source]) -> str:
        """An expression of the tree whose leaves come next."""
        if structure.is_leaf():
            kind, where = next(sources)
            return self._object(where) if kind == "constant" else f"{kind}[{where}]"
        kind = structure.type
        inner = [self.given(child, sources) for child in structure.children()]
        if kind is dict:
            keys = map(self._object, structure.context)
            return f"{{{', '.join(f'{key}: {child}' for key, child in zip(keys, inner, strict=True))}}}"
        if kind is list or kind is tuple:
            return f"[{', '.join(inner)}]" if kind is list else f"({''.join(f'{child}, ' for child in inner)})"
        if _is_plain(structure):
            values = ", ".join(f"{name!r}: {child}" for (name, _), child in zip(_named(structure), inner, strict=True))
            return f"{self._object(_instance)}({self._object(kind)}, {{{values}}})"
        # Leaves of such a tree are its children's, one after another.
        whole = self._object(lambda *children: _from_children(structure, children))
        return f"{whole}({', '.join(inner)})"

    def _object(self, value: Any) -> str:
        if isinstance(value, str):
            return repr(value)
        name = f"k{next(self._numbers)}"
        self._objects[name] = value
        return name


def _is_plain(structure: trees.Structure) -> bool:
    """Whether a node is a dataclass that does nothing when it is made but to keep its fields, all of them children."""
    context, kind = structure.context, structure.type
    if not isinstance(context, trees.Static) or context.values:
        return False
    return not hasattr(kind, "__post_init__") and "__slots__" not in vars(kind)


def _named(structure: trees.Structure) -> list[tuple[str, trees.Structure]]:
    return [*zip((field.name for field in fields(structure.type)), structure.children(), strict=True)]


def _instance(kind: type, values: dict[str, Any]) -> Any:
    new = object.__new__(kind)
    vars(new).update(values)
    return new


def _same_structure(a: trees.Structure, b: trees.Structure) -> bool:
    return a == b and list(trees.static_fields(a)) == list(trees.static_fields(b))


def _from_children(structure: trees.Structure, children: tuple[Any, ...]) -> Any:
    return trees.unflatten([leaf for child in children for leaf in trees.leaves(child)], structure)

"""Trees of tensors: map, flatten, name, compare. The one door to `torch.utils._pytree`.

torch.func and torch.compile understand only torch's own registry, so classes are registered there, once, by `@pytree`.
Static fields travel in the tree's context inside a wrapper that compares equal by type: mapping over two states
whose counters differ works, and `equal` and `diff` compare the static fields explicitly.

Laws:
    unflatten(*flatten(t)) is t again; map(identity, t) likewise; map(f . g, t) == map(f, map(g, t)).

Example:
    >>> tree = {"w": torch.ones(2), "b": [torch.zeros(1), 3]}
    >>> paths(tree)
    ["['w']", "['b'][0]", "['b'][1]"]
    >>> at(tree, "['b'][1]")
    3
    >>> equal(tree, map(lambda leaf: leaf, tree))
    True
"""

import dataclasses
import functools
import struct
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias, TypeVar, cast, overload

import torch
from torch.utils import _pytree

from tnt_func.errors import StructureError, UsageError
from tnt_func.types import PyTree

C = TypeVar("C", bound=type[Any])
Structure: TypeAlias = Any
"""A tree without its leaves; structures compare with ==, static fields by type alone."""

LEAVES = (torch.Tensor, bool, int, float, str, type(None))


class Static:
    """Static fields of one node. Equal to any other by type, so that `map` takes trees whose static fields differ."""

    __slots__ = ("values",)

    def __init__(self, values: tuple[Any, ...]):
        self.values = values

    def __eq__(self, other: object) -> bool:
        return type(other) is Static

    def __hash__(self) -> int:
        return hash(Static)

    def __repr__(self) -> str:
        return f"Static{self.values}"


@overload
def pytree(cls: C, *, static: tuple[str, ...] = ()) -> C: ...


@overload
def pytree(*, static: tuple[str, ...] = ()) -> Callable[[C], C]: ...


def pytree(cls: Any = None, *, static: tuple[str, ...] = ()) -> Any:
    """Register a frozen dataclass as a tree; its fields are children, but for the static ones.

    Args:
        cls: a frozen dataclass.
        static: names of fields that are no leaves: kept as they are, never mapped, differentiated or vmapped.

    Raises:
        UsageError: the class is no frozen dataclass, or has no such field.

    Example:
        >>> @pytree(static=("name",))
        ... @dataclasses.dataclass(frozen=True)
        ... class Named:
        ...     value: torch.Tensor
        ...     name: str
        >>> map(lambda x: x + 1, Named(torch.zeros(1), "a"))
        Named(value=tensor([1.]), name='a')
    """
    if cls is None:
        return functools.partial(pytree, static=static)
    options: Any = getattr(cls, "__dataclass_params__", None)
    if options is None or not options.frozen:
        name = getattr(cls, "__name__", repr(cls))
        raise UsageError(f"@pytree was given {name}; it takes frozen dataclasses: write @dataclass(frozen=True).")
    names = [field.name for field in dataclasses.fields(cls)]
    if unknown := set(static) - set(names):
        raise UsageError(f"@pytree(static={sorted(unknown)}) names no field of {cls.__name__}; its fields are {names}.")
    children = tuple(name for name in names if name not in static)

    def flatten_node(node: Any) -> tuple[list[Any], Static]:
        return [getattr(node, name) for name in children], Static(tuple(getattr(node, name) for name in static))

    def flatten_with_keys(node: Any) -> tuple[list[tuple[Any, Any]], Static]:
        leaves, context = flatten_node(node)
        return [(_pytree.GetAttrKey(name), leaf) for name, leaf in zip(children, leaves, strict=True)], context

    def unflatten_node(values: Iterable[Any], context: Static) -> Any:
        return cls(**dict(zip(children, values, strict=True)), **dict(zip(static, context.values, strict=True)))

    _pytree.register_pytree_node(
        cls,
        flatten_node,
        cast(Any, unflatten_node),
        serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
        flatten_with_keys_fn=cast(Any, flatten_with_keys),
    )
    return cls


def map(function: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """Apply a function to every leaf, or to the leaves of several trees of one structure side by side.

    The first tree sets the order of dict keys.

    Raises:
        StructureError: another tree lacks something of the first one's structure, or has more.

    Example:
        >>> map(lambda a, b: a + b, (1, [2]), (10, [20]))
        (11, [22])
    """
    if not rest and not torch.compiler.is_compiling():
        return _mapped(function, tree)
    # Dynamo traces tree_map itself eight times as fast as its parts, so structures are not compared beforehand.
    try:
        return _pytree.tree_map(function, tree, *rest)
    except ValueError as error:
        if mismatch := _mismatch(structure(tree), rest):
            raise StructureError(
                f"map was given trees of different structure: {mismatch} It takes trees with the same containers and "
                "keys; pytree.diff(a, b) lists where two differ."
            ) from error
        raise


def _mapped(function: Callable[[Any], Any], tree: PyTree) -> PyTree:
    """`tree_map` of one tree, at a tenth of its price where containers and leaves are plain: every step maps a few."""
    kind = cast(Any, type(tree))
    if kind is torch.Tensor or kind in LEAVES:
        return function(tree)
    if kind is dict:
        return {key: _mapped(function, child) for key, child in tree.items()}
    if kind is list or kind is tuple:
        children: list[Any] = [_mapped(function, child) for child in tree]
        return children if kind is list else tuple(children)
    return _pytree.tree_map(function, tree)


def _mismatch(structure: Structure, others: Iterable[PyTree]) -> str | None:
    try:
        for other in others:
            structure.flatten_up_to(other)
    except ValueError as error:
        return str(error)
    return None


def flatten(tree: PyTree, whole: type | None = None) -> tuple[list[Any], Structure]:
    """The leaves, and the structure that `unflatten` puts them back into.

    Args:
        tree: any tree.
        whole: a class of nodes that are taken for leaves.

    Example:
        >>> leaves, structure = flatten({"a": 1, "b": (2, 3)})
        >>> leaves, unflatten([x * 2 for x in leaves], structure)
        ([1, 2, 3], {'a': 2, 'b': (4, 6)})
        >>> flatten({"a": 1, "b": (2, 3)}, whole=tuple)[0]
        [1, (2, 3)]
    """
    if whole is None:
        return _pytree.tree_flatten(tree)
    return _pytree.tree_flatten(tree, is_leaf=lambda node: isinstance(node, whole))


def unflatten(leaves: Iterable[Any], structure: Structure) -> PyTree:
    """The tree of that structure with these leaves.

    Example:
        >>> unflatten([1, 2], flatten((0, 0))[1])
        (1, 2)
    """
    return _pytree.tree_unflatten(leaves, structure)


def leaves(tree: PyTree) -> list[Any]:
    """The leaves, in order.

    Example:
        >>> leaves({"a": 1, "b": (2, None)})
        [1, 2, None]
    """
    return _pytree.tree_leaves(tree)


def tensors(tree: PyTree) -> list[torch.Tensor]:
    """The leaves that are tensors, in order.

    Example:
        >>> tensors({"a": 1, "b": torch.zeros(2)})
        [tensor([0., 0.])]
    """
    return [leaf for leaf in leaves(tree) if isinstance(leaf, torch.Tensor)]


def structure(tree: PyTree) -> Structure:
    """The tree without its leaves.

    Example:
        >>> structure([1, 2]) == structure([3, 4]), structure([1, 2]) == structure((1, 2))
        (True, False)
    """
    return _pytree.tree_structure(tree)


def named_leaves(tree: PyTree) -> list[tuple[str, Any]]:
    """Every leaf with its path, in order. Paths read like the code that reaches the leaf.

    Example:
        >>> named_leaves({"a": (1, 2)})
        [("['a'][0]", 1), ("['a'][1]", 2)]
    """
    return [(_pytree.keystr(path), leaf) for path, leaf in _pytree.tree_flatten_with_path(tree)[0]]


def paths(tree: PyTree) -> list[str]:
    """The path of every leaf, in order.

    Example:
        >>> paths([0, {"w": 1}])
        ['[0]', "[1]['w']"]
    """
    return [path for path, _ in named_leaves(tree)]


def names(tree: PyTree) -> list[str]:
    """The name of every leaf, in order: what leads to it, joined by dots, as modules name their parameters.

    Example:
        >>> names({"body.0.weight": 1, "heads": [2, 3]})
        ['body.0.weight', 'heads.0', 'heads.1']
    """
    field: dict[Any, str] = {_pytree.MappingKey: "key", _pytree.SequenceKey: "idx", _pytree.GetAttrKey: "name"}
    pairs = _pytree.tree_flatten_with_path(tree)[0]
    return [".".join(str(getattr(step, field[type(step)])) for step in path) for path, _ in pairs]


def at(tree: PyTree, path: str) -> Any:
    """The leaf at a path, as `paths` spells it.

    Raises:
        UsageError: no leaf has that path; the message lists those there are.

    Example:
        >>> at({"w": [5, 6]}, "['w'][1]")
        6
    """
    found = dict(named_leaves(tree))
    if path not in found:
        raise UsageError(f"no leaf at {path!r}; the tree has {list(found)}.")
    return found[path]


def static_fields(structure: Structure) -> Iterator[tuple[Any, ...]]:
    """The static fields of every `@pytree` node in a structure, outermost first.

    Example:
        >>> list(static_fields(structure({"a": 1})))
        []
    """
    if isinstance(structure.context, Static):
        yield structure.context.values
    for child in structure.children():
        yield from static_fields(child)


def check_leaves(tree: PyTree, name: str) -> None:
    """Refuse a tree with a leaf that no checkpoint could hold.

    Args:
        tree: any tree.
        name: what the message calls it.

    Raises:
        StructureError: a leaf is no tensor, bool, int, float, str or None; all offenders are listed.

    Example:
        >>> check_leaves({"a": 1, "f": len}, "state")
        Traceback (most recent call last):
        tnt_func.errors.StructureError: state['f'] is a builtin_function_or_method; ...
    """
    if all(isinstance(leaf, LEAVES) for leaf in leaves(tree)):
        return
    bad = "\n".join(f"{name}{p} is a {type(x).__name__}" for p, x in named_leaves(tree) if not isinstance(x, LEAVES))
    raise StructureError(
        f"{bad}; leaves are tensors, bool, int, float, str and None, and nothing else. Register a class of your own "
        "with @pytree (from tnt_func.pytree import pytree) on a frozen dataclass, turn an array into a tensor "
        "(torch.as_tensor), and keep functions in the unit."
    )


def describe(leaf: Any) -> str:
    """A leaf in few words: dtype and shape of a tensor, the value of anything else.

    Example:
        >>> describe(torch.zeros(2, 3)), describe(4)
        ('float32[2, 3]', 'int 4')
    """
    if isinstance(leaf, torch.Tensor):
        layout = "" if leaf.layout is torch.strided else f" {leaf.layout}".replace("torch.", "")
        device = "" if leaf.device.type == "cpu" else f" on {leaf.device}"
        return f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}{layout}{device}"
    return f"{type(leaf).__name__} {leaf!r}" if isinstance(leaf, LEAVES) else type(leaf).__name__


def same_leaf(a: Any, b: Any) -> bool:
    """Whether two leaves are the same bits: NaN equals NaN, 0.0 differs from -0.0, 1 differs from True and from 1.0.

    Example:
        >>> same_leaf(torch.tensor(float("nan")), torch.tensor(float("nan"))), same_leaf(0.0, -0.0), same_leaf(1, True)
        (True, False, False)
    """
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if (a.dtype, a.shape, a.device, a.layout) != (b.dtype, b.shape, b.device, b.layout):
            return False
        return a is b or torch.equal(_bytes(a), _bytes(b))
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return struct.pack("<d", a) == struct.pack("<d", b)
    return bool(a == b)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    flat = _dense(tensor).resolve_conj().resolve_neg().contiguous()
    # An axis of one element may have any stride and count as contiguous; a view as bytes asks for stride 1.
    return flat.as_strided((flat.numel(),), (1,)).view(torch.uint8)


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach() if tensor.layout is torch.strided else tensor.detach().to_dense()


def equal(a: PyTree, b: PyTree) -> bool:
    """Whether two trees are the same: structure, static fields, and every leaf to the bit.

    Example:
        >>> equal({"w": torch.zeros(2)}, {"w": torch.zeros(2)}), equal({"w": 1}, {"v": 1})
        (True, False)
    """
    leaves_a, structure_a = flatten(a)
    leaves_b, structure_b = flatten(b)
    if structure_a != structure_b or list(static_fields(structure_a)) != list(static_fields(structure_b)):
        return False
    return all(same_leaf(x, y) for x, y in zip(leaves_a, leaves_b, strict=True))


def diff(a: PyTree, b: PyTree, name: str = "tree") -> list[str]:
    """How two trees differ, a line a difference; empty where they are the same to the bit.

    Args:
        a, b: two trees.
        name: what the lines call the root.

    Example:
        >>> diff({"w": torch.zeros(2)}, {"w": torch.tensor([0.0, 0.5])})
        ["tree['w']: 1 of 2 elements differ, by at most 0.5"]
        >>> diff({"w": torch.zeros(2)}, {"w": torch.zeros(3)}, "params")
        ["params['w']: float32[2] became float32[3]"]
    """
    here, there = dict(named_leaves(a)), dict(named_leaves(b))
    lines = [f"{name}{path}: missing, was {describe(here[path])}" for path in here if path not in there]
    lines += [f"{name}{path}: new, {describe(there[path])}" for path in there if path not in here]
    lines += [
        f"{name}{path}: {_difference(leaf, there[path])}"
        for path, leaf in here.items()
        if path in there and not same_leaf(leaf, there[path])
    ]
    structure_a, structure_b = structure(a), structure(b)
    if not lines and structure_a != structure_b:
        lines.append(f"{name}: containers differ: {structure_a} became {structure_b}")
    if structure_a == structure_b:
        pairs = zip(static_fields(structure_a), static_fields(structure_b), strict=True)
        lines += [f"{name}: static fields {x} became {y}" for x, y in pairs if x != y]
    return lines


def _difference(a: Any, b: Any) -> str:
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)) or describe(a) != describe(b):
        return f"{describe(a)} became {describe(b)}"
    differs = _bytes(a.cpu()).view(-1, a.element_size()).ne(_bytes(b.cpu()).view(-1, b.element_size())).any(dim=1)
    wide = torch.complex128 if a.is_complex() else torch.float64
    x, y = (_dense(leaf).to("cpu", wide).reshape(-1)[differs] for leaf in (a, b))
    return f"{len(x)} of {a.numel()} elements differ, by at most {float((x - y).abs().max()):.3g}"

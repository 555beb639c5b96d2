"""Trees of parameters as lists, and whether their values may be looked at.

An update takes half a dozen trees of one structure apart and puts them together again. A flat dict of tensors, which
most parameters are, is taken apart by its keys at a twentieth of the price of a general tree.
"""

import itertools
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

import torch
from torch import Tensor

from tnt_func import pytree as trees
from tnt_func.errors import StructureError
from tnt_func.types import PyTree

T = TypeVar("T")
Predicate: TypeAlias = Callable[[str], bool]
"""Of the name of a parameter, as `pytree.names` spells it: `lambda name: name.endswith("bias")`."""

PLAIN_TENSORS = {Tensor, torch.nn.Parameter}
kind = operator.attrgetter("shape", "dtype", "device", "layout")
"""What a gradient has in common with its parameter."""
_level: Callable[[], int | None] = torch._C._functorch.maybe_current_level  # pyright: ignore
_mode: Callable[[object], object] = torch._C._get_dispatch_mode  # pyright: ignore
_TRACES: object = torch._C._TorchDispatchModeKey.PROXY  # pyright: ignore


@dataclass(frozen=True)
class Layout:
    """How parameters are laid out.

    Args:
        leaves: the parameters, tensors or None, in order.
        structure: their keys where they are a flat dict, else their structure.

    Example:
        >>> here = layout({"w": torch.ones(1), "b": None})
        >>> here.take({"b": 2, "w": 1}, "grads"), here.give([3, 4])
        ([1, 2], {'w': 3, 'b': 4})
    """

    leaves: list[Any]
    structure: Any

    def take(self, tree: PyTree, name: str) -> list[Any]:
        """The leaves of another tree of this layout, in this order; `name` is for the error if it is of another."""
        if type(self.structure) is not tuple:
            try:
                return self.structure.flatten_up_to(tree)
            except ValueError as error:
                raise _other_layout(self, tree, name) from error
        if type(tree) is not dict or len(tree) != len(self.structure):
            raise _other_layout(self, tree, name)
        try:
            return list(map(tree.__getitem__, self.structure))
        except KeyError as error:
            raise _other_layout(self, tree, name) from error

    def give(self, leaves: list[Any], was: PyTree = None) -> PyTree:
        """The tree of this layout with other leaves; `was`, a tree of it, itself where those are its own."""
        if was is not None and all(map(operator.is_, leaves, self.take(was, "params"))):
            return was
        if type(self.structure) is tuple:
            return dict(zip(self.structure, leaves, strict=True))
        return trees.unflatten(leaves, self.structure)


def layout(params: PyTree) -> Layout:
    """The layout of a tree of parameters.

    Raises:
        StructureError: a leaf is neither a tensor nor None.

    Example:
        >>> layout([torch.ones(1), {"b": torch.zeros(1)}]).leaves
        [tensor([1.]), tensor([0.])]
    """
    if type(params) is dict and all(leaf is None or isinstance(leaf, Tensor) for leaf in params.values()):
        return Layout(list(params.values()), tuple(params))
    leaves, structure = trees.flatten(params)
    if not all(leaf is None or isinstance(leaf, Tensor) for leaf in leaves):
        bad = [f"params{p} is {trees.describe(x)}" for p, x in trees.named_leaves(params) if not isinstance(x, Tensor)]
        raise StructureError(
            "\n".join(bad)
            + "\nAn optimizer takes trees of tensors. Write torch.tensor(...), or None for what it is to "
            "leave alone."
        )
    return Layout(leaves, structure)


def unless_same(old: tuple[Any, ...], new: tuple[Any, ...]) -> tuple[Any, ...]:
    """The old tuple itself where the new one has the same entries.

    Example:
        >>> old = ([], 1)
        >>> unless_same(old, (old[0], 1)) is old
        True
    """
    return old if all(map(operator.is_, old, new)) else new


def paths(here: Layout) -> list[str]:
    """The path of every leaf, in order, as `pytree.paths` spells it.

    Example:
        >>> paths(layout({"fc.weight": torch.ones(1), "fc.bias": None}))
        ["['fc.weight']", "['fc.bias']"]
    """
    return trees.paths(here.give([0] * len(here.leaves)))


def check_grads(here: Layout, grads: list[Any], *, sparse: bool = False) -> None:
    """Refuse gradients that are not like their parameters.

    Raises:
        StructureError: a gradient has another shape, dtype or device, or is sparse where it may not be.

    Example:
        >>> check_grads(layout({"w": torch.ones(2)}), [torch.ones(3)])
        Traceback (most recent call last):
        tnt_func.errors.StructureError: grads['w'] is float32[3] and its parameter float32[2]; ...
    """
    # Dynamo traces no attrgetter, and pays for no loop.
    plain = not torch.compiler.is_compiling() and PLAIN_TENSORS.issuperset(map(type, (*here.leaves, *grads)))
    if plain and list(map(kind, here.leaves)) == list(map(kind, grads)):
        return
    for place, (leaf, grad) in enumerate(zip(here.leaves, grads, strict=True)):
        if grad is None:
            continue
        if leaf is not None and leaf.shape == grad.shape and leaf.dtype == grad.dtype and leaf.device == grad.device:
            if sparse or grad.layout == leaf.layout:
                continue
        raise StructureError(
            f"grads{paths(here)[place]} is {trees.describe(grad)} and its parameter {trees.describe(leaf)}; they have "
            "the same shape, dtype, device and layout. Cast the gradient, or write None for no gradient; for sparse "
            "ones, optim.from_torch(torch.optim.SparseAdam)."
        )


def cloned(*lists: list[Tensor]) -> list[list[Tensor]]:
    """Copies of the tensors of each list.

    Example:
        >>> cloned([torch.ones(1)], [torch.zeros(1), torch.ones(1)])
        [[tensor([1.])], [tensor([0.]), tensor([1.])]]
    """
    flat = [tensor for tensors in lists for tensor in tensors]
    # One call for all of them, which torch has from 2.12 on.
    clone: Any = getattr(torch, "_foreach_clone", None)
    copies = iter([tensor.clone() for tensor in flat] if clone is None else clone(flat))
    return [[*itertools.islice(copies, len(tensors))] for tensors in lists]


def laid_out(tensors: list[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """Each tensor with the strides of another; itself if it has them.

    Example:
        >>> laid_out([torch.ones(2, 3).T], [torch.ones(3, 2)])[0].stride()
        (2, 1)
    """
    if all(map(Tensor.is_contiguous, tensors)) and all(map(Tensor.is_contiguous, like)):
        return tensors
    return [
        tensor if tensor.stride() == other.stride() else torch.empty_like(other).copy_(tensor)
        for tensor, other in zip(tensors, like, strict=True)
    ]


class ByName(Generic[T]):
    """A function of every leaf's name. A layout is asked for its names only where it is not the one before.

    Example:
        >>> ByName(len)(layout({"fc.weight": torch.ones(1)}))
        [9]
    """

    def __init__(self, function: Callable[[str], T]):
        self._function, self._last = function, (object(), [])

    def __call__(self, here: Layout) -> list[T]:
        if torch.compiler.is_compiling():
            return [self._function(name) for name in _names(here)]
        structure, results = self._last
        if structure != here.structure:
            results = [self._function(name) for name in _names(here)]
            self._last = here.structure, results
        return results


def _names(here: Layout) -> list[str]:
    return trees.names(here.give([0] * len(here.leaves)))


def first_claim(predicates: Sequence[Predicate]) -> ByName[int]:
    """Which predicate is the first to hold for the name of each leaf; as many as there are, where none does.

    Example:
        >>> first_claim([lambda name: name == "b"])(layout({"a": torch.ones(1), "b": torch.ones(1)}))
        [1, 0]
    """
    return ByName(lambda name: next((n for n, claims in enumerate(predicates) if claims(name)), len(predicates)))


def is_graphed() -> bool:
    """Whether a graph is being made of what is called, as `tnt.compiled` makes it.

    Example:
        >>> is_graphed()
        False
    """
    return _mode(_TRACES) is not None


def is_traced(hyperparameters: Iterable[Any]) -> bool:
    """Whether values must not be looked at: in a graph being traced, in `torch.func`, or where gradients flow back.

    Example:
        >>> is_traced([torch.tensor(0.1)]), is_traced([torch.tensor(0.1, requires_grad=True)])
        (False, True)
    """
    if torch.compiler.is_compiling() or _level() is not None or is_graphed():
        return True
    return torch.is_grad_enabled() and any(x.requires_grad for x in hyperparameters if isinstance(x, Tensor))


def _other_layout(here: Layout, tree: PyTree, name: str) -> StructureError:
    missing, new = (set(a) - set(b) for a, b in ((paths(here), trees.paths(tree)), (trees.paths(tree), paths(here))))
    return StructureError(
        f"{name} was given without {sorted(missing)} and with {sorted(new)}; it has the structure of params. "
        "Write None for a gradient that is not there."
    )

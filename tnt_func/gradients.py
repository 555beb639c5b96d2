"""The gradient of an objective: one function, on whichever of torch's two roads is open and fastest.

Eager, `torch.autograd.grad` on detached leaves; under torch.compile, vmap and torch.func.grad, `torch.func.grad`; where
the parameters carry a graph themselves, as in differentiating through training, `autograd.grad` with the graph kept.

Example:
    >>> value, aux, grads = value_and_grad(lambda params: (params["w"] ** 2, "aux"), {"w": torch.tensor(3.0)})
    >>> value, aux, grads
    (tensor(9.), 'aux', {'w': tensor(6.)})
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from tnt_func import pytree as trees
from tnt_func.errors import ContractError
from tnt_func.types import PyTree

A = TypeVar("A")
_requires_grad = operator.attrgetter("requires_grad")
_run_backward: Any = getattr(torch.autograd.graph, "_engine_run_backward", None)


def value_and_grad(objective: Callable[[PyTree], tuple[Tensor, A]], params: PyTree) -> tuple[Tensor, A, PyTree]:
    """The value of an objective, what it returns beside, and its gradient with respect to the parameters.

    Args:
        objective: `params -> (value, aux)`, the value a 0-d tensor.
        params: a tree of floating or complex tensors.

    Returns:
        The value and aux, detached from the graph that was differentiated (kept where params carry a graph), and a tree
        like params. The gradient of a parameter that the objective does not use is None, as `tensor.grad` is in torch;
        under torch.compile, vmap and torch.func.grad it is zero.

    Raises:
        ContractError: the value is not a 0-d tensor, or depends on no parameter.

    Example:
        >>> value_and_grad(lambda p: (p["a"] * 2, None), {"a": torch.tensor(1.0), "b": torch.tensor(1.0)})[2]
        {'a': tensor(2.), 'b': None}

    References:
        torch.autograd.grad, torch.func.grad_and_value.
    """
    if torch.compiler.is_compiling() or _transformed():
        return _functional(objective, params)
    leaves, structure = _taken_apart(params)
    enabled = torch.is_grad_enabled()
    kept = enabled and any(map(_requires_grad, leaves))
    inputs = [leaf if kept and leaf.requires_grad else leaf.detach().requires_grad_() for leaf in leaves]
    if enabled:
        value, aux = objective(_put_together(inputs, structure))
    else:
        with torch.enable_grad():
            value, aux = objective(_put_together(inputs, structure))
    if not isinstance(value, Tensor) or value.dim() != 0 or not value.requires_grad:  # pyright: ignore
        returned = trees.describe(value)
        if isinstance(value, Tensor) and value.dim() == 0:  # pyright: ignore
            returned = "a value that depends on no parameter"
        raise ContractError(
            f"the objective returned {returned}; it is differentiated, so it returns a 0-d tensor computed from the "
            "parameters. Write loss.mean(), and compute the loss from the params that it is given."
        )
    if kept:
        grads = torch.autograd.grad(value, inputs, create_graph=True, allow_unused=True)
        return value, aux, _put_together(grads, structure)
    return value.detach(), trees.map(_detached, aux), _put_together(_grads(value, inputs, structure), structure)


def _grads(value: Tensor, inputs: list[Tensor], structure: Any) -> Sequence[Tensor | None]:
    """`torch.autograd.grad`, without its checks where they are made already: they cost as much as a small layer."""
    if _run_backward is None or type(structure) is not tuple or type(value) is not Tensor or value.is_complex():
        return torch.autograd.grad(value, inputs, allow_unused=True)
    return _run_backward((value,), (torch.ones_like(value),), False, False, tuple(inputs), True, accumulate_grad=False)


def _taken_apart(params: PyTree) -> tuple[list[Tensor], Any]:
    """The leaves, and the keys of a flat dict, which most parameters are, or the structure of another tree."""
    if type(params) is dict and all(type(leaf) is Tensor for leaf in params.values()):
        return list(params.values()), tuple(params)
    return trees.flatten(params)


def _put_together(leaves: Sequence[Tensor | None], structure: Any) -> PyTree:
    if type(structure) is tuple:
        return dict(zip(structure, leaves, strict=True))
    return trees.unflatten(leaves, structure)


def _functional(objective: Callable[[PyTree], tuple[Tensor, A]], params: PyTree) -> tuple[Tensor, A, PyTree]:
    """By torch.func, whose aux may hold tensors only: other leaves go round it."""
    others: list[Any] = []

    def tensors_only(params: PyTree) -> tuple[Tensor, list[Tensor]]:
        value, aux = objective(params)
        leaves, structure = trees.flatten(aux)
        others[:] = [structure, [(False, None) if isinstance(leaf, Tensor) else (True, leaf) for leaf in leaves]]
        return value, [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    grads, (value, tensors) = torch.func.grad_and_value(tensors_only, has_aux=True)(params)
    structure, leaves = others
    found = iter(tensors)
    return value, trees.unflatten([leaf if other else next(found) for other, leaf in leaves], structure), grads


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) and leaf.requires_grad else leaf


def _transformed() -> bool:
    """Whether a torch.func transform is under way."""
    return torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore

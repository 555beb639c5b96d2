"""What goes into a live `torch.optim.Optimizer` before a step, and what is read off it afterwards."""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tnt_func import pytree as trees
from tnt_func.errors import ContractError, UsageError
from tnt_func.pytree import pytree
from tnt_func.rng import preserved

OWN = {"defaults", "state", "param_groups", "_warned_capturable_if_run_uncaptured", "_opt_called"}
"""Attributes of a torch optimizer that are read off otherwise, or are no memory."""


@pytree
@dataclass(frozen=True, eq=False)
class PlainNumber:
    """What a class keeps as a Python number: int64, float64 or bool []."""

    value: Tensor


def frozen(value: Any, where: str) -> Any:
    """What a class remembers, as a tree of tensors; None is an empty tuple, as None is where nothing is.

    Raises:
        UsageError: it is nothing that a state can hold.
    """
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, (bool, int, float)):
        return PlainNumber(torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None))
    if value is None:
        return ()
    if isinstance(value, Mapping):
        return {key: frozen(inner, f"{where}[{key!r}]") for key, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(frozen(inner, f"{where}[{n}]") for n, inner in enumerate(value))
    raise UsageError(
        f"{where} is a {type(value).__name__}; from_torch takes classes whose state is tensors and numbers. "
        "Keep a tensor there, or write the optimizer as init and update."
    )


def thawed(value: Any, *, own: bool = True) -> Any:
    """What was frozen, to be written to: in copies, or where it is."""
    if isinstance(value, Tensor):
        return value.clone() if own else value
    if isinstance(value, PlainNumber):
        return value.value.item()
    if isinstance(value, dict):
        return {key: thawed(inner, own=own) for key, inner in value.items()}
    return None if value == () else type(value)(thawed(inner, own=own) for inner in value)


def numbers_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a parameter group that are numbers, or tuples of numbers and None."""

    def is_number(value: Any) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool)

    def is_numeric(value: Any) -> bool:
        if isinstance(value, (list, tuple)):
            return any(map(is_number, value)) and all(part is None or is_number(part) for part in value)
        return is_number(value)

    numeric = {name: value for name, value in group.items() if name != "params" and is_numeric(value)}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in numeric.items()}


def like_given(value: Any, given: Any) -> Any:
    """A number of the state as the class was given it: an int where it was one and still is, a list where it was."""
    if isinstance(given, (list, tuple)):
        return type(given)(like_given(part, was) for part, was in zip(value, given, strict=True))
    return int(value) if isinstance(given, int) and float(value).is_integer() else value


def copies_of(leaves: list[Any], *, own: bool = True) -> list[Any]:
    """Parameters that an optimizer may write to: copies, or the same memory."""
    copies = [leaf if leaf is None else leaf.detach().clone() if own else leaf.detach() for leaf in leaves]
    return [x.requires_grad_() if x is not None and (x.is_floating_point() or x.is_complex()) else x for x in copies]


def step(optimizer: Any, copies: list[Any], grads: list[Any]) -> None:
    """One step on copies of the gradients, laid out as the parameters.

    Raises:
        ContractError: the class remembers something elsewhere than in `state` and `param_groups`.
    """
    for tensor, grad in zip(copies, grads, strict=True):
        if grad is not None:
            tensor.grad = grad.detach().clone() if grad.is_sparse else torch.empty_like(tensor).copy_(grad.detach())
    if type(optimizer).__module__.startswith("torch.optim"):
        optimizer.step()
        return
    mine = {id(tensor): f"parameter {n}" for n, tensor in enumerate(copies)}
    before = _attributes(optimizer, mine)
    optimizer.step()
    changed = [name for name, value in _attributes(optimizer, mine).items() if not trees.equal(before.get(name), value)]
    stray = [key for key in optimizer.state if id(key) not in mine]
    if changed or stray:
        places = [f"self.{name}" for name in changed] + [f"self.state[{key!r}]" for key in stray]
        raise ContractError(
            f"{type(optimizer).__name__}.step changed {', '.join(places)}; from_torch takes classes that remember in "
            "self.state[parameter] and in numbers of self.param_groups. Keep it there, or write the optimizer as init "
            "and update."
        )


def first_step(make: Callable[[list[Any]], Any], leaves: list[Any]) -> tuple[Any, list[Any]]:
    """An optimizer after a step on zero gradients, dense if it takes those, else sparse; and its parameters.

    Raises:
        UsageError: it takes neither.
    """
    reasons: list[str] = []
    for kind in ("dense", "sparse"):
        copies = copies_of(leaves)
        optimizer = make(copies)
        zeros = [torch.zeros_like(x) if x is not None and x.requires_grad else None for x in copies]
        try:
            with preserved(("torch",)):
                step(
                    optimizer, copies, zeros if kind == "dense" else [x if x is None else x.to_sparse() for x in zeros]
                )
            return optimizer, copies
        except ContractError:
            raise
        except Exception as error:
            reasons.append(f"{kind} ones: {type(error).__name__}: {error}")
    name = type(optimizer).__name__
    raise UsageError(
        f"{name} made no first step on zero gradients, neither on {' nor on '.join(reasons)}. from_torch takes classes "
        "whose step() needs no closure and no preparation. Write such a class, or the optimizer as init and update."
    )


def _attributes(optimizer: Any, mine: Mapping[int, str]) -> dict[str, Any]:
    """The optimizer's own attributes, as they are now."""
    private = ("_optimizer_", "_zero_grad_profile_name")
    return {
        name: _snapshot(value, mine)
        for name, value in vars(optimizer).items()
        if name not in OWN and not name.startswith(private)
    }


def _snapshot(value: Any, mine: Mapping[int, str]) -> Any:
    """What can be compared later; parameters, which are to change, by their names."""
    if id(value) in mine:
        return mine[id(value)]
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: _snapshot(inner, mine) for key, inner in value.items()}
    if isinstance(value, (list, tuple, set, deque)):
        return [_snapshot(inner, mine) for inner in value]
    if isinstance(value, trees.LEAVES):
        return value
    return {"id": id(value), **_snapshot(getattr(value, "__dict__", {}), {id(value): "itself", **mine})}

"""A module as a pure function: `from_module(module)` gives what applies it, and the tensors it is applied to.

`apply(params, buffers, *args, train=...)` runs the module's own forward on the tensors it is given, and returns the
buffers as they are afterwards: BatchNorm's averages are a result, not a side effect. The user's module is copied,
without its tensors, when the model is made; it is never called, written to, or switched between modes.

Laws:
    `apply` leaves params and buffers as they were. With `train=False` it returns the very buffers it was given.

Example:
    >>> model = from_module(torch.nn.Linear(2, 1))
    >>> output, buffers = model.apply(model.params, model.buffers, torch.ones(3, 2), train=True)
    >>> output.shape, sorted(model.params), buffers
    (torch.Size([3, 1]), ['bias', 'weight'], {})
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parameter import is_lazy

from tnt_func.errors import StructureError, UsageError, UsageTypeError
from tnt_func.factories import Brief
from tnt_func.types import typed

Trainable = Callable[[str, Tensor], bool]


class Apply(Protocol):
    """`(params, buffers, *args, train=..., **kwargs) -> (output, buffers)`."""

    def __call__(
        self, params: dict[str, Tensor], buffers: dict[str, Tensor], /, *args: Any, train: bool, **kwargs: Any
    ) -> tuple[Any, dict[str, Tensor]]:
        """Run forward on these tensors."""
        ...


@dataclass(frozen=True, repr=False)
class Model(Brief):
    """What a module computes, and the tensors it starts from.

    Args:
        apply: `(params, buffers, *args, train=..., **kwargs) -> (output, buffers)`.
        params: what is trained, by name.
        buffers: what is not: the module's buffers, and parameters that are frozen.
        module: the module itself, without storage.

    Example:
        >>> from_module(torch.nn.BatchNorm1d(2)).buffers.keys()
        dict_keys(['running_mean', 'running_var', 'num_batches_tracked'])
    """

    apply: Apply = field(repr=False)
    params: dict[str, Tensor] = field(repr=False)
    buffers: dict[str, Tensor] = field(repr=False)
    module: nn.Module


@typed
def from_module(module: nn.Module, *, trainable: Trainable | None = None) -> Model:
    """A module as a pure function and its tensors, copied.

    Tied weights stay tied: they are one entry, under their first name. In training, submodules that were put in eval
    mode inside a module in train mode stay in eval mode.

    Back again: `module.load_state_dict({**state.params, **state.buffers})`; with `strict=False` where weights are tied,
    or a buffer is not persistent, since a `state_dict` has a name for each place and none for such a buffer.

    Args:
        module: any module; several inputs, keyword inputs, and outputs of any kind are its own affair.
        trainable: `(name, parameter) -> bool` says which parameters are trained; those with `requires_grad` if not
            given. The others are frozen: they go into `buffers`, and take no optimizer state.

    Raises:
        UsageTypeError: the module is wrapped by DDP, FSDP, DataParallel, torch.compile or torch.jit.
        UsageError: it has parameters that are not initialised yet.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
        >>> head = from_module(net, trainable=lambda name, parameter: name.startswith("1."))
        >>> sorted(head.params), sorted(head.buffers)
        (['1.bias', '1.weight'], ['0.bias', '0.weight'])

    References:
        torch.func.functional_call.
    """
    _check_plain(module)
    chosen = trainable or (lambda name, parameter: parameter.requires_grad)
    parameters = dict(module.named_parameters())
    params = {name: _copy(parameter) for name, parameter in parameters.items() if chosen(name, parameter)}
    frozen = {name: _copy(parameter) for name, parameter in parameters.items() if name not in params}
    own = {name: _copy(buffer) for name, buffer in module.named_buffers()}
    trains, evaluates = _skeleton(module), _skeleton(module).eval()
    if not module.training:
        trains.train()
    ties = _ties(module)
    names = {**{name: name for name in (*parameters, *own)}, **ties}
    training, evaluating = _Filled(trains, names), _Filled(evaluates, names)

    def apply(
        params: dict[str, Tensor], buffers: dict[str, Tensor], /, *args: Any, train: bool, **kwargs: Any
    ) -> tuple[Any, dict[str, Tensor]]:
        tensors = {**params, **buffers}
        if not train or not own:
            return (training if train else evaluating)(tensors, args, kwargs)[0], buffers
        # Forward writes BatchNorm's averages into the tensors it is given.
        tensors.update((name, buffers[name].clone()) for name in own)
        output, tensors = training(tensors, args, kwargs)
        return output, {**buffers, **{name: tensors[name] for name in own}}

    return Model(apply, params, {**own, **frozen}, trains)


class _Filled:
    """A module without storage, called with tensors in the places of its own.

    `functional_call` does as much; it looks every place up by name, twice a call, at the price of a small forward.

    Args:
        module: the module; as it was, after each call.
        names: what goes into each place, by the place's full name.
    """

    def __init__(self, module: nn.Module, names: dict[str, str]):
        self._module, self._names = module, names
        self._places: list[tuple[dict[str, Any], str, Any, str]] = []
        for place, name in names.items():
            path, _, own = place.rpartition(".")
            owner = module.get_submodule(path)
            registry: dict[str, Any] = owner._parameters if own in owner._parameters else owner._buffers
            self._places.append((registry, own, registry[own], name))

    def __call__(
        self, tensors: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Tensor]]:
        """The module's output, and what is in the places afterwards, by name."""
        if torch.compiler.is_compiling():
            tensors = {place: tensors[name] for place, name in self._names.items()}
            return functional_call(self._module, tensors, args, kwargs, tie_weights=False), tensors
        try:
            given = [tensors[name] for _, _, _, name in self._places]
        except KeyError:
            missing = sorted({name for *_, name in self._places} - tensors.keys())
            raise StructureError(
                f"apply was given params and buffers without {missing}; they are all the tensors of the module. Write "
                "model.apply(params, buffers, ...) with trees like model.params and model.buffers."
            ) from None
        try:
            for (registry, own, _, _), tensor in zip(self._places, given, strict=True):
                registry[own] = tensor
            output = self._module(*args, **kwargs)
            # A module may also put another tensor in place of a buffer.
            return output, {name: registry[own] for registry, own, _, name in self._places}
        finally:
            for registry, own, empty, _ in self._places:
                registry[own] = empty


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def _skeleton(module: nn.Module) -> nn.Module:
    """A copy of the module whose tensors have shapes and no storage."""
    memo: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(module, memo)


def _ties(module: nn.Module) -> dict[str, str]:
    """Every further name of a tensor that has several, with its first."""
    first: dict[int, str] = {}
    ties: dict[str, str] = {}
    for named in (module.named_parameters, module.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            if first.setdefault(id(tensor), name) != name:
                ties[name] = first[id(tensor)]
    return ties


def _check_plain(module: nn.Module) -> None:
    kind = type(module).__name__
    wrapped = {
        "DistributedDataParallel": "module.module",
        "DataParallel": "module.module",
        "OptimizedModule": "module._orig_mod",
    }
    inner = [type(part).__name__ for part in module.modules()]
    sharded = [name for part, name in zip(module.modules(), inner, strict=True) if _is_sharded(part)]
    if kind in wrapped or sharded:
        raise UsageTypeError(
            f"from_module was given a {sharded[0] if sharded else kind}; the step is differentiated as a function, and "
            "gradients that a wrapper synchronises or shards would go wrong silently. Pass the plain module"
            f"{f' ({wrapped[kind]})' if kind in wrapped else ''}, and compile or distribute the unit instead."
        )
    if isinstance(module, torch.jit.ScriptModule):
        raise UsageTypeError(
            f"from_module was given a {kind}; a scripted module cannot be copied. Pass the original module."
        )
    if lazy := [name for name, tensor in module.named_parameters() if is_lazy(tensor)]:
        raise UsageError(
            f"from_module was given a {kind} whose {lazy} have no shape yet; parameters are part of the first State. "
            "Run one batch through the module before: module(inputs)."
        )


def _is_sharded(module: nn.Module) -> bool:
    return any(base.__name__ in ("FSDPModule", "FullyShardedDataParallel") for base in type(module).__mro__)

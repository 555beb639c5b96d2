"""Steps that may write the new state over the one they are given: the bits are the same, memory and time are less.

Example:
    >>> from tnt_func import optim, rng
    >>> from tnt_func.recipes import supervised
    >>> from tnt_func.transitions import prepare, step
    >>> layer = torch.nn.Linear(2, 1)
    >>> unit, state = supervised(layer, torch.nn.functional.mse_loss, optim.sgd(0.1), key=rng.key(0))
    >>> train_unit, batch = donate(unit).train_unit, (torch.ones(4, 2), torch.zeros(4, 1))
    >>> first = prepare(train_unit, state)
    >>> second = step(train_unit, first, batch)
    >>> second.params["weight"].data_ptr() == state.params["weight"].data_ptr()
    True
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tnt_func import pytree as trees
from tnt_func.donation import donating, storage
from tnt_func.errors import ConsumedError
from tnt_func.factories import factory
from tnt_func.meshes import here, is_laid_out
from tnt_func.state import State
from tnt_func.transforms.seams import Around, U, on_train_step
from tnt_func.types import Batch, Output, PyTree


@factory
def donate(unit: U, *, debug: bool = False) -> U:
    """The unit whose train step consumes the state that it is given: an in-place optimizer, and the same bits.

    `train` and `fit` copy the state of their caller first, so nothing changes for who calls them, but that observers
    which hold on to a state keep a copy of it, `tnt.keep(state)`. `tnt.step` consumes what it is given, as a donated
    argument in JAX: use the state that it returns. Whatever else in a state shares memory with its parameters, an
    average that begins as they are say, is copied when that memory is about to be written over.

    Args:
        unit: its train step is made by `minimize` or compiled, or composed of such by `sequence`, `alternate`, `focus`.
        debug: whether every old tensor, too, raises an error where it is used, in whatever it was put; that costs a
            few microseconds a tensor.

    Raises:
        UsageError: the step cannot donate.

    Example:
        >>> from tnt_func.unit import TrainUnit
        >>> donate(TrainUnit(train_step=max))
        Traceback (most recent call last):
        tnt_func.errors.UsageError: donate was given the step <built-in function max>; ...

    References:
        jax.jit(donate_argnums=0).
    """
    return on_train_step(unit, lambda step: Watched(donating(step)) if debug else donating(step))


@dataclass(frozen=True)
class Watched(Around):
    """A donating step after which the tensors of the state that it was given can no longer be used."""

    def __call__(self, state: State, batch: Batch) -> tuple[State, Output]:
        """The step. What it gives are tensors anew, in the same memory."""
        old = trees.tensors((state.params, state.opt_state))
        after, output = self.inner(state, batch)
        gone = {id(leaf): leaf for leaf in old if type(here(leaf)) in (Tensor, torch.nn.Parameter)}
        held = {storage(leaf) for leaf in trees.tensors((after.params, after.opt_state))} - {0}
        written = {at: leaf for at, leaf in gone.items() if storage(leaf) in held}

        def anew(leaf: Any) -> Any:
            return leaf.detach() if id(leaf) in written else leaf

        fresh: dict[str, PyTree] = {
            name: trees.map(anew, getattr(after, name)) for name in ("params", "opt_state", "buffers", "memory")
        }
        after = after.replace(**fresh)
        for leaf in written.values():
            if is_laid_out(leaf):
                here(leaf).__class__ = Consumed
                leaf.__class__ = _consumed_part(type(leaf))
            else:
                leaf.__class__ = Consumed
        return after, output


class Consumed(Tensor):
    """A tensor in whose memory a donating step has put another value. It says of what kind it was, and no more."""

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _HARMLESS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise ConsumedError(
            f"a tensor of a consumed state was used by {getattr(func, '__name__', func)}; a donating step has written "
            "over it. Use the state that the step returned, or keep a copy before: kept = tnt.keep(state)."
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Consumed({trees.describe(self)})"


@functools.cache
def _consumed_part(kind: Any) -> Any:
    """The same of a tensor that lies on a mesh: of a kind that is not always imported."""

    class ConsumedPart(kind):
        __slots__ = ()
        __torch_function__ = Consumed.__torch_function__
        __repr__ = Consumed.__repr__

        def to_local(self, **_: Any) -> Any:
            return Consumed.__torch_function__(kind.to_local, ())

        def full_tensor(self, **_: Any) -> Any:
            return Consumed.__torch_function__(kind.full_tensor, ())

        def redistribute(self, *_: Any, **__: Any) -> Any:
            return Consumed.__torch_function__(kind.redistribute, ())

    return ConsumedPart


_HARMLESS = {
    getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "layout", "requires_grad", "is_sparse")
}

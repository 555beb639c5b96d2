"""Activations computed again in the backward pass instead of being kept for it: memory for time.

Example:
    >>> import torch
    >>> from tnt_func import optim, rng
    >>> from tnt_func.recipes import supervised
    >>> net = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)))
    >>> unit, state = supervised(net, nn.functional.mse_loss, optim.sgd(0.1), key=rng.key(0))
    >>> lean = remat(unit, lambda name, module: isinstance(module, nn.Sequential))
    >>> batch = torch.ones(2, 4), torch.zeros(2, 4)
    >>> (a, _), (b, _) = (each.train_unit.train_step(state, batch) for each in (unit, lean))
    >>> torch.equal(a.params["0.0.weight"], b.params["0.0.weight"])
    True
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tnt_func.descent import Descent
from tnt_func.errors import UsageError
from tnt_func.factories import factory
from tnt_func.model import Apply, Model, from_module
from tnt_func.optim.layout import is_graphed
from tnt_func.transforms.seams import Around, U, on_descent

Choice: TypeAlias = Callable[[str, nn.Module], bool]
"""`(name, submodule) -> bool`, the name as in `named_modules`."""


@factory
def remat(unit: U, where: Choice) -> U:
    """Of chosen submodules, only the inputs are kept for the backward pass, which runs them again.

    The bits are the same: dropout masks are drawn again from where the generator stood, BatchNorm's averages move once,
    autocast is as it was. Choose the blocks that a model repeats; the whole of a model would save nothing.

    Args:
        unit: its train step is made by `minimize`, and its objective is that of `supervised`, or a frozen dataclass
            with a `tnt.Model` in a field.
        where: `(name, submodule) -> bool`.

    Raises:
        UsageError: the unit is another, no submodule is chosen, or a chosen one has forward hooks, which would run
            twice. At a step, torch's RuntimeError under `torch.func`, where tensors are saved without hooks. In a
            compiled step the compiler decides what is kept, and nothing is run again here.

    Example:
        >>> from tnt_func import optim, rng
        >>> from tnt_func.recipes import supervised
        >>> unit, _ = supervised(nn.Linear(2, 1), nn.functional.mse_loss, optim.sgd(0.1), key=rng.key(0))
        >>> remat(unit, lambda name, module: name.startswith("blocks."))
        Traceback (most recent call last):
        tnt_func.errors.UsageError: remat was given a choice that takes none of the submodules []; ...

    References:
        torch.utils.checkpoint.checkpoint(use_reentrant=False); Chen et al. 2016, https://arxiv.org/abs/1604.06174.
    """

    def lean(objective: Any) -> Any:
        if isinstance(objective, Around):
            return replace(objective, inner=lean(objective.inner))
        plain = is_dataclass(objective) and not isinstance(objective, type)
        values = {field.name: getattr(objective, field.name) for field in fields(objective)} if plain else {}
        models = {name: value for name, value in values.items() if isinstance(value, Model)}
        if not plain or not models:
            raise UsageError(
                f"remat was given the objective {objective!r}; it reaches models in the fields of a dataclass. Write "
                "@dataclass(frozen=True) class Objective: model: tnt.Model, with the objective as its __call__."
            )
        changed: dict[str, Any] = {name: _rematerialised(model, where) for name, model in models.items()}
        return replace(cast(Any, objective), **changed)

    def changed(descent: Descent) -> Descent:
        return replace(descent, objective=lean(descent.objective))

    return on_descent(unit, "remat", changed)


def _rematerialised(model: Model, where: Choice) -> Model:
    module = copy.deepcopy(model.module)
    names = [name for name, part in module.named_modules() if name]
    chosen = {name: module.get_submodule(name) for name in names if where(name, module.get_submodule(name))}
    if not chosen:
        raise UsageError(
            f"remat was given a choice that takes none of the submodules {names}; it takes at least one. Write "
            "lambda name, module: isinstance(module, Block), say."
        )
    for name, part in reversed(chosen.items()):  # what is inside before what it is inside of
        if part._forward_hooks or part._forward_pre_hooks:
            raise UsageError(
                f"remat was given the choice of {name!r}, which has forward hooks; it would run them twice a step. "
                "Remove them, or choose the submodules inside of it."
            )
        part.forward = Rematerialised(part, from_module(part).apply)
    applied = from_module(module, trainable=lambda name, parameter: name in model.params)
    return replace(model, apply=applied.apply, module=applied.module)


@dataclass(frozen=True)
class Rematerialised:
    """The forward of a submodule, in place of its own.

    Args:
        module: whose tensors are read, and whose buffers are written, at each call: the model puts them there.
        apply: what the submodule computes, as a function; by the time of the backward pass its tensors are gone.
    """

    module: nn.Module
    apply: Apply

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The submodule's output."""
        params: dict[str, Tensor] = dict(self.module.named_parameters())
        buffers = dict(self.module.named_buffers())
        train = self.module.training

        def run(
            params: dict[str, Tensor], buffers: dict[str, Tensor], args: Any, kwargs: Any
        ) -> tuple[Any, dict[str, Tensor]]:
            return self.apply(params, buffers, *args, train=train, **kwargs)

        # Into copies, so that running again moves no average twice, nor starts from one that moved.
        before = {name: buffer.clone() for name, buffer in buffers.items()} if train else buffers
        # A graph keeps no state of a generator, and running again there would draw other masks.
        if is_graphed():
            output, after = run(params, before, args, kwargs)
        else:
            output, after = checkpoint(run, params, before, args, kwargs, use_reentrant=False)
        if train:
            with torch.no_grad():
                for name, buffer in buffers.items():
                    buffer.copy_(after[name])
        return output

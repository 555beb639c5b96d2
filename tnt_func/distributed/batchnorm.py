"""BatchNorm by the statistics of the whole batch, of which every rank has a part.

What a channel is normalised by is merged from the counts, means and variances of all ranks, by one message a layer;
its gradient takes another. With x in n places over all ranks, s = 1 / sqrt(var + eps), y = w s (x - mean) + c, and a
and b the derivatives, by mean and by var, of what all ranks descend together,

    dx = w s dy + a / n + 2 b (x - mean) / n.

Ranks descend one objective, sum(w_r L_r) / sum(w_r), and through mean and var each L_r depends on the samples of all.
So a and b are sums of what ranks find with their weights in it already: each differentiates w_r L_r, and not L_r.

Laws:
    The step of a net on parts of a batch is that on the batch in one process, up to rounding, whatever the parts, none
    of it included. Buffers have the same bits on every rank. In a world of one, all bits are BatchNorm's own.

Example:
    >>> from tnt_func.distributed.world import init, mesh
    >>> net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    >>> with init() as world:
    ...     sync_batchnorm(net, mesh(world))[1]
    SyncBatchNorm(4, eps=1e-05, momentum=0.1, ...)
"""

import copy
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from tnt_func import pytree as trees
from tnt_func.descent import Differentiate, Objective, Slope, differentiate
from tnt_func.distributed.collectives import Exchange, gathering
from tnt_func.distributed.outputs import Sharing
from tnt_func.distributed.world import Ranks, together
from tnt_func.errors import ContractError, UsageError
from tnt_func.schedules.curves import dtype_on
from tnt_func.state import State, content
from tnt_func.transforms.precision import unscaled
from tnt_func.transforms.seams import Around
from tnt_func.types import Batch, Output, Phase, PyTree, typed

_KINDS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_descending: list[Ranks] = []
"""Whose weighted objectives are being differentiated; a backward pass on a GPU, in a thread of its own, sees it too."""


@typed
def sync_batchnorm(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """A copy of a module in which BatchNorm has the statistics of the whole batch, of which every rank has a part.

    Tensors and their names are the same, so it may be loaded from where BatchNorm was saved. Train it by
    `data_parallel(unit, mesh, buffers="synchronised")`, which differentiates for it and sees to it that ranks are at
    the same step. Ranks take a message of 1 + 2 C numbers a layer of C channels forward, and of 2 C backward.

    Samples of a rank whose weight is 0 are among those that all are normalised by, so its loss has a slope too, which
    is to be finite: sum / weight.clamp(min=1), say. Where it has no samples, the loss may be NaN.

    Statistics are synchronised wherever those of the batch are used: in training, and where no averages are kept in
    evaluation too. A layer in eval mode that has averages sends nothing.

    Args:
        module: left as it is.
        mesh: the ranks that share a batch; as that of `data_parallel`.

    Raises:
        UsageError: a BatchNorm is of a class of its own, or has no shape yet. At a call on several ranks: a gradient is
            to be taken outside of `data_parallel`.
        ValueError: at a call: a channel has one value on all ranks together, as of BatchNorm.

    Example:
        >>> from tnt_func.distributed.world import init, mesh
        >>> with init() as world:
        ...     sync_batchnorm(nn.Sequential(nn.BatchNorm2d(3)), mesh(world))
        Sequential(
          (0): SyncBatchNorm(3, eps=1e-05, momentum=0.1, ...)
        )

    References:
        torch.nn.SyncBatchNorm.convert_sync_batchnorm, of CUDA and DistributedDataParallel.
    """
    norms = [(name, part) for name, part in module.named_modules() if isinstance(part, _BatchNorm)]
    for name, part in norms:
        lazy = [own for own, tensor in part.named_parameters() if is_lazy(tensor)]
        if lazy or type(part) not in (*_KINDS, SyncBatchNorm):
            wrong = f"whose {lazy} have no shape yet" if lazy else "whose forward may be any"
            raise UsageError(
                f"sync_batchnorm was given {name or 'a module'}, a {type(part).__name__} {wrong}; it converts what "
                "nn.BatchNorm1d, 2d and 3d compute. Put one of them there, or run one batch through the module before."
            )
    module = copy.deepcopy(module)
    found: dict[Any, Any] = {part: SyncBatchNorm(part, mesh) for part in module.modules() if isinstance(part, _KINDS)}
    # One that is in several places stays one.
    for part in [*module.modules()]:
        for name, child in part._modules.items():
            if child in found:
                part._modules[name] = found[child]
    return found.get(module, module)


class SyncBatchNorm(_BatchNorm):
    """BatchNorm by the statistics of all ranks. Made by `sync_batchnorm`.

    Args:
        norm: what it is in one process; its tensors become this one's.
        mesh: the ranks.
    """

    def __init__(self, norm: _BatchNorm, mesh: DeviceMesh):
        nn.Module.__init__(self)
        self.__dict__.update(norm.__dict__)
        self.kind, self.mesh = type(norm), mesh

    def forward(self, input: Tensor) -> Tensor:
        """The normalised input."""
        ranks = Ranks.of(self.mesh)
        if ranks.size == 1 or not (self.training or self.running_mean is None):
            return super().forward(input)
        self._check_input_dim(input)
        if torch.is_grad_enabled() and not _descending:
            raise UsageError(
                "a SyncBatchNorm was called where a gradient may be taken, outside of data_parallel; the ranks' "
                "gradients would not add up to that of the batch. Write tnt.distributed.data_parallel(unit, mesh, "
                'buffers="synchronised"), or call it under torch.no_grad().'
            )
        output, mean, var, count = Normalised.apply(input, self.weight, self.bias, self.eps, ranks)  # pyright: ignore
        if self.training and self.running_mean is not None and self.running_var is not None:
            self._keep(mean.detach(), (var * count / (count - 1)).detach())
        return output

    def _check_input_dim(self, input: Tensor) -> None:
        self.kind._check_input_dim(self, input)

    def _keep(self, mean: Tensor, var: Tensor) -> None:
        """Move the averages. New ones are put in the places of the old: torch.func lets those not be written into."""
        share: Any = self.momentum or 0.0
        if self.num_batches_tracked is not None:
            self.num_batches_tracked = self.num_batches_tracked + 1
            if self.momentum is None:
                share = 1 / self.num_batches_tracked.to(mean.dtype)
        for name, new in (("running_mean", mean), ("running_var", var)):
            old: Any = getattr(self, name)
            setattr(self, name, (share * new + (1 - share) * old).to(old.dtype))


class Normalised(torch.autograd.Function):
    """What a batch is normalised to, and by which mean, variance and count. It can be differentiated again."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, ranks: Ranks
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """[batch, C, ...] in the dtype of x, [C] and [C] in float32 at least, []."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean, var, count = _merged(wide, ranks)
        scale, shift = (None if each is None else each.to(wide.dtype) for each in (weight, bias))
        normalised = nn.functional.batch_norm(wide, mean, var, scale, shift, False, 0.0, eps)
        return normalised.to(x.dtype), mean, var, count

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep x itself, and vectors."""
        x, weight, bias, ctx.eps, ctx.ranks = inputs
        _, mean, var, count = output
        ctx.has_bias = bias is not None
        ctx.mark_non_differentiable(count)
        ctx.save_for_backward(x, weight, mean, var, count)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        """The gradients of x, weight and bias, by one message: see the top of the module."""
        x, weight, mean, var, count = ctx.saved_tensors
        dy, dmean, dvar = (grad.to(mean.dtype) for grad in grads[:3])
        over, shape = _places(x), (1, -1, *[1] * (x.dim() - 2))
        away, scale = x.to(mean.dtype) - mean.view(shape), (var + ctx.eps).rsqrt()
        plain, along = dy.sum(over), (dy * away).sum(over)
        dweight = None if weight is None else (along * scale).to(weight.dtype)
        dbias = plain.to(weight.dtype) if weight is not None and ctx.has_bias else None
        if not ctx.needs_input_grad[0]:
            return None, dweight, dbias, None, None
        slope = scale if weight is None else scale * weight.to(mean.dtype)
        a, b = dmean - slope * plain, dvar - 0.5 * slope * scale * scale * along
        a, b = Summed.apply(torch.stack([a, b]), ctx.ranks) / count.to(mean.dtype)  # pyright: ignore
        dx = slope.view(shape) * dy + a.view(shape) + 2 * b.view(shape) * away
        return dx.to(x.dtype), dweight, dbias, None, None


class Summed(torch.autograd.Function):
    """The sum over ranks; its gradient is that of the sum of what ranks make of it."""

    @staticmethod
    def forward(x: Tensor, ranks: Ranks) -> Tensor:
        """Like x."""
        total = x.clone(memory_format=torch.contiguous_format)
        together("a sum of batch statistics", lambda: dist.all_reduce(total, group=ranks.group))
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the ranks."""
        ctx.ranks = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        """The sum over ranks of the gradients."""
        return Summed.apply(grads[0], ctx.ranks), None


def _places(x: Tensor) -> list[int]:
    """The dimensions over which a channel is."""
    return [0, *range(2, x.dim())]


def _merged(x: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance of each channel over all ranks, and the number of its values.

    Merged of those of the ranks: sums of squares would lose what is small beside the mean.

    References:
        Chan et al. 1979, http://i.stanford.edu/pub/cstr/reports/cs/tr/79/773/CS-TR-79-773.pdf.
    """
    over, count = _places(x), x.numel() // x.shape[1]
    own = torch.zeros(1 + 2 * x.shape[1], dtype=dtype_on(x.device), device=x.device)
    if count:
        mean = x.mean(over, keepdim=True)
        own[0] = count
        own[1:] = torch.cat([mean.view(-1), (x - mean).square_().mean(over)])
    work, found = gathering(ranks, own)
    together("an exchange of batch statistics", work.wait)
    counts, (means, spreads) = found[:, :1], found[:, 1:].chunk(2, 1)
    total = counts.sum()
    if total.is_cpu and total <= 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got {int(total)} on all ranks")
    mean = (counts * means).sum(0) / total
    var = (counts * (spreads + (means - mean).square())).sum(0) / total
    return mean.to(x.dtype), var.to(x.dtype), total


@dataclass(frozen=True)
class Synchronised:
    """The slope of the weighted objective of a rank, through what all ranks see of each other.

    Its gradients are the rank's part of a sum, which is to be divided by that of the weights, and not to be weighted
    again. A rank of weight 0 has its part too: its samples, if it has some, are among what others are normalised by.
    """

    differentiate: Differentiate
    sharing: Sharing

    def __call__(self, objective: Objective, params: PyTree, state: State, batch: Batch) -> Slope:
        """The slope; its value is not weighted."""
        sharing = self.sharing

        def weighted(params: PyTree, state: State, batch: Batch) -> tuple[Tensor, tuple[PyTree, Output]]:
            value, (buffers, output) = objective(params, state, batch)
            sharing.told_apart(output)
            return value * _weight(output[sharing.weight], value), (buffers, output)

        begun(sharing.ranks, "train", state)
        _descending.append(sharing.ranks)
        try:
            slope = self.differentiate(weighted, params, state, batch)
        finally:
            _descending.pop()
        return slope._replace(value=slope.value / _weight(slope.output[sharing.weight], slope.value))


def synchronised(given: Differentiate, sharing: Sharing) -> Differentiate:
    """A way of differentiating all of a batch at once, as one of which each rank has a part.

    Raises:
        UsageError: it takes micro-batches, or is a graph.
    """
    inner = unscaled(given)
    if inner is not differentiate:
        raise UsageError(
            f"data_parallel was given buffers='synchronised' and a unit whose gradient is found by "
            f"{type(inner).__name__}; ranks normalise a batch together, all of it at once. Leave microbatch out, whose "
            'parts are normalised one by one, and have smaller batches or remat; or write buffers="mean".'
        )
    return given if sharing.ranks.size == 1 else Synchronised(given, sharing)


@dataclass(frozen=True)
class Begun(Around):
    """A step of evaluation or prediction that all ranks take, which might normalise by the batch."""

    ranks: Ranks
    phase: Phase

    def __call__(self, state: State, batch: Batch) -> tuple[State, Output]:
        """The step."""
        begun(self.ranks, self.phase, state)
        return self.inner(state, batch)


def begun(ranks: Ranks, phase: Phase, state: State) -> None:
    """See that all ranks are here, before what one does elsewhere meets the messages of a layer.

    Raises:
        RankError: a rank is somewhere else, or has left.
    """
    if ranks.size > 1:
        Exchange(ranks, f"{phase} step", state.progress.of(phase).steps, []).wait()


def checksums(before: State, after: PyTree) -> dict[str, float]:
    """A number for each buffer that a step has changed, at the first step of an epoch: reading them takes its time."""
    if before.progress.train.steps_in_epoch or after is before.buffers:
        return {}
    pairs = zip(trees.named_leaves(after), trees.leaves(before.buffers), strict=True)
    return {path: float(zlib.crc32(content(new))) for (path, new), old in pairs if new is not old}


def check_same(names: Sequence[str], rows: Sequence[Sequence[float]]) -> None:
    """Refuse buffers of which ranks have different ones.

    Raises:
        ContractError: they differ.
    """
    for name, (first, *others) in zip(names, zip(*rows, strict=True), strict=True):
        if ranks := [rank for rank, other in enumerate(others, 1) if other != first]:
            raise ContractError(
                f"the step changes state.buffers{name}, which on rank {ranks[0]} is not what it is on rank 0; "
                "buffers='synchronised' takes those that every rank finds alike. Convert the module: "
                "tnt.distributed.sync_batchnorm(module, mesh), or put layers that keep other averages in eval mode."
            )


def _weight(weight: Any, value: Tensor) -> Any:
    return weight.to(value.device, value.dtype) if isinstance(weight, Tensor) else weight

"""Transforms of gradients, to be chained in front of an optimizer.

Numbers are leaves of the state (`set_hyperparameters`), or a `Schedule` of the updates done.

Example:
    >>> from tnt_func.optim import chain, sgd
    >>> optimizer = chain(add_decayed_weights(0.5, mask=lambda name: "bias" not in name), sgd(1.0))
    >>> params = {"weight": torch.ones(1), "bias": torch.ones(1)}
    >>> optimizer.update({"weight": torch.zeros(1), "bias": torch.zeros(1)}, optimizer.init(params), params)[0]
    {'weight': tensor([0.5000]), 'bias': tensor([1.])}
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from tnt_func import treemath
from tnt_func.factories import factory
from tnt_func.meshes import here as part
from tnt_func.meshes import parts_of, placed
from tnt_func.optim.base import GradientTransform
from tnt_func.optim.layout import ByName, Layout, Predicate, layout, paths
from tnt_func.optim.leafwise import check_not_negative, kernels
from tnt_func.optim.state import Hyperparameter, Number, OptState, Settings
from tnt_func.rng import Key, fold_in
from tnt_func.schedules.curves import dtype_on
from tnt_func.types import PyTree

Grads: TypeAlias = dict[int, Tensor]
"""The gradients that there are, by their place in the layout."""


@factory
def clip_by_global_norm(max_norm: Hyperparameter) -> GradientTransform:
    """Scale all gradients by min(1, max_norm / (norm + 1e-6)), norm being that of all of them as one vector.

    Args:
        max_norm: the largest norm that is let through.

    Raises:
        UsageError: the norm is negative.

    Example:
        >>> clip, w = clip_by_global_norm(1.0), torch.zeros(2)
        >>> clip.update(torch.tensor([3.0, 4.0]), clip.init(w), w)[0]
        tensor([0.6000, 0.8000])

    References:
        torch.nn.utils.clip_grad_norm_, to the bit.
    """
    check_not_negative(max_norm=max_norm)

    def rule(h: Mapping[str, Any], grads: Grads, here: Layout, state: OptState) -> Grads:
        old = [*grads.values()]
        norm = treemath.global_norm(old)
        most = h["max_norm"].to(norm) if isinstance(h["max_norm"], Tensor) else h["max_norm"]
        factor = ((norm + 1e-6).reciprocal() * most).clamp(max=1.0)
        own = [grad if grad.requires_grad else part(grad) for grad in old]
        if not isinstance(h["max_norm"], Tensor) and all(grad.device == factor.device for grad in old):
            new = kernels._foreach_mul(own, factor) if old else []
        else:
            new = [grad * factor.to(grad.device) for grad in own]
        return {
            place: placed(x if x.dtype == g.dtype else x.to(g.dtype), g)
            for (place, g), x in zip(grads.items(), new, strict=True)
        }

    return _transform(Settings(max_norm=max_norm), rule)


@factory
def clip_by_value(limit: Hyperparameter) -> GradientTransform:
    """Every element of every gradient, or the bound that it is beyond: min(max(g, -limit), limit).

    Args:
        limit: the largest size of an element.

    Raises:
        UsageError: the limit is negative.

    Example:
        >>> clip, w = clip_by_value(1.0), torch.zeros(2)
        >>> clip.update(torch.tensor([0.5, -4.0]), clip.init(w), w)[0]
        tensor([ 0.5000, -1.0000])

    References:
        torch.nn.utils.clip_grad_value_, to the bit.
    """
    check_not_negative(limit=limit)

    def rule(h: Mapping[str, Any], grads: Grads, here: Layout, state: OptState) -> Grads:
        def clip(grad: Tensor) -> Tensor:
            most = h["limit"].to(grad) if isinstance(h["limit"], Tensor) else h["limit"]
            return grad.clamp(-most, most)

        return {place: clip(grad) for place, grad in grads.items()}

    return _transform(Settings(limit=limit), rule, elementwise=True)


@factory
def add_decayed_weights(weight_decay: Hyperparameter, *, mask: Predicate = lambda name: True) -> GradientTransform:
    """g + weight_decay p, where the mask holds for the name of the parameter p.

    Args:
        weight_decay: L2 penalty.
        mask: of a name, "body.0.bias" say; which parameters decay.

    Raises:
        UsageError: the decay is negative.

    Example:
        >>> decay, w = add_decayed_weights(0.1), torch.tensor(2.0)
        >>> decay.update(torch.tensor(0.0), decay.init(w), w)[0]
        tensor(0.2000)

    References:
        optax.add_decayed_weights; the weight_decay of torch.optim.SGD.
    """
    check_not_negative(weight_decay=weight_decay)
    masked = ByName(mask)

    def rule(h: Mapping[str, Any], grads: Grads, here: Layout, state: OptState) -> Grads:
        def add(grad: Tensor, param: Tensor) -> Tensor:
            if not isinstance(h["weight_decay"], Tensor):
                return grad.add(param, alpha=h["weight_decay"])
            wide = param.to(torch.promote_types(param.dtype, torch.float32))
            return (grad + h["weight_decay"].to(wide.device, wide.real.dtype) * wide).to(grad.dtype)

        decays = masked(here)
        return {place: add(grad, here.leaves[place]) if decays[place] else grad for place, grad in grads.items()}

    return _transform(Settings(weight_decay=weight_decay), rule, elementwise=True)


@factory
def centralize() -> GradientTransform:
    """Take from a gradient with several axes its mean over all but the first, that of the outputs.

    Example:
        >>> central, w = centralize(), torch.zeros(2, 2)
        >>> central.update(torch.tensor([[1.0, 3.0], [5.0, 5.0]]), central.init(w), w)[0]
        tensor([[-1.,  1.],
                [ 0.,  0.]])

    References:
        Yong et al. 2020, https://arxiv.org/abs/2004.01461.
    """

    def rule(h: Mapping[str, Any], grads: Grads, here: Layout, state: OptState) -> Grads:
        return {
            place: grad - grad.mean(dim=tuple(range(1, grad.dim())), keepdim=True) if grad.dim() > 1 else grad
            for place, grad in grads.items()
        }

    return _transform(Settings(), rule)


@factory
def add_noise(key: Key, *, eta: Hyperparameter = 0.01, gamma: Number = 0.55) -> GradientTransform:
    """g plus normal noise of variance eta / (1 + updates done)^gamma.

    The noise of an element is a function of the key, the path of its parameter, the number of updates done and its
    place. No generator is touched, and it is the same eager, compiled, under vmap, and where ranks have parts.

    Args:
        key: where the noise comes from. Folded with the paths it is in the state: `slots["keys"]`, int64 [leaves].
        eta: variance of the first noise.
        gamma: how fast it falls.

    Raises:
        UsageError: a number is negative.

    Example:
        >>> from tnt_func.rng import key
        >>> noise, w = add_noise(key(0), eta=1.0), torch.zeros(3)
        >>> noise.update(w, noise.init(w), w)[0]
        tensor([...])

    References:
        Neelakantan et al. 2015, https://arxiv.org/abs/1511.06807; SplitMix64, Steele et al. 2014,
        https://doi.org/10.1145/2714064.2660195; Box and Muller 1958.
    """
    check_not_negative(eta=eta, gamma=gamma)

    def slots(here: Layout) -> dict[str, Tensor]:
        return {"keys": torch.tensor([_signed(fold_in(key, path).seed) for path in paths(here)], dtype=torch.int64)}

    def rule(h: Mapping[str, Any], grads: Grads, here: Layout, state: OptState) -> Grads:
        size = torch.as_tensor((h["eta"] / (1 + state.step.double()) ** h["gamma"]) ** 0.5, dtype=torch.float64)
        seeds = _mixed(state.slots["keys"] + state.step * _STEP).unbind()

        def add(grad: Any, seed: Tensor) -> Tensor:
            places, put = _places(grad)
            noise = _normal(seed.to(grad.device), places, grad.is_complex())
            return grad + put((size.to(noise) * noise).to(grad.dtype))

        return {place: add(grad, seeds[place]) for place, grad in grads.items()}

    return _transform(Settings(eta=eta, gamma=gamma), rule, slots)


def _transform(
    settings: Settings,
    rule: Callable[[Mapping[str, Any], Grads, Layout, OptState], Grads],
    slots: Callable[[Layout], dict[str, Tensor]] = lambda here: {},
    elementwise: bool = False,
) -> GradientTransform:
    """The transform that gives the gradients which there are to a rule, with the hyper-parameters of this update.

    A rule that is elementwise makes of an element what it does whatever the others are, and wherever it is: of tensors
    that lie in parts on a mesh it is given the parts that are here.
    """

    def init(params: PyTree) -> OptState:
        return settings.init(slots(layout(params)))

    def run(grads: PyTree, state: OptState, params: PyTree) -> tuple[PyTree, Mapping[str, Any]]:
        here = layout(params)
        leaves = here.take(grads, "grads")
        traced = settings.traced(state)
        values, lying = settings.now(state, traced=traced), leaves
        parts = parts_of(here.leaves, leaves) if elementwise and not traced else None
        if parts is not None:
            here, leaves = Layout(parts[0], here.structure), parts[1]
        found = rule(values, {place: grad for place, grad in enumerate(leaves) if grad is not None}, here, state)
        new = [found.get(place) for place in range(len(leaves))]
        return here.give(new if parts is None else [*map(placed, new, lying)]), values

    def update(grads: PyTree, state: OptState, params: PyTree) -> tuple[PyTree, OptState]:
        new, values = run(grads, state, params)
        return new, settings.after(state, values, state.slots)

    def consume(grads: PyTree, state: OptState, params: PyTree) -> tuple[PyTree, OptState]:
        if settings.traced(state):
            return update(grads, state, params)
        new, values = run(grads, state, params)
        return new, settings.move(state, values)

    return GradientTransform(init, update, consume=consume)


def _signed(word: int) -> int:
    """64 bits as torch's int64 has them."""
    return word - (1 << 64) if word >> 63 else word


_STEP, _FIRST, _SECOND = map(_signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _mixed(word: Tensor) -> Tensor:
    """SplitMix64's bijection of int64, as good as random. Its shifts bring in zeros, torch's bring in the sign."""
    word = (word ^ ((word >> 30) & ((1 << 34) - 1))) * _FIRST
    word = (word ^ ((word >> 27) & ((1 << 37) - 1))) * _SECOND
    return word ^ ((word >> 31) & ((1 << 33) - 1))


def _normal(seed: Tensor, places: Tensor, is_complex: bool) -> Tensor:
    """Standard normal numbers from pairs of 53 random bits; real and complex alike.

    Args:
        places: of the bits: [2, ...], and 2 for the parts of a complex number at the end.
    """
    # The product of the arange alone, inductor would take for an index, which may not overflow.
    words = _mixed((seed + places) * _STEP)
    uniform = (((words >> 11) & ((1 << 53) - 1)) + 1).to(dtype_on(places.device)) * 2.0**-53
    normal = (-2 * uniform[0].log()).sqrt() * (2 * math.pi * uniform[1]).cos()
    return torch.view_as_complex(normal * 0.5**0.5) if is_complex else normal


def _places(like: Any) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The places of the bits of a tensor, and what puts what is made of them where it is.

    Of one that lies on a mesh, they are those of the part which is here, among those of the whole.
    """
    shape = (*like.shape, 2) if like.is_complex() else like.shape
    count = math.prod(shape)
    if not hasattr(like, "placements"):
        return torch.arange(2 * count, device=like.device).reshape(2, *shape), lambda noise: noise
    from torch.distributed.tensor import DTensor, Replicate

    begins, sizes = [0] * len(shape), [*shape]
    for axis, placement in enumerate(like.placements):
        if placement.is_shard():
            cut = placement.dim
            size = -(-sizes[cut] // like.device_mesh.size(axis))
            start = min(like.device_mesh.get_local_rank(axis) * size, sizes[cut])
            begins[cut], sizes[cut] = begins[cut] + start, min(size, sizes[cut] - start)
    places = torch.zeros((), dtype=torch.int64, device=like.device)
    for begin, size, length in zip(begins, sizes, shape, strict=True):
        places = places[..., None] * length + torch.arange(begin, begin + size, device=like.device)
    placements = [each if each.is_shard() else Replicate() for each in like.placements]

    def put(noise: Tensor) -> Tensor:
        return DTensor.from_local(
            noise, like.device_mesh, placements, run_check=False, shape=like.shape, stride=like.stride()
        )

    return torch.stack([places, places + count]), put

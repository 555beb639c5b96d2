"""Operations of convolutional networks written otherwise for a CPU, where what torch has for them is slow.

Max-pooling whose windows lie apart goes without indices: what is the largest is found again from what was pooled, in
the loop that needs it, where torch makes indices of 64 bits and scatters gradients one by one. Convolutions take and
give channels last, which between its two graphs torch.compile has too and here is said; their bias has its gradient
from a loop. One of a single channel takes torch up to ten times as long as one of two, for memory of one channel is
laid out in either way and torch cannot tell which.

References:
    torch._inductor.decomposition.select_decomp_table; torch._decomp.decompositions;
    torch._inductor.graph.GraphLowering.decide_layout_opt.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

WINDOW = 16
"""Elements of a window up to which each of them looks at all."""


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Those of inductor, with these in place of some.

    Example:
        >>> unpool = decompositions()[torch.ops.aten.max_pool2d_with_indices_backward.default]
        >>> unpool(torch.ones(1, 1, 1), torch.tensor([[[1.0, 3.0, 2.0]]]), [1, 2], [], [0, 0], [1, 1], False, None)
        tensor([[[0., 1., 0.]]])
    """
    from torch._inductor.decomposition import select_decomp_table

    aten, found = torch.ops.aten, dict[Any, Callable[..., Any]](select_decomp_table())
    backward = found[aten.convolution_backward.default]
    pool, scattered = (
        found[op] for op in (aten.max_pool2d_with_indices.default, aten.max_pool2d_with_indices_backward.default)
    )

    def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, *how: Any) -> Any:
        if not _is_of_images(weight, how):
            return NotImplemented
        laid = _laid_out(x, weight, how)
        if laid[0] is x and laid[1] is weight:
            return NotImplemented
        like = weight if _format(x) == torch.contiguous_format else x
        return _laid_like(like, aten.convolution(*laid, bias, *how))

    def convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, biases: Any, *given: Any) -> Any:
        *how, (of_x, of_weight, of_bias) = given
        if not _is_of_images(weight, how):
            return backward(grad, x, weight, biases, *given)
        laid = _channels_last(grad), *_laid_out(x, weight, how)
        if not of_bias and all(a is b for a, b in zip(laid, (grad, x, weight), strict=True)):
            return NotImplemented
        made = aten.convolution_backward(*laid, biases, *how, [of_x, of_weight, False])
        # Of what was widened, the first channel.
        new = [
            _laid_like(a, b[:, : a.shape[1]]) if b is not None else None
            for a, b in zip((x, weight), made[:2], strict=True)
        ]
        return *new, laid[0].sum([0, 2, 3]) if of_bias else None

    def pooled(x: Tensor, size: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, ceils: bool = False) -> Any:
        height, width = _pair(size)
        ends = ceils and any(n % one for n, one in zip(x.shape[-2:], (height, width), strict=True))
        if ends or not _lie_apart(x, size, stride, padding, dilation):
            return pool(x, size, stride, padding, dilation, ceils)
        largest, place = _largest(x, size)
        row, column = (torch.arange(n, device=x.device) for n in largest.shape[-2:])
        place = place.long()
        index = (row[:, None] * height + place // width) * x.shape[-1] + column * width + place % width
        return _laid_like(x, largest), _laid_like(x, index)

    def unpooled(
        grad: Tensor, x: Tensor, size: Any, stride: Any, padding: Any, dilation: Any, ceils: bool, largest: Tensor
    ) -> Any:
        height, width = _pair(size)
        beyond = x.shape[-1] - grad.shape[-1] * width, x.shape[-2] - grad.shape[-2] * height
        if min(beyond) < 0 or not _lie_apart(x, size, stride, padding, dilation):
            return scattered(grad, x, size, stride, padding, dilation, ceils, largest)
        _, place = _largest(x, size)
        row, column = (torch.arange(n, device=x.device, dtype=place.dtype) for n in (height, width))
        # Each place in a window has the gradient where the largest was there, or 0.
        here = place[..., :, None, :, None] == row[:, None, None] * width + column
        whole = torch.where(here, grad[..., :, None, :, None], 0).flatten(-4, -3).flatten(-2)
        return _laid_like(x, aten.constant_pad_nd(whole, [0, beyond[0], 0, beyond[1]]))

    return {
        **found,
        aten.convolution.default: convolution,
        aten.convolution_backward.default: convolution_backward,
        aten.max_pool2d_with_indices.default: pooled,
        aten.max_pool2d_with_indices_backward.default: unpooled,
    }


def _is_of_images(weight: Tensor, how: Sequence[Any]) -> bool:
    """Whether a convolution is; `how`: stride, padding, dilation, transposed, output_padding, groups."""
    return weight.dim() == 4 and not how[3]


def _is_of_one_channel(weight: Tensor, how: Sequence[Any]) -> bool:
    return weight.shape[1] == 1 and how[5] == 1


def _laid_out(x: Tensor, weight: Tensor, how: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """Both with channels last, and where they have one, with a second of zeros."""
    if _is_of_one_channel(weight, how):
        x, weight = (torch.cat([one, torch.zeros_like(one)], 1) for one in (x, weight))
    return _channels_last(x), _channels_last(weight)


def _channels_last(x: Tensor) -> Tensor:
    return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous(memory_format=torch.channels_last)


def _laid_like(x: Tensor, made: Tensor) -> Tensor:
    """With channels last where `x` has them so, and else not, as what follows was traced."""
    its = _format(x)
    # Memory of one channel, or of one pixel, is contiguous either way; strides tell which was meant, and last.
    return made.contiguous(memory_format=its) if _format(made) == its else made.clone(memory_format=its)


def _format(x: Tensor) -> torch.memory_format:
    from torch._prims_common import suggest_memory_format

    return suggest_memory_format(x)


def _lie_apart(x: Tensor, size: Any, stride: Any, padding: Any, dilation: Any) -> bool:
    """Whether the windows of a pooling are small, none overlaps another, and all lie inside."""
    height, width = _pair(size)
    spread = _pair(stride or size) == (height, width) and _pair(padding) == (0, 0) and _pair(dilation) == (1, 1)
    return spread and height * width <= WINDOW and x.is_floating_point()


def _largest(x: Tensor, size: Any) -> tuple[Tensor, Tensor]:
    """Of each window, and which it is, row by row, as numbers like `x`: the first of equal ones, the last NaN."""
    height, width = _pair(size)
    rows, columns = (n // one for n, one in zip(x.shape[-2:], (height, width), strict=True))
    parts = [
        x[..., i : rows * height : height, j : columns * width : width] for i in range(height) for j in range(width)
    ]
    largest, place = parts[0], torch.zeros_like(parts[0])
    for number, part in enumerate(parts[1:], 1):
        larger = (part > largest) | (part != part)
        largest = torch.where(larger, part, largest)
        place = torch.where(larger, number, place)
    return largest, place


def _pair(given: Any) -> tuple[int, int]:
    """One number stands for both, as in torch."""
    return (given, given) if isinstance(given, int) else (given[0], given[-1])

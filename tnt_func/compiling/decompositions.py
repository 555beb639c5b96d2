"""Operations of convolutional networks written otherwise for a CPU, where what torch has for them is slow.

A convolution of one channel takes torch up to ten times as long as one of two, for memory of one channel is laid out
in either way and torch cannot tell which. Gradients of max-pooling are scattered one by one, each an atomic addition.

References:
    torch._inductor.decomposition.select_decomp_table; torch._decomp.decompositions.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Those of inductor, with these in place of some.

    Example:
        >>> unpool = decompositions()[torch.ops.aten.max_pool2d_with_indices_backward.default]
        >>> unpool(torch.ones(1, 1, 1), torch.ones(1, 1, 3), [1, 2], [], [0, 0], [1, 1], False, torch.tensor([[[1]]]))
        tensor([[[0., 1., 0.]]])
    """
    from torch._inductor.decomposition import select_decomp_table

    aten, found = torch.ops.aten, dict[Any, Callable[..., Any]](select_decomp_table())
    convolved = found[aten.convolution_backward.default]
    scattered = found[aten.max_pool2d_with_indices_backward.default]

    def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, *how: Any) -> Any:
        if not _is_of_one_channel(weight, how):
            return NotImplemented
        return aten.convolution(_widened(x), _widened(weight), bias, *how)

    def convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, biases: Any, *given: Any) -> Any:
        *how, wanted = given
        if not _is_of_one_channel(weight, how):
            return convolved(grad, x, weight, biases, *how, wanted)
        new = aten.convolution_backward(grad, _widened(x), _widened(weight), biases, *how, wanted)
        return *(made[:, :1] if made is not None else None for made in new[:2]), new[2]

    def unpooled(
        grad: Tensor, x: Tensor, size: Any, stride: Any, padding: Any, dilation: Any, ceils: bool, largest: Tensor
    ) -> Any:
        height, width = _pair(size)
        if _pair(stride or size) != (height, width) or _pair(padding) != (0, 0) or _pair(dilation) != (1, 1):
            return scattered(grad, x, size, stride, padding, dilation, ceils, largest)
        # No window overlaps another: each place in a window has the gradient where the largest was there, or 0.
        (rows, columns), (of_rows, of_columns) = x.shape[-2:], grad.shape[-2:]
        row, column = (torch.arange(n, device=x.device) for n in (of_rows, of_columns))
        place = largest - (row[:, None] * (height * columns) + column * width)
        # With channels last, as convolutions have them, every write is of as many numbers as there are channels.
        grad, place = grad.movedim(-3, -1), place.movedim(-3, -1)
        parts = [
            torch.stack([torch.where(place == i * columns + j, grad, 0) for j in range(width)], -2)
            for i in range(height)
        ]
        whole = torch.stack(parts, -4).flatten(-5, -4).flatten(-3, -2).movedim(-1, -3)
        return aten.constant_pad_nd(whole, [0, columns - of_columns * width, 0, rows - of_rows * height])

    return {
        **found,
        aten.convolution.default: convolution,
        aten.convolution_backward.default: convolution_backward,
        aten.max_pool2d_with_indices_backward.default: unpooled,
    }


def _is_of_one_channel(weight: Tensor, how: Sequence[Any]) -> bool:
    """Whether a convolution of images is; `how`: stride, padding, dilation, transposed, output_padding, groups."""
    return weight.dim() == 4 and weight.shape[1] == 1 and not how[3] and how[5] == 1


def _widened(x: Tensor) -> Tensor:
    """With a second channel, of zeros."""
    return torch.cat([x, torch.zeros_like(x)], 1)


def _pair(given: Sequence[int]) -> tuple[int, int]:
    """One number stands for both, as in torch."""
    return (given[0], given[-1])

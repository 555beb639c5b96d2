import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._inductor.lowering  # which inductor's own pooling needs
from torch import nn
from torch.nn import functional as F

import tnt_func as tnt
from tnt_func.compiling.decompositions import decompositions

aten = torch.ops.aten
LAST = torch.channels_last


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 3, 7, 9), (3, 6, 6)], ids=str)
@pytest.mark.parametrize("some", [0.0, float("nan"), float("-inf")])
def test_max_pooling_and_its_gradients_have_the_same_bits(shape: tuple[int, ...], some: float):
    found = decompositions()
    pool, unpool = found[aten.max_pool2d_with_indices.default], found[aten.max_pool2d_with_indices_backward.default]
    # Windows side by side, of several forms; then such as overlap, are padded, or are large.
    windows = [([2, 2], [], 0), ([3, 2], [3, 2], 0), ([1, 2], [], 0)]
    windows += [([2, 2], [1, 1], 0), ([3, 3], [3, 3], 1), ([5, 5], [], 0)]
    for (size, stride, padding), ceils in itertools.product(windows, [False, True]):
        # Few values, so that some are equal.
        x = torch.randint(0, 3, shape).float()
        x[torch.rand(shape) < 0.3] = some
        x = (x if len(shape) == 3 else x.contiguous(memory_format=LAST)).requires_grad_()
        pooled, largest = F.max_pool2d(x, size, stride or None, padding, 1, ceils, True)
        new = pool(x.detach(), size, stride, [padding, padding], [1, 1], ceils)
        assert torch.equal(new[1], largest)
        torch.testing.assert_close(new[0], pooled.detach(), rtol=0, atol=0, equal_nan=True)
        grad = torch.randn_like(pooled)
        (expected,) = torch.autograd.grad(pooled, x, grad)
        got = unpool(grad, x.detach(), size, stride, [padding, padding], [1, 1], ceils, largest)
        assert torch.equal(got, expected)


@pytest.mark.parametrize(("channels", "groups"), [(1, 1), (4, 1), (4, 4)])
@pytest.mark.parametrize("given", [torch.contiguous_format, LAST], ids=str)
def test_convolutions_of_images_have_channels_last(channels: int, groups: int, given: torch.memory_format):
    found = decompositions()
    x = torch.randn(2, channels, 6, 6).contiguous(memory_format=given)
    weight = torch.randn(4, channels // groups, 3, 3).contiguous(memory_format=given)
    how = [1, 1], [1, 1], [1, 1], False, [0, 0], groups
    expected = aten.convolution(x, weight, torch.ones(4), *how)
    got = found[aten.convolution.default](x, weight, torch.ones(4), *how)
    assert (got is NotImplemented) is (given is LAST and channels > 1)
    if got is not NotImplemented:
        torch.testing.assert_close(got, expected, check_stride=True)
    grad = torch.randn_like(expected)
    for wanted in ([True, True, True], [False, True, False]):
        new = found[aten.convolution_backward.default](grad, x, weight, [4], *how, wanted)
        old = aten.convolution_backward(grad, x, weight, [4], *how, wanted)
        assert (new is NotImplemented) is (given is LAST and channels > 1 and not wanted[2])
        if new is not NotImplemented:
            torch.testing.assert_close(new, old)
            assert new[1].is_contiguous(memory_format=given)


def block(count: int, *parts: nn.Module) -> nn.Module:
    """Ends with two numbers of each image; the rest are images of 7 by 7 with 4 channels."""
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(count, 2))


NETS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm, ReLU, pooling": lambda: block(
        36, nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)
    ),
    "of one channel": lambda: block(36, nn.Conv2d(4, 1, 1), nn.Conv2d(1, 4, 3, padding=1), nn.MaxPool2d(2)),
    "of one pixel": lambda: block(36, nn.AvgPool2d(7), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1, padding=1)),
    "of groups, dilated": lambda: block(200, nn.Conv2d(4, 8, 3, groups=4, padding=1, dilation=2, stride=1)),
    "depthwise, no bias": lambda: block(100, nn.Conv2d(4, 4, 3, groups=4, bias=False), nn.GELU()),
    "transposed": lambda: block(100, nn.Conv2d(4, 4, 3, 2), nn.ConvTranspose2d(4, 4, 3), nn.MaxPool2d(1)),
    "pooled twice": lambda: block(4, nn.MaxPool2d(2), nn.Conv2d(4, 4, 1), nn.MaxPool2d(3)),
    "overlapping, ceiled": lambda: block(
        64, nn.Conv2d(4, 4, 1), nn.MaxPool2d(3, stride=1, padding=1), nn.MaxPool2d(2, ceil_mode=True)
    ),
    "views between": lambda: block(
        36, nn.Flatten(), nn.Linear(196, 196), nn.Unflatten(1, (4, 7, 7)), nn.MaxPool2d(2), nn.Conv2d(4, 4, 1)
    ),
    "views around": lambda: block(
        196, nn.Flatten(), nn.Linear(196, 196), nn.Unflatten(1, (4, 7, 7)), nn.Conv2d(4, 4, 3, padding=1)
    ),
    "channels last": lambda: block(36, nn.Conv2d(4, 4, 3, padding=1), nn.MaxPool2d(2)).to(
        memory_format=LAST  # pyright: ignore[reportCallIssue]
    ),
    "in a row": lambda: block(24, nn.Flatten(2), nn.Conv1d(4, 2, 3, stride=2), nn.MaxPool1d(2)),
    "in space": lambda: block(100, nn.Unflatten(1, (1, 4)), nn.Conv3d(1, 2, 3)),
}


@pytest.mark.parametrize("name", NETS)
def test_a_compiled_convolutional_net_is_the_net(name: str):
    torch.manual_seed(0)
    net = NETS[name]()
    data: list[Any] = [(torch.randn(n, 4, 7, 7), torch.randint(0, 2, (n,))) for n in (4, 4, 3)]
    unit, state = tnt.supervised(net, F.cross_entropy, tnt.optim.sgd(0.1), key=tnt.key(0))
    expected = tnt.train(unit.train_unit, state, data, max_epochs=1)
    got = tnt.train(tnt.compiled(unit.train_unit, backend="aot_eager"), state, data, max_epochs=1)
    tnt.asserts.assert_trees_close((got.params, got.buffers), (expected.params, expected.buffers), rtol=1e-4, atol=1e-5)

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tnt_func as tnt
from tnt_func.compiling.decompositions import decompositions

aten = torch.ops.aten


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 3, 7, 9), (3, 6, 6)], ids=str)
def test_gradients_of_max_pooling_have_the_same_bits(shape: tuple[int, ...]):
    unpool = decompositions()[aten.max_pool2d_with_indices_backward.default]
    # Windows side by side, of several forms; then such as overlap, or are padded. Few values, so that some are equal.
    apart, others = [([2, 2], [], 0), ([3, 2], [3, 2], 0), ([1, 2], [], 0)], [([2, 2], [1, 1], 0), ([3, 3], [3, 3], 1)]
    for (size, stride, padding), ceils in itertools.product([*apart, *others], [False, True]):
        x = torch.randint(0, 3, shape).float().requires_grad_()
        pooled, largest = F.max_pool2d(x, size, stride or None, padding, 1, ceils, True)
        grad = torch.randn_like(pooled)
        (expected,) = torch.autograd.grad(pooled, x, grad)
        got = unpool(grad, x.detach(), size, stride, [padding, padding], [1, 1], ceils, largest)
        assert torch.equal(got, expected)


@pytest.mark.parametrize(("channels", "widened"), [(1, True), (3, False)])
def test_a_convolution_of_one_channel_is_one_of_two(channels: int, widened: bool):
    found = decompositions()
    x, weight = torch.randn(2, channels, 6, 6), torch.randn(4, channels, 3, 3)
    how = [1, 1], [1, 1], [1, 1], False, [0, 0], 1
    got = found[aten.convolution.default](x, weight, torch.ones(4), *how)
    expected = aten.convolution(x, weight, torch.ones(4), *how)
    assert (got is not NotImplemented) is widened
    if widened:
        torch.testing.assert_close(got, expected)
    for wanted in ([True, True, True], [False, True, False]):
        new = found[aten.convolution_backward.default](torch.ones_like(expected), x, weight, [4], *how, wanted)
        assert (new is not NotImplemented) is widened
        if widened:
            old = aten.convolution_backward(torch.ones_like(expected), x, weight, [4], *how, wanted)
            torch.testing.assert_close(new, old)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_compiled_convolutional_net_is_the_net(groups: int):
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(groups, 4, 3, groups=groups, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, stride=2), nn.Flatten(), nn.Linear(4, 2)),
    )
    data = [(torch.randn(n, groups, 7, 7), torch.randint(0, 2, (n,))) for n in (4, 4, 3)]
    unit, state = tnt.supervised(net, F.cross_entropy, tnt.optim.sgd(0.1), key=tnt.key(0))
    expected = tnt.train(unit.train_unit, state, data, max_epochs=1)
    got = tnt.train(tnt.compiled(unit.train_unit, backend="aot_eager"), state, data, max_epochs=1)
    tnt.asserts.assert_trees_close((got.params, got.buffers), (expected.params, expected.buffers), rtol=1e-4, atol=1e-5)

"""Law 12: compiled steps, over models and transforms of a dozen structures; their runs keep every other law."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tnt_func as tnt
from tnt_func.compiling import Compiled
from tnt_func.errors import LawError
from tnt_func.testing import check_compiled, check_unit
from tnt_func.testing.broken.compilations import COMPILATIONS
from tnt_func.testing.resume import check_resume

T = tnt.transforms
Made = tuple[tnt.FitUnit, tnt.State]


class Tied(nn.Module):
    """In and out by one weight."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, 3, bias=False)
        self.unused = nn.Parameter(torch.ones(2))
        self.out = nn.Linear(4, 3, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.embed(x)) @ self.embed.weight)


def made(module: nn.Module, optimizer: tnt.optim.Optimizer | None = None, **options: Any) -> Made:
    return tnt.supervised(module, F.cross_entropy, optimizer or tnt.optim.adamw(1e-2), key=tnt.key(0), **options)


def net(*middle: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8, bias=False), *middle, nn.Tanh(), nn.Linear(8, 3))


def transformed(change: Callable[[tnt.FitUnit], tnt.FitUnit]) -> Made:
    unit, state = made(net(nn.BatchNorm1d(8), nn.Dropout(0.5)))
    return change(unit), state


def image_net() -> nn.Module:
    conv = nn.Conv2d(1, 4, 3, padding=1, bias=False)
    return nn.Sequential(nn.Unflatten(1, (1, 2, 2)), conv, nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


def attention() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.1, batch_first=True)
    body = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    return nn.Sequential(nn.Unflatten(1, (1, 4)), body, nn.Flatten(), nn.Linear(4, 3))


def accuracy(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (output.argmax(-1) == targets).float().mean()


def small_steps() -> tnt.optim.Optimizer:
    clipped = tnt.optim.clip_by_global_norm(0.1)
    return tnt.optim.chain(clipped, tnt.optim.sgd(tnt.schedules.cosine(0.1, steps=9), momentum=0.9))


MODELS: dict[str, Callable[[], Made]] = {
    "linear, adamw": lambda: made(nn.Linear(4, 3)),
    "clipping, a schedule, momentum": lambda: made(net(), small_steps()),
    "dropout": lambda: made(net(nn.Dropout(0.5))),
    "BatchNorm": lambda: made(net(nn.BatchNorm1d(8)), metrics={"accuracy": accuracy}),
    "tied weights, one unused": lambda: made(Tied()),
    "frozen": lambda: made(net(), trainable=lambda name, parameter: name.startswith("2")),
    "convolution": lambda: made(image_net()),
    "attention": lambda: made(attention()),
    "accumulate": lambda: made(net(), tnt.optim.accumulate(tnt.optim.sgd(0.1), 2)),
    "autocast": lambda: transformed(T.autocast),
    "autocast, a loss scale": lambda: transformed(lambda unit: T.autocast(unit, torch.float16)),
    "microbatch": lambda: transformed(lambda unit: T.microbatch(unit, 2)),
    "ema": lambda: transformed(lambda unit: T.ema(unit, 0.5, evaluate=True)),
    "skip_nonfinite, gradient stats": lambda: transformed(lambda unit: T.with_gradient_stats(T.skip_nonfinite(unit))),
    "remat": lambda: transformed(lambda unit: T.remat(unit, lambda name, part: isinstance(part, nn.Dropout))),
}


def data(*sizes: int) -> list[Any]:
    noise = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 4, generator=noise), torch.randint(0, 3, (n,), generator=noise)) for n in sizes]


@pytest.mark.parametrize("name", MODELS)
def test_compiled_steps_are_the_steps(name: str):
    torch.manual_seed(0)
    unit, state = MODELS[name]()
    half = name.startswith("autocast")
    # Parts of a batch have sizes that are read in Python.
    sizes, compilations = ((6, 4), 2) if name == "microbatch" else ((6, 3), 1)
    rtol, atol = (0.05, 0.05) if half else (1e-4, 1e-5)
    whole = name in ("BatchNorm", "ema")
    check_compiled(
        unit if whole else unit.train_unit, state, data(*sizes), compilations=compilations, rtol=rtol, atol=atol
    )


@pytest.mark.parametrize("form", ["step", "gradients"])
def test_runs_of_compiled_steps_keep_every_law(form: Any):
    unit, state = made(nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)), tnt.optim.sgd(0.1))
    fast = tnt.compiled(T.skip_nonfinite(unit), form=form, backend="aot_eager")
    check_unit(fast.train_unit, state, data(4, 3))
    check_resume(fast, state, data(4, 3), eval_batches=data(4))
    assert isinstance(fast.train_unit.train_step, Compiled)
    assert {each.reason for each in fast.train_unit.train_step.compilations} == {None}


@pytest.mark.parametrize("name", COMPILATIONS)
def test_what_breaks_the_law_is_named(name: str):
    make, words = COMPILATIONS[name]
    check_compiled(*make(False))
    with pytest.raises(LawError, match="law 12") as caught:
        check_compiled(*make(True))
    assert all(word in str(caught.value) for word in words)

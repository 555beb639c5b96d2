"""Law 12, donated: the same bits as not donated, whatever the structure, the optimizer and what is around the step."""

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.nn import functional as F

import tnt_func as tnt
from tnt_func import optim
from tnt_func.errors import LawError
from tnt_func.testing import check_donation
from tnt_func.testing.broken.donation import DONATIONS
from tnt_func.unit import Callback, FitUnit

T, few = tnt.transforms, settings(max_examples=settings.default.max_examples // 10 if settings.default else 10)


class Tied(nn.Module):
    """The last layer is the first, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.bias = nn.Linear(3, 4), nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.into(x)), self.into.weight.T, self.bias)


class Unused(nn.Module):
    """One parameter never has a gradient, and one only where the batch says so."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.never = nn.Linear(3, 3), nn.Linear(3, 3), nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x)) if x.sum() > 0 else self.one(x)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(3, 3),
    "dropout": lambda: nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.3), nn.Linear(4, 3)),
    "batch norm": lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)),
    "tied": Tied,
    "unused": Unused,
    "frozen": lambda: nn.Sequential(nn.Linear(3, 4).requires_grad_(False), nn.Linear(4, 3)),
    "half": lambda: nn.Linear(3, 3).bfloat16(),
    "channels last": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 3, 1)), nn.Conv2d(1, 2, (2, 1)).to(memory_format=torch.channels_last), nn.Flatten()  # pyright: ignore
    ),
}  # fmt: skip
OPTIMIZERS: dict[str, Callable[[], optim.Optimizer]] = {
    "sgd": lambda: optim.sgd(0.1),
    "sgd, nesterov": lambda: optim.sgd(0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adamw": lambda: optim.adamw(tnt.schedules.cosine(0.1, steps=8), amsgrad=True),
    "rmsprop": lambda: optim.rmsprop(0.01, momentum=0.9, centered=True),
    "adagrad": lambda: optim.adagrad(0.1),
    "lion": lambda: optim.lion(0.01),
    "muon": lambda: optim.grouped(optim.adam(0.1), [(lambda path: "0.weight" in path, optim.muon(0.02))]),
    "grouped": lambda: optim.grouped(optim.adam(0.1), [(lambda path: "bias" in path, {"lr": 0.01})]),
    "accumulated": lambda: optim.accumulate(optim.adam(0.1), every=3),
    "chained": lambda: optim.chain(
        optim.clip_by_global_norm(0.5), optim.add_noise(tnt.key(1), eta=tnt.schedules.linear(0.1, 0.0, steps=8)),
        optim.add_decayed_weights(0.1), optim.sgd(0.1, momentum=0.9),
    ),
    "thawing": lambda: optim.frozen(optim.adam(0.1)),
    "torch's AdamW": lambda: optim.from_torch(torch.optim.AdamW, lr=0.1),
    "torch's SGD": lambda: optim.from_torch(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
    "torch's NAdam": lambda: optim.from_torch(torch.optim.NAdam, lr=0.1, groups=[(lambda p: "bias" in p, {"lr": 1})]),
}  # fmt: skip
TRANSFORMS: dict[str, Callable[[FitUnit], FitUnit]] = {
    "microbatch": lambda unit: T.microbatch(unit, 2),
    "ema": lambda unit: T.ema(unit, 0.5, evaluate=True),
    "swa": T.swa,
    "autocast": T.autocast,
    "scaled": lambda unit: T.autocast(unit, torch.float16, init_scale=2.0**120, growth_interval=2),
    "skip_nonfinite": T.skip_nonfinite,
    "with_gradient_stats": T.with_gradient_stats,
    "with_gradients": T.with_gradients,
}
first_params = Callback(name="first", memory=lambda state: state.params)
last_params = Callback(
    name="last",
    memory=lambda state: state.params,
    on_train_step_end=lambda state: (
        state.remember("last", state.params)
        if state.progress.train.steps % 2
        else state.replace(params=state.memory["last"])
    ),
)
CALLBACKS: dict[str, Callable[[], Callback]] = {
    "keeps the first": lambda: first_params,
    "goes back": lambda: last_params,
    "keep_best": lambda: tnt.callbacks.keep_best("loss", phase="train", interval="step"),
    "plateau": lambda: tnt.callbacks.reduce_lr_on_plateau("loss", phase="train", interval="step", patience=0),
    "stops": lambda: tnt.callbacks.early_stopping("loss", mode="max", patience=1),
}


def data(count: int, seed: int) -> list[Any]:
    noise = torch.Generator().manual_seed(seed)
    return [(torch.randn(4, 3, generator=noise), torch.randint(0, 2, (4,), generator=noise)) for _ in range(count)]


def loss(output: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(output.float(), targets)


@few
@given(
    st.sampled_from(sorted(NETWORKS)),
    st.sampled_from(sorted(OPTIMIZERS)),
    st.lists(st.sampled_from(sorted(TRANSFORMS)), unique=True, max_size=3).filter(
        lambda names: not {"autocast", "scaled"} <= {*names}
    ),
    st.lists(st.sampled_from(sorted(CALLBACKS)), unique=True, max_size=2),
    st.integers(0, 2),
)
def test_donated_is_not_donated_bitwise(
    network: str, optimizer: str, transforms: list[str], callbacks: list[str], seed: int
):
    torch.manual_seed(seed)
    module = NETWORKS[network]()
    dtype = next(module.parameters()).dtype
    unit, state = tnt.supervised(module, loss, OPTIMIZERS[optimizer](), key=tnt.key(seed))
    for name in transforms:
        unit = TRANSFORMS[name](unit)
    given = [CALLBACKS[name]() for name in callbacks if name != "plateau" or optimizer in ("sgd", "accumulated")]
    batches = [(x.to(dtype), y) for x, y in data(3, seed)]
    check_donation(unit, state, batches, eval_batches=batches[:1], callbacks=given, evaluate_every_n_steps=2)


@pytest.mark.parametrize("network", sorted(NETWORKS))
@pytest.mark.parametrize("optimizer", ["adamw", "torch's NAdam"])
def test_every_network(network: str, optimizer: str):
    torch.manual_seed(0)
    module = NETWORKS[network]()
    unit, state = tnt.supervised(module, loss, OPTIMIZERS[optimizer](), key=tnt.key(0))
    batches = [(x.to(next(module.parameters()).dtype), y) for x, y in data(3, 0)]
    check_donation(unit, state, batches, max_epochs=1)


@pytest.mark.parametrize(
    ("optimizer", "transform"),
    [
        *((optimizer, "ema") for optimizer in sorted(OPTIMIZERS.keys() - {"adamw"})),
        *(("adamw", transform) for transform in sorted(TRANSFORMS)),
    ],
)
def test_every_optimizer_and_every_transform(optimizer: str, transform: str):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    unit, state = tnt.supervised(network, loss, OPTIMIZERS[optimizer](), key=tnt.key(0))
    check_donation(TRANSFORMS[transform](unit), state, data(4, 0), max_epochs=1, evaluate_every_n_epochs=0)


def player(name: str, other: str) -> tnt.TrainUnit:
    def objective(params: Any, state: tnt.State, batch: Tensor) -> Any:
        value = (params["w"] * batch - state.params[other]["w"]).square().sum()
        return value, (state.buffers, {f"{name} loss": value, f"{other} seen": state.params[other]["w"]})

    return tnt.TrainUnit(train_step=tnt.minimize(objective, optim.adam(0.1), part=name))


def focused(name: str) -> tnt.TrainUnit:
    def objective(params: Any, state: tnt.State, batch: Tensor) -> Any:
        value = (params["w"] - batch).square().sum()
        return value, (state.buffers, {"loss": value})

    return tnt.focus(tnt.TrainUnit(train_step=tnt.minimize(objective, optim.sgd(0.1, momentum=0.9))), name)


def copying(state: tnt.State, batch: Tensor) -> Any:
    """A step between two others that lets one part of the parameters be the memory of another."""
    return state.replace(params={**state.params, "b": state.params["a"]}), {}


COMPOSED: dict[str, Callable[[], tnt.TrainUnit]] = {
    "sequence": lambda: tnt.sequence(player("a", "b"), player("b", "a")),
    "alternate": lambda: tnt.alternate(player("a", "b"), player("b", "a"), turns=(0, 0, 1)),
    "focus": lambda: focused("a"),
    "sequence of focus": lambda: tnt.sequence(focused("a"), focused("b")),
    "copied between": lambda: tnt.sequence(player("a", "b"), tnt.TrainUnit(train_step=copying), player("b", "a")),
    "copied, then focus": lambda: tnt.sequence(tnt.TrainUnit(train_step=copying), focused("a")),
}


@pytest.mark.parametrize("name", sorted(COMPOSED))
def test_composed_steps(name: str):
    params = {"a": {"w": torch.tensor([1.0, 2.0])}, "b": {"w": torch.tensor([0.5, -1.0])}}
    optimizer = optim.sgd(0.1, momentum=0.9) if "focus" in name else optim.adam(0.1)
    opt_state = {part: optimizer.init(tree) for part, tree in params.items()}
    state = tnt.State(params=params, opt_state=opt_state, buffers={"a": {}, "b": {}}, key=tnt.key(0))
    check_donation(COMPOSED[name](), state, [torch.tensor([x, 1.0]) for x in (0.5, 1.5, -1.0)])


@pytest.mark.parametrize("name", sorted(DONATIONS))
def test_the_law_finds_what_breaks_it_and_lets_its_twin_pass(name: str):
    make, words = DONATIONS[name]
    check_donation(*make(False))
    with pytest.raises(LawError, match=r"law 12 \(donation\) is broken") as raised:
        check_donation(*make(True))
    assert all(word in str(raised.value) for word in words)

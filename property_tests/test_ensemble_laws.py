"""Law 11: vmapped members equal a Python loop over them, in float64 to 1e-10, whatever they are made of."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn
from torch.nn import functional as F

import tnt_func as tnt
from tnt_func import callbacks, optim, schedules, transforms
from tnt_func.errors import LawError
from tnt_func.testing import check_ensemble
from tnt_func.testing.broken.ensembles import ENSEMBLES

few = settings(max_examples=settings.default.max_examples // 8 if settings.default else 25)
Make = Callable[[], optim.Optimizer]

# By what normalises the gradient: such optimizers amplify a gradient that is zero but for rounding.
PLAIN: dict[str, Make] = {
    "sgd": lambda: optim.sgd(0.1, weight_decay=0.01),
    "momentum": lambda: optim.sgd(0.1, momentum=0.9, dampening=0.1),
    "nesterov": lambda: optim.sgd(0.1, momentum=0.9, nesterov=True),
    "schedule": lambda: optim.sgd(schedules.cosine(0.1, steps=5)),
    "clipped": lambda: optim.chain(optim.clip_by_global_norm(0.1), optim.sgd(0.1)),
    "decayed": lambda: optim.chain(optim.centralize(), optim.add_decayed_weights(0.1), optim.sgd(0.1)),
    "accumulated": lambda: optim.accumulate(optim.sgd(0.1), every=2),
    "noisy": lambda: optim.chain(optim.add_noise(tnt.key(3)), optim.clip_by_value(0.1), optim.sgd(0.1)),
}
NORMALISING: dict[str, Make] = {
    "adam": lambda: optim.adam(0.01, weight_decay=0.1),
    "adamw": lambda: optim.adamw(0.01, amsgrad=True),
    "rmsprop": lambda: optim.rmsprop(0.01, momentum=0.5, centered=True),
    "adagrad": lambda: optim.adagrad(0.1, lr_decay=0.1),
    "lion": lambda: optim.lion(0.01),
    "grouped": lambda: optim.grouped(
        optim.adamw(0.01), [(lambda path: "bias" in path, {"weight_decay": 0.0}), (lambda p: "2" in p, optim.sgd(0.1))]
    ),
    "thawing": lambda: optim.grouped(optim.adam(0.01), [(lambda path: "0" in path, optim.frozen(optim.adam(0.01)))]),
}
TRANSFORMS: dict[str, Callable[[Any], Any]] = {
    "none": lambda unit: unit,
    "microbatch": lambda unit: transforms.microbatch(unit, 2),
    "ema": lambda unit: transforms.ema(unit, 0.5, evaluate=True),
    "swa": lambda unit: transforms.swa(unit, evaluate=True),
    "skip_nonfinite": transforms.skip_nonfinite,
    "with_gradient_stats": transforms.with_gradient_stats,
}
CALLBACKS: dict[str, Callable[[], tnt.Callback]] = {
    "stops": lambda: callbacks.early_stopping("loss", patience=1),
    "stops in training": lambda: callbacks.early_stopping(
        "loss", phase="train", patience=1, interval="step", name="in_training"
    ),
    "keeps": lambda: callbacks.keep_best("loss"),
    "slows": lambda: callbacks.reduce_lr_on_plateau("loss", patience=0),
}


@dataclass(frozen=True)
class Members:
    """What the members of an ensemble are made of."""

    widths: tuple[int, ...]
    activation: Callable[[], nn.Module]
    normed: bool
    optimizer: str
    transform: str
    callbacks: tuple[str, ...]
    rates: tuple[float, ...]
    own: bool
    chunk_size: int | None
    loop: bool
    seed: int

    def member(self, seed: int) -> tuple[tnt.FitUnit, tnt.State]:
        torch.manual_seed(seed)
        sizes, layers = (3, *self.widths, 2), list[nn.Module]()
        for one, two in zip(sizes[:-1], sizes[1:], strict=True):
            layers += [nn.Linear(one, two), *[nn.BatchNorm1d(two)] * (self.normed and two != 2), self.activation()]
        optimizer = {**PLAIN, **NORMALISING}[self.optimizer]()
        accuracy = {"accuracy": lambda output, targets: (output.argmax(-1) == targets).double().mean()}
        net = nn.Sequential(*layers[:-1]).double()
        return tnt.supervised(net, F.cross_entropy, optimizer, key=tnt.key(0), metrics=accuracy)

    def data(self, count: int) -> list[Any]:
        noise = torch.Generator().manual_seed(self.seed)
        shape = [len(self.rates)] * self.own + [5]
        return [
            (
                torch.randn(*shape, 3, generator=noise, dtype=torch.float64),
                torch.randint(0, 2, shape, generator=noise),
            )
            for _ in range(count)
        ]


def members() -> st.SearchStrategy[Members]:
    normed = st.booleans()
    optimizers = normed.flatmap(
        lambda normed: st.tuples(
            st.just(normed), st.sampled_from(sorted(PLAIN if normed else {**PLAIN, **NORMALISING}))
        )
    )
    return st.builds(
        lambda both, **rest: Members(normed=both[0], optimizer=both[1], **rest),
        optimizers,
        widths=st.lists(st.integers(2, 4), min_size=1, max_size=2).map(tuple),
        activation=st.sampled_from((nn.Tanh, nn.ReLU, nn.GELU)),
        transform=st.sampled_from(sorted(TRANSFORMS)),
        callbacks=st.lists(st.sampled_from(sorted(CALLBACKS)), unique=True, max_size=2).map(tuple),
        rates=st.lists(st.sampled_from((0.01, 0.05, 0.2)), min_size=1, max_size=3).map(tuple),
        own=st.booleans(),
        chunk_size=st.sampled_from((None, 2)),
        loop=st.booleans(),
        seed=st.integers(0, 3),
    )


@few
@given(members())
def test_members_are_what_they_are_alone(case: Members):
    made = [case.member(case.seed + index) for index in range(len(case.rates))]
    unit = TRANSFORMS[case.transform](made[0][0])
    scheduled = case.optimizer == "schedule"
    states = [
        state if scheduled else state.replace(opt_state=optim.set_hyperparameters(state.opt_state, lr=rate))
        for (_, state), rate in zip(made, case.rates, strict=True)
    ]
    # A member that has stopped within an epoch closes it with the others, whose counters keep_best notes.
    left_out = {"slows"} if scheduled else set[str]()
    left_out |= {"keeps"} if "stops in training" in case.callbacks else set[str]()
    attached = [CALLBACKS[name]() for name in case.callbacks if name not in left_out]
    check_ensemble(
        unit,
        states,
        case.data(2),
        eval_batches=case.data(1),
        callbacks=attached,
        batch="own" if case.own else "shared",
        chunk_size=case.chunk_size,
        loop=case.loop,
        max_epochs=3,
    )


@pytest.mark.parametrize("name", sorted(ENSEMBLES))
def test_what_a_member_must_not_do_is_found_out(name: str):
    make, words = ENSEMBLES[name]
    check_ensemble(*make(False))
    with pytest.raises(LawError) as caught:
        check_ensemble(*make(True))
    assert all(word in str(caught.value) for word in ("law 11 (ensemble) is broken", *words)), caught.value

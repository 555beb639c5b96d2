"""Laws of transforms: any order of a stack gives the same bits, resume included; micro-batches make the batch."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.nn import functional as F

import tnt_func as tnt
from tnt_func import optim
from tnt_func.descent import Slope
from tnt_func.errors import LawError
from tnt_func.testing import check_accumulation
from tnt_func.transforms.seams import amended
from tnt_func.unit import Callback, FitUnit, TrainUnit, attach

T = tnt.transforms
Transform = Callable[[FitUnit], FitUnit]
few = settings(max_examples=settings.default.max_examples // 8 if settings.default else 25)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.2)), nn.Linear(4, 2))


def data(count: int) -> list[Any]:
    noise = torch.Generator().manual_seed(1)
    return [(torch.randn(5, 3, generator=noise), torch.randint(0, 2, (5,), generator=noise)) for _ in range(count)]


def counting(name: str) -> Callback:
    return Callback(
        name=name,
        memory=lambda state: torch.tensor(0),
        on_train_step_end=lambda state: state.remember(name, state.memory[name] + len(state.output)),
    )


CALLBACKS = {name: counting(name) for name in ("callback", "another callback")}
TRANSFORMS: dict[str, Transform] = {
    "microbatch": lambda unit: T.microbatch(unit, 2),
    "ema": lambda unit: T.ema(unit, 0.5, evaluate=True),
    "swa": T.swa,
    "autocast": lambda unit: T.autocast(unit, torch.float16, init_scale=2.0**40, growth_interval=2),
    "skip_nonfinite": T.skip_nonfinite,
    "with_gradient_stats": T.with_gradient_stats,
    "with_gradients": T.with_gradients,
    "detect_anomaly": T.detect_anomaly,
    "remat": lambda unit: T.remat(unit, lambda name, part: name == "1"),
    **{name: lambda unit, callback=callback: attach(unit, callback) for name, callback in CALLBACKS.items()},
}
# An overflow that the loss scale skips is an anomaly.
stacks = st.sampled_from(("autocast", "detect_anomaly")).flatmap(
    lambda other: st.lists(st.sampled_from(sorted(TRANSFORMS.keys() - {other})), unique=True)
)


def stacked(unit: FitUnit, transforms: Sequence[Transform]) -> FitUnit:
    return functools.reduce(lambda unit, transform: transform(unit), transforms, unit)


def check_order(
    transforms: Sequence[Transform], others: Sequence[Transform], cut: int, given: Sequence[Callback] = ()
) -> None:
    """However a stack is ordered, callbacks in it or given to the run, and the run cut, the end is the same."""
    unit, state = tnt.supervised(network(), F.cross_entropy, optim.adamw(1e-2), key=tnt.key(0))
    one, other = stacked(unit, transforms), stacked(unit, others)
    run: dict[str, Any] = {"max_epochs": 2, "evaluate_every_n_steps": 1}
    whole = tnt.fit(one, state, data(2), data(1), **run)
    answers = iter([*[False] * cut, True])
    paused = tnt.fit(other, state, data(2), data(1), callbacks=given, pause_when=lambda: next(answers, False), **run)
    again = tnt.fit(other, paused, data(2), data(1), callbacks=given, **run)
    if tnt.digest(whole) != tnt.digest(again):
        raise LawError("law 8 (composition) is broken: the order of a stack decides its bits")


@few
@given(stacks, st.randoms(use_true_random=False), st.integers(0, 5), st.booleans())
def test_any_order_of_a_stack_gives_the_same_bits(names: list[str], random: Any, cut: int, attached: bool):
    given = [] if attached else [CALLBACKS[name] for name in names if name in CALLBACKS]
    shuffled = [name for name in random.sample(names, len(names)) if attached or name not in CALLBACKS]
    check_order([TRANSFORMS[name] for name in names], [TRANSFORMS[name] for name in shuffled], cut, given)


@dataclass(frozen=True)
class Scale:
    """An amendment that does not commute with itself."""

    factor: float
    shift: float

    def __call__(self, before: tnt.State, after: tnt.State, slope: Slope) -> tuple[tnt.State, Slope]:
        params = {name: leaf * self.factor + self.shift for name, leaf in after.params.items()}
        return after.replace(params=params), slope


def scaled(scale: Scale) -> Transform:
    return lambda unit: amended(unit, "scaled", lambda descent: scale)


def test_transforms_that_do_not_commute_are_found_out():
    double, shift = scaled(Scale(2.0, 0.0)), scaled(Scale(1.0, 1.0))
    check_order([double, shift], [double, shift], 1)
    with pytest.raises(LawError, match="law 8"):
        check_order([double, shift], [shift, double], 1)


IDENTITIES = {**TRANSFORMS, "microbatch": lambda unit: T.microbatch(unit, 1)}


@pytest.mark.parametrize("name", [name for name in IDENTITIES if name != "autocast"])
def test_a_transform_adds_its_slot_and_output_and_changes_nothing_else(name: str):
    unit, state = tnt.supervised(network(), F.cross_entropy, optim.adamw(1e-2), key=tnt.key(0))
    plain = tnt.train(unit.train_unit, state, data(2), max_epochs=2)
    after = tnt.train(IDENTITIES[name](unit).train_unit, state, data(2), max_epochs=2)
    assert tnt.digest(after.replace(memory=plain.memory)) == tnt.digest(plain)


def masked(total: bool = False) -> TrainUnit:
    """A mean over tokens that count; the sum is none."""

    def objective(params: dict[str, Tensor], state: tnt.State, batch: Any) -> Any:
        tokens, mask = batch
        losses = (tokens @ params["w"] + params["b"]).tanh().square() * mask
        count = mask.sum()
        loss = losses.sum() if total else losses.sum() / count
        output = {"loss": loss, "num_tokens": count, "num_samples": len(mask), "double": 2 * loss}
        return loss, (state.buffers, output)

    return TrainUnit(train_step=tnt.minimize(objective, optim.sgd(0.1)))


@st.composite
def masked_batches(draw: st.DrawFn) -> Any:
    """At least one token counts, in no particular row."""
    rows = draw(st.integers(1, 7))
    mask = torch.tensor(draw(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=rows, max_size=rows)))
    mask[draw(st.integers(0, rows - 1)), draw(st.integers(0, 2))] = True
    noise = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    return torch.randn(rows, 3, 2, generator=noise, dtype=torch.float64), mask.double()


FIRST = tnt.State(params={"w": torch.ones(2), "b": torch.zeros(())}, key=tnt.key(0))


@given(masked_batches(), st.integers(1, 5))
def test_micro_batches_of_any_size_and_mask_make_the_batch(batch: Any, count: int):
    check_accumulation(masked(), FIRST, [batch], counts=[count], weight="num_tokens", summed=["num_samples"])


@pytest.mark.parametrize("count", [2, 3])
def test_a_sum_and_a_wrong_weight_are_found_out(count: int):
    mask = torch.tensor([[1.0, 1, 1], [1, 1, 1], [1, 0, 0], [0, 0, 1], [1, 0, 1]], dtype=torch.float64)
    batch = torch.randn(5, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), mask
    for unit, weight, others in (
        (masked(total=True), "num_tokens", "num_samples"),
        (masked(), "num_samples", "num_tokens"),
    ):
        with pytest.raises(LawError, match=r"law 13 \(accumulation\).*\n  value.*\n  grads") as caught:
            check_accumulation(unit, FIRST, [batch], counts=[count], weight=weight, summed=[others])
        assert "weight='num_tokens'" in str(caught.value)


def test_supervised_accumulates_but_for_batch_norm():
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    unit, state = tnt.supervised(module, F.cross_entropy, optim.sgd(0.1), key=tnt.key(0))
    check_accumulation(unit, state, data(2), counts=[2, 3, 4])
    normed = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    unit, state = tnt.supervised(normed, F.cross_entropy, optim.sgd(0.1), key=tnt.key(0))
    with pytest.raises(LawError, match="law 13"):
        check_accumulation(unit, state, data(1))

"""`typed` and the protocols."""

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

import pytest
import torch

import tnt_func as tnt
from tnt_func.errors import UsageTypeError
from tnt_func.types import Phase, Pipeline, Point, typed


@typed
def repeat(word: str, times: int | None = None) -> str:
    """The word, again and again."""
    return word if times is None else word * times


@typed
def total(values: Sequence[int], names: Mapping[str, int] | None = None, more: tuple[int, ...] = ()) -> int:
    return sum(values) + sum(more)


def test_typed_lets_pass_what_fits():
    assert repeat("ab", times=2) == "abab" and repeat("ab") == "ab"
    assert (repeat.__name__, repeat.__doc__) == ("repeat", "The word, again and again.")


@pytest.mark.parametrize("arguments", [(3,), ("a", "b"), ("a", 1.0)])
def test_typed_refuses_what_does_not_fit(arguments: tuple[Any, ...]):
    with pytest.raises(UsageTypeError, match=r"repeat\(\) parameter .* violates type hint") as caught:
        repeat(*arguments)
    assert "\x1b" not in str(caught.value)


def test_typed_says_how_what_is_wanted_is_made():
    module: Any = torch.nn.Linear(1, 1)
    optimizer: Any = torch.optim.AdamW(module.parameters())
    key: Any = 0
    with pytest.raises(UsageTypeError, match=r"Write supervised\(\.\.\., key=tnt\.key\(0\)\)\.$"):
        tnt.supervised(module, max, tnt.optim.sgd(0.1), key=key)
    with pytest.raises(
        UsageTypeError, match=r"Write .*optimizer=tnt\.optim\.adamw\(1e-3\)\), or tnt\.optim\.from_torch"
    ):
        tnt.supervised(module, max, optimizer, key=tnt.key(0))


def test_typed_checks_the_result():
    @typed
    def wrong() -> int:
        answer: Any = "4"
        return answer

    with pytest.raises(UsageTypeError, match=r"wrong\(\) return '4' violates"):
        wrong()


def test_typed_passes_the_functions_own_type_error_through():
    @typed
    def fails(x: int) -> int:
        raise TypeError("mine")

    with pytest.raises(TypeError, match="mine") as caught:
        fails(1)
    assert not isinstance(caught.value, UsageTypeError)


def test_typed_draws_nothing_and_looks_at_the_first_item_of_a_container():
    before = random.getstate()
    for _ in range(5):
        assert total([1, 2, 3], {"a": 1, "b": 2}, (4, 5)) == 15
        with pytest.raises(UsageTypeError, match="index 0"):
            total(["1", 2, 3])  # pyright: ignore[reportArgumentType]
    assert random.getstate() == before


def test_typed_runs_compiled_containers_included():
    @typed
    def stretched(x: torch.Tensor, factors: Sequence[float]) -> torch.Tensor:
        return x * factors[0]

    compiled = torch.compile(lambda x: stretched(x, [2.0]), fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 2.0))


def test_a_pipeline_is_whatever_has_batches():
    class Counting:
        def batches(self, epoch: int, start: int) -> Iterator[int]:
            return iter(range(start, 3))

    assert isinstance(Counting(), Pipeline)
    assert not isinstance([1, 2], Pipeline)


def test_phases_and_points_are_those_of_the_order_of_events():
    assert get_args(Phase) == ("train", "eval", "predict")
    opening = (
        "start",
        "epoch_start",
        "fetched",
        "step_start",
        "step_end",
        "step_done",
        "epoch_end",
        "epoch_done",
        "end",
    )
    assert get_args(Point) == (*opening, "paused", "failed")

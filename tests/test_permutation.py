"""Permutations that are computed, not stored."""

import math
from collections import Counter

import pytest
import torch

from tnt_func import rng
from tnt_func.data.permutation import BLOCK, permute, splitmix


def test_every_size_up_to_2000_is_permuted():
    for size in range(1, 2001):
        found = permute(rng.key(size), size, torch.arange(size))
        assert torch.equal(found.sort().values, torch.arange(size)), size


def test_a_range_is_what_its_places_are_across_blocks():
    size = 3 * BLOCK + 5
    every = permute(rng.key(1), size, torch.arange(size))
    for places in (
        range(size),
        range(BLOCK - 3, BLOCK + 3),
        range(BLOCK + 1, BLOCK + 9),
        range(0, size, 100),
        range(9, 2, -3),
    ):
        assert torch.equal(permute(rng.key(1), size, places), every[torch.tensor(places)])
    assert permute(rng.key(1), size, range(0)).tolist() == []


@pytest.mark.parametrize("size", [3, 4])
def test_every_order_is_as_likely(size: int):
    """Pearson's statistic over all orders lies within five standard deviations of its mean."""
    times = 30 * math.factorial(size)
    counts = Counter(tuple(permute(rng.key(seed), size, torch.arange(size)).tolist()) for seed in range(times))
    expected, freedom = times / math.factorial(size), math.factorial(size) - 1
    assert len(counts) == freedom + 1
    statistic = sum((count - expected) ** 2 / expected for count in counts.values())
    assert abs(statistic - freedom) < 5 * math.sqrt(2 * freedom)


def test_orders_are_odd_as_often_as_even_where_both_sides_of_the_square_are_odd():
    def odd(order: list[int]) -> bool:
        return sum(a > b for i, a in enumerate(order) for b in order[i + 1 :]) % 2 == 1

    odds = sum(odd(permute(rng.key(seed), 9, torch.arange(9)).tolist()) for seed in range(200))
    assert 60 < odds < 140


def test_neighbours_and_epochs_are_not_correlated():
    size, orders = 1000, [permute(rng.key(seed), 1000, range(1000)).double() for seed in range(40)]
    pairs = [(order[1:], order[:-1]) for order in orders] + [*zip(orders, orders[1:], strict=False)]
    pairs += [(order, torch.arange(1000.0).double()) for order in orders]
    scores = [float(torch.corrcoef(torch.stack(pair))[0, 1]) * math.sqrt(size) for pair in pairs]
    assert max(map(abs, scores)) < 5 and abs(sum(scores)) / math.sqrt(len(scores)) < 4


def test_the_numbers_are_those_of_splitmix64():
    # The first outputs for seed 1234567, of the reference implementation in C.
    assert [splitmix(1234567, place) for place in range(3)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]

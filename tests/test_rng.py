"""Keys, and the scopes in which global generators draw from them."""

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
import torch

from tnt_func import rng
from tnt_func.errors import UsageError, UsageTypeError
from tnt_func.rng import Key, fold_in, key, preserved, scope, split
from tnt_func.types import Generator

# NumPy's stubs know nothing of the legacy generator's bits.
legacy: Any = np.random


def stand() -> dict[str, Any]:
    """Where every global generator stands, cached second normals included."""
    bits = legacy.get_bit_generator()
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": (type(bits), id(bits), str(legacy.get_state(legacy=False))),
        "random": random.getstate(),
    }


def draw() -> list[float]:
    """One number of each generator, and a normal of each, whose second half is cached."""
    gauss = [torch.randn(()).item(), torch.empty(1).normal_().item(), legacy.standard_normal(), random.gauss(0, 1)]
    return [torch.rand(()).item(), legacy.random_sample(), random.random(), *gauss]


@pytest.fixture(autouse=True)
def own_generators() -> Iterator[None]:
    """Each test may leave the global generators as it likes."""
    bits, states = legacy.get_bit_generator(), (torch.get_rng_state(), random.getstate())
    legacy.set_bit_generator(legacy.MT19937(1))
    torch.manual_seed(1)
    random.seed(1)
    yield
    legacy.set_bit_generator(bits)
    torch.set_rng_state(states[0])
    random.setstate(states[1])


# Keys

GOLDEN = {
    "init": 2830797326821491032,
    "1": 14354977576864736518,
    1: 5509842535781378034,
    -1: 15413771437896170950,
    0: 7120306904099482837,
    "été": 14943779091123796103,
    2**70: 1092200647937716609,
}


@pytest.mark.parametrize("name", GOLDEN, ids=repr)
def test_a_derived_key_is_pinned(name: str | int):
    assert fold_in(key(0), name) == Key(GOLDEN[name])


def test_derivations_of_the_largest_key_are_pinned():
    assert fold_in(fold_in(key(2**64 - 1), "train"), 3) == Key(15984530814815658213)


def test_a_key_depends_on_the_whole_path_by_which_it_was_derived():
    root = key(0)
    paths = [(), ("a",), ("b",), ("a", "b"), ("b", "a"), ("ab",), ("a", 1), ("a", "1"), (1, "a"), (-1,), (1,), (11,)]
    derived = dict.fromkeys(paths, root)
    for path in paths:
        for name in path:
            derived[path] = fold_in(derived[path], name)
    assert len(set(derived.values())) == len(paths)
    assert fold_in(key(1), 11) != fold_in(key(11), 1)


def test_a_consumer_more_shifts_nobody():
    alone = [fold_in(key(5), "dropout")]
    fold_in(key(5), "newcomer")
    assert [fold_in(key(5), "dropout")] == alone and split(key(5), 2) == split(key(5), 3)[:2]


def test_split_is_fold_in_by_number():
    assert split(key(3), 3) == tuple(fold_in(key(3), i) for i in range(3))
    assert split(key(3), 0) == ()


@pytest.mark.parametrize("name", [np.int64(3), True, 1.0, torch.tensor(3), None, ("a", 1)], ids=repr)
def test_a_name_is_a_str_or_an_int_and_nothing_that_prints_like_one(name: Any):
    with pytest.raises(UsageTypeError, match=r"fold_in was given .*; a key is derived by a str or an int.*Write tnt\."):
        fold_in(key(0), name)


@pytest.mark.parametrize(("seed", "instead"), [(-1, 2**64 - 1), (2**64, 0), (-(2**64), 0)])
def test_a_seed_has_64_bits(seed: int, instead: int):
    with pytest.raises(
        UsageError, match=rf"key\({seed}\) was given; .* from 0 to 2\*\*64 - 1. Write tnt.key\({instead}\)"
    ):
        key(seed)
    assert key(0).seed == 0 and key(2**64 - 1).seed == 2**64 - 1


# Scopes


def test_a_scope_gives_the_bits_of_the_generators_seeded_by_hand():
    seed = 2**40 + 9
    with scope(key(seed)):
        inside = draw()
    torch.manual_seed(seed)
    legacy.seed(9)
    random.seed(seed)
    assert draw() == inside


def test_a_scope_of_the_largest_key():
    with scope(key(2**64 - 1)):
        a = draw()
    with scope(key(2**64 - 1)):
        assert draw() == a


SCOPES: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "preserved": preserved,
    "scope": lambda: scope(key(4)),
}
BITS: dict[str, Callable[[], Any]] = {
    "MT19937": lambda: legacy.MT19937(7),
    "Philox": lambda: legacy.Philox(7),
    "PCG64": lambda: legacy.PCG64(7),
}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("name", SCOPES)
def test_afterwards_the_generators_stand_exactly_where_they_stood(name: str, cached: bool, bits: str):
    legacy.set_bit_generator(BITS[bits]())
    if cached:
        draw()
        assert legacy.get_state(legacy=False)["has_gauss"] == 1
    before = stand()
    with SCOPES[name]():
        draw()
        legacy.seed(3)
        torch.manual_seed(3)
        random.seed(3)
        draw()
    assert stand() == before


@pytest.mark.parametrize("bits", BITS)
def test_numbers_drawn_afterwards_are_those_that_would_have_been_drawn(bits: str):
    legacy.set_bit_generator(BITS[bits]())
    expected = [draw(), draw()]
    legacy.set_bit_generator(BITS[bits]())
    torch.manual_seed(1)
    random.seed(1)
    first = draw()
    with scope(key(0)):
        draw()
    assert [first, draw()] == expected


def test_inside_preserved_the_generators_go_on_from_where_they_stood():
    with scope(key(9)):
        draw()
    draw()
    with preserved():
        inside = draw()
    assert draw() == inside


@pytest.mark.parametrize("bits", ["Philox", "PCG64"])
def test_inside_preserved_a_generator_that_cannot_be_seeded_begins_anew(bits: str):
    legacy.set_bit_generator(BITS[bits]())
    numbers: set[float] = set()
    for seed in range(2):
        with scope(key(seed)):
            draw()
        with preserved():
            numbers.add(legacy.random_sample())
    assert len(numbers) == 1


@pytest.mark.parametrize("wrong", [-(2**70), "a"], ids=repr)
def test_a_key_that_cannot_be_opened_leaves_everything_as_it_was(wrong: Any):
    before = stand()
    with pytest.raises((RuntimeError, TypeError, ValueError)), scope(Key(wrong)):
        raise AssertionError
    assert stand() == before


def test_a_bit_generator_that_is_exchanged_inside_is_put_back():
    before = stand()
    with scope(key(0)):
        legacy.set_bit_generator(legacy.Philox(1))
        draw()
        with scope(key(1)):
            draw()
    assert stand() == before


def test_a_bit_generator_that_is_exchanged_inside_can_be_seeded_over():
    with preserved():
        legacy.set_bit_generator(legacy.Philox(1))
        rng.seed(key(3))
        assert legacy.random_sample() == legacy.RandomState(3).random_sample()


@pytest.mark.parametrize("name", SCOPES)
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, StopIteration])
def test_an_exception_restores_too_and_comes_through(name: str, error: type[BaseException]):
    before = stand()
    with pytest.raises(error), SCOPES[name]():
        draw()
        raise error
    assert stand() == before


def test_an_inner_scope_leaves_the_outer_one_where_it_stood():
    with scope(key(0)):
        expected = draw() + draw()
    before = stand()
    with scope(key(0)):
        drawn = draw()
        with scope(key(1)):
            other = draw()
        drawn += draw()
    assert drawn == expected and other != expected[:7]
    assert stand() == before


@pytest.mark.parametrize("named", [(), ("torch",), ("numpy",), ("random",), ("torch", "random")], ids=str)
def test_generators_that_are_not_named_are_left_alone(named: tuple[Generator, ...]):
    before = stand()
    with scope(key(0), named):
        at_start = stand()
        draw()
        at_end = stand()
    after = stand()
    for name in before:
        if name in named:
            assert before[name] != at_start[name] and after[name] == before[name]
        else:
            assert at_start[name] == before[name] and after[name] == at_end[name] != before[name]


def test_drawing_is_a_call_in_a_scope_or_where_the_caller_preserves_a_seeded_call():
    before = stand()
    with scope(key(6)):
        expected = draw()
    assert rng.drawing(key(6), rng.ALL, False, draw) == expected
    assert stand() == before
    with preserved():
        draw()
        assert rng.drawing(key(6), rng.ALL, True, draw) == expected
        assert stand() != before
    assert stand() == before


def test_drawing_passes_arguments_results_and_errors_on():
    assert rng.drawing(key(0), (), False, divmod, 7, 2) == (3, 1)
    for kept in (False, True):
        with preserved(), pytest.raises(ZeroDivisionError):
            rng.drawing(key(0), rng.ALL, kept, divmod, 7, 0)


def test_seed_is_for_good():
    rng.seed(key(5))
    expected = draw()
    rng.seed(key(5))
    assert draw() == expected


def test_without_numpy_the_others_are_covered(monkeypatch: pytest.MonkeyPatch):
    before = stand()
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "numpy")
        with scope(key(0)):
            torch.rand(1)
            random.random()
    assert stand() == before


def test_cuda_generators_are_covered_where_cuda_is_initialised(monkeypatch: pytest.MonkeyPatch):
    devices = tuple(torch.Generator().manual_seed(seed) for seed in (11, 12))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "default_generators", devices)
    before = [device.get_state().tolist() for device in devices]
    with scope(key(3)):
        inside = [torch.rand(2, generator=device) for device in devices]
    expected = torch.rand(2, generator=torch.Generator().manual_seed(3))
    assert all(torch.equal(numbers, expected) for numbers in inside)
    assert [device.get_state().tolist() for device in devices] == before

    with scope(key(3), ("numpy", "random")):
        torch.rand(2, generator=devices[0])
    assert [device.get_state().tolist() == b for device, b in zip(devices, before, strict=True)] == [False, True]


def test_cuda_generators_are_not_touched_where_cuda_is_not_initialised(monkeypatch: pytest.MonkeyPatch):
    device = torch.Generator().manual_seed(11)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "default_generators", (device,))
    expected = torch.rand(2, generator=torch.Generator().manual_seed(11))
    with scope(key(3)):
        assert torch.equal(torch.rand(2, generator=device), expected)

"""Laws of keys and scopes: derivation is a function that does not collide, and a scope leaves no trace."""

import random
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tnt_func import rng
from tnt_func.rng import Key, drawing, fold_in, preserved, scope, split
from tnt_func.testing.generators import moved, standing, stands
from tnt_func.types import Generator

keys = st.integers(0, 2**64 - 1).map(rng.key)
names = st.text(max_size=4) | st.integers(-(2**70), 2**70)
some = st.lists(st.sampled_from(rng.ALL), unique=True).map(tuple)
seeds = st.fixed_dictionaries({name: st.integers(0, 2**32) for name in rng.ALL})


def drawn(draws: tuple[Generator, ...] = rng.ALL) -> list[Any]:
    """Numbers out of the generators, a normal one among them, of which NumPy and Python cache every second."""
    takes = {
        "torch": lambda: torch.randn(3).tolist(),
        "numpy": lambda: (numpy.random.randn(), numpy.random.rand()),
        "random": lambda: (random.gauss(0, 1), random.random()),
    }
    return [takes[name]() for name in draws]


@given(keys, names, names)
def test_derivation_is_a_function_without_collisions(key: Key, a: str | int, b: str | int):
    assert fold_in(key, a) == fold_in(Key(key.seed), a)
    same = type(a) is type(b) and a == b
    assert (fold_in(key, a) == fold_in(key, b)) == same
    assert fold_in(key, a) != key and 0 <= fold_in(key, a).seed < 2**64


@given(keys, names, names)
def test_derivations_do_not_commute(key: Key, a: str | int, b: str | int):
    same = type(a) is type(b) and a == b
    assert (fold_in(fold_in(key, a), b) == fold_in(fold_in(key, b), a)) == same


@given(keys, st.integers(0, 5), st.integers(0, 5))
def test_fewer_keys_are_the_first_of_more(key: Key, few: int, more: int):
    assert split(key, few) == split(key, few + more)[:few]
    assert len(set(split(key, few + more))) == few + more


@given(keys, seeds, seeds)
def test_what_a_scope_draws_depends_on_its_key_alone(key: Key, here: Any, there: Any):
    with standing(here), scope(key):
        first = drawn()
    with standing(there), scope(key):
        assert drawn() == first


@given(keys, keys, some, some, seeds, st.booleans())
def test_a_scope_leaves_no_trace(key: Key, inner: Key, draws: Any, inner_draws: Any, here: Any, raises: bool):
    """Nested, left by an error or not, whatever is drawn of the generators that it covers."""
    with standing(here):
        drawn()
        following = drawn()
    with standing(here):
        drawn()  # a normal number is cached in NumPy and in Python
        before = stands()
        try:
            with scope(key, draws):
                drawn(draws)
                with scope(inner, inner_draws):
                    drawn(inner_draws)
                drawn(draws)
                if raises:
                    raise KeyError
        except KeyError:
            pass
        assert moved(before) == []
        assert drawn() == following


@given(keys, keys, some, seeds)
def test_an_inner_scope_does_not_disturb_the_outer(key: Key, inner: Key, draws: Any, here: Any):
    with standing(here), scope(key):
        plain = drawn() + drawn()
    with standing(here), scope(key):
        before = drawn()
        with scope(inner, draws):
            drawn(draws)
        assert before + drawn() == plain


@given(keys, some, seeds)
def test_a_scope_touches_only_what_it_covers(key: Key, draws: Any, here: Any):
    others: Any = [name for name in rng.ALL if name not in draws]
    with standing(here):
        before = stands(others)
        with scope(key, draws):
            assert moved(before) == []


@given(keys, some, seeds, seeds)
def test_a_call_that_only_seeds_draws_what_one_in_a_scope_does(key: Key, draws: Any, here: Any, there: Any):
    with standing(here):
        in_a_scope = drawing(key, draws, False, drawn, draws)
    with standing(there), preserved():
        assert drawing(key, draws, True, drawn, draws) == in_a_scope


@pytest.mark.parametrize("name", rng.ALL)
def test_moved_sees_a_single_draw(name: Generator):
    with preserved():
        before = stands()
        drawn((name,))
        assert moved(before) == [name]

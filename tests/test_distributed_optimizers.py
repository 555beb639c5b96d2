"""Optimizers on parameters in parts are those of one process, whether they treat each element alone or look at all."""

import pytest
from distributed_optimizers import OPTIMIZERS
from distributed_worlds import Found, found_by, same


@pytest.fixture(scope="module")
def found() -> Found:
    """What every rank of a world of two found."""
    return found_by("distributed_optimizers.py", 2)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_of_parts_are_those_of_the_whole(found: Found, name: str):
    each = same(found, name)
    assert each["apart"] <= 1e-10 < 1e-3 < each["moved"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_in_place_are_the_others_to_the_bit(found: Found, name: str):
    assert len({*same(found, name)["digests"]}) == 1


@pytest.mark.parametrize("rule", ["by_norm", "normed"])
def test_a_rule_that_looks_at_all_and_is_declared_elementwise_is_seen(found: Found, rule: str):
    assert same(found, f"{rule}, not declared") <= 1e-10
    assert min(each[f"{rule}, declared"] for each in found) > 1e-3


def test_parts_that_were_written_over_say_so_where_they_are_used(found: Found):
    for use, text in same(found, "used").items():
        assert text.startswith("ConsumedError: a tensor of a consumed state was used by"), use
    assert same(found, "shown") == "Consumed(float64[7, 5])"

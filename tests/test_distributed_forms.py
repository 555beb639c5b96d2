"""Donated, compiled and micro-batched units train on ranks as alone; orders that cannot be right are refused."""

import pytest
from distributed_forms import FORMS
from distributed_worlds import Found, found_by


@pytest.fixture(scope="module", params=(1, 2))
def found(request: pytest.FixtureRequest) -> Found:
    """What every rank of a world found."""
    return found_by("distributed_forms.py", request.param)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_run_of_one_process(found: Found, form: str):
    assert all(gap <= 1e-12 for each in found for gap in each[form]["apart"].values()), found[0][form]["apart"]
    if len(found) == 1 and form != "compiled":
        assert found[0][form]["digests"]["whole"] == found[0][form]["alone"]


@pytest.mark.parametrize("form", FORMS)
def test_donated_is_not_donated_to_the_bit_on_every_rank(found: Found, form: str):
    digests = [each[form]["digests"] for each in found]
    assert all(each == digests[0] for each in digests)
    for at in ("whole", "parts"):
        assert len({digest for name, digest in digests[0].items() if name.startswith(at)}) == 1, digests[0]


def test_ranks_sum_once_a_step_whatever_is_inside(found: Found):
    once = [0, 0] if len(found) == 1 else [1, 1]
    assert all(each[form]["messages"] == once for each in found for form in FORMS)


def test_parts_that_were_given_are_consumed(found: Found):
    assert all(each["given"].startswith("state.params was read after a donating step") for each in found)


def test_orders_that_cannot_be_right_are_refused_with_the_one_that_is(found: Found):
    for each in found:
        said = each["refused"]
        for graph in ("in a graph", "in a graph of the gradient", "in a graph, to evaluate"):
            assert "data_parallel(tnt.compiled(unit), mesh)" in said[graph]
        assert "form='step', the update in it" in said["one graph"] and "form='gradients'" in said["one graph"]
        for parts in ("micro-batches", "micro-batches in half"):
            assert "data_parallel(tnt.transforms.microbatch(unit, 2), mesh)" in said[parts]

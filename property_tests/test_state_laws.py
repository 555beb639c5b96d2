"""Laws of states: `replace` writes to nothing, equal states and no others have equal digests, a copy is the state."""

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from tnt_func import pytree as trees
from tnt_func import rng
from tnt_func.metrics import mean
from tnt_func.progress import Progress, RunProgress
from tnt_func.state import FIELDS, State, digest
from tnt_func.testing.snapshot import changes, freeze, thaw
from tnt_func.testing.strategies import states, tensors

leaves = tensors() | st.none() | st.booleans() | st.integers(-2, 2) | st.floats() | st.text(max_size=2)
keys = st.sampled_from("ab")


def containers(inside: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    several = st.lists(inside, max_size=2)
    return several | several.map(tuple) | st.dictionaries(keys, inside, max_size=2)


def in_order(tree: Any) -> Any:
    """The tree with the keys of its dicts sorted; a digest does not see their order, `equal` does."""
    if isinstance(tree, dict):
        return {key: in_order(tree[key]) for key in sorted(tree)}
    return type(tree)(in_order(child) for child in tree) if isinstance(tree, list | tuple) else tree


anything = st.recursive(leaves, containers, max_leaves=4).map(in_order)


@st.composite
def any_states(draw: st.DrawFn) -> State:
    """States with anything that a state may hold, an accumulator among it."""
    state = draw(states())
    metrics = {"train": {"loss": mean("loss").of({"loss": draw(st.floats())})}}
    return state.replace(memory={"slot": draw(anything)}, metrics=metrics, stop=draw(st.none() | st.text(max_size=2)))


@given(any_states(), st.sampled_from(sorted(FIELDS - {"key", "progress"})), anything)
def test_replace_writes_to_nothing_and_shares_the_rest(state: State, name: str, value: Any):
    before = freeze(state)
    after = state.replace(**{name: value})
    assert freeze(state) == before
    assert getattr(after, name) is value
    assert all(getattr(after, other) is getattr(state, other) for other in FIELDS - {name})


@given(any_states(), any_states())
def test_equal_states_and_no_others_have_equal_digests(a: State, b: State):
    for x, y in ((a, b), (a, thaw(freeze(a))), (a, a.replace(memory=b.memory)), (a, a.replace(stop=b.stop))):
        assert (digest(x) == digest(y)) == trees.equal(x, y)


@given(anything, anything)
def test_equal_trees_and_no_others_have_equal_digests(a: Any, b: Any):
    assert (digest(a) == digest(b)) == trees.equal(a, b)


@given(st.permutations("abc"), leaves)
def test_digests_and_frozen_trees_do_not_see_the_order_of_keys(order: list[str], leaf: Any):
    a, b = dict.fromkeys("abc", leaf), dict.fromkeys(order, leaf)
    assert digest(a) == digest(b) and freeze(a) == freeze(b)


@given(any_states(), any_states())
def test_frozen_states_compare_as_states_do(a: State, b: State):
    assert (freeze(a) == freeze(b)) == trees.equal(a, b)
    assert (changes(freeze(a), freeze(b), "state") == []) == trees.equal(a, b)


@given(any_states())
def test_what_is_thawed_is_what_was_frozen_and_shares_nothing(state: State):
    before = freeze(state)
    copy = thaw(before)
    assert trees.equal(copy, state)
    for tensor in trees.tensors(copy):
        tensor.fill_(1)
    assert freeze(state) == before


@given(any_states(), st.text(max_size=2), st.text(max_size=2))
def test_the_first_reason_to_stop_is_kept(state: State, first: str, second: str):
    assert state.request_stop(first).request_stop(second).stop == (first if state.stop is None else state.stop)


@given(st.integers(0, 5), st.integers(0, 5), st.integers(0, 5))
def test_counters_of_one_phase_leave_the_others_alone(a: int, b: int, c: int):
    progress = RunProgress(Progress(a), Progress(b), Progress(c))
    for phase in ("train", "eval", "predict"):
        moved = progress.put(phase, progress.of(phase).after_step())
        assert moved.of(phase) == progress.of(phase)._replace(steps=1, steps_in_epoch=1)
        others = {"train", "eval", "predict"} - {phase}
        assert all(moved.of(other) == progress.of(other) for other in others)  # pyright: ignore[reportArgumentType]


def test_a_digest_is_the_same_everywhere():
    """A number fixed once: states saved by one version are found by the next."""
    state = State(params={"w": torch.arange(3.0), "b": torch.zeros(())}, key=rng.key(7), memory={"n": 1})
    assert digest(state) == digest(state.replace(params={"b": torch.zeros(()), "w": torch.arange(3.0)}))

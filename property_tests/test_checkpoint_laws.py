"""Law 15: a checkpoint is the state, or it is refused; values that are no tensors come back through strict JSON."""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tnt_func import pytree as trees
from tnt_func import testing
from tnt_func.checkpoint import restore, save
from tnt_func.checkpoint.values import decode, encode
from tnt_func.errors import LawError
from tnt_func.metrics import mean
from tnt_func.state import State, digest
from tnt_func.testing.broken.checkpoints import CHECKPOINTS
from tnt_func.testing.case import Case
from tnt_func.testing.snapshot import freeze
from tnt_func.testing.strategies import DTYPES, cases, states, tensors

# Files are flushed to the disk: fewer examples than other laws have.
few = settings(max_examples=settings().max_examples // 8)
MORE = (*DTYPES, torch.complex64, torch.complex128, torch.uint16, torch.float8_e4m3fn)
plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
leaves = tensors(MORE) | tensors().map(lambda tensor: tensor.t().expand(2, *tensor.t().shape)) | plain
keys = st.text(max_size=3) | st.integers(-2, 2)


def containers(inside: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    several = st.lists(inside, max_size=2)
    return several | several.map(tuple) | st.dictionaries(keys, inside, max_size=2)


@st.composite
def any_states(draw: st.DrawFn) -> State:
    """States with anything that a state may hold; leaves that share storage, a state in memory, accumulators."""
    state, slot = draw(states()), draw(st.recursive(leaves, containers, max_leaves=4))
    metrics = {"eval": {draw(st.text(max_size=3)): mean("x").of({"x": draw(st.floats())})}}
    memory = {draw(st.text(max_size=3)): slot, "twice": [slot, slot], "state": draw(states())}
    return state.replace(memory=memory, metrics=metrics, stop=draw(st.none() | st.text(max_size=2)))


@few
@given(any_states(), st.integers(0, 1000))
def test_a_checkpoint_is_the_state_or_is_refused(state: State, seed: int):
    with tempfile.TemporaryDirectory() as directory:
        testing.check_checkpoint(state, directory, damages=3, seed=seed)


@few
@given(cases(), st.integers(0, 1000))
def test_the_states_of_runs_are_restored_inside_the_first(case: Case, at: int):
    found = [event for event in case.events() if event.state.output is None]
    state = found[at % len(found)].state
    with tempfile.TemporaryDirectory() as directory:
        save(Path(directory, "x"), state)
        assert trees.equal(restore(Path(directory, "x"), found[0].state), state)


@few
@given(any_states())
def test_slots_that_nobody_knows_are_saved_again_unchanged(state: State):
    with tempfile.TemporaryDirectory() as name:
        first, second = Path(name, "1"), Path(name, "2")
        save(first, state)
        stranger = restore(first, state.replace(memory={"state": state.memory["state"]}))
        assert digest(stranger) != digest(state)
        save(second, stranger)
        assert trees.equal(restore(second, state), state)
        assert freeze(restore(second, stranger)) == freeze(stranger)


@given(st.recursive(plain | st.sampled_from(MORE), containers))
def test_values_come_back_through_strict_json(value: Any):
    def refuse(constant: str) -> Any:
        raise AssertionError(constant)

    text = json.dumps(encode(value), allow_nan=False)
    assert freeze(decode(json.loads(text, parse_constant=refuse))) == freeze(value)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_what_breaks_the_law_is_named(name: str, tmp_path: Path):
    broken = CHECKPOINTS[name]
    with pytest.raises(LawError) as caught:
        testing.check_checkpoint(broken.state, tmp_path, save=broken.save, restore=broken.restore)
    message = str(caught.value)
    assert message.startswith("law 15 (checkpoint) is broken") and all(word in message for word in broken.words)
    assert list(tmp_path.iterdir()) == []

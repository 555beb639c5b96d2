"""What every test and doctest runs under: one torch thread, and the Hypothesis profiles."""

import os
from collections.abc import Iterator

# Read once, when torch is first imported; processes that tests start inherit it.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

settings.register_profile("default", max_examples=200, deadline=None, derandomize=False, print_blob=True)
settings.register_profile("fuzz", parent=settings.get_profile("default"), max_examples=5_000)
settings.register_profile("doctest", parent=settings.get_profile("default"), derandomize=True)
# Hypothesis loads a profile of its own where CI is set; --hypothesis-profile=fuzz still wins over this line.
settings.load_profile("default")


@pytest.fixture(autouse=True)
def torch_begins_alike() -> None:
    """Weights that a test leaves to chance are the same wherever it runs, and whatever has run there before it."""
    torch.default_generator.manual_seed(0)


@pytest.fixture(autouse=True)
def doctests_draw_alike(request: pytest.FixtureRequest) -> Iterator[None]:
    """A docstring shows what Hypothesis found, and from another seed it may find, or shrink to, something else."""
    if not isinstance(request.node, pytest.DoctestItem):
        yield
        return
    before = settings.get_current_profile_name()
    settings.load_profile("doctest")
    yield
    settings.load_profile(before)

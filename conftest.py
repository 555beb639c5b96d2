"""What every test and doctest runs under: one torch thread, and the Hypothesis profiles."""

import os

# Read once, when torch is first imported; processes that tests start inherit it.
os.environ["OMP_NUM_THREADS"] = "1"

import torch
from hypothesis import settings

torch.set_num_threads(1)

settings.register_profile("default", max_examples=200, deadline=None, derandomize=False, print_blob=True)
settings.register_profile("fuzz", parent=settings.get_profile("default"), max_examples=5_000)
# Hypothesis loads a profile of its own where CI is set; --hypothesis-profile=fuzz still wins over this line.
settings.load_profile("default")

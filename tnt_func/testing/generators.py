"""The global random generators of torch, NumPy and Python, disturbed and watched.

Example:
    >>> before = stands()
    >>> _ = torch.rand(1)
    >>> moved(before)
    ['torch']
"""

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from tnt_func import rng
from tnt_func.testing.snapshot import freeze
from tnt_func.types import Generator


def stands(which: Iterable[Generator] = rng.ALL) -> dict[Generator, Any]:
    """Where generators stand; NumPy's only where NumPy is loaded.

    Example:
        >>> stands(("torch",)) == stands(("torch",))
        True
    """
    return {name: _READERS[name]() for name in which}


def moved(before: Mapping[Generator, Any]) -> list[Generator]:
    """The generators that do not stand where they stood.

    Example:
        >>> moved(stands())
        []
    """
    return [name for name, stood in before.items() if _READERS[name]() != stood]


@contextmanager
def standing(seeds: Mapping[Generator, int]) -> Iterator[None]:
    """Inside, the generators stand where these seeds put them; afterwards, where they stood.

    Example:
        >>> before = stands()
        >>> with standing({"torch": 1, "numpy": 2, "random": 3}):
        ...     _ = torch.rand(1)
        >>> moved(before)
        []
    """
    with rng.preserved():
        for name, seed in seeds.items():
            rng.seed(rng.key(seed), (name,))
        yield


def _torch() -> Any:
    cuda = torch.cuda.default_generators if torch.cuda.is_initialized() else ()
    return [freeze(generator.get_state()) for generator in (torch.default_generator, *cuda)]


def _numpy() -> Any:
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return None
    state = numpy.random.get_state(legacy=False)
    inner = state["state"]
    return state["bit_generator"], inner["key"].tobytes(), inner["pos"], state["has_gauss"], state["gauss"]


_READERS = {"torch": _torch, "numpy": _numpy, "random": rng.random.getstate}

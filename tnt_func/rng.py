"""Random keys as values, and the scopes in which the global generators draw from them.

A `Key` is 64 bits. `fold_in` derives a key by name or number, never by position, so adding a consumer shifts nobody.
Code that draws from global generators (`F.dropout`, `torch.randn`, NumPy, `random`) is a function of a key inside
`scope(key)`; afterwards the generators stand exactly where they stood.

Laws:
    Derivation is a function, the same on every platform. A scope leaves every generator it covers as it found it.

Example:
    >>> with scope(key(0)):
    ...     a = torch.rand(2)
    >>> with scope(key(0)):
    ...     b = torch.rand(2)
    >>> torch.equal(a, b), fold_in(key(0), "init") == fold_in(key(0), "init")
    (True, True)
"""

import hashlib
import random
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch

from tnt_func.errors import UsageError, UsageTypeError, kind_of
from tnt_func.types import Generator, typed

P = ParamSpec("P")
R = TypeVar("R")

ALL: tuple[Generator, ...] = ("torch", "numpy", "random")
_WORD = 1 << 64
_spares: list[Any] = []
"""NumPy generators that no scope uses at the moment; making one takes 150 microseconds."""


class Key(NamedTuple):
    """A random key: 64 bits, to be folded into others and opened by `scope`.

    Example:
        >>> key(7)
        Key(seed=7)
    """

    seed: int


@typed
def key(seed: int) -> Key:
    """The key of a seed. `scope(key(s))` gives the bits of `torch.manual_seed(s)`.

    Raises:
        UsageError: the seed is negative or has more than 64 bits.

    Example:
        >>> with scope(key(3)):
        ...     x = torch.rand(2)
        >>> torch.equal(x, torch.rand(2, generator=torch.Generator().manual_seed(3)))
        True
    """
    if not 0 <= seed < _WORD:
        raise UsageError(
            f"key({seed}) was given; a seed is an integer from 0 to 2**64 - 1. Write tnt.key({seed % _WORD})."
        )
    return Key(seed)


def fold_in(key: Key, name: str | int) -> Key:
    """The key derived from `key` by a name or a number (negative ones too); "1" and 1 give different keys.

    Raises:
        UsageTypeError: the name is neither a str nor an int; NumPy's numbers, tensors and booleans are not.

    Example:
        >>> fold_in(key(0), "dropout") == fold_in(key(0), "noise")
        False
        >>> fold_in(key(0), 1) == fold_in(key(0), "1")
        False

    References:
        BLAKE2b, RFC 7693, with 8 bytes of output.
    """
    if type(name) is not str and type(name) is not int:
        raise UsageTypeError(
            f"fold_in was given {name!r}, {kind_of(name)}; a key is derived by a str or an int, of which every "
            "platform writes the same text. Write tnt.fold_in(key, int(number))."
        )
    text = f"{key.seed}:{name!a}".encode()
    return Key(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little"))


def split(key: Key, count: int) -> tuple[Key, ...]:
    """As many keys as asked for: `fold_in(key, 0)`, `fold_in(key, 1)`, ...

    Example:
        >>> split(key(0), 2) == (fold_in(key(0), 0), fold_in(key(0), 1))
        True
    """
    return tuple(fold_in(key, index) for index in range(count))


def seed(key: Key, draws: tuple[Generator, ...] = ALL) -> None:
    """Put the named global generators at the start of a key's streams, for good. Mostly one wants `scope`.

    NumPy's legacy generator takes 32 bits of seed: the key's low half.

    Example:
        >>> with preserved():
        ...     seed(key(1))
        ...     torch.initial_seed()
        1
    """
    if "torch" in draws:
        torch.default_generator.manual_seed(key.seed)
        if torch.cuda.is_initialized():
            for generator in torch.cuda.default_generators:
                generator.manual_seed(key.seed)
    if "numpy" in draws and (numpy := sys.modules.get("numpy")):
        if type(numpy.random.get_bit_generator()) is not numpy.random.MT19937:
            # Somebody put a generator of another kind there, whose draws would be others.
            numpy.random.set_bit_generator(numpy.random.MT19937(0))
        numpy.random.seed(key.seed & 0xFFFFFFFF)
    if "random" in draws:
        random.seed(key.seed)


class preserved:
    """Whatever happens inside, the named global generators afterwards stand where they stood.

    Inside they go on from there; NumPy's begins anew where it is no MT19937, for only that kind can be seeded.
    torch is covered on the CPU and, where it is initialised, on every CUDA device; NumPy where it is loaded.

    Args:
        draws: the generators to preserve.

    Example:
        >>> before = torch.get_rng_state()
        >>> with preserved():
        ...     _ = torch.rand(3)
        >>> torch.equal(before, torch.get_rng_state())
        True
    """

    __slots__ = ("_draws", "_numpy", "_random", "_spare", "_torch")

    def __init__(self, draws: tuple[Generator, ...] = ALL):
        self._draws = draws

    def __enter__(self) -> None:
        self._keep()
        if self._numpy:
            numpy, _, state = self._numpy
            if state["bit_generator"] == "MT19937":
                numpy.set_state(state)
            else:
                numpy.seed(0)

    def _keep(self) -> None:
        self._torch = self._random = self._numpy = None
        if "torch" in self._draws:
            cuda = torch.cuda.default_generators if torch.cuda.is_initialized() else ()
            self._torch = [(generator, generator.get_state()) for generator in (torch.default_generator, *cuda)]
        if "numpy" in self._draws and (numpy := sys.modules.get("numpy")):
            # Another MT19937 is swapped in: writing 624 words back costs more, and np.random.seed takes no other kind.
            # Swapping forgets the cached second half of a normal draw, so that is read beforehand.
            self._numpy = numpy.random, numpy.random.get_bit_generator(), numpy.random.get_state(legacy=False)
            self._spare = _spares.pop() if _spares else numpy.random.MT19937(0)
            numpy.random.set_bit_generator(self._spare)
        if "random" in self._draws:
            self._random = random.getstate()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for generator, state in self._torch or ():
            generator.set_state(state)
        if self._numpy:
            numpy, generator, state = self._numpy
            numpy.set_bit_generator(generator)
            _spares.append(self._spare)
            if state["has_gauss"]:
                numpy.set_state(state)
        if self._random:
            random.setstate(self._random)


class scope(preserved):
    """Inside, the named global generators draw from a key; afterwards they stand exactly where they stood.

    Args:
        key: where the streams start.
        draws: the generators that are seeded; the others are left alone.

    Example:
        >>> with scope(key(0), draws=("torch",)):
        ...     first = torch.randn(1)
        >>> with scope(key(0), draws=("torch",)):
        ...     torch.equal(first, torch.randn(1))
        True
    """

    __slots__ = ("_key",)

    def __init__(self, key: Key, draws: tuple[Generator, ...] = ALL):
        self._key, self._draws = key, draws

    def __enter__(self) -> None:
        self._keep()
        try:
            seed(self._key, self._draws)
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise


def drawing(
    key: Key, draws: tuple[Generator, ...], kept: bool, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs
) -> R:
    """Call a function whose draws from the global generators come from a key.

    Args:
        key: where the streams start.
        draws: the generators that are seeded for it.
        kept: whether the caller preserves the generators already; seeding alone costs a fraction of a scope.
        function: what to call, with the arguments that follow.

    Example:
        >>> a, b = (drawing(key(0), ("torch",), False, torch.rand, 2) for _ in range(2))
        >>> torch.equal(a, b)
        True
    """
    if kept:
        seed(key, draws)
        return function(*args, **kwargs)
    with scope(key, draws):
        return function(*args, **kwargs)

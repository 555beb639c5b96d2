"""Permutations that are computed, not stored: the shuffled place of any index, in constant memory.

A place is written as two digits, and each round adds to one digit a keyed hash of the other: a Feistel network, which
is a bijection whatever the hash. It permutes a few places more than there are; a walk goes on until it is back among
those asked for, which makes it a bijection of exactly these.

Laws:
    For every key and size, `permute` is a bijection of range(size), and a function of nothing else.

Example:
    >>> order = permute(rng.key(0), 10, range(10))
    >>> sorted(order.tolist()) == list(range(10)), permute(rng.key(0), 10, range(3, 5)).equal(order[3:5])
    (True, True)
    >>> permute(rng.key(0), 2**40, torch.tensor([2**39])).shape
    torch.Size([1])

References:
    Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002: the generalised Feistel network, cycle walking.
    Steele, Lea and Flood, Fast Splittable Pseudorandom Number Generators, 2014: the mixing function.
"""

import functools
import math
from typing import TypeAlias

import torch

from tnt_func import rng
from tnt_func.rng import Key

Indices: TypeAlias = range | torch.Tensor
"""Places in an epoch: a range where they are evenly spaced, else int64 [count]."""

_WORD = (1 << 64) - 1
ROUNDS = 4
BLOCK = 4096
"""A neighbourhood of places is computed at once, for vector operations, and the last few are kept."""


def permute(key: Key, size: int, indices: Indices) -> torch.Tensor:
    """Where a keyed permutation of range(size) takes each of the indices: int64 [count].

    Args:
        key: which permutation.
        size: how many places there are, up to 2**62.
        indices: places, each below `size`.

    Example:
        >>> permute(rng.key(1), 1, range(1))
        tensor([0])
    """
    if isinstance(indices, torch.Tensor):
        return _walk(key, size, indices)
    if not indices:
        return torch.empty(0, dtype=torch.int64)
    first, last = indices[0], indices[-1]
    if not 0 < indices.step <= 64:
        return _walk(key, size, torch.tensor(indices))
    numbers = range(first // BLOCK, last // BLOCK + 1)
    blocks = [_block(key, size, number) for number in numbers]
    near = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
    origin = numbers[0] * BLOCK
    return near[first - origin : last - origin + 1 : indices.step]


@functools.lru_cache(maxsize=16)
def _block(key: Key, size: int, number: int) -> torch.Tensor:
    return _walk(key, size, torch.arange(number * BLOCK, min((number + 1) * BLOCK, size)))


def _walk(key: Key, size: int, indices: torch.Tensor) -> torch.Tensor:
    if size == 1:
        return torch.zeros_like(indices)
    # An even number of values of one digit: with two odd ones every permutation would be an even one.
    left = math.isqrt(size - 1) + 1
    left += left % 2
    right = -(-size // left)
    salts = tuple(_signed(salt.seed) for salt in rng.split(key, 2 * ROUNDS))
    places = _encipher(indices, left, right, salts)
    while (outside := places >= size).any():
        places[outside] = _encipher(places[outside], left, right, salts)
    return places


def _encipher(places: torch.Tensor, left: int, right: int, salts: tuple[int, ...]) -> torch.Tensor:
    high, low = places // right, places % right
    for even, odd in zip(salts[::2], salts[1::2], strict=True):
        high = (high + _hash(low, even)) % left
        low = (low + _hash(high, odd)) % right
    return high * right + low


def _hash(x: torch.Tensor, salt: int) -> torch.Tensor:
    """About 31 bits of x and salt: SplitMix64's finalizer, but that a right shift of int64 fills with the sign."""
    x = x + salt
    x ^= x >> 30
    x *= _signed(0xBF58476D1CE4E5B9)
    x ^= x >> 27
    x *= _signed(0x94D049BB133111EB)
    x >>= 33
    return x


def splitmix(seed: int, place: int) -> int:
    """The place-th number of the SplitMix64 generator: 64 bits, at a quarter of what folding a key costs.

    Example:
        >>> hex(splitmix(0, 0))
        '0xe220a8397b1dcdaf'
    """
    z = (seed + (place + 1) * 0x9E3779B97F4A7C15) & _WORD
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _WORD
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _WORD
    return z ^ (z >> 31)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >= 1 << 63 else word

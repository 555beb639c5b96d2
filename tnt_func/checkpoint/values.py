"""Values that are no tensors as strict JSON, to the bit: NaN, infinities, -0.0, long integers, tuples.

Law:
    `decode(encode(value))` is the value again, of the same type.

Example:
    >>> encode((1, float("inf"), Key(2**63)))
    {'tuple': [1, {'float': '7ff0000000000000'}, {'Key': [{'int': '0x8000000000000000'}]}]}
    >>> decode(encode((1, float("inf"), Key(2**63))))
    (1, inf, Key(seed=9223372036854775808))
"""

import math
import struct
from typing import Any, TypeAlias, cast

import torch

from tnt_func.errors import UsageTypeError, kind_of
from tnt_func.progress import Progress, RunProgress
from tnt_func.rng import Key

Json: TypeAlias = Any
"""None, bool, int, finite float, str, and lists and dicts of these."""

SAFE = 1 << 53
"""Integers beyond it lose digits in many a reader of JSON."""

RECORDS: dict[str, Any] = {record.__name__: record for record in (Key, Progress, RunProgress)}
"""The named tuples that a checkpoint may hold."""


def encode(value: Any) -> Json:
    """A value as strict JSON.

    Args:
        value: None, bool, int, float, str, a torch dtype, a Key, counters; tuples, lists and dicts of these.

    Raises:
        UsageTypeError: it is anything else. Subclasses are: a `numpy.float64` would come back as a float.

    Example:
        >>> encode(float("nan")), encode([0.5, None]), encode({1: torch.int8})
        ({'float': '7ff8000000000000'}, {'list': [0.5, None]}, {'dict': [[1, {'dtype': 'int8'}]]})
    """
    kind = cast(Any, type(value))
    if value is None or kind is bool or kind is str:
        return value
    if kind is int:
        return value if -SAFE < value < SAFE else {"int": hex(value)}
    if kind is float:
        return value if math.isfinite(value) else {"float": struct.pack(">d", value).hex()}
    if kind is tuple or kind is list or RECORDS.get(kind.__name__) is kind:
        return {kind.__name__: [encode(item) for item in value]}
    if kind is dict:
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    if kind is torch.dtype:
        return {"dtype": str(value).removeprefix("torch.")}
    raise UsageTypeError(
        f"{kind_of(value)} was given, {value!r}; a checkpoint holds tensors, None, bool, int, float, str, and nothing "
        "else. Turn it into one of these: float(x), int(x), str(x)."
    )


def decode(value: Json) -> Any:
    """The value that was encoded.

    Raises:
        KeyError, TypeError, ValueError: this is nothing that `encode` gives.

    Example:
        >>> decode({"dict": [[1, {"dtype": "int8"}]]})
        {1: torch.int8}
    """
    if not isinstance(value, dict | list):
        return value
    ((kind, inside),) = cast("dict[str, Any]", value).items()
    if kind == "int":
        return int(inside, 16)
    if kind == "float":
        return struct.unpack(">d", bytes.fromhex(inside))[0]
    if kind == "dtype":
        return dtype_of(inside)
    if kind == "dict":
        return {decode(key): decode(item) for key, item in inside}
    items = [decode(item) for item in inside]
    return items if kind == "list" else tuple(items) if kind == "tuple" else RECORDS[kind](*items)


def dtype_of(name: str) -> torch.dtype:
    """The torch dtype of a name.

    Raises:
        KeyError: torch has no such dtype.

    Example:
        >>> dtype_of("bfloat16")
        torch.bfloat16
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise KeyError(f"torch has no dtype {name!r}")
    return dtype

"""Names for the shapes of things, and `typed`, which checks them at public functions.

Example:
    >>> @typed
    ... def double(x: int) -> int: return 2 * x
    >>> double("2")
    Traceback (most recent call last):
    tnt_func.errors.UsageTypeError: ...
"""

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any, Literal, Protocol, TypeAlias, TypeVar, cast, runtime_checkable

import torch

from tnt_func.errors import UsageTypeError

PyTree: TypeAlias = Any
"""Nested tuples, lists, dicts and `@pytree` classes over leaves: tensors, numbers, strings, booleans, None."""

Batch: TypeAlias = Any
"""What the data yields; the loop never looks inside."""

Output: TypeAlias = Any
"""What a step returns beside the state: a pytree, usually a mapping from names to scalars."""

Phase: TypeAlias = Literal["train", "eval", "predict"]
Mode: TypeAlias = Literal["min", "max"]
"""Whether less or more is better."""

Point: TypeAlias = Literal[
    "start",
    "epoch_start",
    "fetched",
    "step_start",
    "step_end",
    "step_done",
    "epoch_end",
    "epoch_done",
    "end",
    "paused",
    "failed",
]
Generator: TypeAlias = Literal["torch", "numpy", "random"]
"""A global random generator that user code may draw from: torch's (CPU and CUDA), NumPy's, Python's."""

Limit: TypeAlias = int | float | None
"""A lifetime total: an integer from 0, `math.inf` for none on purpose, None for not given."""


@runtime_checkable
class Pipeline(Protocol):
    """Data as a function: epoch and position in, batches out. The loop seeks in it instead of skipping.

    Example:
        >>> class Counting:
        ...     def batches(self, epoch, start): return iter(range(start, 3))
        >>> isinstance(Counting(), Pipeline), list(Counting().batches(0, 1))
        (True, [1, 2])
    """

    def batches(self, epoch: int, start: int) -> Iterator[Batch]:
        """The batches of `epoch` from position `start` on, position 0 being the first."""
        ...


F = TypeVar("F", bound=Callable[..., Any])

# By the names of the types, which are on floors above.
_WRITTEN = {
    "Key": "tnt.key(0))",
    "Optimizer": "tnt.optim.adamw(1e-3)), or tnt.optim.from_torch(torch.optim.AdamW, lr=1e-3) for one of torch's",
    "State": "tnt.State(params=..., key=tnt.key(0)))",
}


class _Violation(UsageTypeError):
    """What beartype makes of its message: a UsageTypeError that also says what to write."""

    def __new__(cls, *args: object) -> UsageTypeError:
        found = str(args[0])
        parameter = re.match(r"Function (?:\S+\.)?(\w+)\(\) parameter (\w+)=", found)
        if parameter is None:
            return UsageTypeError(found)
        function, name = parameter.groups()
        wanted = re.search(r"violates type hint <class 'tnt_func\.(?:\w+\.)*(\w+)'>", found)
        written = _WRITTEN.get(wanted[1]) if wanted else None
        written = written or f"...) with a value of that type; help({function}) has an example"
        return UsageTypeError(f"{found} Write {function}(..., {name}={written}.")


def typed(function: F) -> F:
    """Check the arguments and the result of a public function against its annotations, at about a microsecond a call.

    The check is built, and beartype imported, at the first call: `import tnt_func` waits for neither. Of a container
    the first item is checked. Draws nothing; code that torch.compile traces is not checked again.

    Raises:
        UsageTypeError: at a call whose arguments do not fit.

    Example:
        >>> @typed
        ... def half(x: float) -> float: return x / 2
        >>> half(3.0)
        1.5
    """
    checked: Any = None

    @functools.wraps(function)
    def checking(*args: Any, **kwargs: Any) -> Any:
        nonlocal checked
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        if checked is None:
            checked = _checked(function)
        return checked(*args, **kwargs)

    return cast(F, checking)


def _checked(function: Callable[..., Any]) -> Any:
    from beartype import BeartypeConf, beartype

    checked: Any = beartype(conf=BeartypeConf(violation_type=_Violation, is_color=False))(function)
    # beartype looks at an item that it draws from the global `random`, which no call may move.
    for name in checked.__kwdefaults__ or ():
        if name.endswith("getrandbits"):
            checked.__kwdefaults__[name] = _first
    return checked


def _first(bits: int) -> int:
    return 0

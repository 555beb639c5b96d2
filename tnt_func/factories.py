"""What a value says of itself: the call that made it, or else its fields; the same in every process.

Optimizers, schedules, metrics, callbacks and units are functions inside, of which Python says where in memory they lie.
What a `factory` makes remembers its call, whose arguments those functions hold anyway, and writes it down when asked.

Example:
    >>> @factory
    ... def scaled(factor: float, *, by: Callable[[float], float] = abs) -> Callable[[float], float]:
    ...     return lambda x: factor * by(x)
    >>> scaled(2.0), scaled(2.0, by=round), scaled(2.0)(-3.0)
    (scaled(2.0), scaled(2.0, by=round), 6.0)
"""

import functools
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields
from inspect import Parameter
from types import FunctionType
from typing import Any, NamedTuple, TypeVar, cast

from torch import Tensor, nn

from tnt_func.pytree import describe
from tnt_func.types import typed

F = TypeVar("F", bound=Callable[..., Any])


class Call(NamedTuple):
    """A call of a factory, as it is written: what has a place in order by its place, the rest by name.

    Example:
        >>> Call(sorted, ([2, 1],), {"reverse": True})
        sorted([2, 1], reverse=True)
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __repr__(self) -> str:
        return f"{self.function.__name__}({', '.join(self._arguments())})"

    def _arguments(self) -> Iterator[str]:
        signature = inspect.signature(self.function)
        given, in_order = signature.bind(*self.args, **self.kwargs).arguments, True
        for name, parameter in signature.parameters.items():
            if name not in given:
                in_order = False
            elif parameter.kind is Parameter.VAR_POSITIONAL:
                yield from map(said, given[name])
            elif parameter.kind is Parameter.VAR_KEYWORD:
                yield from (f"{key}={said(value)}" for key, value in given[name].items())
            elif parameter.kind is not Parameter.KEYWORD_ONLY and in_order:
                yield said(given[name])
            else:
                yield f"{name}={said(given[name])}"


class Brief:
    """A dataclass whose repr is the call of the `factory` that made it, or else its fields that are not as they are by
    default. One that is made of it by `dataclasses.replace` was made by no call.

    Example:
        >>> @dataclass(repr=False)
        ... class Pair(Brief):
        ...     first: Any
        ...     second: Any = None
        >>> Pair(int), Pair(typed, second=2)
        (Pair(first=int), Pair(first=typed, second=2))
        >>> @factory
        ... def pair(first: int) -> Pair: return Pair(first, second=typed)
        >>> pair(first=1)
        pair(1)
    """

    def __repr__(self) -> str:
        if _CALL in vars(self):
            return repr(vars(self)[_CALL])
        shown: list[str] = []
        for field in fields(cast(Any, self)):
            value = getattr(self, field.name)
            default: Any = field.default if field.default_factory is MISSING else field.default_factory()
            if field.repr and not _same(value, default):
                shown.append(f"{field.name}={said(value)}")
        return f"{type(self).__qualname__}({', '.join(shown)})"


@dataclass(frozen=True, repr=False)
class Formula(Brief):
    """A function that says how it was made.

    Example:
        >>> Formula(abs)(-2)
        2
    """

    function: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        """What the function gives."""
        return self.function(*args)


def factory(function: F) -> F:
    """`typed`, for a function that makes a `Brief` or a function, which says by which call it was made.

    Where an argument is given back, it stays what it is.

    Raises:
        UsageTypeError: at a call whose arguments do not fit.

    Example:
        >>> @factory
        ... def power(exponent: int) -> Callable[[int], int]: return lambda x: x**exponent
        >>> power(3), power(3)(2)
        (power(3), 8)
    """
    checked = typed(function)

    @functools.wraps(function)
    def making(*args: Any, **kwargs: Any) -> Any:
        made = checked(*args, **kwargs)
        if any(made is given for given in (*args, *kwargs.values())):
            return made
        if isinstance(made, FunctionType):
            made = Formula(made)
        if isinstance(made, Brief):
            vars(made)[_CALL] = Call(making, args, kwargs)
        return made

    return cast(F, making)


def said(value: object) -> str:
    """The repr of a value without what is of this process alone: functions and classes by their names, no addresses; of
    a tensor and of a module with others inside, no more than what it is.

    Example:
        >>> said([max, said, int, lambda: 1, object()]), said(nn.Sequential(nn.ReLU())), said(nn.ReLU())
        ('[max, said, int, <lambda>, <object object>]', 'Sequential(...)', 'ReLU()')
    """
    if isinstance(value, Tensor) and value.numel() > 1:
        return describe(value)
    if isinstance(value, nn.Module) and next(value.children(), None) is not None:
        return f"{type(value).__name__}(...)"
    return _OF_THIS_PROCESS.sub(r"\1\2\3", repr(value))


_CALL = "_call"
_OF_THIS_PROCESS = re.compile(
    r"<function (\S+) at 0x\w+>|<built-in function (\w+)>|<class '(?:[^']*\.)?(\w+)'>| at 0x[0-9a-fA-F]+"
)


def _same(value: Any, default: Any) -> bool:
    return value is default or (isinstance(value, (type(default), int, float)) and bool(value == default))

"""Every exception of the library, and the one way to call user code, import an extra and deprecate a name.

Each exception is also the builtin that fits, so `except ValueError` works without importing anything from here.
A message has three parts: what was given, what holds, what to write instead.

Example:
    >>> issubclass(UsageError, ValueError) and issubclass(LawError, AssertionError)
    True
"""

import functools
import importlib
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class TntError(Exception):
    """Whatever tnt_func raises on its own account.

    Example:
        >>> raise UsageError("max_epochs=-1 was given")
        Traceback (most recent call last):
        tnt_func.errors.UsageError: max_epochs=-1 was given
    """


class UsageError(TntError, ValueError):
    """An argument has the right type and a value that cannot work: a negative limit, a name used twice."""


class UsageTypeError(TntError, TypeError):
    """An argument has the wrong type: an EvalUnit where a TrainUnit belongs, a list where a State belongs."""


class ContractError(TntError, RuntimeError):
    """A step or a hook broke its contract: returned no State, touched the key or a counter, wrote while evaluating."""


class ConsumedError(TntError, RuntimeError):
    """A state was read whose tensors a donating step has consumed."""


class StructureError(TntError, ValueError):
    """A tree changed, or has not, the structure, shapes, dtypes or devices that it must have."""


class TreeError(TntError, AssertionError):
    """An assertion about a tree failed (`tnt_func.asserts`)."""


class DataError(TntError, ValueError):
    """The data cannot feed the run: it is empty, exhausted, or shorter than the position to resume from."""


class ResumeError(DataError):
    """The open epoch cannot be continued exactly with the data that was given."""


class CheckpointError(TntError, OSError):
    """A checkpoint could not be written, or is missing, incomplete or damaged."""


class RankError(TntError, RuntimeError):
    """A process has not joined the others, has left them, or does something else than they do."""


class LawError(TntError, AssertionError):
    """A unit, callback, metric or observer breaks one of the laws (`tnt_func.testing`)."""


class MissingExtraError(TntError, ImportError):
    """An optional dependency is not installed; the message names the extra that brings it."""


def optional(module: str, *, user: str, extra: str, package: str | None = None) -> Any:
    """A module of an optional dependency, imported where it is used.

    Args:
        module: its full name.
        user: what needs it, for the message.
        extra: the extra of tnt-func that brings it.
        package: what is installed, where its name is not the module's.

    Raises:
        MissingExtraError: it is not installed.

    Example:
        >>> optional("nowhere", user="report", extra="plots")
        Traceback (most recent call last):
        tnt_func.errors.MissingExtraError: report needs nowhere, which is not installed. Run pip install ...
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{user} needs {package or module}, which is not installed. Run pip install 'tnt-func[{extra}]'."
        ) from error


def deprecated(*, since: str, removed_in: str, instead: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Mark a function as going away; every call warns visibly (`FutureWarning`).

    Args:
        since: the first version that warns.
        removed_in: the version that no longer has it.
        instead: the line to write instead.

    Example:
        >>> @deprecated(since="0.2", removed_in="0.4", instead="new(x)")
        ... def old(x): return x
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     _ = old(1)
        >>> str(caught[0].message)
        'old is deprecated since 0.2 and goes in 0.4; write new(x) instead.'
    """

    def mark(function: Callable[P, R]) -> Callable[P, R]:
        message = f"{function.__name__} is deprecated since {since} and goes in {removed_in}; write {instead} instead."

        @functools.wraps(function)
        def warned(*args: P.args, **kwargs: P.kwargs) -> R:
            warnings.warn(message, FutureWarning, stacklevel=2)
            return function(*args, **kwargs)

        return warned

    return mark


def kind_of(value: object) -> str:
    """The type of a value, as a message says it.

    Example:
        >>> kind_of([3]), kind_of(3), kind_of(int), kind_of(None)
        ('a list', 'an int', 'the class int', 'None')
    """
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    name = type(value).__name__
    return f"{'an' if name[0] in 'AEIOaeio' else 'a'} {name}"


def call(owner: str, function: Callable[..., R], *args: object) -> R:
    """Call user code; a StopIteration from it, which would end a loop silently, becomes an error that names it.

    Example:
        >>> call("the hook", next, iter(()))
        Traceback (most recent call last):
        tnt_func.errors.ContractError: the hook raised StopIteration; ...
    """
    try:
        return function(*args)
    except StopIteration as error:
        raise ContractError(
            f"{owner} raised StopIteration; that would end the epoch in silence. Call next(iterator, default) there, "
            "or raise another error."
        ) from error

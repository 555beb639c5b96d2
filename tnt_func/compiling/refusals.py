"""What a compiled step must not do, and which line of it does."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tnt_func.errors import ContractError, TntError


class Unreadable:
    """In place of what goes round a compiled step. It may be passed on, and not looked at.

    Args:
        name: how the step spells it.
        advice: what to write instead.
        by: who must not look.

    Example:
        >>> Unreadable("state.key", "Draw with torch.randn").seed
        Traceback (most recent call last):
        tnt_func.errors.ContractError: the step reads state.key; it goes round a compiled step. Draw with torch.randn.
    """

    def __init__(self, name: str, advice: str, by: str = "the step"):
        self._name, self._advice, self._by = name, advice, by

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise ContractError(f"{self._by} reads {self._name}; it goes round a compiled step. {self._advice}.")

    __getattr__ = __getitem__ = __iter__ = __len__ = __bool__ = __call__ = _refuse
    __eq__ = __lt__ = __le__ = __gt__ = __ge__ = __add__ = __radd__ = __mod__ = __int__ = __index__ = _refuse
    __hash__ = object.__hash__


@contextmanager
def explained(name: str, step: Any) -> Iterator[None]:
    """Errors of tracing, told with the line of the step that asked for a value.

    Raises:
        ContractError: in place of torch's own errors about values that are not there.
    """
    try:
        yield
    except TntError:
        raise
    except Exception as error:
        if type(error).__name__ not in _VALUES:
            error.add_note(f"This was while {name} was compiled; {_line(error)}.")
            raise
        raise ContractError(
            f"{name} looks at the value of a tensor; {_line(error)}. A compiled step is traced without values: no "
            "branch on one, no .item(), no size that depends on one. Write torch.where(condition, a, b), or look in a "
            "hook."
        ) from error


_VALUES = {
    "DataDependentOutputException",
    "DynamicOutputShapeException",
    "GuardOnDataDependentSymNode",
    "UnsupportedOperatorException",
    "PendingUnbackedSymbolNotFound",
}


def _line(error: BaseException) -> str:
    """The innermost line that is neither torch's nor this library's."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not any(part in frame.filename for part in _LIBRARIES)]
    frame = (own or frames)[-1]
    return f"{frame.filename}, line {frame.lineno}: {frame.line}"


_LIBRARIES = ("/torch/", "/tnt_func/", "<frozen", "\\torch\\", "\\tnt_func\\", "contextlib.py")

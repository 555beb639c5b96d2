"""What is compiled, and how long that takes, on the console while it happens.

Example:
    >>> from tnt_func.compiling import Compilation
    >>> told = compilations(file=sys.stdout)
    >>> told(Compilation("train_step", 1, None)); told(Compilation("train_step", 1, None, done=True))
    compiling train_step ...
    compiled train_step in ... s
"""

import sys
import time
from typing import Any

from tnt_func.compiling import Compilation, OnCompile
from tnt_func.observers.console import Text
from tnt_func.types import typed


@typed
def compilations(*, file: Text | None = None) -> OnCompile:
    """What `tnt.compiled(unit, on_compile=...)` calls, printing a line before each compilation and one after it.

    A unit that is given nothing to call has this one where the standard error is a terminal.

    Args:
        file: open, written to; None is the standard error of the moment, which keeps a run's own output apart.

    Example:
        >>> import tnt_func as tnt
        >>> unit = tnt.compiled(tnt.EvalUnit(eval_step=max), on_compile=compilations())
    """
    return _lines(file)


def _lines(file: Any) -> OnCompile:
    begun: dict[tuple[str, int], float] = {}

    def printing(compilation: Compilation) -> None:
        what = compilation.step, compilation.number
        if compilation.done:
            line = f"compiled {compilation.step} in {time.perf_counter() - begun.pop(what):.1f} s"
        else:
            begun[what] = time.perf_counter()
            line = f"compiling {compilation.step} ..." + (f" again: {compilation.reason}" if compilation.reason else "")
        print(line, file=sys.stderr if file is None else file, flush=True)

    return printing


_to_the_error = _lines(None)


def to_a_terminal(compilation: Compilation) -> None:
    """Print where the standard error is a terminal."""
    if sys.stderr.isatty():
        _to_the_error(compilation)

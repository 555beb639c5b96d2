"""The command line: `python -m tnt_func inspect | diff | verify PATH...`.

Ends with 0 where things are equal, 1 where they differ and 2 where they cannot be compared, as diff(1) does. What is in
a record is read, never imported or executed; `verify --run` imports the module that its user names.
"""

import argparse
import importlib
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tnt_func.checkpoint.restoring import inspect
from tnt_func.checkpoint.saving import MANIFEST
from tnt_func.errors import TntError, UsageError
from tnt_func.replay.differing import diff
from tnt_func.replay.rows import Record
from tnt_func.replay.verifying import verify

SHOWN = 10
"""How many of the last rows `inspect` shows."""


def main(arguments: Sequence[str] | None = None, *others: Callable[[Any], None]) -> int:
    """Run a command and return its exit code.

    Args:
        arguments: of the command line; None takes the process's.
        others: add further commands, each with `act`, the function of its arguments that gives the exit code.

    Example:
        >>> main(["inspect", "nowhere"])
        2
    """
    parser = argparse.ArgumentParser(prog="python -m tnt_func", description="Look at records and checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("inspect", help="what a record or a checkpoint holds")
    command.add_argument("path", nargs="+", type=Path)
    command = commands.add_parser("diff", help="what differs first between two records, or two checkpoints")
    command.add_argument("a", type=Path)
    command.add_argument("b", type=Path)
    command = commands.add_parser("verify", help="whether a recorded run gives again what was recorded")
    command.add_argument("path", type=Path)
    command.add_argument(
        "--run",
        required=True,
        metavar="MODULE:FUNCTION",
        help="a function of yours that returns (unit, state, data), or with a dict of the call's other arguments as a "
        "fourth; its module is imported",
    )
    command.add_argument("--sample", type=int, help="so many segments instead of all")
    command.add_argument("--seed", type=int, default=0, help="which segments")
    command.add_argument("--fingerprint", help="of the data, as it was recorded")
    for add in others:
        add(commands)
    given = parser.parse_args(arguments)
    try:
        if "act" in given:
            return given.act(given)
        if given.command == "inspect":
            print("\n\n".join(_inspected(path) for path in given.path))
            return 0
        if given.command == "diff":
            found = diff(given.a, given.b)
            print(found or "the same")
            return int(found is not None)
        unit, state, data, options = _run(given.run)
        chosen = {"sample": given.sample, "seed": given.seed, "fingerprint": given.fingerprint}
        verdict = verify(given.path, unit, state, data, **chosen, **options)
        print(verdict)
        return int(not verdict.ok)
    except TntError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except Exception:
        # Of the user's own code; python would end with 1, which says that the run differs.
        traceback.print_exc()
        return 2


def _run(named: str) -> tuple[Any, Any, Any, dict[str, Any]]:
    module, _, function = named.partition(":")
    try:
        made = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(
            f"--run {named} was given: {error}. Write --run module:function, importable from here."
        ) from error
    if not isinstance(made, tuple) or len(made) not in (3, 4):
        raise UsageError(
            f"--run {named} gave {made!r}; it returns (unit, state, data), or (unit, state, data, options)."
        )
    return (*made, {})[:4] if len(made) == 3 else made


def _inspected(path: Path) -> str:
    if (path / MANIFEST).exists():
        manifest = inspect(path)
        head = {"checkpoint": path, **manifest.static, "tnt_func": manifest.tnt_func, "torch": manifest.torch}
        return f"{_table(head.items())}\n\n{_table(manifest.leaves.items())}"
    record = Record.read(path)
    steps = [row for row in record.rows if row.row == "step"]
    calls = [index for index, row in enumerate(record.rows) if row.row == "call"]
    head: dict[str, Any] = {"record": path}
    if record.rows:
        head |= asdict(record.lineage_at(len(record.rows) - 1))
        head["calls"] = ", ".join(f"from step {record.rows[index].step}" for index in calls)
        head["steps"] = f"{steps[0].step} to {steps[-1].step}" if steps else "none"
        head["digests"] = sum(row.digest is not None for row in record.rows)
        head["checkpoints"] = ", ".join(str(record.rows[index].step) for index in record.checkpoints())
    names = list(dict.fromkeys(name for row in steps[-SHOWN:] for name in row.numbers or {}))
    last = [[row.step, row.epoch, *((row.numbers or {}).get(name, "-") for name in names)] for row in steps[-SHOWN:]]
    return f"{_table(head.items())}\n\n{_table([['step', 'epoch', *names], *last])}"


def _table(lines: Iterable[Sequence[Any]]) -> str:
    cells = [[f"{cell:.6g}" if isinstance(cell, float) else str(cell) for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)

"""`python -m tnt_func report DIR... [-o report.html]`."""

import argparse
from pathlib import Path
from typing import Any

from tnt_func.reports.page import report


def command(commands: Any) -> None:
    """Add the command to those of `tnt_func.replay.shell`.

    Example:
        >>> from tnt_func.replay.shell import main
        >>> main(["report", "nowhere"], command)
        2
    """
    parser = commands.add_parser("report", help="a page that shows a run, or compares several with the first")
    parser.add_argument("run", nargs="+", type=Path, help="a directory of a run, or a file of its rows")
    parser.add_argument("-o", "--output", type=Path, default=Path("report.html"), help="report.html if not given")
    parser.add_argument("--names", nargs="+", help="of the runs; otherwise those of their directories")
    parser.add_argument("--title", help="of the page")
    parser.set_defaults(act=_act)


def _act(given: argparse.Namespace) -> int:
    print(report(*given.run, path=given.output, names=given.names, title=given.title))
    return 0

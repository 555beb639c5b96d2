"""`python -m tnt_func`: see `tnt_func.replay.shell` and `tnt_func.reports.shell`."""

import sys

from tnt_func.replay.shell import main
from tnt_func.reports.shell import command

if __name__ == "__main__":
    sys.exit(main(None, command))

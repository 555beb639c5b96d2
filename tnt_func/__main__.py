"""`python -m tnt_func`: see `tnt_func.replay.shell`."""

import sys

from tnt_func.replay.shell import main

if __name__ == "__main__":
    sys.exit(main())

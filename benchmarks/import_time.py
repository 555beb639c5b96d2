"""What `import tnt_func` costs beside `import torch`, and which packages it brings in that it could do without: none.

CPU time in fresh interpreters, each of which imports torch and then tnt_func, so that both meet the same machine. They
are read from bytecode, as pip leaves them.
"""

import os
import statistics
import subprocess
import sys

ROUNDS, BAR = 21, 1.15
TIMED = (
    "import time; start = time.process_time(); import torch; between = time.process_time(); import tnt_func; "
    "print(between - start, time.process_time() - between)"
)
ADDED = (
    "import sys, torch; before = set(sys.modules); import tnt_func; "
    "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names))"
)


def python(code: str) -> str:
    writing = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=writing).stdout.strip()


if __name__ == "__main__":
    python(TIMED)
    turns = [tuple(map(float, python(TIMED).split())) for _ in range(ROUNDS)]
    for module, seconds in zip(("torch", "tnt_func after it"), zip(*turns, strict=True), strict=True):
        print(f"import {module:19}{statistics.median(seconds):6.3f} s ({min(seconds):.3f} - {max(seconds):.3f})")
    ratios = [(torchs + ours) / torchs for torchs, ours in turns]
    print(
        f"{statistics.median(ratios):.3f} ({min(ratios):.3f} - {max(ratios):.3f}) times import torch; the bar is {BAR}"
    )
    extra = set(python(ADDED).split()) - {"tnt_func"}
    print(f"packages imported beside torch and tnt_func: {', '.join(sorted(extra)) or 'none'}")

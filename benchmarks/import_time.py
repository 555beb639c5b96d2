"""What `import tnt_func` costs beside `import torch`, and which packages it brings in that it could do without: none.

CPU time inside fresh interpreters, the two imports in turn, so that both meet the same machine; ratios within a turn.
Both are read from bytecode, as pip leaves them.
"""

import os
import statistics
import subprocess
import sys

ROUNDS, BAR = 21, 1.15
TIMED = "import time; start = time.process_time(); import {0}; print(time.process_time() - start)"
ADDED = (
    "import sys, torch; before = set(sys.modules); import tnt_func; "
    "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names))"
)


def python(code: str) -> str:
    writing = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=writing).stdout.strip()


if __name__ == "__main__":
    times: dict[str, list[float]] = {"torch": [], "tnt_func": []}
    for module in times:
        python(TIMED.format(module))
    for turn in range(ROUNDS):
        for module in sorted(times, reverse=turn % 2 == 0):
            times[module].append(float(python(TIMED.format(module))))
    for module, seconds in times.items():
        print(f"import {module:10}{statistics.median(seconds):7.3f} s ({min(seconds):.3f} - {max(seconds):.3f})")
    ratios = [ours / torchs for ours, torchs in zip(times["tnt_func"], times["torch"], strict=True)]
    print(
        f"{statistics.median(ratios):.3f} ({min(ratios):.2f} - {max(ratios):.2f}) times import torch; the bar is {BAR}"
    )
    extra = set(python(ADDED).split()) - {"tnt_func", "beartype"}
    print(f"packages imported beside torch, tnt_func and beartype: {', '.join(sorted(extra)) or 'none'}")

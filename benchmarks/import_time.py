"""What `import tnt_func` costs beside `import torch`, and which optional packages it brings in: it must be none.

Each import is timed inside a fresh interpreter, the two in turn, so that both meet the same machine.
"""

import statistics
import subprocess
import sys

ROUNDS, BAR = 15, 1.15
OPTIONAL = ("numpy", "hypothesis", "pytest", "tensorboard", "sklearn", "safetensors", "torchtnt", "tqdm")
TIMED = "import time; start = time.perf_counter(); import {0}; print(time.perf_counter() - start)"
ADDED = (
    "import sys, torch; before = set(sys.modules); import tnt_func; "
    "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names))"
)


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    times: dict[str, list[float]] = {"torch": [], "tnt_func": []}
    for module in times:
        python(TIMED.format(module))
    for turn in range(ROUNDS):
        for module in sorted(times, reverse=turn % 2 == 0):
            times[module].append(float(python(TIMED.format(module))))
    for module, seconds in times.items():
        print(f"import {module:10}{statistics.median(seconds):7.3f} s ({min(seconds):.3f} - {max(seconds):.3f})")
    ratio = statistics.median(times["tnt_func"]) / statistics.median(times["torch"])
    added = python(ADDED).split()
    print(f"{ratio:.3f} times import torch, medians of {ROUNDS}; the bar is {BAR}")
    print(f"packages that import tnt_func adds to torch's: {', '.join(added)}")
    print(f"optional ones among them: {', '.join(name for name in added if name in OPTIONAL) or 'none'}")

"""A run split at every step, in fresh processes, and killed at random moments, ends on the bits of the whole run."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent / "checkpoint_runs.py"


def process(*arguments: object) -> list[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parent.parent)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, env=environment)
    # The workers of a killed process may say so on their way out.
    assert done.returncode == 0 and (not done.stderr or arguments[0] == "torture"), done.stdout + done.stderr
    return done.stdout.split("\n")[:-1]


def test_every_split_in_a_fresh_process_ends_on_the_same_bits(tmp_path: Path):
    """Dropout, BatchNorm, augmentation, accumulation, clipping, a schedule, an average, early stopping, metrics."""
    digest, paused = process("every", tmp_path)
    *ends, resumed = process("split", tmp_path)
    assert len(ends) == 3 * 18 and set(ends) == {digest}
    assert paused != digest and resumed == digest


def test_killed_at_random_moments_it_resumes_to_the_same_bits():
    *log, verdict = process("torture", "--kills", 20, "--seed", os.urandom(2)[0])
    kills = sum(line.startswith("kill ") for line in log)
    assert kills >= 20 and verdict == f"{kills} kills, 0 wrong", "\n".join(log)

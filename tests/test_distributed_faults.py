"""A rank that is killed, hangs, fails, is asked to end or never comes: the run goes on, or all end and say why."""

import json
import os
import re
from pathlib import Path

from distributed_worlds import process


def test_killed_at_random_moments_and_started_again_by_torchrun_a_run_ends_on_the_same_bits():
    done = process("distributed_faults.py", "torture", "--kills", 5, "--seed", os.urandom(2)[0])
    *log, verdict = done.stdout.splitlines()
    kills = sum(line.startswith("kill ") for line in log)
    assert kills >= 5 and verdict == f"{kills} kills, 0 wrong", done.stdout + done.stderr


def test_an_error_of_one_rank_ends_all_and_is_the_one_that_is_shown(tmp_path: Path):
    """Under torchrun's command line, which has started the processes again after a kill, each with its own hashes."""
    start = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "--max-restarts", 1)
    done = process(*start, "distributed_faults.py", "error", tmp_path)
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert done.returncode == 1 and ranks[0] == ranks[1], done.stderr
    named, start, (ended, unbroken) = ranks[0]
    assert named.startswith(
        "LawError: law 2 (determinism) is broken at train step_end (epoch 0, step 1): rank 1 differs"
    )
    assert re.search(r"train_step is where it begins\n  state.params\['w'\]: [12] of 2 elements differ", named)
    assert 1 <= start <= 13 and ended == unbroken
    (root,) = re.findall(r"Root Cause \(first observed failure\):\n(.*)", done.stderr, re.DOTALL)
    assert "rank      : 1" in root and "ValueError: the disk of rank 1 is full" in root


def test_ranks_do_not_wait_for_ever_and_end_together_when_asked(tmp_path: Path):
    done = process("distributed_faults.py", "waits", tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "waits.json").read_text())
    assert found["hangs"].startswith("RankError: ") and "did not come in time" in found["hangs"]
    assert found["never joins"].startswith(
        "RankError: rank 1 has waited 2 seconds, and of 3 ranks not all have joined: 0, 2 missing"
    )
    assert found["signalled"] == ["11", "11"]
    assert found["kept"] == ["step-000000000010-epoch-000001", "step-000000000011-epoch-000001"]
    assert len({*found["ended"]}) == 1

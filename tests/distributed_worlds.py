"""Worlds of real processes that talk by gloo, under torchrun's own agent, forked from one that has imported torch.

A rank starts in 20 ms then, and not in three seconds; the agent, its restarts and its environment are torchrun's.
"""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# DTensor would import it on each rank.
import torch._dynamo  # noqa: F401
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import tnt_func as tnt

TESTS = Path(__file__).parent
Found = list[dict[str, Any]]
_numbers = itertools.count()


def started(size: int, work: Callable[..., Any], *args: Any, restarts: int = 0, joins: bool = True) -> list[Any]:
    """What each rank returns of `work(world, *args)`; of `work(*args)`, which joins the others itself, if not joins."""
    config = LaunchConfig(
        1,
        1,
        size,
        run_id=f"{os.getpid()}-{next(_numbers)}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        start_method="fork",
        monitor_interval=0.02,
        max_restarts=restarts,
    )
    found = elastic_launch(config, _joined)(work, *args) if joins else elastic_launch(config, work)(*args)
    return [found[rank] for rank in range(size)]


def _joined(work: Callable[..., Any], *args: Any) -> Any:
    with tnt.distributed.init(device="cpu") as world:
        return work(world, *args)


def process(*command: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script of this folder in a process of its own."""
    paths = os.pathsep.join([str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **environment}
    command = (sys.executable, *map(str, command))
    return subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True, timeout=1200)


def found_by(script: str, size: int) -> Found:
    """What each rank of a world found, of a script that takes its size and prints that last."""
    done = process(script, size)
    assert done.returncode == 0, f"{done.args}\n{done.stderr}"
    return json.loads(done.stdout.splitlines()[-1])


def same(found: Found, name: str) -> Any:
    """What all ranks agree on."""
    values = [each[name] for each in found]
    assert all(value == values[0] for value in values), f"{name}: {values}"
    return values[0]

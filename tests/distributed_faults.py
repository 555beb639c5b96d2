"""What goes wrong on one rank: it is killed, hangs, is asked to end, has an error, or never comes.

python tests/distributed_faults.py torture    kill -9 of a rank at random moments, torchrun's restart; a line each
python tests/distributed_faults.py waits DIRECTORY    what the others say of a rank that they wait for, as JSON
torchrun --nproc-per-node 2 --max-restarts 1 tests/distributed_faults.py error DIRECTORY    a kill, then an error
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from distributed_runs import DATA, EVAL_DATA, laid, prepared, refusal
from distributed_units import ORDER
from distributed_worlds import started
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.elastic.multiprocessing import SignalException

import tnt_func as tnt
from tnt_func.testing import check_ranks

KINDS, STEPS = ("replicated", "sharded"), 16


def trained(world: tnt.distributed.World, directory: Path, kind: str, observers: Any = (), pause: Any = None) -> Any:
    """Go on from what a directory has, saving after every step: in the background by rank 0, or by all, their parts."""
    cut = lambda data: data.shard(world.rank, world.size)  # noqa: E731
    like = prepared()[1]
    if kind == "sharded":
        unit, first, mesh = laid(world, kind, like)
        saving = tnt.distributed.checkpointer(directory, mesh, every_n_steps=1, keep=2)
        state = tnt.distributed.resume(directory, first, mesh)
    else:
        # What is there is known to rank 0 alone.
        like = tnt.checkpoint.resume(directory, like) if world.rank == 0 else like
        unit, state, mesh = laid(world, kind, like)
        saving = tnt.observers.checkpointer(directory, every_n_steps=1, keep=2, asynchronous=True)
        saving = tnt.observers.rank_zero(saving)
    pause = tnt.distributed.agreed(pause, mesh) if pause else None
    options = {"max_steps": STEPS, "evaluate_every_n_steps": 5, "pause_when": pause}
    return tnt.fit(unit, state, cut(DATA), cut(EVAL_DATA), observers=[*observers, saving], **options)


def ended(world: tnt.distributed.World, directory: Path, kind: str) -> str:
    return tnt.digest(tnt.distributed.gather(trained(world, directory, kind)))


def attempt(directory: str, kind: str, seconds: float, kills: int, size: int, seed: str) -> str:
    """One start of a rank, which may be killed at any moment, before it has joined, too."""
    number, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
    choice = random.Random(f"{seed} {number}")
    victim, moment = choice.randrange(size), choice.uniform(0, seconds)
    if number < kills and rank == victim:
        kill_after(moment, Path(directory), f"rank {rank} of {size} after {moment:.3f} of {seconds:.3f} s, {kind}")
    with tnt.distributed.init(device="cpu") as world:
        return ended(world, Path(directory) / "checkpoints", kind)


def kill_after(moment: float, directory: Path, said: str) -> None:
    """Have a process of its own kill this one, wherever it is by then."""
    victim = os.getpid()
    if os.fork():
        return
    time.sleep(moment)
    if os.getppid() == victim:
        last = tnt.checkpoint.latest(directory / "checkpoints")
        with open(directory / "kills", "a") as log:
            log.write(f"{said}; latest {last.name if last else 'none'}\n")
        os.kill(victim, signal.SIGKILL)
    os._exit(0)


def torture(kills: int, seed: int) -> int:
    """Kill ranks until there were so many kills; how often a run ended elsewhere than the unbroken one."""
    choice, done, wrong, unbroken = random.Random(seed), 0, 0, dict[Any, tuple[str, float]]()
    print(f"seed {seed}")
    for kind in itertools.cycle(KINDS):
        if done >= kills:
            break
        # What a test asks for is done in worlds of two, which take less.
        size = choice.choice((2, 4)) if kills > 5 else 2
        if (kind, size) not in unbroken:
            with tempfile.TemporaryDirectory() as directory:
                began = time.monotonic()
                digests = started(size, ended, Path(directory), kind)
                assert len({*digests}) == 1
                unbroken[kind, size] = digests[0], time.monotonic() - began
        digest, seconds = unbroken[kind, size]
        with tempfile.TemporaryDirectory() as directory:
            many = min(kills - done, 4)
            given = (directory, kind, seconds, many, size, f"{seed} {done}")
            found = started(size, attempt, *given, restarts=many, joins=False)
            log = (Path(directory) / "kills").read_text().splitlines() if (Path(directory) / "kills").exists() else []
        for line in log:
            done += 1
            print(f"kill {done}: {line}")
        wrong += {*found} != {digest}
        print(f"ended: {'the same digest' if {*found} == {digest} else f'{found}, not {digest}'}", flush=True)
    print(f"{done} kills, {wrong} wrong")
    return wrong


def waits(directory: Path) -> dict[str, Any]:
    """A rank that hangs, one that never joins, and a job that is asked to end; what there is to be seen."""
    found: dict[str, Any] = {}
    with contextlib.suppress(Exception):
        started(2, hangs, directory, joins=False)
    found["hangs"] = (directory / "hangs").read_text()
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {"RANK": "1", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    os.environ |= environment
    found["never joins"] = refusal(tnt.distributed.init, device="cpu", timeout=2)
    for name in environment:
        del os.environ[name]
    with contextlib.suppress(SignalException):
        started(2, asked_to_end, directory, joins=False)
    found["signalled"] = [(directory / f"signalled-{rank}").read_text() for rank in range(2)]
    checkpoints = directory / "asked"
    found["kept"] = sorted(path.name for path in checkpoints.iterdir())
    found["ended"] = started(2, ended, checkpoints, "sharded") + started(2, ended, directory / "anew", "sharded")
    return found


def hangs(directory: Path) -> None:
    """Rank 1 stays away from the third step; the other says so when its patience is over."""
    with tnt.distributed.init(device="cpu", timeout=5) as world:

        def stay(event: tnt.Event) -> None:
            if (world.rank, event.point, event.state.progress.train.steps) == (1, "step_end", 3):
                signal.pause()

        (directory / "hangs").write_text(refusal(trained, world, directory / "hanging", "replicated", [stay]))
        os._exit(1)


def asked_to_end(directory: Path) -> None:
    """At step 11 of one rank torchrun itself gets a SIGTERM, and passes it on to all."""

    def ask(event: tnt.Event) -> None:
        if (int(os.environ["RANK"]), event.point, event.state.progress.train.steps) == (1, "step_end", 11):
            os.kill(os.getppid(), signal.SIGTERM)
            while not signalled():
                time.sleep(0.01)

    with tnt.distributed.init(device="cpu") as world, tnt.pausing.on_signal(signal.SIGTERM) as signalled:
        state = trained(world, directory / "asked", "sharded", [ask], signalled)
        (directory / f"signalled-{world.rank}").write_text(f"{state.progress.train.steps}")
    os._exit(0)  # torchrun has forked it, and would wait for what it returns.


def error(world: tnt.distributed.World, directory: Path) -> None:
    """The first attempt is killed; the second goes on from the last checkpoint, and then has an error."""
    mesh, first = tnt.distributed.mesh(world), os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    named = refusal(ORDER().check, check_ranks, mesh=mesh)

    def kill(event: tnt.Event) -> None:
        if first and (world.rank, event.point, event.state.progress.train.steps) == (1, "step_end", 13):
            os.kill(os.getpid(), signal.SIGKILL)

    start = tnt.distributed.resume(directory / "run", prepared()[1], mesh).progress.train.steps
    state = trained(world, directory / "run", "replicated", [kill])
    unbroken = trained(world, directory / "unbroken", "replicated")
    digests = [tnt.digest(state), tnt.digest(unbroken)]
    (directory / f"rank-{world.rank}.json").write_text(json.dumps([named, start, digests]))

    def fail(event: tnt.Event) -> None:
        if world.rank == 1 and event.state.progress.train.steps == STEPS:
            raise ValueError("the disk of rank 1 is full")

    trained(world, directory / "failing", "replicated", [fail])


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("torture", "waits", "error"))
    parser.add_argument("directory", nargs="?", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.what == "torture":
        sys.exit(torture(given.kills, given.seed) > 0)
    if given.what == "waits":
        (given.directory / "waits.json").write_text(json.dumps(waits(given.directory)))
    else:
        with tnt.distributed.init(device="cpu") as world:
            error(world, given.directory)

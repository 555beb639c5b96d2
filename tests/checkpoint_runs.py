"""A run with everything in it that a checkpoint must carry; in processes of its own it is split, resumed and killed.

python tests/checkpoint_runs.py every DIRECTORY   save every resumable state, and begin a run; print the last digests
python tests/checkpoint_runs.py split DIRECTORY   continue each, in one to three pieces, and the run; print the digests
python tests/checkpoint_runs.py torture           kill -9 at random moments, resume, compare; a line each
"""

import argparse
import contextlib
import functools
import itertools
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import tnt_func as tnt

EPOCHS, BATCHES, EVAL_BATCHES = 3, 5, 2
WORKERS = (0, 2)


class Augmented(Dataset[Any]):
    """Rows with noise from every generator."""

    def __init__(self, batches: int):
        self.batches = batches

    def __len__(self) -> int:
        return 8 * self.batches

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        row = torch.sin(torch.arange(4.0) * (index + 1))
        noise = torch.rand(4) + np.random.rand() + random.random()
        return row + 0.1 * noise, row.sum()[None]


def loader(batches: int, workers: int = 0) -> DataLoader[Any]:
    return DataLoader(Augmented(batches), batch_size=8, shuffle=True, num_workers=workers)


def prepared() -> tuple[tnt.FitUnit, tnt.State]:
    """Dropout, BatchNorm, clipping, accumulation over epochs' ends, a schedule, an average, early stopping."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 1))
    lr = tnt.schedules.cosine(1e-2, steps=6)
    optimizer = tnt.optim.chain(tnt.optim.clip_by_global_norm(1.0), tnt.optim.accumulate(tnt.optim.adamw(lr), 4))
    unit, state = tnt.supervised(module, nn.functional.mse_loss, optimizer, key=tnt.key(3))
    stopping = tnt.callbacks.early_stopping("loss", patience=50)
    unit = tnt.attach(tnt.transforms.ema(unit, 0.9), stopping)
    return unit, tnt.prepare(unit, state)


OPTIONS: dict[str, Any] = {"max_epochs": EPOCHS, "evaluate_every_n_steps": 4, "evaluate_every_n_epochs": 1}


def events(state: tnt.State, pause_when: Callable[[], bool] | None = None) -> Iterator[tnt.Event]:
    return tnt.fit_events(prepared()[0], state, loader(BATCHES), loader(EVAL_BATCHES), **OPTIONS, pause_when=pause_when)


def run(directory: Path, workers: int = 0, asynchronous: bool = False, pause_after: int = -1) -> str:
    """Train on from what a directory has."""
    saving = tnt.observers.checkpointer(directory, every_n_steps=1, keep=3, asynchronous=asynchronous)
    unit, like = prepared()
    state, asked = tnt.checkpoint.resume(directory, like), itertools.count()
    pause_when = tnt.pausing.until(lambda: next(asked) == pause_after)
    state = tnt.fit(
        unit,
        state,
        loader(BATCHES, workers),
        loader(EVAL_BATCHES),
        **OPTIONS,
        observers=[saving],
        pause_when=pause_when,
    )
    return tnt.digest(state)


def every(directory: Path) -> str:
    """Save every resumable state under its place in the order."""
    digest = ""
    for index, event in enumerate(events(prepared()[1])):
        if event.resumable:
            tnt.checkpoint.save(directory / f"{index:03}", event.state)
        digest = tnt.digest(event.state)
    return digest


def split(directory: Path, seed: int = 0) -> list[str]:
    """Where each of the saved states leads, with up to two more splits on the way, each through a checkpoint."""
    choice, like, digests = random.Random(seed), prepared()[1], list[str]()
    for start, pieces in itertools.product(sorted(directory.iterdir()), (1, 2, 3)):
        state = tnt.checkpoint.restore(start, like)
        for _ in range(pieces - 1):
            stop, asked = choice.randrange(12), itertools.count()
            *_, last = events(state, lambda stop=stop, asked=asked: next(asked) == stop)
            with tempfile.TemporaryDirectory() as between:
                tnt.checkpoint.save(f"{between}/x", last.state)
                state = tnt.checkpoint.restore(f"{between}/x", like)
        *_, last = events(state)
        digests.append(tnt.digest(last.state))
    return digests


def forked(work: Callable[[], Any], kill_after: float | None = None, group: bool = False) -> tuple[str, float]:
    """What a process of its own returns, and how long it took; nothing, where it is killed before."""
    mouth, ear = os.pipe()
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(mouth)
        os.setsid()
        try:
            os.write(ear, str(work()).encode())
        except BaseException as error:
            os.write(ear, repr(error).encode())
        os._exit(0)
    os.close(ear)
    if kill_after is not None:
        time.sleep(kill_after)
        (os.killpg if group else os.kill)(child, signal.SIGKILL)
        os.waitpid(child, 0)
        # A worker whose parent died before it looked would wait for ever, with its end of the pipe open.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
    with os.fdopen(mouth) as pipe:
        said = pipe.read()
    if kill_after is None:
        os.waitpid(child, 0)
    return said, time.monotonic() - began


def torture(kills: int, seed: int) -> int:
    """Kill a training process at random moments, alone or with its workers; how often what is resumed went wrong."""
    choice, done, wrong = random.Random(seed), 0, 0
    print(f"seed {seed}")
    unbroken = {kind: _unbroken(*kind) for kind in itertools.product(WORKERS, (False, True))}
    while done < kills:
        workers, asynchronous, group = choice.choice(WORKERS), choice.random() < 0.5, choice.random() < 0.5
        digest, seconds = unbroken[workers, asynchronous]
        with tempfile.TemporaryDirectory() as directory:
            training = functools.partial(run, Path(directory), workers, asynchronous)
            for share in (1, 0.5)[: choice.randint(1, 2)]:
                moment = choice.uniform(0, share * seconds)
                if forked(training, moment, group)[0]:
                    continue  # It was done before.
                last, left = tnt.checkpoint.latest(directory), len(list(Path(directory).glob(".*")))
                done += 1
                print(
                    f"kill {done}: {'process group' if group else 'process'} after {moment:.3f} of {seconds:.3f} s, "
                    f"{'a' if asynchronous else ''}synchronous, {workers} workers; "
                    f"latest {last.name if last else 'none'}, {left} half-written"
                )
            said, _ = forked(training)
            wrong += said != digest
            print(f"resumed: {'the same digest' if said == digest else f'{said}, not {digest}'}", flush=True)
    print(f"{done} kills, {wrong} wrong")
    return wrong


def _unbroken(workers: int, asynchronous: bool) -> tuple[str, float]:
    with tempfile.TemporaryDirectory() as directory:
        return forked(functools.partial(run, Path(directory), workers, asynchronous))


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("every", "split", "torture"))
    parser.add_argument("directory", nargs="?", type=Path)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.what == "torture":
        sys.exit(torture(given.kills, given.seed) > 0)
    states, begun = given.directory / "states", given.directory / "run"
    if given.what == "every":
        states.mkdir()
        print(every(states), run(begun, pause_after=7), sep="\n")
    else:
        print(*split(states), run(begun), sep="\n")

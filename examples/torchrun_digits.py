"""Handwritten digits on several processes, with every parameter in parts, paused and gone on with on another number.

torchrun --nproc-per-node 2 examples/torchrun_digits.py --pause-after 100
python examples/torchrun_digits.py

The first command trains on two processes for a while; the second goes on in one, from what both have saved, and does
all of it where nothing was saved. Prints the accuracy on held-out digits. Asked to end by a signal, processes save and
exit with the code 75: start again to go on.
"""

import argparse
import math
import os
import sys

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import tnt_func as tnt

EPOCHS, BATCH = 12, 64


def data() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    pixels, digits = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(digits)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, held_out = order[360:], order[:360]
    return (images[train], labels[train]), (images[held_out], labels[held_out])


def accuracy(scores: Tensor, labels: Tensor) -> Tensor:
    return (scores.argmax(-1) == labels).double().mean()


def show(event: tnt.Event) -> None:
    if event.phase == "eval" and event.point == "end":
        epoch = event.state.progress.train.epochs
        loss = tnt.metrics.compute(event.state, "train")["loss"]
        print(f"epoch {epoch:2}  loss {loss:.3f}  held-out {tnt.metrics.compute(event.state, 'eval')['accuracy']:.3f}")


def main(world: tnt.distributed.World, directory: str, pause_after: float) -> int:
    mesh = tnt.distributed.mesh(world)
    # The same module on every process: a State in parts is cut from States that are the same.
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).to(world.device)
    optimizer = tnt.optim.chain(
        tnt.optim.clip_by_global_norm(1.0), tnt.optim.adamw(tnt.schedules.cosine(1e-2, steps=EPOCHS * 23))
    )
    unit, state = tnt.supervised(module, F.cross_entropy, optimizer, key=tnt.key(0), metrics={"accuracy": accuracy})
    unit = tnt.distributed.data_parallel(unit, mesh)
    like = tnt.distributed.shard(tnt.prepare(unit, state), mesh)

    train, held_out = data()
    batches = tnt.data.source(train).shuffle(tnt.key(1)).batch(BATCH).shard(world.rank, world.size)
    tests = tnt.data.source(held_out).batch(360).shard(world.rank, world.size)
    steps = 0

    def enough() -> bool:
        nonlocal steps
        steps += 1
        return steps > pause_after

    with tnt.pausing.on_signal() as signalled:
        state = tnt.fit(
            unit,
            tnt.distributed.resume(directory, like, mesh),
            batches,
            tests,
            max_epochs=EPOCHS,
            observers=[
                tnt.observers.rank_zero(show),
                tnt.distributed.checkpointer(directory, mesh, every_n_epochs=1, keep=2),
            ],
            pause_when=tnt.distributed.agreed(tnt.pausing.any_of(signalled, enough), mesh),
        )
    if world.rank == 0:
        print(f"after step {state.progress.train.steps} on {world.size} processes")
        print(f"held-out accuracy {tnt.metrics.compute(state, 'eval')['accuracy']:.3f}")
    # Not 0, whichever process got the signal: torchrun then goes on where it still can, and a scheduler knows.
    return 0 if state.progress.train.epochs == EPOCHS or steps > pause_after else os.EX_TEMPFAIL


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", default="runs/digits")
    parser.add_argument("--pause-after", type=float, default=math.inf)
    given = parser.parse_args()
    with tnt.distributed.init() as world:
        code = main(world, given.directory, given.pause_after)
    sys.exit(code)

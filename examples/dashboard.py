"""Three learning rates on the handwritten digits, looked at side by side: curves, times, and where the runs part.

Each run leaves rows, digests and checkpoints in a directory; the report is one file, which any browser opens.
Prints the held-out accuracy of each run and where the report is.
"""

from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import tnt_func as tnt
from tnt_func.observers import jsonl_writer, points, recorder, throughput, timing

EPOCHS, BATCH = 10, 64
FOLDER = Path("dashboard")


def data() -> tuple[TensorDataset, TensorDataset]:
    pixels, digits = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(digits)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, held_out = order[360:], order[:360]
    return TensorDataset(images[train], labels[train]), TensorDataset(images[held_out], labels[held_out])


def accuracy(scores: Tensor, labels: Tensor) -> Tensor:
    return (scores.argmax(-1) == labels).double().mean()


def train(folder: Path, lr: float) -> float:
    """A recorded run; its held-out accuracy."""
    train_set, held_out = data()
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 10))
    optimizer = tnt.optim.adamw(tnt.schedules.cosine(lr, steps=EPOCHS * (len(train_set) // BATCH)))
    unit, state = tnt.supervised(module, F.cross_entropy, optimizer, key=tnt.key(0), metrics={"accuracy": accuracy})
    observers = [
        tnt.replay.record(folder, config={"lr": lr, "batch_size": BATCH, "optimizer": "adamw"}),
        recorder(
            jsonl_writer(folder / "rows.jsonl"),
            every_n_steps=5,
            hyperparameters=["lr"],
            measures=[timing(), throughput(), points()],
        ),
    ]
    loader = DataLoader(train_set, batch_size=BATCH, shuffle=True, drop_last=True)
    state = tnt.fit(unit, state, loader, DataLoader(held_out, 360), max_epochs=EPOCHS, observers=observers)
    return float(tnt.metrics.compute(state, "eval")["accuracy"])


def main() -> None:
    folders = {lr: FOLDER / f"lr-{lr:g}" for lr in (3e-4, 3e-3, 3e-2)}
    for lr, folder in folders.items():
        print(f"lr {lr:<6g}  held-out accuracy {train(folder, lr):.3f}")
    print(tnt.report(*folders.values(), path=FOLDER / "report.html", title="Three learning rates"))


if __name__ == "__main__":
    main()

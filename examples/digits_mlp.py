"""Handwritten digits with a two-layer network: module, loss, optimizer, and `supervised` does the rest.

Prints the accuracy on held-out digits.
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import tnt_func as tnt

EPOCHS, BATCH = 15, 64


def data() -> tuple[TensorDataset, TensorDataset]:
    pixels, digits = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(digits)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, held_out = order[360:], order[:360]
    return TensorDataset(images[train], labels[train]), TensorDataset(images[held_out], labels[held_out])


def accuracy(scores: Tensor, labels: Tensor) -> Tensor:
    return (scores.argmax(-1) == labels).double().mean()


def show(event: tnt.Event) -> None:
    if event.phase == "eval" and event.point == "end":
        epoch = event.state.progress.train.epochs
        loss = tnt.metrics.compute(event.state, "train")["loss"]
        print(f"epoch {epoch:2}  loss {loss:.3f}  held-out {tnt.metrics.compute(event.state, 'eval')['accuracy']:.3f}")


def main() -> None:
    train, held_out = data()
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 10))
    steps = EPOCHS * -(-len(train) // BATCH)
    optimizer = tnt.optim.chain(
        tnt.optim.clip_by_global_norm(1.0), tnt.optim.adamw(tnt.schedules.cosine(1e-2, steps=steps), weight_decay=1e-2)
    )
    unit, state = tnt.supervised(module, F.cross_entropy, optimizer, key=tnt.key(0), metrics={"accuracy": accuracy})
    state = tnt.fit(
        unit,
        state,
        DataLoader(train, batch_size=BATCH, shuffle=True),
        DataLoader(held_out, batch_size=360),
        max_epochs=EPOCHS,
        observers=[show],
    )
    print(f"held-out accuracy {tnt.metrics.compute(state, 'eval')['accuracy']:.3f}")


if __name__ == "__main__":
    main()

"""Handwritten digits with a small convolutional network: BatchNorm, augmentation, a cosine, an average, early stopping.

All of it is a function of the key: run it twice, or stop it in the middle, and it ends on the same bits.
Prints the accuracy on held-out digits.
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

import tnt_func as tnt

EPOCHS, BATCH = 20, 64


class Shifted(Dataset[tuple[Tensor, Tensor]]):
    """Digits moved by up to a pixel each way; the loop seeds what draws here."""

    def __init__(self, images: Tensor, labels: Tensor):
        self.padded, self.labels = F.pad(images, (1, 1, 1, 1)), labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        down, right = torch.randint(3, (2,)).tolist()
        return self.padded[index, :, down : down + 8, right : right + 8], self.labels[index]


def data() -> tuple[Shifted, TensorDataset]:
    pixels, digits = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, torch.tensor(digits)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, held_out = order[360:], order[:360]
    return Shifted(images[train], labels[train]), TensorDataset(images[held_out], labels[held_out])


def block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(block(1, 16), nn.MaxPool2d(2), block(16, 32)),
        *(block(32, 64), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(64, 10)),
    )


def accuracy(scores: Tensor, labels: Tensor) -> Tensor:
    return (scores.argmax(-1) == labels).double().mean()


def show(event: tnt.Event) -> None:
    if event.phase == "eval" and event.point == "end":
        epoch = event.state.progress.train.epochs
        loss = tnt.metrics.compute(event.state, "train")["loss"]
        print(f"epoch {epoch:2}  loss {loss:.3f}  held-out {tnt.metrics.compute(event.state, 'eval')['accuracy']:.3f}")
    if event.phase == "train" and event.point == "end" and event.reason:
        print(f"stopped: {event.reason}")


def main() -> None:
    train, held_out = data()
    steps = EPOCHS * -(-len(train) // BATCH)
    optimizer = tnt.optim.adamw(tnt.schedules.cosine(1e-2, steps=steps), weight_decay=1e-2)
    unit, state = tnt.supervised(network(), F.cross_entropy, optimizer, key=tnt.key(0), metrics={"accuracy": accuracy})
    # Evaluation, and with it early stopping, is of the averaged parameters.
    unit = tnt.transforms.ema(unit, 0.98, warmup=True, evaluate=True)
    state = tnt.fit(
        unit,
        state,
        DataLoader(train, batch_size=BATCH, shuffle=True),
        DataLoader(held_out, batch_size=360),
        max_epochs=EPOCHS,
        callbacks=[tnt.callbacks.early_stopping("accuracy", mode="max", patience=5)],
        observers=[show],
    )
    print(f"held-out accuracy {tnt.metrics.compute(state, 'eval')['accuracy']:.3f}")


if __name__ == "__main__":
    main()

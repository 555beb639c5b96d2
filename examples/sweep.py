"""Learning rate times weight decay, 8 x 8, in one run: the results as a table, and as a heat map in sweep.png."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import tnt_func as tnt

EPOCHS, BATCH = 5, 64
RATES = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1]
DECAYS = [0.0, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0]


def data() -> tuple[TensorDataset, TensorDataset]:
    pixels, digits = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(digits)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, held_out = order[360:], order[:360]
    return TensorDataset(images[train], labels[train]), TensorDataset(images[held_out], labels[held_out])


def accuracy(scores: Tensor, labels: Tensor) -> Tensor:
    return (scores.argmax(-1) == labels).double().mean()


def draw(table: tnt.ensembles.Table) -> None:
    figure, axes = plt.subplots(layout="constrained")
    picture = axes.imshow(table.grid("accuracy"), origin="lower", vmin=0.0, vmax=1.0)
    axes.set(xlabel="weight decay", ylabel="learning rate", title="held-out accuracy")
    axes.set_xticks(range(len(DECAYS)), [f"{decay:g}" for decay in DECAYS])
    axes.set_yticks(range(len(RATES)), [f"{rate:g}" for rate in RATES])
    figure.colorbar(picture)
    figure.savefig("sweep.png", dpi=120)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    metrics = {"accuracy": accuracy}
    unit, state = tnt.supervised(net, F.cross_entropy, tnt.optim.adamw(1e-3), key=tnt.key(0), metrics=metrics)
    train, held_out = data()
    grid = tnt.sweep(unit, {"lr": RATES, "weight_decay": DECAYS})
    end = tnt.fit(
        grid.unit,
        grid.start(state),
        DataLoader(train, batch_size=BATCH, shuffle=True),
        DataLoader(held_out, batch_size=360),
        max_epochs=EPOCHS,
    )
    table = grid.table(end)
    draw(table)
    print(table)
    best = table.best("accuracy", "max")
    print(f"best: lr {best['lr']:g}, weight decay {best['weight_decay']:g}, held-out accuracy {best['accuracy']:.3f}")


if __name__ == "__main__":
    main()

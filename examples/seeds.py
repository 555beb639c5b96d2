"""Sixty-four seeds of a digits network in one run, and the same members one after another.

Draws the band of their curves into seeds.png: every member's held-out loss, their mean and the middle 90 %.
"""

import time

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import tnt_func as tnt
from tnt_func.ensembles import spread

MEMBERS, EPOCHS, BATCH = 64, 6, 64


def data() -> tuple[TensorDataset, TensorDataset]:
    pixels, digits = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(digits)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, held_out = order[360:], order[:360]
    return TensorDataset(images[train], labels[train]), TensorDataset(images[held_out], labels[held_out])


def accuracy(scores: Tensor, labels: Tensor) -> Tensor:
    return (scores.argmax(-1) == labels).double().mean()


def member(seed: int) -> tuple[tnt.FitUnit, tnt.State]:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))
    metrics = {"accuracy": accuracy}
    return tnt.supervised(net, F.cross_entropy, tnt.optim.adamw(3e-3), key=tnt.key(0), metrics=metrics)


def draw(history: tnt.observers.History) -> None:
    rows = [row for row in history if row.phase == "eval"]
    epochs = [row.epoch for row in rows]
    losses = torch.tensor([[row.metrics[f"loss.{index}"] for index in range(MEMBERS)] for row in rows]).T
    band = spread(losses)
    figure, axes = plt.subplots(layout="constrained")
    axes.plot(epochs, losses.T, color="grey", linewidth=0.3)
    axes.fill_between(epochs, band.quantiles[0.05], band.quantiles[0.95], alpha=0.3, label="90 % of the members")
    axes.plot(epochs, band.mean, label=f"mean of {MEMBERS}")
    axes.set(xlabel="epoch", ylabel="held-out loss", yscale="log")
    axes.legend()
    figure.savefig("seeds.png", dpi=120)


def main() -> None:
    torch.set_num_threads(1)
    train, held_out = data()
    loader, held_out_loader = DataLoader(train, batch_size=BATCH, shuffle=True), DataLoader(held_out, batch_size=360)
    made = [member(seed) for seed in range(MEMBERS)]
    states = [state for _, state in made]
    plain = made[0][0]
    unit = tnt.ensemble(plain, MEMBERS)

    history = tnt.observers.History()
    recording = tnt.observers.recorder(history, every_n_steps=1_000)
    start = time.process_time()
    state = tnt.fit(unit, tnt.stack(states), loader, held_out_loader, max_epochs=EPOCHS, observers=[recording])
    together = time.process_time() - start
    draw(history)

    found = spread(tnt.metrics.compute(state, "eval")["accuracy"], quantiles=(0.0, 1.0))
    print(f"held-out accuracy {found.mean:.3f} +- {found.std:.3f}", end=", ")
    print(f"from {found.quantiles[0.0]:.3f} to {found.quantiles[1.0]:.3f}")

    start = time.process_time()
    alone = tnt.fit(plain, states[0], loader, held_out_loader, max_epochs=EPOCHS)
    after_another = (time.process_time() - start) * MEMBERS
    difference = max(
        (one - other).abs().max()
        for one, other in zip(tnt.member(state, 0).params.values(), alone.params.values(), strict=True)
    )
    print(f"member 0 and its run alone differ by {difference:.0e}")
    print(f"{MEMBERS} members in {together:.1f} s of the CPU; one after another they take {after_another:.0f} s")
    print(f"speedup {after_another / together:.1f}")


if __name__ == "__main__":
    main()

"""A network that reads digits learns from twenty examples to tell odd ones from even ones.

Its first layers are frozen, BatchNorm's averages included; the layers after them learn slowly, the new head fast.
Prints the accuracy on held-out digits: of the same network from scratch, and of the one that was trained before.
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import tnt_func as tnt

Batch = tuple[Tensor, Tensor]
EXAMPLES = 20


class Network(nn.Module):
    def __init__(self, classes: int):
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU())
        self.body = nn.Sequential(nn.Linear(128, 64), nn.ReLU())
        self.head = nn.Linear(64, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(self.stem(images)))


def accuracy(scores: Tensor, labels: Tensor) -> Tensor:
    return (scores.argmax(-1) == labels).double().mean()


def data() -> tuple[list[Batch], list[Batch], list[Batch]]:
    """Digits to read; a few others, odd or even; the rest of those, held out."""
    pixels, digits = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(digits)
    read, few, rest = (slice(0, 1000), slice(1000, 1000 + EXAMPLES), slice(1000 + EXAMPLES, None))
    return (
        list(zip(images[read].split(32), labels[read].split(32), strict=True)),
        list(zip(images[few].split(8), (labels[few] % 2).split(8), strict=True)),
        [(images[rest], labels[rest] % 2)],
    )


def learnt(module: Network, optimizer: tnt.optim.Optimizer, train: list[Batch], held_out: list[Batch], epochs: int):
    """The state after so many epochs, and the accuracy on what was held out."""
    unit, state = tnt.supervised(module, F.cross_entropy, optimizer, key=tnt.key(0), metrics={"accuracy": accuracy})
    state = tnt.fit(unit, state, train, held_out, max_epochs=epochs, evaluate_every_n_epochs=epochs)
    return state, float(tnt.metrics.compute(state, "eval")["accuracy"])


def main() -> None:
    digits, few, held_out = data()
    torch.manual_seed(0)
    _, scratch = learnt(Network(2), tnt.optim.adamw(1e-3), few, held_out, epochs=20)
    print(f"from scratch {scratch:.3f}")

    module = Network(10)
    before, known = learnt(module, tnt.optim.adamw(1e-3), digits, digits, epochs=20)
    print(f"on digits {known:.3f}")

    # What was learnt goes into the module, which `supervised` copies from; a module in eval mode stays in it.
    module.load_state_dict({**before.params, **before.buffers})
    module.head = nn.Linear(64, 2)
    module.stem.requires_grad_(False).eval()
    slow_and_fast = tnt.optim.grouped(tnt.optim.adamw(1e-4), [(lambda name: name.startswith("head."), {"lr": 1e-2})])
    after, tuned = learnt(module, slow_and_fast, few, held_out, epochs=20)
    assert all(
        torch.equal(after.buffers[name], tensor) for name, tensor in module.state_dict().items() if "stem" in name
    )
    print(f"held-out accuracy {tuned:.3f}")


if __name__ == "__main__":
    main()

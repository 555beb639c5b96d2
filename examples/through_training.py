"""The gradient of a whole training run: how the final loss moves with the learning rate.

A State is a value and a step is a function, so training is differentiable like anything else: put a learning rate that
requires gradients into `opt_state`, train, and ask autograd. Prints it beside finite differences, and their distance.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tnt_func as tnt

STEPS = 30


def problem() -> tuple[list[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]:
    """Batches to train on and a held-out batch: a noisy sine, float64."""
    noise = torch.Generator().manual_seed(0)
    x = torch.rand(STEPS + 1, 32, 1, dtype=torch.float64, generator=noise) * 6 - 3
    y = x.sin() + 0.1 * torch.randn(x.shape, dtype=torch.float64, generator=noise)
    return list(zip(x[:-1], y[:-1], strict=True)), (x[-1], y[-1])


def final_loss(lr: Tensor) -> Tensor:
    """The held-out loss after training at a learning rate."""
    batches, held_out = problem()
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    model = tnt.from_module(module)
    unit, state = tnt.supervised(module, F.mse_loss, tnt.optim.sgd(0.0, momentum=0.9), key=tnt.key(0))
    state = state.replace(opt_state=tnt.optim.set_hyperparameters(state.opt_state, lr=lr))
    state = tnt.train(unit.train_unit, state, batches, max_epochs=1)
    output, _ = model.apply(state.params, state.buffers, held_out[0], train=False)
    return F.mse_loss(output, held_out[1])


def main() -> None:
    lr = torch.tensor(0.02, dtype=torch.float64, requires_grad=True)
    loss = final_loss(lr)
    (slope,) = torch.autograd.grad(loss, lr)
    step = 1e-6
    with torch.no_grad():
        around = (final_loss(lr + step) - final_loss(lr - step)) / (2 * step)
    print(f"held-out loss {loss:.6f} after {STEPS} steps at lr {lr:.3f}")
    print(f"d loss / d lr, through the run       {slope:.9f}")
    print(f"d loss / d lr, finite differences    {around:.9f}")
    print(f"relative distance {abs((slope - around) / around):.1e}")


if __name__ == "__main__":
    main()

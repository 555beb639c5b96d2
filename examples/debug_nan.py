"""A run ends in NaN: which step, which operation, which batch, and where it would have ended without it.

A layer divides by a standard deviation, with its epsilon outside of the root, and one batch of 500 is the same row over
and over: its loss is finite, its gradient is not. The run is recorded; all that follows is asked of the record:
`bisect` finds step and operation, `diff` says what changed first, `what_if` goes on without the batch.

Prints the loss that the run would have ended on.
"""

import tempfile

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tnt_func as tnt
from tnt_func import replay

STEPS, BAD = 500, 137


class Standardised(nn.Module):
    """Columns of mean 0 and standard deviation 1 over the batch."""

    def forward(self, inputs: Tensor) -> Tensor:
        return (inputs - inputs.mean(0)) / (inputs.var(0).sqrt() + 1e-5)


def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(STEPS, 16, 4, generator=generator)
    inputs[BAD - 1, :] = inputs[BAD - 1, 0]
    return [(batch, torch.sin(batch.sum(1, keepdim=True))) for batch in inputs]


def healthy(state: tnt.State) -> bool:
    return bool(tnt.treemath.all_finite(state.params))


def main() -> None:
    batches = data()
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 16), Standardised(), nn.Tanh(), nn.Linear(16, 1))
    unit, first = tnt.supervised(module, F.mse_loss, tnt.optim.adamw(1e-2), key=tnt.key(0))
    run = unit.train_unit, first, batches
    with tempfile.TemporaryDirectory() as directory:
        watching = replay.record(directory, checkpoint_every_n_steps=100, code="v1", config={"lr": 1e-2})
        state = tnt.train(*run, max_epochs=1, observers=[watching])
        print(f"the run ended on loss {tnt.metrics.compute(state, 'train')['loss']:.3f}")

        found = replay.bisect(directory, *run, lambda state: not healthy(state))
        assert found is not None and found.before is not None
        print(f"not finite: {found}")
        print(
            f"its batch has {len(found.batch[0].unique(dim=0))} distinct rows, its loss is {found.numbers['loss']:.3f}"
        )
        print(f"what the step changed first: {replay.diff(found.before, found.after)}")

        branches = replay.what_if(directory, *run, found.step - 3, replay.Change(without=[found.step]), steps=6)
        print(branches)
        mended = replay.what_if(directory, *run, found.step - 1, replay.Change(without=[found.step])).now
        last = [float(mended.numbers[step]["loss"]) for step in range(STEPS - 99, STEPS + 1)]
        print(f"loss of the last 100 steps without the batch of step {found.step}: {sum(last) / 100:.4f}")


if __name__ == "__main__":
    main()

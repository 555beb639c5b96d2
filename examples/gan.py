"""A generator and its adversary in turns: eight clouds on a circle, learnt from noise.

Each has its own optimizer, and its own part of the state; an objective reads the other's parameters there.
Prints on how many of the clouds the generator puts its points, and how many of the points are on one.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tnt_func as tnt

CLOUDS, SPREAD, BATCH, NOISE, STEPS = 8, 0.1, 128, 4, 3000


def network(inputs: int, outputs: int) -> tnt.Model:
    return tnt.from_module(
        nn.Sequential(
            nn.Linear(inputs, 64), nn.LeakyReLU(0.2), nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, outputs)
        )
    )


def clouds() -> Tensor:
    angles = torch.arange(CLOUDS) * (2 * math.pi / CLOUDS)
    return 2 * torch.stack((angles.cos(), angles.sin()), dim=1)


def points(epoch: int) -> Iterator[Tensor]:
    """An endless epoch; the loop seeds what draws here, and the noise in the step."""
    while True:
        yield clouds()[torch.randint(CLOUDS, (BATCH,))] + SPREAD * torch.randn(BATCH, 2)


def main() -> None:
    torch.manual_seed(0)
    generator, critic = network(NOISE, 2), network(2, 1)

    def generated(params: Any, count: int) -> Tensor:
        return generator.apply(params, {}, torch.randn(count, NOISE), train=True)[0]

    def score(params: Any, points: Tensor) -> Tensor:
        return critic.apply(params, {}, points, train=True)[0]

    def tell_apart(params: Any, state: tnt.State, real: Tensor):
        fake = generated(state.params["generator"], len(real))
        loss = F.softplus(-score(params, real)).mean() + F.softplus(score(params, fake)).mean()
        return loss, (state.buffers, {"critic_loss": loss})

    def deceive(params: Any, state: tnt.State, real: Tensor):
        loss = F.softplus(-score(state.params["critic"], generated(params, len(real)))).mean()
        return loss, (state.buffers, {"generator_loss": loss})

    optimizer = tnt.optim.adamw(1e-3, betas=(0.5, 0.99), weight_decay=0.0)
    unit = tnt.alternate(
        tnt.TrainUnit(train_step=tnt.minimize(tell_apart, optimizer, part="critic")),
        tnt.transforms.ema(tnt.TrainUnit(train_step=tnt.minimize(deceive, optimizer, part="generator")), 0.99),
    )
    params = {"generator": generator.params, "critic": critic.params}
    opt_state = {name: optimizer.init(part) for name, part in params.items()}
    state = tnt.train(unit, tnt.State(params=params, opt_state=opt_state, key=tnt.key(0)), points, max_steps=STEPS)

    average = tnt.transforms.averaged(state, "ema").params["generator"]
    with torch.no_grad(), tnt.rng.scope(tnt.key(1)):
        distance, nearest = torch.cdist(generated(average, 1000), clouds()).min(dim=1)
    near = distance < 4 * SPREAD
    print(f"points on a cloud {near.double().mean():.2f}")
    print(f"clouds found {len(nearest[near].unique())} of {CLOUDS}")


if __name__ == "__main__":
    main()

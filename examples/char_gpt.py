"""A small transformer that learns, letter by letter, from the help texts of Python itself.

Clipping, a warm-up and a cosine; the sample is drawn from the average of the parameters.
Prints the tokens per second, the sample, and the loss of the last epoch, in nats a letter.
"""

import time
from collections.abc import Iterator
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tnt_func as tnt

TEXT = "\n".join(topics[name] for name in sorted(topics) if topics[name].isascii())
LETTERS = sorted(set(TEXT))
TOKENS = torch.tensor([LETTERS.index(letter) for letter in TEXT])
CONTEXT, BATCH, STEPS, EPOCHS = 32, 32, 100, 3


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm, self.attend, self.mix = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.attend(self.norm(x)).chunk(3, -1)
        )
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.mix(seen)
        return x + self.feed(x)


class GPT(nn.Module):
    def __init__(self, width: int = 64, layers: int = 2, heads: int = 4):
        super().__init__()
        self.letters, self.places = nn.Embedding(len(LETTERS), width), nn.Embedding(CONTEXT, width)
        for embedding in (self.letters, self.places):
            nn.init.normal_(embedding.weight, std=0.02)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(LETTERS)))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.blocks(self.letters(tokens) + self.places.weight[: tokens.shape[1]]))


def next_letter(scores: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(scores.flatten(0, 1), targets.flatten())


def windows(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """An epoch of data; the loop seeds what draws here by the epoch and the index."""
    for _ in range(STEPS):
        starts = torch.randint(len(TOKENS) - CONTEXT, (BATCH, 1))
        passage = TOKENS[starts + torch.arange(CONTEXT + 1)]
        yield passage[:, :-1], passage[:, 1:]


def sample(unit: tnt.FitUnit, state: tnt.State, prompt: str, length: int) -> str:
    assert unit.predict_unit is not None
    tokens = [LETTERS.index(letter) for letter in prompt]
    with torch.no_grad(), tnt.rng.scope(tnt.fold_in(state.key, "sample")):
        for _ in range(length):
            _, scores = unit.predict_unit.predict_step(state, [torch.tensor([tokens[-CONTEXT:]])])
            tokens.append(int(torch.multinomial((scores[0, -1] / 0.6).softmax(-1), 1)))
    return "".join(LETTERS[token] for token in tokens)


def show(event: tnt.Event) -> None:
    if event.phase == "train" and event.point == "epoch_end":
        loss = tnt.metrics.compute(event.state, "train")["loss"]
        print(f"epoch {event.state.progress.train.epochs}  loss {loss:.3f}")


def main() -> None:
    torch.manual_seed(0)
    lr = tnt.schedules.warmup(tnt.schedules.cosine(5e-3, steps=STEPS * EPOCHS - 40), steps=40)
    optimizer = tnt.optim.chain(tnt.optim.clip_by_global_norm(1.0), tnt.optim.adamw(lr, betas=(0.9, 0.99)))
    unit, state = tnt.supervised(GPT(), next_letter, optimizer, key=tnt.key(0))
    unit = tnt.transforms.ema(unit, 0.98, evaluate=True)
    started = time.perf_counter()
    state = tnt.train(unit.train_unit, state, windows, max_epochs=EPOCHS, observers=[show])
    seconds = time.perf_counter() - started
    print(f"{state.progress.train.steps * BATCH * CONTEXT / seconds:,.0f} tokens per second")
    print(f"sample: {sample(unit, state, 'The ', 160)!r}")
    print(f"loss {tnt.metrics.compute(state, 'train')['loss']:.3f}")


if __name__ == "__main__":
    main()

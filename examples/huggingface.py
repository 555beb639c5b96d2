"""A Hugging Face transformer, unchanged: `from_module` takes it as it takes any module.

A tiny, randomly initialised BERT learns to tell sequences in which token 1 is more frequent than token 2. Its inputs
are keywords, its output is a dataclass, and the loss is the one it computes itself. Prints the held-out accuracy.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

import tnt_func as tnt

STEPS, LENGTH = 100, 10


def batch(seed: int, size: int = 32) -> tuple[dict[str, Tensor], Tensor]:
    tokens = torch.randint(1, 6, (size, LENGTH), generator=torch.Generator().manual_seed(seed))
    labels = ((tokens == 1).sum(-1) > (tokens == 2).sum(-1)).long()
    return {"input_ids": tokens, "labels": labels}, labels


def loss(output: Any, labels: Tensor) -> Tensor:
    return output.loss


def accuracy(output: Any, labels: Tensor) -> Tensor:
    return (output.logits.argmax(-1) == labels).double().mean()


def main() -> None:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=8, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    module = BertForSequenceClassification(config)
    unit, state = tnt.supervised(module, loss, tnt.optim.adamw(3e-3), key=tnt.key(0), metrics={"accuracy": accuracy})
    state = tnt.train(unit.train_unit, state, lambda epoch: (batch(i) for i in range(STEPS)), max_epochs=1)
    state = tnt.evaluate(unit.eval_unit, state, [batch(10_000 + i) for i in range(8)])
    print(f"loss {tnt.metrics.compute(state, 'eval')['loss']:.3f} after {STEPS} steps")
    print(f"held-out accuracy {tnt.metrics.compute(state, 'eval')['accuracy']:.3f}")


if __name__ == "__main__":
    main()

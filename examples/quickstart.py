"""Tell benign tumours from malignant ones: train, evaluate on held-out rows, pause in mid-epoch and resume.

Everything is a plain function of a state. The model is two matrix products, the optimizer is SGD with momentum written
out, and the step adds noise to its inputs, so that there is randomness for the resumed run to get right.
"""

import itertools

import torch
import torch.nn.functional as F
from sklearn.datasets import load_breast_cancer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import tnt_func as tnt

# 569 tumours of 30 measurements each; every fourth row is held out.
features, labels = load_breast_cancer(return_X_y=True)
inputs = torch.tensor(features, dtype=torch.float32)
targets = torch.tensor(labels, dtype=torch.float32)
held_out = torch.arange(len(inputs)) % 4 == 0

# Standardised by what the training rows alone know.
mean, std = inputs[~held_out].mean(dim=0), inputs[~held_out].std(dim=0)
inputs = (inputs - mean) / std
train_loader = DataLoader(TensorDataset(inputs[~held_out], targets[~held_out]), batch_size=32, shuffle=True)
eval_loader = DataLoader(TensorDataset(inputs[held_out], targets[held_out]), batch_size=64)

Params = dict[str, Tensor]
Batch = tuple[Tensor, Tensor]
Output = dict[str, Tensor | int]


# The model: parameters and inputs in, one logit a row out.
def first_params(hidden: int = 16) -> Params:
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden.weight": torch.randn(30, hidden, generator=generator) / 30**0.5,
        "hidden.bias": torch.zeros(hidden),
        "output.weight": torch.randn(hidden, generator=generator) / hidden**0.5,
    }


def logits_of(params: Params, inputs: Tensor) -> Tensor:
    return torch.tanh(inputs @ params["hidden.weight"] + params["hidden.bias"]) @ params["output.weight"]


def loss_of(params: Params, inputs: Tensor, targets: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits_of(params, inputs), targets)


# A step takes a state and a batch and returns the next state and what there is to report. It changes nothing.
def train_step(state: tnt.State, batch: Batch) -> tuple[tnt.State, Output]:
    inputs, targets = batch
    noisy = inputs + 0.1 * torch.randn_like(inputs)  # The loop seeds this: step 7 draws the same noise on every run.
    grads, loss = torch.func.grad_and_value(loss_of)(state.params, noisy, targets)

    lr, velocity = state.opt_state["lr"], state.opt_state["velocity"]
    velocity = {name: 0.9 * velocity[name] + grads[name] for name in grads}
    params = {name: param - lr * velocity[name] for name, param in state.params.items()}
    after = state.replace(params=params, opt_state={"lr": lr, "velocity": velocity})
    return after, {"loss": loss, "num_samples": len(targets)}


# A hook takes a state and returns one: here the learning rate falls by a third after every epoch.
def decay_lr(state: tnt.State) -> tnt.State:
    return state.replace(opt_state={**state.opt_state, "lr": state.opt_state["lr"] * 2 / 3})


def eval_step(state: tnt.State, batch: Batch) -> tuple[tnt.State, Output]:
    inputs, targets = batch
    hits = (logits_of(state.params, inputs) > 0) == (targets > 0.5)
    return state, {"accuracy": hits.double().mean(), "num_samples": len(targets)}


train_unit = tnt.TrainUnit(
    train_step=train_step,
    on_train_epoch_end=decay_lr,
    metrics={"loss": tnt.metrics.mean("loss", weight="num_samples")},
)
eval_unit = tnt.EvalUnit(
    eval_step=eval_step,
    metrics={"accuracy": tnt.metrics.mean("accuracy", weight="num_samples")},
)


# An observer is told of every event. It may print; it cannot change the run.
def print_loss(event: tnt.Event) -> None:
    if event.point == "epoch_end":
        loss = tnt.metrics.compute(event.state, "train")["loss"].item()
        print(f"epoch {event.state.progress.train.epochs}: loss {loss:.4f}")


if __name__ == "__main__":
    params = first_params()
    velocity = {name: torch.zeros_like(param) for name, param in params.items()}
    first = tnt.State(params=params, opt_state={"lr": torch.tensor(0.1), "velocity": velocity}, key=tnt.key(0))

    trained = tnt.train(train_unit, first, train_loader, max_epochs=4, observers=[print_loss])
    evaluated = tnt.evaluate(eval_unit, trained, eval_loader)
    print(f"held-out accuracy {tnt.metrics.compute(evaluated, 'eval')['accuracy'].item():.3f}")

    # Once more, with a pause in the middle of an epoch: pause_when is asked after every step and every epoch.
    asked = itertools.count(1)
    paused = tnt.train(train_unit, first, train_loader, max_epochs=4, pause_when=lambda: next(asked) == 20)
    print(f"paused at {paused.progress.train}")

    # The state is all there is to keep. Whatever happens to the global generators meanwhile does not matter.
    torch.manual_seed(12345)
    resumed = tnt.train(train_unit, paused, train_loader, max_epochs=4)
    print(f"digest, never stopped: {tnt.digest(trained)}")
    print(f"digest, resumed:       {tnt.digest(resumed)}")

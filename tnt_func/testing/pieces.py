"""Pure pieces that units are made of at random: what a step can do, what a hook can do, what data can look like.

Each prints as the code that makes it, so that a failing example can be read.

Example:
    >>> from tnt_func.rng import key
    >>> step = Steps((Descend(0.5), Count()))
    >>> state = State(params={"w": torch.zeros(2)}, buffers={"count": torch.tensor(0)}, key=key(0))
    >>> state, output = step(state, 2.0)
    >>> state.params["w"], output["loss"]
    (tensor([1., 1.]), tensor(4., dtype=torch.float64))
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch

from tnt_func import pytree as trees
from tnt_func import rng
from tnt_func.state import State
from tnt_func.types import Batch, Generator, Output, Phase, PyTree

Piece: TypeAlias = Callable[[State, torch.Tensor], State]
"""A part of a training step: from the state and the batch's number to a state."""


def number(batch: Batch) -> torch.Tensor:
    """The mean of whatever a batch holds, float64; 0 where it holds nothing.

    Example:
        >>> number({"x": [1.0, 2.0]}), number([])
        (tensor(1.5000, dtype=torch.float64), tensor(0., dtype=torch.float64))
    """
    values = [torch.as_tensor(leaf, dtype=torch.float64).reshape(-1) for leaf in trees.leaves(batch)]
    joined = torch.cat(values) if values else torch.zeros(0, dtype=torch.float64)
    return joined.sum() / max(1, joined.numel())


def draw(generator: Generator) -> float:
    """A number from 0 to 1 out of a global generator; out of torch's, where NumPy is not loaded.

    Example:
        >>> with rng.scope(rng.key(0)):
        ...     0 <= draw("random") < 1
        True
    """
    numpy = sys.modules.get("numpy")
    if generator == "random":
        return rng.random.random()
    return float(numpy.random.rand()) if generator == "numpy" and numpy else float(torch.rand(()))


@dataclass(frozen=True)
class Steps:
    """A training step out of pieces. Its output is how far the parameters are from the batch's number."""

    pieces: tuple[Piece, ...]

    def __call__(self, state: State, batch: Batch) -> tuple[State, Output]:
        """The state after every piece, and the output before any."""
        output = measured(state, batch)
        for piece in self.pieces:
            state = piece(state, number(batch))
        return state, output


def measured(state: State, batch: Batch) -> Output:
    """The step of an evaluation, without the state: a loss, a weight, and a vector.

    Example:
        >>> measured(State(params=torch.ones(2), key=rng.key(0)), 3.0)["loss"]
        tensor(4., dtype=torch.float64)
    """
    x = number(batch)
    errors = [(leaf.detach().double() - x).square().reshape(-1) for leaf in trees.tensors(state.params)]
    loss = number(torch.cat(errors)) if errors else x
    return {"loss": loss, "num_samples": 1 + len(trees.leaves(batch)), "vector": torch.stack((loss, x))}


@dataclass(frozen=True)
class Reads:
    """The step of an evaluation or prediction, which may draw."""

    draws: Generator | None = None

    def __call__(self, state: State, batch: Batch) -> tuple[State, Output]:
        """The state as it is, and an output."""
        noise = 0.0 if self.draws is None else draw(self.draws)
        output = measured(state, batch)
        return state, {**output, "loss": output["loss"] + noise}


def floats(function: Callable[..., torch.Tensor], tree: PyTree, *rest: PyTree) -> PyTree:
    """Apply a function to the floating-point leaves, in float64, and keep their dtypes; other leaves stay.

    Example:
        >>> floats(lambda x: x + 0.5, [torch.ones(1), torch.tensor(1)])
        [tensor([1.5000]), tensor(1)]
    """

    def apply(leaf: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        if not leaf.is_floating_point():
            return leaf
        return function(leaf.double(), *(other.double() for other in others)).to(leaf.dtype)

    return trees.map(apply, tree, *rest)


@dataclass(frozen=True)
class Descend:
    """Gradient descent by hand."""

    rate: float

    def __call__(self, state: State, x: torch.Tensor) -> State:
        """Towards the batch's number."""
        return state.replace(params=floats(lambda leaf: leaf - self.rate * (leaf - x), state.params))


@dataclass(frozen=True)
class Differentiate:
    """Gradient descent by autograd, at the rate that `opt_state` holds."""

    def __call__(self, state: State, x: torch.Tensor) -> State:
        """Against the gradient of the squared distance."""
        leaves, structure = trees.flatten(floats(torch.Tensor.detach, state.params))
        wanted = [leaf.detach().requires_grad_() if leaf.is_floating_point() else leaf for leaf in leaves]
        inputs = [leaf for leaf in wanted if leaf.requires_grad]
        loss = sum(((leaf - x).double().square().sum() for leaf in inputs), torch.zeros((), dtype=torch.float64))
        grads = iter(torch.autograd.grad(loss, inputs) if inputs else ())
        grad_tree = trees.unflatten([next(grads) if leaf.requires_grad else leaf for leaf in wanted], structure)
        return state.replace(params=floats(lambda p, g: p - state.opt_state["lr"] * g, state.params, grad_tree))


@dataclass(frozen=True)
class Momentum:
    """Descent with a velocity in `opt_state`."""

    beta: float

    def __call__(self, state: State, x: torch.Tensor) -> State:
        """The velocity first, then the parameters."""
        velocity = floats(lambda v, p: self.beta * v + p - x, state.opt_state["momentum"], state.params)
        params = floats(lambda p, v: p - state.opt_state["lr"] * v, state.params, velocity)
        return state.replace(params=params, opt_state={**state.opt_state, "momentum": velocity})


@dataclass(frozen=True)
class Noise:
    """Noise out of a global generator."""

    draws: Generator

    def __call__(self, state: State, x: torch.Tensor) -> State:
        """One number, added to every parameter."""
        noise = draw(self.draws)
        return state.replace(params=floats(lambda leaf: leaf + noise, state.params))


@dataclass(frozen=True)
class Dropout:
    """Dropout of parameters, as a layer would draw it."""

    def __call__(self, state: State, x: torch.Tensor) -> State:
        """Half of the parameters, on average."""
        return state.replace(params=floats(lambda leaf: torch.nn.functional.dropout(leaf, 0.5), state.params))


@dataclass(frozen=True)
class Count:
    """A buffer that counts steps."""

    def __call__(self, state: State, x: torch.Tensor) -> State:
        """One more."""
        return state.replace(buffers={**state.buffers, "count": state.buffers["count"] + 1})


SLOT = "unit"
"""The slot of memory of a unit out of pieces; a callback's has its name."""


def blank(state: State) -> PyTree:
    """The first memory of a unit or callback out of pieces.

    Example:
        >>> blank(State(params={}, key=rng.key(0)))
        {'count': 0, 'value': tensor(0., dtype=torch.float64), 'set': False}
    """
    return {"count": 0, "value": torch.zeros((), dtype=torch.float64), "set": False}


def _put(state: State, slot: str, **changed: Any) -> State:
    return state.remember(slot, {**state.memory[slot], **changed})


@dataclass(frozen=True)
class Add:
    """A hook that counts in memory."""

    slot: str

    def __call__(self, state: State) -> State:
        """One more."""
        return _put(state, self.slot, count=state.memory[self.slot]["count"] + 1)


@dataclass(frozen=True)
class Set:
    """A hook that may run any number of times."""

    slot: str

    def __call__(self, state: State) -> State:
        """Set, whether it was or not."""
        return _put(state, self.slot, set=True)


@dataclass(frozen=True)
class Follow:
    """A hook that averages what the steps return; before the first step it does nothing."""

    slot: str

    def __call__(self, state: State) -> State:
        """Half of what was, half of what is."""
        if not isinstance(state.output, Mapping):
            return state
        return _put(state, self.slot, value=(state.memory[self.slot]["value"] + state.output["loss"]) / 2)


@dataclass(frozen=True)
class Draw:
    """A hook that remembers a random number."""

    slot: str
    draws: Generator

    def __call__(self, state: State) -> State:
        """The number, added to what was there."""
        return _put(state, self.slot, value=state.memory[self.slot]["value"] + draw(self.draws))


@dataclass(frozen=True)
class Decay:
    """A hook that shrinks parameters and rate; of training only."""

    factor: float

    def __call__(self, state: State) -> State:
        """Both by a factor."""
        opt_state = {**state.opt_state, "lr": state.opt_state["lr"] * self.factor}
        return state.replace(params=floats(lambda leaf: leaf * self.factor, state.params), opt_state=opt_state)


@dataclass(frozen=True)
class Clamp:
    """A hook that may run any number of times, and changes parameters; of training only."""

    def __call__(self, state: State) -> State:
        """Into the range from -1 to 1."""
        return state.replace(params=floats(lambda leaf: leaf.clamp(-1, 1), state.params))


@dataclass(frozen=True)
class StopEvery:
    """A hook that requests a stop where a counter is one short of a multiple."""

    phase: Phase
    counter: Literal["epochs", "steps"]
    every: int

    def __call__(self, state: State) -> State:
        """Stop there, go on elsewhere."""
        count = getattr(state.progress.of(self.phase), self.counter)
        there = count % self.every == self.every - 1
        return state.request_stop(f"{self.phase} {self.counter} {count}") if there else state


@dataclass(frozen=True)
class PerEpoch:
    """Data as a function of the epoch: a generator that draws from the global generators as it goes."""

    length: int

    def __call__(self, epoch: int) -> Iterator[Batch]:
        """The epoch's batches; each epoch has one more number in each."""
        for index in range(self.length):
            yield [epoch + index + draw(generator) for generator in rng.ALL] + [0.5] * epoch


@dataclass(frozen=True)
class Seekable:
    """A Pipeline: it begins where it is told to."""

    length: int

    def batches(self, epoch: int, start: int) -> Iterator[Batch]:
        """The epoch's batches from a position on."""
        for index in range(start, self.length):
            yield {"x": torch.full((2,), epoch - index / 4.0), "y": (index, 1.0)}

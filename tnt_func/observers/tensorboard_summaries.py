"""Histograms, images and text for TensorBoard, beside a run's scalars.

Example:
    >>> import tempfile
    >>> import tnt_func as tnt
    >>> from tnt_func.observers import tensorboard_writer
    >>> def train_step(state, batch): return state.replace(params={"w": state.params["w"] + batch}), {}
    >>> state = tnt.State(params={"w": torch.zeros(8)}, key=tnt.key(0))
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     writer = tensorboard_writer(directory)
    ...     weights = tensorboard_summaries(writer, every_n_epochs=1, histograms=lambda event: event.state.params)
    ...     _ = tnt.train(tnt.TrainUnit(train_step=train_step), state, [1.0], max_epochs=1, observers=[weights])
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from tnt_func import pytree as trees
from tnt_func.errors import UsageError, kind_of
from tnt_func.events import Event
from tnt_func.observers.combinators import needs_all
from tnt_func.observers.tensorboard_writer import TensorboardWriter
from tnt_func.types import PyTree, typed

BINS = 64


@typed
def tensorboard_summaries(
    writer: TensorboardWriter,
    *,
    every_n_steps: int | None = None,
    every_n_epochs: int | None = None,
    histograms: Callable[[Event], PyTree] | None = None,
    images: Callable[[Event], Mapping[str, torch.Tensor]] | None = None,
    text: Callable[[Event], Mapping[str, str]] | None = None,
) -> "TensorboardSummaries":
    """An observer that shows tensors, images and text in TensorBoard, over the train steps of the lifetime.

    What a function returns, with the names that it gives, is one event; a resumed run takes out those after its place.
    Each copies what it shows from the device. The functions may compute what is in no state, on the event's batch say;
    the parameters are those after the step.

    Args:
        writer: shared with `recorder`, or alone; there is one for a directory.
        every_n_steps: called at `step_end` events of training, of the lifetime.
        every_n_epochs: called at `epoch_end` events of training, likewise.
        histograms: a tree of tensors, named by their paths: `lambda event: {"params": event.state.params}`, or the
            gradients of a unit `with_gradients`: `lambda event: {"grads": event.state.output["grads"]}`. Each has 64
            bins from the least to the greatest value; what is no tensor is left out, and so is what is not finite.
        images: tensors [channels, height, width] or [batch, channels, height, width], with 1 or 3 channels, uint8 or
            floating from 0 to 1.
        text: Markdown.

    Raises:
        UsageError: no cadence, or one below 1; nothing to show; out of the run, what has no name, and an image of
            another shape.

    Example:
        >>> from tnt_func.observers import tensorboard_writer
        >>> writer = tensorboard_writer("runs/7")
        >>> tensorboard_summaries(writer, every_n_steps=500, text=lambda event: {"sample": "**Once** upon"})
        tensorboard_summaries(tensorboard_writer('runs/7'))
    """
    cadences = [n for n in (every_n_steps, every_n_epochs) if n is not None]
    if not cadences or min(cadences) < 1:
        raise UsageError(
            f"tensorboard_summaries(every_n_steps={every_n_steps}, every_n_epochs={every_n_epochs}) was given; one of "
            "them at least is given, and it is at least 1. Write every_n_steps=500, say."
        )
    if histograms is None and images is None and text is None:
        raise UsageError(
            "tensorboard_summaries was given nothing to show; it takes functions of an event. Write "
            "histograms=lambda event: event.state.params, say."
        )
    return TensorboardSummaries(writer, (every_n_steps, every_n_epochs), histograms, images, text)


class TensorboardSummaries:
    """What `tensorboard_summaries` makes: called with every event, closed at the end."""

    def __init__(
        self,
        writer: TensorboardWriter,
        every: tuple[int | None, int | None],
        histograms: Callable[[Event], PyTree] | None,
        images: Callable[[Event], Mapping[str, torch.Tensor]] | None,
        text: Callable[[Event], Mapping[str, str]] | None,
    ):
        self._writer, self._every = writer, every
        self._histograms, self._images, self._text = histograms, images, text

    def __repr__(self) -> str:
        return f"tensorboard_summaries({self._writer!r})"

    def __call__(self, event: Event) -> None:
        """Show what is due."""
        if event.phase != "train":
            return
        if event.point == "start":
            self.open(event)
        elif self._due(event):
            progress = event.state.progress.train
            self._writer.add(progress.steps, {"epoch/train_summaries": float(progress.epochs)}, self._made(event))

    check_part = needs_all

    def open(self, event: Event) -> None:
        """Bring the writer to where a run starts."""
        if event.phase == "train":
            progress = event.state.progress.train
            self._writer.open((progress.steps, progress.epochs))

    def close(self) -> None:
        """Close the writer."""
        self._writer.close()

    def _due(self, event: Event) -> bool:
        n_steps, n_epochs = self._every
        progress = event.state.progress.train
        if event.point == "step_end":
            return n_steps is not None and progress.steps % n_steps == 0
        return event.point == "epoch_end" and n_epochs is not None and progress.epochs % n_epochs == 0

    def _made(self, event: Event) -> Iterator[Any]:
        make = self._writer.summary
        for path, tensor in trees.named_leaves(self._histograms(event)) if self._histograms else ():
            name = re.sub(r"\['?(.*?)'?\]", r"/\1", path).lstrip("/") or "histogram"
            if isinstance(tensor, torch.Tensor) and (found := _histogram(tensor)):
                yield make.histogram_raw(name, *found)
        for name, image in _named("images", self._images, event):
            if not isinstance(image, torch.Tensor):
                raise UsageError(
                    f"images gave {name!r}, {kind_of(image)}; an image is a tensor. Write torch.as_tensor(image)."
                )
            if image.ndim not in (3, 4) or image.shape[-3] not in (1, 3):
                raise UsageError(
                    f"images gave {name!r} of the shape {list(image.shape)}; an image is [channels, height, width], or "
                    "a batch of such, with 1 or 3 channels. Write image[None] for one of gray values."
                )
            pixels = image.detach().cpu() if image.dtype == torch.uint8 else image.detach().cpu().float()
            yield make.image(name, pixels.numpy(), dataformats="CHW" if image.ndim == 3 else "NCHW")
        for name, words in _named("text", self._text, event):
            yield make.text(name, str(words))


def _named(what: str, function: Callable[[Event], Mapping[str, Any]] | None, event: Event) -> Iterator[tuple[str, Any]]:
    found = {} if function is None else function(event)
    if not isinstance(found, Mapping):
        raise UsageError(
            f"{what}= gave {kind_of(found)}; what is shown has names. Write {what}=lambda event: {{'sample': ...}}."
        )
    yield from found.items()


def _histogram(tensor: torch.Tensor) -> tuple[Any, ...] | None:
    """Minimum, maximum, count, sum, sum of squares, upper limits and counts of the bins, of what is finite."""
    values = tensor.detach().cpu().reshape(-1).double()
    values = values[values.isfinite()]
    if not len(values):
        return None
    low, high = (x.item() for x in values.aminmax())
    counts = values.histc(BINS, low, high) if low < high else torch.tensor([len(values)])
    limits = torch.linspace(low, high, len(counts) + 1, dtype=torch.float64)[1:]
    total, squares = values.sum().item(), values.square().sum().item()
    return low, high, len(values), total, squares, limits.tolist(), counts.tolist()

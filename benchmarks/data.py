"""Batches a second against torch's DataLoader on the same dataset; what seeking costs, and what seeding does."""

import gc
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

import tnt_func as tnt
from tnt_func.data import Elements, loader, source
from tnt_func.types import Generator

BATCH, ROUNDS = 64, 9
KEY = tnt.key(0)
TENSORS = TensorDataset(torch.rand(64 * 100, 3, 32, 32), torch.arange(64 * 100))


class Mapped(Dataset[Any]):
    """A dataset as torch's loader takes it: a function of another one's items."""

    def __init__(self, data: Any, fn: Callable[[Any], Any]):
        self.data, self.fn = data, fn

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return self.fn(self.data[index])


def scale(item: Any) -> Any:
    image, label = item
    return (image - 0.5) * 2, label


def augment(item: Any) -> Any:
    """A crop out of a padded image and a flip, drawn."""
    image, label = item
    padded = torch.nn.functional.pad(image, (4, 4, 4, 4))
    top, left, flip = torch.randint(0, 9, (3,)).tolist()
    image = padded[:, top : top + 32, left : left + 32]
    return scale((image.flip(2) if flip > 4 else image, label))


def enlarge(item: Any) -> Any:
    """As much work as reading a small picture."""
    image, label = augment(item)
    return torch.nn.functional.interpolate(image[None], size=(160, 160), mode="bicubic", antialias=True)[0], label


def square(number: int) -> int:
    return number * number


def cases() -> Iterator[tuple[str, Elements, Any]]:
    tensors, few = source(TENSORS).shuffle(KEY), Subset(TENSORS, range(64 * 10))
    torch_only: tuple[Generator, ...] = ("torch",)
    yield "no map", tensors, TENSORS
    yield "scaling, `draws=()`", tensors.map(scale, draws=()), Mapped(TENSORS, scale)
    yield "scaling in the dataset", source(Mapped(TENSORS, scale), draws=()).shuffle(KEY), Mapped(TENSORS, scale)
    yield (
        "numbers squared, `draws=()`",
        source(range(20_000)).shuffle(KEY).map(square, draws=()),
        Mapped(range(20_000), square),
    )
    for what, data, fn in (("crop, flip", TENSORS, augment), ("crop, flip, enlarge", few, enlarge)):
        start = source(data, draws=()).shuffle(KEY)
        yield f'{what}, `draws=("torch",)`', start.map(fn, draws=torch_only), Mapped(data, fn)
        yield f"{what}, all generators", start.map(fn), Mapped(data, fn)


def cpu_seconds(batches: Iterator[Any]) -> float:
    """CPU time a batch, of a whole epoch in this process."""
    gc.collect()
    start = time.process_time()
    count = sum(1 for _ in batches)
    return (time.process_time() - start) / count


def wall_seconds(batches: Iterator[Any]) -> float:
    """Time a batch, after the first one, for which workers start."""
    gc.collect()
    next(batches)
    start = time.perf_counter()
    count = sum(1 for _ in batches)
    return (time.perf_counter() - start) / count


def compare() -> None:
    print(f"| shuffle, collate {BATCH}, and | workers | batches/s | DataLoader's | ratio |\n|---|---|---|---|---|")
    for workers, seconds in ((0, cpu_seconds), (2, wall_seconds)):
        for name, elements, dataset in cases():
            ours = loader(elements.batch(BATCH), num_workers=workers)
            theirs = DataLoader(dataset, BATCH, shuffle=True, num_workers=workers)
            rates: tuple[list[float], list[float]] = ([], [])
            for turn in range(ROUNDS):
                for who in (turn % 2, 1 - turn % 2):
                    rates[who].append(1 / seconds(iter(theirs) if who else ours.batches(turn)))
            ratios = [a / b for a, b in zip(*rates, strict=True)]
            columns = (name, str(workers), spread(rates[0], 0), spread(rates[1], 0), spread(ratios, 2))
            print(f"| {' | '.join(columns)} |", flush=True)


def seeking() -> None:
    batches = source(range(10**9)).shuffle(KEY).batch(BATCH)
    times: dict[int, list[float]] = {1: [], 10**6: []}
    for turn in range(30):
        for start in [*times][:: 1 if turn % 2 else -1]:
            began = time.process_time()
            next(batches.batches(turn, start))
            times[start].append((time.process_time() - began) * 1e3)
    print("\n| of 10^9 elements shuffled, the first batch from | ms |\n|---|---|")
    for start, of in times.items():
        print(f"| {start:,} | {spread(of, 2)} |")


def seeding(steps: int = 10_000) -> None:
    """What a step pays in `train` so that it may draw: a run less one that declares draws=()."""
    state = tnt.State(params=0, key=KEY)
    draws: list[tuple[Generator, ...]] = [(), ("torch",), ("torch", "numpy"), ("torch", "numpy", "random")]
    times: dict[tuple[Generator, ...], list[float]] = {which: [] for which in draws}
    for turn in range(ROUNDS):
        for which in draws[:: 1 if turn % 2 else -1]:
            unit = tnt.TrainUnit(train_step=lambda state, batch: (state, {}), draws=which)
            start = time.process_time()
            tnt.train(unit, state, range(steps), max_epochs=1)
            times[which].append((time.process_time() - start) / steps * 1e6)
    print("\n| a step that draws | µs more than `draws=()` |\n|---|---|")
    for which in draws[1:]:
        print(f"| {', '.join(which)} | {spread([a - b for a, b in zip(times[which], times[()], strict=True)], 1)} |")


def spread(values: list[float], digits: int) -> str:
    low, middle, high = (f"{value:,.{digits}f}" for value in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({low} - {high})"


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    compare()
    seeking()
    seeding()

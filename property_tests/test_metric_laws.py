"""Law 8 of metrics: accumulators are a monoid, and an epoch's number does not depend on how its steps are cut."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import sklearn.metrics
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics import ExplainedVariance, MeanSquaredError

from tnt_func import metrics, testing
from tnt_func.metrics import Metric, from_torchmetrics

finite = st.floats(-1e6, 1e6)
weights = st.integers(1, 100) | st.floats(0.125, 8.0)


@st.composite
def output_lists(draw: st.DrawFn, numbers: st.SearchStrategy[float]) -> list[Any]:
    """Outputs of up to six steps: numbers, or tensors of one dtype and shape, with weights."""
    count = draw(st.integers(0, 6))
    shape = draw(st.sampled_from(((), (2,), (0,), (1, 2))))
    dtype = draw(st.sampled_from((torch.float32, torch.float64)))
    whole = draw(st.booleans())

    def value() -> Any:
        if whole:
            return draw(numbers)
        size = int(torch.Size(shape).numel())
        return torch.tensor([draw(numbers) for _ in range(size)], dtype=dtype).reshape(shape)

    return [{"x": value(), "n": draw(weights)} for _ in range(count)]


sums = st.sampled_from(
    (metrics.mean("x"), metrics.mean("x", weight="n"), metrics.total("x"), metrics.total("x", weight="n"))
)
picks = st.sampled_from((metrics.minimum("x"), metrics.maximum("x"), metrics.last("x")))


@given(sums, output_lists(finite))
def test_sums_are_monoids_but_for_rounding(metric: Metric, outputs: list[Any]):
    testing.check_metric(metric, outputs)


@given(picks, output_lists(st.floats(width=32)))
def test_what_picks_is_a_monoid_to_the_bit(metric: Metric, outputs: list[Any]):
    testing.check_metric(metric, outputs, rtol=0.0)


@given(output_lists(finite).filter(bool))
def test_means_are_means(outputs: list[Any]):
    """Against one division of all of them at once."""
    metric = metrics.mean("x", weight="n")
    merged = metric.empty()
    for output in outputs:
        merged = merged.merge(metric.of(output))
    values = torch.stack([torch.as_tensor(output["x"], dtype=torch.float64) for output in outputs])
    shares = torch.tensor([float(output["n"]) for output in outputs], dtype=torch.float64)
    expected = torch.tensordot(shares, values, dims=1) / shares.sum()
    torch.testing.assert_close(merged.value(), expected, rtol=1e-9, atol=1e-6)


# Metrics of torchmetrics, on any split of samples into batches and of batches into shards.

CLASSES = 3
classes: dict[str, Any] = {"num_classes": CLASSES}
names = {"preds": "output", "target": "targets"}
peers: Any = sklearn.metrics


def labelled(size: int, draw: np.random.Generator) -> tuple[Any, Any]:
    return draw.normal(size=(size, CLASSES)), draw.integers(0, CLASSES, size)


def binary(size: int, draw: np.random.Generator) -> tuple[Any, Any]:
    """Scores that are among the thresholds; both labels are there."""
    return draw.integers(0, 8, size) / 8, np.append(draw.integers(0, 2, size - 2), [0, 1])


def words(size: int, draw: np.random.Generator) -> tuple[Any, Any]:
    return draw.normal(size=(size, 2, CLASSES)), draw.integers(0, CLASSES, (size, 2))


def real(size: int, draw: np.random.Generator) -> tuple[Any, Any]:
    return draw.normal(size=size), draw.normal(size=size)


def perplexity(x: Any, y: Any) -> Any:
    odds = np.exp(x.reshape(-1, CLASSES))
    return np.exp(peers.log_loss(y.ravel(), odds / odds.sum(1, keepdims=True), labels=range(CLASSES)))


PEERS: dict[str, tuple[Metric, Callable[..., Any], Callable[[Any, Any], Any]]] = {
    "accuracy": (
        metrics.accuracy("multiclass", **classes),
        labelled,
        lambda x, y: peers.accuracy_score(y, x.argmax(1)),
    ),
    "top_k_accuracy": (
        metrics.top_k_accuracy(2, **classes),
        labelled,
        lambda x, y: peers.top_k_accuracy_score(y, x, k=2, labels=range(CLASSES)),
    ),
    "f1": (
        metrics.f1("multiclass", average="macro", **classes),
        labelled,
        lambda x, y: peers.f1_score(y, x.argmax(1), average="macro"),
    ),
    "confusion_matrix": (
        metrics.confusion_matrix("multiclass", **classes),
        labelled,
        lambda x, y: peers.confusion_matrix(y, x.argmax(1), labels=range(CLASSES)),
    ),
    "auroc": (metrics.auroc("binary", thresholds=9), binary, lambda x, y: peers.roc_auc_score(y, x)),
    "perplexity": (metrics.perplexity(), words, perplexity),
    "mean_squared_error": (
        from_torchmetrics(MeanSquaredError(), **names),
        real,
        lambda x, y: peers.mean_squared_error(y, x),
    ),
    "explained_variance": (
        from_torchmetrics(ExplainedVariance(), **names),
        real,
        lambda x, y: peers.explained_variance_score(y, x),
    ),
}


@st.composite
def splits(draw: st.DrawFn) -> tuple[int, list[int], list[int]]:
    """A seed, the sizes of batches of two to twenty samples together, and how many batches each shard has."""
    sizes = draw(st.lists(st.integers(1, 5), min_size=2, max_size=4))
    ends = [0, *sorted(draw(st.lists(st.integers(0, len(sizes)), max_size=2))), len(sizes)]
    return draw(st.integers(0, 99)), sizes, [b - a for a, b in zip(ends, ends[1:], strict=False)]


def folded(metric: Metric, outputs: list[Any]) -> Any:
    return functools.reduce(lambda a, output: a.merge(metric.of(output)), outputs, metric.empty())


@pytest.mark.filterwarnings("ignore:No (positive|negative) samples:UserWarning")
@pytest.mark.parametrize("name", PEERS)
@settings(max_examples=settings.default.max_examples // 10 if settings.default else 20)
@given(splits())
def test_any_split_gives_the_number_of_the_whole(name: str, split: tuple[int, list[int], list[int]]):
    metric, data, peer = PEERS[name]
    seed, sizes, shards = split
    scores, labels = data(sum(sizes), np.random.default_rng(seed))
    whole = {"output": torch.from_numpy(scores), "targets": torch.from_numpy(labels)}
    pieces = zip(whole["output"].split(sizes), whole["targets"].split(sizes), strict=True)
    outputs = [{"output": x, "targets": y} for x, y in pieces]
    rest = iter(outputs)
    parts = [folded(metric, [next(rest) for _ in range(size)]) for size in shards]
    value = functools.reduce(lambda a, b: a.merge(b), parts).value()
    exact = 1e-6 if value.dtype is torch.float32 else 1e-9
    torch.testing.assert_close(value, metric.of(whole).value(), rtol=exact, atol=1e-12)
    wanted = torch.as_tensor(peer(scores, labels), dtype=torch.float64)
    torch.testing.assert_close(value.double(), wanted, rtol=1e-6, atol=1e-7)
    testing.check_metric(metric, outputs)


def test_a_mean_of_batches_is_no_mean_of_samples():
    """Negative control: the accuracy of each step, averaged over steps."""
    outputs = [{"hits": torch.tensor(hits)} for hits in ([1.0], [1.0, 0.0, 0.0], [0.0, 0.0])]
    whole = {"hits": torch.cat([output["hits"] for output in outputs])}
    exact = metrics.mean("mean", weight="n")
    of_samples = Metric(exact.empty, lambda o: exact.of({"mean": o["hits"].double().mean(), "n": len(o["hits"])}))
    of_steps = Metric(exact.empty, lambda o: exact.of({"mean": o["hits"].double().mean(), "n": 1}))
    assert folded(of_samples, outputs).value() == of_samples.of(whole).value()
    assert folded(of_steps, outputs).value() != of_steps.of(whole).value()

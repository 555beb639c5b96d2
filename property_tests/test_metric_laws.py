"""Law 8 of metrics: accumulators are a monoid, and an epoch's number does not depend on how its steps are cut."""

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from tnt_func import metrics, testing
from tnt_func.metrics import Metric

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

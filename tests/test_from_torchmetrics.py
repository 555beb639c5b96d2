"""Metrics of torchmetrics: their values, their states in the State, and which are refused with what to write."""

import copy
import functools
import sys
from typing import Any

import pytest
import sklearn.metrics
import torch
import torchmetrics
from torch.fx.experimental.proxy_tensor import make_fx
from torchmetrics import classification, regression

import tnt_func as tnt
from tnt_func import metrics, testing
from tnt_func import pytree as trees
from tnt_func.errors import ContractError, LawError, MissingExtraError, UsageError, UsageTypeError
from tnt_func.metrics import Metric, from_torchmetrics
from tnt_func.testing.snapshot import freeze

DRAW = torch.Generator().manual_seed(0)
SCORES = torch.randn(24, 4, generator=DRAW, dtype=torch.float64)
LABELS = torch.arange(24) % 4


def step(state: tnt.State, batch: Any) -> Any:
    scores, labels = batch
    w = state.params["w"] + 0.1 * scores.mean(0)
    return state.replace(params={"w": w}), {"output": scores + w, "targets": labels}


def run_of(metric: Metric) -> tuple[tnt.TrainUnit, tnt.State, list[Any]]:
    unit = tnt.TrainUnit(train_step=step, metrics={"metric": metric})
    state = tnt.State(params={"w": torch.zeros(4, dtype=torch.float64)}, key=tnt.key(0))
    # Of unequal sizes.
    return unit, state, list(zip(SCORES.split([4, 12, 8]), LABELS.split([4, 12, 8]), strict=True))


MAKERS: dict[str, Any] = {
    "accuracy": lambda: metrics.accuracy("multiclass", num_classes=4),
    "macro accuracy": lambda: metrics.accuracy("multiclass", num_classes=4, average="macro"),
    "top_k_accuracy": lambda: metrics.top_k_accuracy(2, num_classes=4),
    "f1": lambda: metrics.f1("multiclass", num_classes=4, average="macro"),
    "auroc": lambda: metrics.auroc("multiclass", num_classes=4, thresholds=20),
    "confusion_matrix": lambda: metrics.confusion_matrix("multiclass", num_classes=4),
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_unit_with_one_obeys_every_law(name: str):
    testing.check_unit(*run_of(MAKERS[name]()))


@pytest.mark.parametrize("name", MAKERS)
def test_an_epoch_resumed_in_the_middle_reports_the_same_number(name: str):
    unit, state, data = run_of(MAKERS[name]())
    whole = metrics.compute(tnt.train(unit, state, data, max_epochs=1), "train")["metric"]
    for steps in (1, 2):
        part = tnt.train(unit, state, data, max_epochs=1, pause_when=counted(steps))
        assert part.progress.train.steps_in_epoch == steps
        # As in another process: a unit made anew.
        done = tnt.train(run_of(MAKERS[name]())[0], part, data, max_epochs=1)
        assert torch.equal(metrics.compute(done, "train")["metric"], whole)


def counted(steps: int) -> Any:
    asked = iter(range(1, 99))
    return lambda: next(asked) >= steps


def test_the_named_ones_are_those_of_scikit_learn():
    output = {"output": SCORES, "targets": LABELS}
    right, best = LABELS.numpy(), SCORES.argmax(1).numpy()
    parts = SCORES.softmax(1).numpy()
    wanted = {
        "accuracy": sklearn.metrics.accuracy_score(right, best),
        "macro accuracy": sklearn.metrics.balanced_accuracy_score(right, best),
        "top_k_accuracy": sklearn.metrics.top_k_accuracy_score(right, parts, k=2),
        "f1": sklearn.metrics.f1_score(right, best, average="macro"),
        "confusion_matrix": sklearn.metrics.confusion_matrix(right, best),
    }
    for name, value in wanted.items():
        ours = MAKERS[name]().of(output).value()
        torch.testing.assert_close(ours.double(), torch.as_tensor(value).double(), rtol=1e-6, atol=0.0)
    bins = torch.arange(24) * 5 % 8 / 8  # Every score is one of the thresholds, so the area is exact.
    area = metrics.auroc("binary", thresholds=9).of({"output": bins, "targets": LABELS % 2}).value()
    torch.testing.assert_close(float(area), sklearn.metrics.roc_auc_score(right % 2, bins.numpy()))
    told = metrics.perplexity().of({"output": SCORES[None], "targets": LABELS[None]}).value()
    torch.testing.assert_close(float(told), float(torch.tensor(sklearn.metrics.log_loss(right, parts)).exp()))


def test_what_a_metric_needs_to_see_is_read_by_name_and_holds_no_graph():
    metric = from_torchmetrics(regression.MeanSquaredError(), preds="guess", target="truth")
    guess = torch.tensor([1.0, 3.0], requires_grad=True)
    accumulator = metric.of({"guess": guess, "truth": torch.tensor([0.0, 0.0]), "loss": 3.0})
    assert float(accumulator.value()) == 5.0
    assert not any(leaf.requires_grad for leaf in trees.tensors(accumulator))
    with pytest.raises(ContractError, match=r"reads output\['truth'\], and the step's output has \['guess'\]"):
        metric.of({"guess": guess})


def test_the_users_metric_is_never_written_to():
    theirs = classification.MulticlassAUROC(num_classes=4, thresholds=10)
    theirs.update(SCORES, LABELS)
    before = freeze(copy.deepcopy(theirs.__getstate__()))
    metric = from_torchmetrics(theirs, preds="output", target="targets")
    output = {"output": SCORES[:8], "targets": LABELS[:8]}
    a, b = metric.of(output), metric.empty()
    b.merge(a).merge(a).value()
    assert freeze(theirs.__getstate__()) == before
    fresh = classification.MulticlassAUROC(num_classes=4, thresholds=10)
    fresh.update(SCORES[:8], LABELS[:8])
    assert torch.equal(a.value(), fresh.compute()), "what it had seen before is none of ours"


def test_floating_states_are_float64_and_counts_are_counts():
    error = from_torchmetrics(regression.MeanSquaredError(), preds="x", target="y")
    zeros = torch.zeros(1)
    ones = [error.of({"x": torch.full((1,), x), "y": zeros}) for x in (4096.0, 1.0)]
    assert float(ones[0].merge(ones[1]).value()) == (4096.0**2 + 1) / 2  # float32 would lose the 1.
    leaves = {path: leaf.dtype for path, leaf in trees.named_leaves(ones[0])}
    assert leaves[".states['sum_squared_error']"] is torch.float64 and leaves[".updates"] is torch.int64


def test_nothing_seen_is_nan():
    for make in MAKERS.values():
        assert make().empty().value().isnan()
    assert from_torchmetrics(regression.R2Score(), preds="x", target="y").empty().value().isnan()


def test_the_same_metric_made_twice_has_accumulators_of_one_kind():
    a, b = (metrics.auroc("binary", thresholds=9) for _ in range(2))
    assert type(a.empty()) is type(b.empty()) and trees.equal(a.empty(), b.empty())
    assert trees.map(lambda x, y: x + y, a.empty(), b.empty()).updates == 0
    for other in (metrics.auroc("binary", thresholds=10), metrics.auroc("binary", max_fpr=0.5, thresholds=9)):
        assert type(a.empty()) is not type(other.empty())


# Reductions.


class Folding(torchmetrics.Metric):
    """One state with a reduction of choice; `update` folds it as the reduction does."""

    full_state_update = False
    state: torch.Tensor

    def __init__(self, default: float, reduction: Any):
        super().__init__()
        self.kind = reduction
        self.add_state("state", torch.tensor(default), dist_reduce_fx=reduction)

    def update(self, x: torch.Tensor) -> None:
        folds: dict[Any, Any] = {"sum": torch.add, "max": torch.maximum, "min": torch.minimum, "mean": lambda s, x: x}
        self.state = folds.get(self.kind, torch.mul)(self.state, x)

    def compute(self) -> torch.Tensor:
        return self.state


def product(states: torch.Tensor) -> torch.Tensor:
    return states.prod(0)


@pytest.mark.parametrize(
    ("default", "reduction", "value"),
    [
        (0.0, "sum", 5.0),
        (100.0, "sum", 105.0),
        (0.0, "max", 4.0),
        (-9.0, "max", 4.0),
        (9.0, "min", -1.0),
        (0.0, "mean", 5.0 / 3),
        (float("nan"), "mean", 5.0 / 3),
        (1.0, product, -8.0),
    ],
)
def test_states_merge_by_their_own_reductions(default: float, reduction: Any, value: float):
    metric = from_torchmetrics(Folding(default, reduction), x="x")
    outputs = [{"x": torch.tensor(x, dtype=torch.float64)} for x in (2.0, -1.0, 4.0)]
    testing.check_metric(metric, outputs)
    merged = functools.reduce(lambda a, b: a.merge(b), map(metric.of, outputs), metric.empty())
    torch.testing.assert_close(float(merged.value()), value)


def test_what_a_metric_keeps_or_writes_is_not_the_outputs_nor_the_accumulators():
    """A state that is the very input; a compute that works in place."""

    class Working(Folding):
        def compute(self) -> torch.Tensor:
            return self.state.add_(1.0)

    x = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    accumulator = from_torchmetrics(Working(0.0, "mean"), x="x").of({"x": x})
    assert not accumulator.states["state"].requires_grad
    assert [float(accumulator.value()) for _ in range(2)] == [3.0, 3.0] and float(x.detach()) == 2.0


def test_a_reduction_that_is_none_of_its_states_is_found_out():
    """Negative control: summed as if it were a sum, while `update` takes the last."""

    class Last(Folding):
        def update(self, x: torch.Tensor) -> None:
            self.state = x

        def compute(self) -> torch.Tensor:
            return self.state.clamp(max=3.0).square()

    outputs = [{"x": torch.tensor(x, dtype=torch.float64)} for x in (2.0, -1.0, 4.0)]
    with pytest.raises(LawError, match="law 8"):
        testing.check_metric(from_torchmetrics(Last(5.0, lambda states: states[0] - states[1]), x="x"), outputs)


# What is refused.


class Writing(Folding):
    def update(self, x: torch.Tensor) -> None:
        self.seen = x


class Pairs(Folding):
    def compute(self) -> Any:
        return self.state, self.state


REFUSED: dict[str, tuple[Any, dict[str, str], type[Exception], str]] = {
    "a function": (
        len,
        {},
        UsageTypeError,
        "given a builtin_function_or_method; it takes one torchmetrics.Metric; each",
    ),
    "a collection": (
        torchmetrics.MetricCollection([classification.BinaryAccuracy()]),
        {"preds": "x", "target": "y"},
        UsageTypeError,
        "given a MetricCollection; it takes one .* has a name of its own .* Write",
    ),
    "scores in a list": (
        classification.BinaryAUROC(),
        {"preds": "x", "target": "y"},
        UsageError,
        r"state 'preds' grows with the data; .* keeps its shape. Write BinaryAUROC\(..., thresholds=200\)",
    ),
    "a list": (
        regression.CosineSimilarity(),
        {"preds": "x", "target": "y"},
        UsageError,
        "state 'preds' grows with the data; .* Choose a metric that sums",
    ),
    "no reduction": (
        regression.PearsonCorrCoef(),
        {"preds": "x", "target": "y"},
        UsageError,
        "state 'mean_x' was added with no reduction; two of them could not be merged. Write a subclass",
    ),
    "a wrapper": (
        torchmetrics.MinMaxMetric(classification.BinaryAccuracy()),
        {},
        UsageError,
        "which has in it a BinaryAccuracy; a metric's own states are kept, and no wrapper's. Give each",
    ),
    "a sum of two": (
        classification.BinaryAccuracy() + classification.BinaryRecall(),
        {},
        UsageError,
        "which has in it a BinaryAccuracy and a BinaryRecall",
    ),
    "another argument": (
        regression.MeanSquaredError(),
        {"preds": "x", "targets": "y"},
        UsageError,
        r"given \['preds', 'targets'\] for .* whose arguments are \['preds', 'target'\] .* preds=..., target=...",
    ),
    "an argument too few": (regression.MeanSquaredError(), {}, UsageError, "missing a required argument: 'preds'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_a_monoid_is_refused(name: str):
    metric, arguments, error, words = REFUSED[name]
    with pytest.raises(error, match=words):
        from_torchmetrics(metric, **arguments)


def test_what_shows_only_when_it_runs_is_refused_there():
    x = {"x": torch.tensor(1.0)}
    with pytest.raises(
        ContractError, match=r"Writing.update wrote to \['seen'\], which are no states of it; .* add_state"
    ):
        from_torchmetrics(Writing(0.0, "sum"), x="x").of(x)
    with pytest.raises(ContractError, match="Pairs.compute gives a tuple; the value of a metric is one tensor. Write"):
        from_torchmetrics(Pairs(0.0, "sum"), x="x").of(x).value()


def test_without_torchmetrics_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    with pytest.raises(MissingExtraError, match=r"metrics.accuracy needs torchmetrics, .* 'tnt-func\[torchmetrics\]'"):
        metrics.accuracy("binary")


def test_the_first_update_of_all_can_be_traced():
    metric = metrics.accuracy("multiclass", num_classes=4, validate_args=False)

    def counted(scores: torch.Tensor, labels: torch.Tensor) -> Any:
        return metric.of({"output": scores, "targets": labels}).states

    traced = make_fx(counted, tracing_mode="fake")(SCORES, LABELS)
    assert trees.equal(traced(SCORES, LABELS), counted(SCORES, LABELS))

"""Metrics of classifiers, by their short names; each is one of torchmetrics through `from_torchmetrics`.

They read the entries `output` and `targets` of the step's output, scores and labels as torchmetrics takes them: floats
outside of [0, 1] are logits. What else its class takes is passed on: `ignore_index`, `threshold`, `validate_args`.

Example:
    >>> metrics = {"accuracy": accuracy("multiclass", num_classes=3), "f1": f1("multiclass", num_classes=3)}
    >>> output = {"output": torch.eye(3), "targets": torch.tensor([0, 1, 1])}
    >>> {name: round(float(metric.of(output).value()), 4) for name, metric in metrics.items()}
    {'accuracy': 0.6667, 'f1': 0.6667}
"""

from typing import Any, Literal, TypeAlias

import torch

from tnt_func.factories import factory
from tnt_func.metrics.accumulators import Metric
from tnt_func.metrics.from_torchmetrics import from_torchmetrics, torchmetrics

__all__ = ["accuracy", "auroc", "confusion_matrix", "f1", "perplexity", "top_k_accuracy", "torch"]

Task: TypeAlias = Literal["binary", "multiclass", "multilabel"]


@factory
def accuracy(task: Task, *, preds: str = "output", target: str = "targets", **options: Any) -> Metric:
    """The part of the predictions that is right.

    Args:
        task: "binary"; "multiclass", which needs `num_classes`; or "multilabel", which needs `num_labels`.
        preds, target: entries of the step's output: scores [batch] or [batch, classes, ...], and int labels.
        options: `average="macro"` for the mean over classes; without it every sample counts the same.

    Example:
        >>> accuracy("binary").of({"output": torch.tensor([0.9, 0.2]), "targets": torch.tensor([1, 1])}).value()
        tensor(0.5000)

    References:
        torchmetrics.Accuracy, sklearn.metrics.accuracy_score.
    """
    metric = torchmetrics("accuracy").Accuracy(task=task, **options)
    return from_torchmetrics(metric, preds=preds, target=target)


@factory
def top_k_accuracy(
    k: int, *, num_classes: int, preds: str = "output", target: str = "targets", **options: Any
) -> Metric:
    """The part of the samples whose label is among the k highest scores.

    Args:
        k: how many.
        num_classes: how many there are.
        preds, target: entries of the step's output: scores [batch, classes, ...], and int labels.

    Example:
        >>> output = {"output": torch.tensor([[0.5, 0.3, 0.2]] * 3), "targets": torch.tensor([0, 1, 2])}
        >>> top_k_accuracy(2, num_classes=3).of(output).value()
        tensor(0.6667)

    References:
        torchmetrics.Accuracy, sklearn.metrics.top_k_accuracy_score.
    """
    options = {"average": "micro", **options}
    metric = torchmetrics("top_k_accuracy").Accuracy(task="multiclass", num_classes=num_classes, top_k=k, **options)
    return from_torchmetrics(metric, preds=preds, target=target)


@factory
def f1(task: Task, *, preds: str = "output", target: str = "targets", **options: Any) -> Metric:
    """The harmonic mean of precision and recall.

    Args:
        task, preds, target: as of `accuracy`.
        options: `average="macro"` for the mean over classes; without it all are counted together.

    Example:
        >>> f1("binary").of({"output": torch.tensor([0.9, 0.8]), "targets": torch.tensor([1, 0])}).value()
        tensor(0.6667)

    References:
        torchmetrics.F1Score, sklearn.metrics.f1_score.
    """
    return from_torchmetrics(torchmetrics("f1").F1Score(task=task, **options), preds=preds, target=target)


@factory
def auroc(
    task: Task, *, thresholds: int | list[float] = 200, preds: str = "output", target: str = "targets", **options: Any
) -> Metric:
    """The area under the curve of the true positive rate over the false positive rate, counted in bins.

    Args:
        task, preds, target: as of `accuracy`.
        thresholds: how many, evenly over [0, 1], or which; the area is exact where every score is one of them.
        options: `average="weighted"` to weigh classes by their samples.

    Example:
        >>> output = {"output": torch.tensor([0.1, 0.4, 0.35, 0.8]), "targets": torch.tensor([0, 0, 1, 1])}
        >>> auroc("binary").of(output).value()
        tensor(0.7500)

    References:
        torchmetrics.AUROC, sklearn.metrics.roc_auc_score.
    """
    metric = torchmetrics("auroc").AUROC(task=task, thresholds=thresholds, **options)
    return from_torchmetrics(metric, preds=preds, target=target)


@factory
def confusion_matrix(task: Task, *, preds: str = "output", target: str = "targets", **options: Any) -> Metric:
    """How many samples of each class, a row, are taken for each class, a column.

    Args:
        task, preds, target: as of `accuracy`.
        options: `normalize="true"` for parts of each row.

    Example:
        >>> output = {"output": torch.tensor([0, 1, 0]), "targets": torch.tensor([0, 1, 1])}
        >>> confusion_matrix("multiclass", num_classes=2).of(output).value()
        tensor([[1, 0],
                [1, 1]])

    References:
        torchmetrics.ConfusionMatrix, sklearn.metrics.confusion_matrix.
    """
    metric = torchmetrics("confusion_matrix").ConfusionMatrix(task=task, **options)
    return from_torchmetrics(metric, preds=preds, target=target)


@factory
def perplexity(*, ignore_index: int | None = None, preds: str = "output", target: str = "targets") -> Metric:
    """How many tokens a language model hesitates between: exp of the mean of -log p(token) over all tokens.

    Which tokens count depends on labels' values, so a compiled step cannot have it.

    Args:
        ignore_index: the label of tokens that do not count, those of padding say.
        preds, target: entries of the step's output: logits [batch, tokens, vocabulary], and int labels [batch, tokens].

    Example:
        >>> perplexity().of({"output": torch.zeros(1, 2, 5), "targets": torch.tensor([[0, 3]])}).value()
        tensor(5.0000, dtype=torch.float64)

    References:
        torchmetrics.text.Perplexity.
    """
    metric = torchmetrics("perplexity").text.Perplexity(ignore_index=ignore_index)
    return from_torchmetrics(metric, preds=preds, target=target)

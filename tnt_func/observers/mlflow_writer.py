"""Rows as metrics of a run in MLflow.

Example:
    >>> import tempfile
    >>> from tnt_func.observers.rows import Row
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     writer = mlflow_writer("digits", "first", tracking_uri=f"sqlite:///{directory}/runs.db")
    ...     writer.open((0, 0))
    ...     writer.write(Row(1, 0, "train", "step", {"loss": 0.5}))
    ...     writer.close()
    ...     [metric.step for metric in writer.client.get_metric_history(writer.run_id, "train_step/loss")]
    [1]
"""

import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from tnt_func.errors import UsageError, optional
from tnt_func.observers.combinators import is_rank_zero
from tnt_func.observers.rows import Place, Row
from tnt_func.observers.scalars import Recorded, scalars
from tnt_func.types import typed

PARAMS_A_BATCH = 100


@typed
def mlflow_writer(
    experiment: str,
    run_name: str,
    *,
    run_id: str | None = None,
    tracking_uri: str | None = None,
    params: Mapping[str, Any] | None = None,
) -> "MlflowWriter":
    """A `Writer` of metrics to MLflow, over the train steps of the lifetime; a row is one request.

    Metrics of epochs and evaluations are "train/loss", "eval/loss"; a step's output is "train_step/loss". Beside each
    row stands the epoch, "epoch/train_step" and so on. An MLflow run is FINISHED when the writer is closed, or FAILED,
    where an error closes it.

    Among several ranks it is for the first, `rank_zero` around; another one needs the run_id of a run of its own.

    A run that begins at its start is a new run of MLflow. One that resumes goes on with the newest of this name in the
    experiment. MLflow takes no metric back, so rows after the place where it resumes stay; and when these steps are
    taken again, their rows are left out. That is sound, for a resumed run ends on the same bits as one that never
    stopped; only what was measured, a time say, stays as it was the first time. A row that is different is logged as a
    warning, once.

    MLflow's SQL stores, which servers have too, know no infinity: it becomes the largest float64; and SQLite has 0.0
    for -0.0.

    Args:
        experiment: its name; it is made where there is none.
        run_name: of the run in MLflow; without '"'.
        run_id: of a run of MLflow that is there, to write to that one.
        tracking_uri: of a server, or "sqlite:///runs.db"; None is MLflow's own choice. MLflow has given up stores that
            are directories.
        params: logged as they print. MLflow refuses a resumed run with others.

    Raises:
        MissingExtraError: mlflow is not installed.
        UsageError: out of the run, on a rank other than 0 without a run_id.
        MlflowException: out of the run, whatever MLflow refuses.

    Example:
        >>> mlflow_writer("digits", "first", params={"lr": 1e-3})
        mlflow_writer('digits', 'first')
    """
    if '"' in run_name:
        raise UsageError(f"run_name={run_name!r} was given; MLflow cannot search for one with '\"'. Write one without.")
    entities = optional("mlflow.entities", user="mlflow_writer", extra="mlflow", package="mlflow")
    client = optional("mlflow.tracking", user="mlflow_writer", extra="mlflow", package="mlflow").MlflowClient
    return MlflowWriter(experiment, run_name, run_id, lambda: client(tracking_uri), entities, dict(params or {}))


class MlflowWriter:
    """What `mlflow_writer` makes.

    Attributes:
        client: the MlflowClient, None before a run starts.
        run_id: of the run in MLflow, None before a run starts.
    """

    def __init__(
        self, experiment: str, run_name: str, run_id: str | None, client: Any, entities: Any, params: dict[str, Any]
    ):
        self.client: Any = None
        self.run_id = run_id
        self._experiment, self._run_name, self._given = experiment, run_name, run_id
        self._make_client, self._entities, self._params = client, entities, params
        self._recorded = Recorded("MLflow")
        self._opened = False

    def __repr__(self) -> str:
        return f"mlflow_writer({self._experiment!r}, {self._run_name!r})"

    def open(self, place: Place | None) -> None:
        """Find the run, or begin one."""
        if self._given is None and not is_rank_zero():
            raise UsageError(
                f"{self!r} was opened on a rank other than 0; each would make a run of this name, with the same rows. "
                "Write rank_zero(recorder(...)), or give each rank a run of its own: mlflow_writer(..., run_id=...)."
            )
        self.client = self.client or self._make_client()
        self.run_id = self._given or self._found(place) or self._begun()
        self.client.update_run(self.run_id, status="RUNNING")
        params = [self._entities.Param(name, str(value)) for name, value in self._params.items()]
        for start in range(0, len(params), PARAMS_A_BATCH):
            self.client.log_batch(self.run_id, params=params[start : start + PARAMS_A_BATCH])
        points = self._points(place[0]) if place is not None else ()
        self._recorded = Recorded(f"The MLflow run {self._run_name!r}, {self.run_id},", points)
        self._opened = True

    def write(self, row: Row) -> None:
        """Log a batch, unless it is there."""
        if row not in self._recorded:
            now = time.time_ns() // 10**6
            metrics = [self._entities.Metric(name, value, now, row.step) for name, value in scalars(row).items()]
            self.client.log_batch(self.run_id, metrics=metrics)

    def close(self) -> None:
        """Tell MLflow that the run is over."""
        if self._opened:
            self._opened = False
            self.client.set_terminated(self.run_id, "FAILED" if sys.exc_info()[0] else "FINISHED")

    def _found(self, place: Place | None) -> str | None:
        """The newest run of the name, where there is something to go on with."""
        experiment = self.client.get_experiment_by_name(self._experiment)
        if experiment is None or (place is not None and place <= (0, 0)):
            return None
        runs = self.client.search_runs(
            [experiment.experiment_id],
            f'attributes.run_name = "{self._run_name}"',
            max_results=1,
            order_by=["attributes.start_time DESC"],
        )
        return runs[0].info.run_id if runs else None

    def _begun(self) -> str:
        experiment = self.client.get_experiment_by_name(self._experiment)
        number = experiment.experiment_id if experiment else self.client.create_experiment(self._experiment)
        return self.client.create_run(number, run_name=self._run_name).info.run_id

    def _points(self, since: int) -> Iterator[tuple[str, int, float]]:
        """What the run has from a step on."""
        for name in self.client.get_run(self.run_id).data.metrics:
            for metric in self.client.get_metric_history(self.run_id, name):
                if metric.step >= since:
                    yield name, metric.step, metric.value

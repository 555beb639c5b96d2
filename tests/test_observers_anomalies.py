"""Which values are told, once, with metric, step and value; and what becomes of the run."""

import math
import warnings
from typing import Any

import pytest

import tnt_func as tnt
from tnt_func.errors import UsageError
from tnt_func.observers import Anomaly, History, Row, Writer, anomalies, isolate, recorder, throughput

FIRST = tnt.State(params=0, key=tnt.key(0))
UNIT = tnt.TrainUnit(train_step=lambda state, batch: (state, {"loss": batch, "other": 1.0}))


def told(values: list[float], **options: Any) -> list[tuple[int, str]]:
    """Steps and reasons of the anomalies in a run whose loss has these values."""
    found: list[Anomaly] = []
    watching = recorder(anomalies("loss", then=found.append, **options), every_n_steps=1)
    tnt.train(UNIT, FIRST, values, max_epochs=1, observers=[watching])
    assert [repr(values[each.row.step - 1]) for each in found] == [repr(each.value) for each in found]
    return [(each.row.step, each.reason) for each in found]


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("values", "options", "expected"),
    [
        pytest.param([1, NAN, NAN, 1, -INF], {}, [(2, "not finite"), (5, "not finite")], id="not finite"),
        pytest.param([1, NAN, 11], {"nonfinite": False, "above": 10}, [(3, "above 10")], id="not asked for"),
        pytest.param([10, 11, 12, 9, 10.5], {"above": 10}, [(2, "above 10"), (5, "above 10")], id="above"),
        pytest.param([0, -1, NAN, -1], {"below": 0}, [(2, "below 0"), (3, "not finite"), (4, "below 0")], id="below"),
        pytest.param([5] * 9, {"above": 10, "below": 0, "spike": 3}, [], id="nothing"),
    ],
)
def test_what_is_told(values: list[float], options: Any, expected: list[Any]):
    assert told([float(value) for value in values], **options) == expected


def test_a_spike_is_told_by_the_median_of_the_window():
    noise = [1.0, 1.1, 0.9, 1.05, 0.95, 1.0, 1.1, 0.9]
    (step, reason), *more = told([*noise, 3.0, 1.0, 0.2, 1.0], spike=8, window=8)
    # The median is 1, that of the deviations 0.075: 2 / (1.4826 * 0.075) away.
    assert (step, reason) == (9, "18 standard deviations from 1, the median of the 8 before") and not more
    # Four of eight were 50: a mean and its deviation would no longer see it.
    assert [step for step, _ in told([*noise, 50.0, 1.0, 50.0, 1.0, 50.0], spike=8, window=8)] == [9, 11, 13]
    assert told([1.0, 90.0, 1.0], spike=8, window=8) == []  # The window is not yet half full.
    assert told([*noise, *[3.0] * 9, 1.0], spike=8, window=8)[1][0] == 18  # The new level is what is usual by then.


def test_a_metric_that_stands_still_has_room_of_a_hundredth():
    assert told([1.0] * 8 + [1.02], spike=3, window=8) == []
    assert [step for step, _ in told([1.0] * 8 + [1.04], spike=3, window=8)] == [9]
    assert [step for step, _ in told([0.0] * 8 + [1e-9], spike=3, window=8)] == [9]


def test_it_warns_unless_told_otherwise_with_metric_step_and_value():
    watching = recorder(anomalies("loss", above=2), every_n_steps=2)
    with pytest.warns(UserWarning) as caught:
        tnt.train(UNIT, FIRST, [1.0, 3.5, 1.0, 9.0], max_epochs=1, observers=[watching])
    assert [str(one.message) for one in caught] == ["loss is 3.5 at train step 2 (epoch 0), above 2"]


class Wrong(Exception):
    pass


def refuse(anomaly: Anomaly) -> None:
    raise Wrong(anomaly)


@pytest.mark.parametrize("isolated", [False, True])
def test_what_it_raises_ends_the_run_unless_isolated(isolated: bool, caplog: pytest.LogCaptureFixture):
    watching: Any = recorder(anomalies("loss", then=refuse), every_n_steps=1)
    failed: list[Any] = []
    observers = [isolate(watching) if isolated else watching, lambda event: failed.append(event.error)]
    if isolated:
        assert tnt.train(UNIT, FIRST, [1.0, NAN, 1.0], max_epochs=1, observers=observers).progress.train.steps == 3
        assert "loss is nan at train step 2" in caplog.text
    else:
        with pytest.raises(Wrong, match="loss is nan at train step 2"):
            tnt.train(UNIT, FIRST, [1.0, NAN, 1.0], max_epochs=1, observers=observers)
        assert isinstance(failed[-1], Wrong)


def test_evaluations_and_measures_are_looked_at_beside_the_files():
    found: list[str] = []

    def then(anomaly: Anomaly) -> None:
        found.append(str(anomaly).partition(" is ")[2])

    metrics = {"loss": tnt.metrics.mean("loss")}
    unit = tnt.FitUnit(
        train_unit=UNIT,
        eval_unit=tnt.EvalUnit(eval_step=lambda state, batch: (state, {"loss": batch}), metrics=metrics),
    )
    history, ticks = History(), iter(range(1000))
    measure = throughput(samples=lambda batch: 1, clock=ticks.__next__)
    evaluated = anomalies("loss", phase="eval", above=2, then=then)
    measured = anomalies("throughput.run.batches_per_second", kind="epoch", below=0.2, then=then)
    watching = recorder(history, evaluated, measured, measures=[measure])
    tnt.fit(unit, FIRST, [1.0], [3.0], max_epochs=1, observers=[watching])
    # Of start, epoch_start, fetched, step_start, step_end, step_done and epoch_end the last is 6 s after the first.
    assert found == [f"{1 / 6:.6g} after the train epoch at train step 1 (epoch 1), below 0.2"] + [
        "3 after the eval epoch at train step 1 (epoch 1), above 2"
    ]
    assert isinstance(evaluated, Writer) and len(history) == 2


def test_a_name_that_no_row_has_is_told_at_the_end():
    watching = recorder(anomalies("los"), every_n_steps=1)
    with pytest.warns(
        UserWarning, match=r"was given 2 rows of train steps, and none had 'los'; they have \['loss', 'o"
    ):
        tnt.train(UNIT, FIRST, [1.0, 2.0], max_epochs=1, observers=[watching])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watching.close()


def test_a_run_that_goes_back_begins_the_window_anew():
    def spikes(place: tuple[int, int] | None) -> int:
        found: list[Anomaly] = []
        writer = anomalies("loss", spike=3, window=4, then=found.append)
        row = Row(1, 0, "train", "step", {"loss": 1.0})
        for _ in range(4):
            writer.write(row)
        writer.open(place)
        writer.write(row._replace(metrics={"loss": 2.0}))
        return len(found)

    assert (spikes(None), spikes((0, 0))) == (1, 0)


@pytest.mark.parametrize("options", [{"above": 0, "below": 1}, {"spike": 0}, {"window": 1}, {"above": NAN}])
def test_numbers_that_cannot_work(options: Any):
    with pytest.raises(UsageError, match="Write below=0, above=10, spike=10, window=50"):
        anomalies("loss", **options)


def test_there_is_something_to_look_for():
    with pytest.raises(UsageError, match="nothing to look for"):
        anomalies("loss", nonfinite=False)

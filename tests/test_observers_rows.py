"""Who gets rows, and what is said where there are none."""

import warnings
from typing import Any

import pytest
import torch

import tnt_func as tnt
from tnt_func.errors import UsageError, UsageTypeError
from tnt_func.observers import History, Row, csv_writer, recorder, timing

FIRST = tnt.State(params=0, key=tnt.key(0))
METRICS = {"loss": tnt.metrics.mean("loss")}


def test_a_recorder_has_writers_each_once():
    with pytest.raises(UsageError, match=r"no writer; .* Write recorder\(tnt.observers.History\(\)\)"):
        recorder()
    with pytest.raises(UsageTypeError, match=r"the class History; it takes writers of rows.* Write recorder\("):
        recorder(History)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageTypeError, match="writers=<function csv_writer"):
        recorder(csv_writer)  # pyright: ignore[reportArgumentType]
    history = History([Row(1, 0, "train", "step", {})])
    with pytest.raises(UsageError, match="twice. Give it once"):
        recorder(history, History(), history)


def run(output: Any, given: Any, **options: Any) -> None:
    unit = tnt.TrainUnit(train_step=lambda state, batch: (state, output), **options)
    for _ in range(2):
        tnt.train(unit, FIRST, [1, 2], max_epochs=1, observers=[recorder(History(), **given)])


@pytest.mark.parametrize(
    ("output", "given"),
    [
        pytest.param(torch.tensor(0.5), {"every_n_steps": 1}, id="a tensor"),
        pytest.param({"logits": torch.ones(2)}, {"every_n_steps": 1}, id="no number"),
        pytest.param({"loss": 0.5}, {}, id="never due"),
    ],
)
def test_training_that_leaves_no_row_is_told_of(output: Any, given: Any):
    with pytest.warns(UserWarning, match="had nothing to write: .* Return {'loss': loss} from train_step") as told:
        run(output, given)
    assert len(told) == 2


@pytest.mark.parametrize(
    ("output", "given", "options"),
    [
        pytest.param({"loss": 0.5}, {"every_n_steps": 2}, {}, id="a step"),
        pytest.param({"loss": 0.5}, {}, {"metrics": METRICS}, id="an epoch"),
        pytest.param({}, {"measures": [timing()]}, {}, id="a measure"),
    ],
)
def test_one_row_is_enough(output: Any, given: Any, options: Any):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(output, given, **options)
        tnt.evaluate(
            tnt.EvalUnit(eval_step=lambda state, batch: (state, {})), FIRST, [1], observers=[recorder(History())]
        )

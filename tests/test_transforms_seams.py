"""Where transforms take hold."""

from typing import Any

import pytest
import torch

import tnt_func as tnt
from tnt_func import optim
from tnt_func.descent import Descent
from tnt_func.errors import UsageError
from tnt_func.transforms.guards import Anomalous
from tnt_func.transforms.seams import inside, kept_unless, on_descent, on_reads


def step(state: tnt.State, batch: Any) -> Any:
    return state, {}


UNITS: dict[str, Any] = {
    "train": tnt.TrainUnit(train_step=Anomalous(Anomalous(tnt.minimize(max, optim.sgd(0.1))))),
    "fit": tnt.FitUnit(
        train_unit=tnt.TrainUnit(train_step=Anomalous(tnt.minimize(max, optim.sgd(0.1)))),
        eval_unit=tnt.EvalUnit(eval_step=step),
        predict_unit=tnt.PredictUnit(predict_step=step),
    ),
}


@pytest.mark.parametrize("kind", UNITS)
def test_a_descent_is_reached_through_what_is_around_it(kind: str):
    seen: list[Descent] = []
    unit = on_descent(UNITS[kind], "x", lambda descent: (seen.append(descent), descent)[1])
    assert unit == UNITS[kind] and isinstance(seen[0], Descent)


def test_steps_of_composed_units_are_not_reached():
    unit = tnt.sequence(UNITS["train"], UNITS["train"])
    with pytest.raises(UsageError, match="x was given a unit.*transform units before sequence, alternate"):
        on_descent(unit, "x", lambda descent: descent)
    assert inside(unit.train_step, Descent, lambda descent: descent) is None


def test_reads_are_evaluation_and_prediction():
    unit = on_reads(UNITS["fit"], Anomalous)
    assert unit.eval_unit.eval_step == unit.predict_unit.predict_step == Anomalous(step)
    assert unit.train_unit == UNITS["fit"].train_unit and on_reads(UNITS["train"], Anomalous) is UNITS["train"]


@pytest.mark.parametrize("fine", [True, False])
def test_what_is_not_fine_is_kept_and_the_rest_moves(fine: bool):
    before = tnt.State(params=torch.ones(2), buffers={"n": 1}, opt_state=(torch.zeros(1),), key=tnt.key(0))
    after = before.replace(params=torch.zeros(2), buffers={"n": 2}, memory={"slot": 1})
    kept = kept_unless(torch.tensor(fine), before, after, ("params", "opt_state"))
    assert kept.params is (after if fine else before).params
    assert kept.buffers == {"n": 2} and kept.memory == {"slot": 1} and kept.opt_state is before.opt_state

"""overfit_batches: how far a loss falls on a few batches."""

import re

from rehearsal_units import BATCHES, descend, linear, loader, stepping

import tnt_func as tnt
from tnt_func.rehearsal import overfit_batches
from tnt_func.unit import EvalUnit, FitUnit, TrainUnit


def test_a_model_that_learns_its_batches_by_heart():
    unit, state = linear()
    found = overfit_batches(unit, state, loader(shuffle=True), batches=2, steps=150)
    assert found.ok and found.facts["ran"] == "150 steps on 2 batches" and found.facts["lr"] == "0.1"
    assert found.numbers["loss_after"] < 0.01 * found.numbers["loss_before"]
    assert found.numbers["eval loss after"] < 0.01 * found.numbers["eval loss before"]
    assert found.facts["evaluated"].startswith("eval loss ")


def test_one_that_does_not_is_told_how_far_it_came():
    unit, state = linear(optimizer=tnt.optim.sgd(1e-4))
    (finding,) = overfit_batches(unit.train_unit, state, loader(), steps=5).findings
    assert re.match(
        r"The loss went from [\d.]+ to [\d.]+ in 5 steps on 1 batch, and should be at most [\d.]+ \(0.1 ", finding
    )
    assert overfit_batches(unit.train_unit, state, loader(), steps=5, to=0.99999).ok


def test_a_loss_that_is_not_positive_has_to_fall():
    unit, state = stepping(descend)
    falling = TrainUnit(
        train_step=lambda state, batch: (unit.train_step(state, batch)[0], {"nll": state.params["w"].sum() - 9})
    )
    assert overfit_batches(falling, state, BATCHES, steps=5, loss="nll").ok
    rising = TrainUnit(
        train_step=lambda state, batch: (unit.train_step(state, batch)[0], {"nll": -state.params["w"].sum()})
    )
    (finding,) = overfit_batches(rising, state, BATCHES, steps=5, loss="nll").findings
    assert "and should be lower" in finding


def test_a_loss_that_is_not_finite_is_found():
    unit, state = linear(optimizer=tnt.optim.sgd(1e30))
    found = overfit_batches(unit.train_unit, state, loader()).findings
    assert found[0].startswith("output['loss'] (1 of 1 numbers) of train step")
    assert any(finding.startswith("The loss went from") and " to nan in" in finding for finding in found)


def test_a_model_that_evaluates_as_another_function_is_found():
    unit, state = linear()
    doubled = EvalUnit(
        eval_step=lambda state, batch: unit.eval_unit.eval_step(state, (10 * batch[0], batch[1])),
        metrics=unit.eval_unit.metrics,
    )
    odd = FitUnit(train_unit=unit.train_unit, eval_unit=doubled)
    (finding,) = overfit_batches(odd, state, loader(), steps=150).findings
    assert finding.startswith("The loss fell to ") and "another function" in finding

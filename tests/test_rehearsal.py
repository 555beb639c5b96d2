"""fast_dev_run: what it runs, what it costs, and what it finds of parameters."""

import math
import re
from typing import Any

import pytest
import torch
from rehearsal_units import BATCHES, descend, linear, loader, stepping
from torch import nn

import tnt_func as tnt
from tnt_func.data.cursors import BLANK
from tnt_func.errors import UsageError
from tnt_func.progress import Progress, RunProgress
from tnt_func.rehearsal import Rehearsal, fast_dev_run, overfit_batches, sanity_check
from tnt_func.rehearsal.costs import Pace, ahead, duration
from tnt_func.unit import PHASES, POINTS

# What runs


def test_a_good_run_has_no_findings_and_is_told_in_facts_and_numbers():
    unit, state = linear()
    found = fast_dev_run(unit, state, loader(shuffle=True), loader(), max_epochs=3)
    assert found.ok and found.findings == ()
    assert found.facts["ran"] == "5 train steps, 5 eval steps, every hook of an epoch"
    assert found.facts["train batch"] == "[0] float32[8, 2], [1] float32[8, 1]"
    assert re.fullmatch(r"loss [\d.]+ -> [\d.]+, num_samples 8", found.facts["train output"])
    assert found.facts["epoch"].startswith("5 train steps and 5 eval steps, about ")
    assert found.facts["state"].startswith("3 parameters, ")
    assert found.numbers["run_seconds"] == pytest.approx(3 * found.numbers["epoch_seconds"])
    trained = tnt.fit(unit, state, loader(shuffle=True), loader(), max_epochs=1)
    assert found.numbers["eval loss"] == tnt.metrics.compute(trained, "eval")["loss"]
    text = str(found).splitlines()
    assert text[0] == "fast_dev_run: no findings" and repr(found) == str(found)
    assert text[1:] == [f"  {name}: {fact}" for name, fact in found.facts.items()]


def test_every_hook_runs_as_in_the_run():
    called: list[str] = []

    def noting(name: str) -> Any:
        return lambda state: (called.append(name), state)[1]

    points = [f"on_{phase}_{point}" for phase in PHASES[:2] for point in POINTS]
    callback = tnt.Callback(name="notes", **{name: noting(name) for name in points})
    unit, state = linear()
    fast_dev_run(unit, state, loader(16), loader(8), callbacks=[callback])
    rehearsed, called[:] = list(called), []
    tnt.fit(unit, state, loader(16), loader(8), max_epochs=1, callbacks=[callback])
    assert rehearsed == called and set(called) == set(points)


def test_the_rehearsal_begins_where_the_state_stands():
    seen: list[float] = []

    def step(params: Any, batch: Any) -> Any:
        seen.append(float(batch[0]))
        return descend(params, batch)

    unit, state = stepping(step)
    state = state.replace(progress=RunProgress(train=Progress(2, 7, 1)), memory={"data": BLANK})
    found = fast_dev_run(unit, state, BATCHES, steps=1, max_steps=17)
    assert seen == [3.0] and found.facts["ran"] == "1 train step, every hook of an epoch"
    pace = found.numbers["step_seconds"] + found.numbers["batch_seconds"]
    assert found.numbers["run_seconds"] == pytest.approx(10 * pace)


def test_observers_are_called_and_closed_and_their_time_is_not_counted(monkeypatch: pytest.MonkeyPatch):
    now = 0

    def passing(seconds: int) -> None:
        nonlocal now
        now += seconds

    class Observer:
        points: list[str] = []
        closed = 0

        def __call__(self, event: tnt.Event) -> None:
            passing(100)
            self.points.append(event.point)

        def close(self) -> None:
            self.closed += 1

    def step(params: Any, batch: Any) -> Any:
        passing(7 if batch is not None and float(batch[0]) == 1.0 else 2)
        return descend(params, batch)

    monkeypatch.setattr("tnt_func.rehearsal.watching.perf_counter", lambda: now)
    observer = Observer()
    found = fast_dev_run(*stepping(step), BATCHES, observers=[observer])
    assert (found.numbers["first_step_seconds"], found.numbers["step_seconds"]) == (7, 2)
    assert observer.points[0] == "start" and observer.points[-1] == "end" and observer.closed == 1


def test_a_stop_is_told():
    stop = tnt.Callback(name="stop", on_train_step_end=lambda state: state.request_stop("enough"))
    unit, state = linear()
    found = fast_dev_run(unit.train_unit, state, loader(), callbacks=[stop])
    assert found.facts["ran"] == "1 train step, every hook of an epoch, stopped early for 'enough'"
    at_once = tnt.Callback(name="stop", on_train_start=lambda state: state.request_stop("no"))
    found = fast_dev_run(unit.train_unit, state, loader(), callbacks=[at_once])
    assert found.facts["ran"].startswith("0 train steps") and not found.ok
    with pytest.raises(UsageError, match="no step was taken: the run stopped at once, for 'no'"):
        overfit_batches(unit, state, loader(), callbacks=[at_once])


@pytest.mark.parametrize("rehearse", [fast_dev_run, sanity_check])
def test_errors_are_those_of_the_run(rehearse: Any):
    unit, state = stepping(lambda params, batch: {}["missing"])
    with pytest.raises(KeyError, match="missing"):
        rehearse(unit, state, BATCHES)


def test_what_a_run_takes():
    train = Pace(first_step=9, step=0.2, first_batch=9, batch=0.1, overlaps=False, length=10)
    whole = {"train": train, "eval": train._replace(step=0.5, batch=0.5, overlaps=True, length=4)}
    numbers, facts = ahead(whole, epochs=2, steps=math.inf)
    assert numbers == pytest.approx({"epoch_seconds": 5.0, "run_seconds": 10.0})
    assert facts == {"epoch": "10 train steps and 4 eval steps, about 5.0 s", "run": "about 10 s to go"}
    assert ahead(whole, epochs=2, steps=10)[0]["run_seconds"] == pytest.approx(5.0)
    assert ahead({"train": train._replace(length=1)}, epochs=1, steps=10)[1]["epoch"].startswith("1 train step, ")
    assert "run" not in ahead(whole, epochs=math.inf, steps=math.inf)[1]
    unknown, words = ahead({"train": train._replace(length=None)}, epochs=2, steps=100)
    assert unknown == pytest.approx({"run_seconds": 30.0}) and words["epoch"].startswith("of unknown length")
    assert [duration(seconds) for seconds in (0, 9.94e-3, 59.6, 3599.9, 86_399, 90_000)] == [
        "0.0 us", "9.9 ms", "1 min", "1 h", "1 d", "1 d 1 h",
    ]  # fmt: skip


def test_a_rehearsal_is_a_value():
    found = Rehearsal("fast_dev_run", {"ran": "it"}, ("one", "two"), {"run_seconds": 1.0})
    assert str(found) == "fast_dev_run: 2 findings\n  ran: it\n- one\n- two" and not found.ok
    assert found == Rehearsal("fast_dev_run", {"ran": "it"}, ("one", "two"), {"run_seconds": 1.0})


# What is found of parameters


class Half(nn.Module):
    """Uses one of its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.dead = nn.Linear(2, 1), nn.Linear(2, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


@pytest.mark.parametrize("rehearse", [fast_dev_run, overfit_batches])
def test_parameters_without_a_gradient_are_named(rehearse: Any):
    unit, state = linear(Half())
    (finding,) = rehearse(unit.train_unit, state, loader()).findings
    assert finding.startswith("params['dead.weight'] got no gradient in ")


def test_parameters_that_do_not_change_are_named():
    unit, state = stepping(lambda params, batch: {**params, "w": params["w"] - batch})
    (finding,) = fast_dev_run(unit, state, BATCHES, steps=2).findings
    assert finding.startswith("params['v'] did not change in 2 steps. Is that meant (frozen)?")
    unit, state = stepping(lambda params, batch: params)
    (finding,) = fast_dev_run(unit, state, BATCHES).findings
    assert finding.startswith("No parameter changed in 3 steps. Is lr 0, ")


def test_what_becomes_not_finite_is_named_and_what_was_is_not():
    unit, state = stepping(lambda params, batch: {**descend(params, batch), "w": params["w"] / 0})
    state = state.replace(buffers={"mask": torch.tensor([0.0, -torch.inf])}, opt_state={"limit": math.inf})
    (finding,) = fast_dev_run(unit, state, BATCHES).findings
    assert finding.startswith("After 3 steps params['w'] (2 of 2 numbers) is not finite.")
    unit, state = linear()
    module = linear(optimizer=tnt.optim.sgd(1e30))
    finding = fast_dev_run(module[0].train_unit, module[1], loader()).findings[0]
    assert finding.startswith("output['loss'] (1 of 1 numbers) of train step ")

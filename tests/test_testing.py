"""What the checks say to a user: messages, refusals, what they leave alone; and what they are made of."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from torch.utils.data import DataLoader, TensorDataset

from tnt_func import rng, testing
from tnt_func.errors import LawError, StructureError, UsageError, UsageTypeError
from tnt_func.events import Event
from tnt_func.metrics import Metric, Total, mean
from tnt_func.progress import Progress, RunProgress
from tnt_func.pytree import pytree
from tnt_func.state import State
from tnt_func.testing import calls, strategies
from tnt_func.testing.case import Case
from tnt_func.testing.generators import moved, stands
from tnt_func.testing.snapshot import changes, freeze
from tnt_func.unit import Callback, EvalUnit, FitUnit, PredictUnit, TrainUnit

CHECKS = (
    testing.check_purity,
    testing.check_determinism,
    testing.check_structure,
    testing.check_grammar,
    testing.check_observers,
    testing.check_composition,
    testing.check_unit,
)
every_check = pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)


def first_state() -> State:
    return State(params={"w": torch.zeros(2)}, key=rng.key(0))


def train_step(state: State, batch: Any) -> Any:
    w = state.params["w"] + batch
    return state.replace(params={"w": w}), {"loss": w.sum()}


def eval_step(state: State, batch: Any) -> Any:
    return state, {"loss": (state.params["w"] - batch).sum()}


UNIT = TrainUnit(train_step=train_step, metrics={"loss": mean("loss")})
FIT = FitUnit(train_unit=UNIT, eval_unit=EvalUnit(eval_step=eval_step))


def test_the_laws_need_neither_hypothesis_nor_pytest_nor_numpy():
    code = """
import sys, warnings
sys.modules.update(dict.fromkeys(["hypothesis", "pytest", "numpy"]))
warnings.simplefilter("ignore")
import torch
from tnt_func.rng import key
from tnt_func.state import State
from tnt_func.testing import broken, check_unit
from tnt_func.unit import TrainUnit
check_unit(TrainUnit(train_step=lambda state, batch: (state, {})), State(params=torch.zeros(1), key=key(0)), [1.0])
print(len(broken.CONTROLS) > 20)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert (run.stdout, run.stderr) == ("True\n", "")


@every_check
@pytest.mark.parametrize("unit", [UNIT, FIT, EvalUnit(eval_step=eval_step), PredictUnit(predict_step=eval_step)])
def test_a_sound_unit_passes_and_all_is_left_as_it_was(check: Any, unit: Any):
    state, batches = first_state(), [torch.ones(2), torch.zeros(2)]
    before, stood = freeze([state, batches]), stands()
    assert check(unit, state, batches) is None
    assert freeze([state, batches]) == before and moved(stood) == []


def test_the_state_is_left_as_it_was_by_a_unit_that_writes_into_it():
    state = first_state()
    unit = TrainUnit(train_step=lambda state, batch: (state, {"w": state.params["w"].add_(1)}))
    before = freeze(state)
    with pytest.raises(LawError, match="law 1"):
        testing.check_unit(unit, state, [1.0])
    assert freeze(state) == before


def test_a_message_says_where_who_what_and_what_to_write():
    callback = Callback(
        name="noisy", on_eval_epoch_end=lambda state: state.remember("noise", state.params["w"].add_(1))
    )
    with pytest.raises(LawError) as raised:
        testing.check_unit(FIT, first_state(), [1.0], callbacks=[callback])
    said, leaf, advice = str(raised.value).splitlines()
    assert said == (
        "law 1 (purity) is broken at eval epoch_end (epoch 1, step 1): "
        "callback 'noisy' on_eval_epoch_end wrote into the state it was given"
    )
    assert leaf == "  state.params['w']: 2 of 2 elements differ, by at most 1"
    assert "Return new tensors: state.replace(params=params - lr * grads)" in advice


def test_a_message_lists_eight_leaves_and_counts_the_others():
    before, after = ({f"w{index}": torch.full((1,), value) for index in range(12)} for value in (0.0, 1.0))
    lines = changes(freeze(before), freeze(after), "params")
    assert len(lines) == 9 and lines[-1] == "and 4 more"


# What cannot be checked is refused.


@every_check
def test_an_iterator_is_refused(check: Any):
    with pytest.raises(UsageError, match=r"batches is a one-shot list_iterator; .*batches=lambda epoch:"):
        check(UNIT, first_state(), iter([1.0]))
    with pytest.raises(UsageError, match=r"eval_batches is a one-shot list_iterator"):
        check(FIT, first_state(), [1.0], eval_batches=iter([1.0]))


@every_check
def test_what_is_no_unit_is_refused(check: Any):
    with pytest.raises(UsageTypeError, match=f"{check.__name__} was given an int as its unit"):
        check(3, first_state(), [1.0])


@every_check
def test_a_state_that_no_checkpoint_holds_is_refused(check: Any):
    with pytest.raises(StructureError, match=r"state.params is a builtin_function_or_method"):
        check(UNIT, State(params=len, key=rng.key(0)), [1.0])


@every_check
def test_a_word_that_the_entry_point_does_not_know_is_an_error(check: Any):
    with pytest.raises(TypeError, match="max_epoch"):
        check(UNIT, first_state(), [1.0], max_epoch=1)


def test_a_run_without_a_step_is_refused():
    with pytest.raises(UsageError, match=r"no step was taken of batches=\[\] with \{'max_epochs': 2\}"):
        testing.check_unit(UNIT, first_state(), [])


def test_resuming_is_of_training():
    with pytest.raises(UsageTypeError, match="check_resume was given an EvalUnit"):
        testing.check_resume(FIT.eval_unit, first_state(), [1.0])  # pyright: ignore[reportArgumentType]


def test_a_user_error_comes_out_as_it_is():
    def fails(state: State, batch: Any) -> Any:
        raise ZeroDivisionError("of the user")

    for check in CHECKS:
        with pytest.raises(ZeroDivisionError, match="of the user"):
            check(TrainUnit(train_step=fails), first_state(), [1.0])


# What a check does by default.


def test_without_a_limit_the_state_gets_two_more_epochs():
    state = first_state().replace(progress=RunProgress(train=Progress(5, 9, 0)))
    assert Case.of(UNIT, state, [1.0]).options == {"max_epochs": 7}
    assert Case.of(UNIT, state, [1.0], options={"max_steps": 11}).options == {"max_steps": 11}
    assert Case.of(FIT.eval_unit, state, [1.0]).options == {}


def test_a_fit_unit_is_evaluated_on_the_batches_if_there_are_no_others():
    seen = list[Any]()

    def sees(state: State, batch: Any) -> Any:
        seen.append(batch)
        return eval_step(state, batch)

    unit = FitUnit(train_unit=UNIT, eval_unit=EvalUnit(eval_step=sees))
    testing.check_purity(unit, first_state(), [1.0, 2.0], max_epochs=1)
    assert seen == [1.0, 2.0]


def test_the_predict_unit_of_a_fit_unit_is_checked_with_its_callbacks():
    predict_unit = PredictUnit(predict_step=eval_step)
    unit = FitUnit(train_unit=UNIT, eval_unit=FIT.eval_unit, predict_unit=predict_unit)
    callback = Callback(name="both", on_train_end=lambda state: state, on_predict_end=lambda state: _zeroed(state))
    testing.check_unit(unit, first_state(), [1.0])
    with pytest.raises(LawError, match="at predict end .*callback 'both' on_predict_end wrote"):
        testing.check_unit(unit, first_state(), [1.0], callbacks=[callback])


def _zeroed(state: State) -> State:
    state.params["w"].fill_(7)
    return state


def test_the_metrics_of_a_unit_are_checked():
    metric = Metric(lambda: Total(torch.tensor(1.0)), lambda output: Total(output["loss"]))
    with pytest.raises(LawError, match=r"law 8 \(composition\) is broken in a metric: empty\(\) is no identity"):
        testing.check_unit(TrainUnit(train_step=train_step, metrics={"loss": metric}), first_state(), [1.0])


def test_fewer_places_cost_fewer_runs():
    def runs(places: int) -> int:
        epochs = list[int]()

        def data(epoch: int) -> Any:
            epochs.append(epoch)
            return [1.0, 2.0, 3.0]

        testing.check_resume(UNIT, first_state(), data, max_epochs=4, places=places)
        return len(epochs)

    assert runs(2) < runs(8) < runs(32)


def test_observers_are_closed_once_after_all_runs():
    class Log:
        def __init__(self) -> None:
            self.phases = list[str]()
            self.closed = 0

        def __call__(self, event: Event) -> None:
            assert not self.closed
            self.phases.append(event.point)

        def close(self) -> None:
            self.closed += 1

    log = Log()
    testing.check_observers(UNIT, first_state(), [1.0], observers=[log])
    assert log.phases.count("start") == 3 and log.closed == 1


# What a check finds that the zoo has not.


def test_a_loader_with_a_generator_of_its_own_is_found():
    loader = DataLoader(TensorDataset(torch.arange(4.0)), shuffle=True, generator=torch.Generator())
    unit = TrainUnit(train_step=lambda state, batch: train_step(state, batch[0]))
    with pytest.raises(LawError, match="law 2 .*the train data is where it begins"):
        testing.check_unit(unit, first_state(), loader)
    with pytest.raises(LawError, match=r"law 5 \(resume\) is broken .*has generator="):
        testing.check_resume(unit, first_state().replace(progress=RunProgress(train=Progress(1, 4, 0))), loader)


def test_a_callback_that_draws_unseen_is_told_to_declare_it():
    callback = Callback(name="jitter", on_train_step_end=lambda state: state.remember("noise", torch.rand(()).item()))
    unit = TrainUnit(train_step=train_step, draws=(), memory={"noise": lambda state: 0.0})
    said = r"callback 'jitter' on_train_step_end drew from torch's .*\nWrite draws=\('torch',\) in the unit or callback"
    with pytest.raises(LawError, match=said):
        testing.check_determinism(unit, first_state(), [1.0], callbacks=[callback])


def test_a_leaf_that_is_placed_otherwise_is_found(tmp_path: Path):
    """On one rank, where replicated and sharded hold the same numbers."""
    from torch.distributed import (
        FileStore,  # pyright: ignore[reportPrivateImportUsage]
        destroy_process_group,
        init_process_group,
    )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    init_process_group("gloo", store=FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        replicated, sharded = (distribute_tensor(torch.zeros(2), mesh, [placed]) for placed in (Replicate(), Shard(0)))
        assert calls.reshaped({"w": replicated}, {"w": replicated.clone()}, "params") == []
        lines = calls.reshaped({"w": replicated}, {"w": sharded}, "params")
        assert len(lines) == 1 and "Replicate()" in lines[0] and "Shard(dim=0)" in lines[0]
    finally:
        destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_metric_is_held_to_the_precision_it_works_in(dtype: torch.dtype):
    metric = Metric(lambda: Total(torch.zeros((), dtype=dtype)), lambda output: Total(output.to(dtype)))
    testing.check_metric(metric, list(torch.rand(20, generator=torch.Generator().manual_seed(0)) - 0.5))


@pytree
@dataclass(frozen=True)
class Kept:
    """Every output of an epoch: its value is a tree."""

    all: tuple[Any, ...]

    def merge(self, other: "Kept") -> "Kept":
        return Kept(self.all + other.all)

    def value(self) -> Any:
        return {"count": torch.tensor(len(self.all)), "all": self.all}


def test_a_metric_may_have_a_tree_for_its_value():
    testing.check_metric(Metric(lambda: Kept(()), lambda output: Kept((output,))), [1, "a", None, 2.0])


# The strategies.


@pytest.mark.parametrize(
    ("cases", "evaluations"), [(strategies.train_cases(), 0), (strategies.fit_cases(), 10)], ids=["train", "fit"]
)
def test_random_runs_are_runs(cases: Any, evaluations: int):
    """Many of them take steps, and all that the laws speak of happens."""
    seen = {"step": 0, "stop": 0, "open": 0, "callback": 0, "two epochs": 0, "eval inside": 0, "all": 0}

    @settings(max_examples=200, phases=[Phase.generate], database=None, derandomize=True)
    @given(cases)
    def count(case: Case) -> None:
        events = list(case.events())
        points = [(event.phase, event.point) for event in events]
        seen["all"] += 1
        seen["step"] += ("train", "step_end") in points
        seen["stop"] += any(event.state.stop for event in events)
        seen["open"] += case.state.progress.train.is_open
        seen["callback"] += bool(case.callbacks)
        seen["two epochs"] += points.count(("train", "epoch_end")) > 1
        seen["eval inside"] += (("train", "step_end"), ("eval", "start")) in zip(points, points[1:], strict=False)

    count()
    assert seen.pop("eval inside") >= evaluations
    assert seen["step"] > 0.4 * seen["all"] and min(seen.values()) >= 10

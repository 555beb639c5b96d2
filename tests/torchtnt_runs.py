"""Runs of TorchTNT 0.2.4, recorded and live, as `tnt_func.testing.reference.Trace`.

`data/torchtnt_0.2.4_traces.jsonl` holds recorded runs, one JSON object a line:

    cfg      the call: entry point, limits, `n` items a loader and whether it is reiterable, counters at the start
             ([epochs, steps, steps in the epoch] a phase), and `inject`, {index of an event: what its hook does}
    events   [who, hook, phase, the module's training flag, gradients (g: on, n: no_grad, i: inference mode),
             train, eval and predict counters]
    outcome  "ok" or the error that surfaced, "Boom" being the injected one
    final    counters and training flag afterwards

    python tests/torchtnt_runs.py

records every call again with the TorchTNT that is installed: pip install 'tnt-func[oracle]'.
"""

import functools
import json
import logging
from pathlib import Path
from typing import Any

import torch

from tnt_func.testing.reference import RAISED, Counts, Seen, Setting, Source, Trace
from tnt_func.types import Phase
from tnt_func.unit import PHASES

RECORDINGS = Path(__file__).parent / "data" / "torchtnt_0.2.4_traces.jsonl"

PHASE: dict[str, Phase] = {"T": "train", "E": "eval", "P": "predict"}
GRADIENTS = {"g": "on", "n": "no_grad", "i": "inference"}
OUTCOMES = {"Boom": "Injected"}
LIMITS = (
    "max_epochs",
    "max_steps",
    "max_steps_per_epoch",
    "max_eval_steps_per_epoch",
    "evaluate_every_n_steps",
    "evaluate_every_n_epochs",
)


def recordings() -> list[tuple[Setting, Trace]]:
    """Every recorded call, and what TorchTNT did."""
    lines = RECORDINGS.read_text().splitlines()
    return [(_setting(run["cfg"]), _trace(run)) for run in map(json.loads, lines)]


def live(setting: Setting) -> Trace:
    """What TorchTNT does with a setting, now."""
    logging.getLogger("torchtnt").setLevel(logging.CRITICAL)
    from torchtnt import framework
    from torchtnt.utils.progress import Progress

    events: list[Seen] = []
    unit = _unit_class()(setting, events)
    unit.module.train(setting.training)
    for phase in PHASES:
        setattr(unit, f"{phase}_progress", Progress(*setting.progress[phase]))
    callbacks = [_callback_class()(f"C{i}", setting, events) for i in range(setting.n_callbacks)]
    data, eval_data = (
        list(range(source.n)) if source.reiterable else iter(range(source.n))
        for source in (setting.data, setting.eval_data)
    )
    outcome = "ok"
    try:
        run = getattr(framework, setting.entry)
        run(unit, data, *[eval_data] * (setting.entry == "fit"), callbacks=callbacks, **setting.limits())
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and "ki" not in setting.inject.values():
            raise
        outcome = type(error).__name__
    return Trace(tuple(events), outcome, _counted(unit), unit.module.training)


def record(line: str) -> str:
    """The line of a recording, with what TorchTNT does now."""
    run = json.loads(line)
    trace = live(_setting(run["cfg"]))
    short = {long: name for name, long in (PHASE | GRADIENTS | OUTCOMES).items()}
    run["events"] = [
        (seen.who, seen.hook, short[seen.phase], seen.training, short[seen.gradients], *seen[5:])
        for seen in trace.events
    ]
    run["outcome"] = short.get(trace.outcome, trace.outcome)
    run["final"] = {**dict(zip(PHASES, trace.final, strict=True)), "module_training": trace.training}
    return json.dumps(run)


def _setting(cfg: dict[str, Any]) -> Setting:
    return Setting(
        entry=cfg["entry"],
        data=Source(**cfg["train_or_only_loader"]),
        eval_data=Source(**cfg["eval_loader"]),
        n_callbacks=cfg["n_callbacks"],
        progress={phase: _counts(cfg["progress"][phase]) for phase in PHASES},
        training=cfg["module_training_before"],
        inject={int(index): action for index, action in cfg["inject"].items()},
        **{name: cfg[name] for name in LIMITS},
    )


def _trace(run: dict[str, Any]) -> Trace:
    events = (
        Seen(who, hook, PHASE[phase], training, GRADIENTS[gradients], *map(_counts, progress))
        for who, hook, phase, training, gradients, *progress in run["events"]
    )
    train, evaluated, predicted = (_counts(run["final"][phase]) for phase in PHASES)
    outcome: str = run["outcome"]
    return Trace(
        tuple(events), OUTCOMES.get(outcome, outcome), (train, evaluated, predicted), run["final"]["module_training"]
    )


def _counts(listed: list[int]) -> Counts:
    epochs, steps, steps_in_epoch = listed
    return epochs, steps, steps_in_epoch


def _counted(unit: Any) -> tuple[Counts, Counts, Counts]:
    train, evaluated, predicted = (getattr(unit, f"{phase}_progress") for phase in PHASES)
    return _read(train), _read(evaluated), _read(predicted)


def _read(progress: Any) -> Counts:
    return progress.num_epochs_completed, progress.num_steps_completed, progress.num_steps_completed_in_epoch


def _see(setting: Setting, events: list[Seen], who: str, hook: str, state: Any, unit: Any) -> None:
    """Note a call, and do as the setting says."""
    action = setting.inject.get(len(events))
    phase = PHASE[state.active_phase.name[0]]
    gradients = "inference" if torch.is_inference_mode_enabled() else "on" if torch.is_grad_enabled() else "no_grad"
    events.append(Seen(who, hook, phase, unit.module.training, gradients, *_counted(unit)))
    if action == "stop":
        state.stop()
    elif action is not None:
        raise RAISED[action]


@functools.cache
def _unit_class() -> Any:
    from torchtnt.framework.unit import EvalUnit, PredictUnit, TrainUnit

    class Unit(TrainUnit[object], EvalUnit[object], PredictUnit[object]):
        def __init__(self, setting: Setting, events: list[Seen]):
            super().__init__()
            self.module, self.setting, self.seen = torch.nn.Identity(), setting, events

        def see(self, hook: str, state: Any) -> None:
            _see(self.setting, self.seen, "U", hook, state, self)

        def train_step(self, state: Any, data: object) -> None:
            self.see("train_step", state)

        def eval_step(self, state: Any, data: object) -> None:
            self.see("eval_step", state)

        def predict_step(self, state: Any, data: object) -> None:
            self.see("predict_step", state)

        def on_exception(self, state: Any, exc: BaseException) -> None:
            self.see("on_exception", state)

    for phase in PHASES:
        for point in ("start", "epoch_start", "epoch_end", "end"):
            hook = f"on_{phase}_{point}"
            setattr(Unit, hook, lambda self, state, hook=hook: self.see(hook, state))
    return Unit


@functools.cache
def _callback_class() -> Any:
    from torchtnt.framework.callback import Callback

    class Noting(Callback):
        def __init__(self, who: str, setting: Setting, events: list[Seen]):
            self.who, self.setting, self.events = who, setting, events

        def see(self, hook: str, state: Any, unit: Any) -> None:
            _see(self.setting, self.events, self.who, hook, state, unit)

    points = ("start", "epoch_start", "get_next_batch_end", "step_start", "step_end", "epoch_end", "end")
    for hook in ("on_exception", *(f"on_{phase}_{point}" for phase in PHASES for point in points)):
        setattr(Noting, hook, lambda self, state, unit, error=None, hook=hook: self.see(hook, state, unit))
    return Noting


if __name__ == "__main__":
    RECORDINGS.write_text("".join(f"{record(line)}\n" for line in RECORDINGS.read_text().splitlines()))

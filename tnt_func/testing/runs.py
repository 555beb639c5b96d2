"""Laws of runs held against each other: determinism (2), observers (6), evaluation (7)."""

from collections.abc import Mapping, Sequence
from typing import Any

from tnt_func.arguments import expects
from tnt_func.errors import LawError
from tnt_func.events import Closable, Event, Observer
from tnt_func.progress import Progress
from tnt_func.runs import evaluate, fit, predict, train
from tnt_func.state import State
from tnt_func.testing.case import Call, Case, law_error, where
from tnt_func.testing.generators import moved, standing, stands
from tnt_func.testing.snapshot import changes, freeze, thaw
from tnt_func.testing.tape import Moment, compare, record
from tnt_func.types import Generator, Phase
from tnt_func.unit import Callback, EvalUnit, FitUnit, PredictUnit, TrainUnit, Unit

HERE: dict[Generator, int] = {"torch": 1, "numpy": 2, "random": 3}
THERE: dict[Generator, int] = {"torch": 11, "numpy": 12, "random": 13}
"""Two places for the global generators to stand, on which no run depends."""
NOTHING_OUTSIDE = (
    "What is not in the state is not in the run: no counter, cache or clock outside of it. Keep what is to be "
    "remembered in state.memory, with a memory function for its first value."
)
"""What to do about a unit that remembers."""


@expects(TrainUnit, EvalUnit, PredictUnit, FitUnit)
def check_determinism(
    unit: Unit,
    state: State,
    batches: Any,
    *,
    eval_batches: Any = None,
    callbacks: Sequence[Callback] = (),
    **options: Any,
) -> None:
    """Law 2. The same unit, state and data give the same bits, wherever the global generators stand; these stay there.

    A step or hook that draws from a generator that its unit does not declare is named, and so is the first one that
    does another thing the second time: it counts, caches or reads a clock outside the state.

    Args:
        unit, state, batches, eval_batches, callbacks, options: as in `check_unit`.

    Raises:
        LawError: two runs differ, or a global generator has moved.

    Example:
        >>> import torch
        >>> from tnt_func.rng import key
        >>> unit = TrainUnit(train_step=lambda state, batch: (state.replace(params=torch.rand(2)), {}), draws=())
        >>> check_determinism(unit, State(params=torch.zeros(2), key=key(0)), [1.0])
        Traceback (most recent call last):
        tnt_func.errors.LawError: law 2 (determinism) is broken at train step (epoch 0, step 0): train_step drew ...
        Write draws=('torch',) in the unit or callback; ...
    """
    case = Case.of(unit, state, batches, eval_batches, callbacks, options)
    with standing(HERE):
        before = stands()
        for _ in case.events(declared):
            pass
        if went := moved(before):
            said = f"the run has moved the global generators of {', '.join(went)}"
            raise law_error("determinism", "in the run", said, [], "Draw inside steps, hooks and data only.")
        tape = list(record(case))
    with standing(THERE):
        try:
            compare(tape, record(case), "determinism", "a second run", "")
        except LawError:
            raise _explained(case, tape) from None


def declared(call: Call) -> Any:
    """Make a call, and find it to draw from no generator but those that its unit declares."""
    undeclared: list[Generator] = [name for name in HERE if name not in call.declared]
    before = stands(undeclared)
    result = call.make()
    if went := moved(before):
        said = f"{call.owner} drew from {went[0]}'s global generator, which its unit does not declare"
        if "callback" in call.owner:
            said = said.replace("its unit", "the callback")
        draws = tuple(dict.fromkeys((*call.declared, *went)))
        advice = (
            f"Write draws={draws!r} in the unit or callback; it is then seeded from the run's key, and left as it was."
        )
        raise law_error("determinism", f"at {call.where()}", said, [], advice)
    return result


def _explained(case: Case, tape: Sequence[Moment]) -> LawError:
    """The error that says on what it is that runs depend."""
    advice = NOTHING_OUTSIDE
    for name in (None, *HERE):
        moved_one: dict[Generator, int] = {**HERE, **({name: THERE[name]} if name else {})}
        said = "a second run from the same state and generators"
        if name:
            said = f"a run that found {name}'s global generator elsewhere"
            advice = (
                f"Declare draws=({name!r},), or draw in tnt.rng.scope(tnt.fold_in(state.key, name)); read the state of "
                "no generator."
            )
        try:
            with standing(moved_one):
                compare(tape, record(case), "determinism", said, advice)
        except LawError as error:
            return error
    return law_error("determinism", "in the run", "a run differs from the first, now and then", [], advice)


@expects(TrainUnit, EvalUnit, PredictUnit, FitUnit)
def check_observers(
    unit: Unit,
    state: State,
    batches: Any,
    *,
    eval_batches: Any = None,
    callbacks: Sequence[Callback] = (),
    observers: Sequence[Observer] = (),
    **options: Any,
) -> None:
    """Law 6. No observer, one, several, in any order: the same states and outputs.

    Args:
        unit, state, batches, eval_batches, callbacks, options: as in `check_unit`.
        observers: to be tried; they see three runs one after another, and are closed once, after the last.

    Raises:
        LawError: a run ends on another state, or an observer wrote into an event or drew from a global generator.

    Example:
        >>> import torch
        >>> from tnt_func.rng import key
        >>> unit = TrainUnit(train_step=lambda state, batch: (state, {}))
        >>> zero = lambda event: event.state.params.zero_()
        >>> check_observers(unit, State(params=torch.ones(2), key=key(0)), [1.0], observers=[zero])
        Traceback (most recent call last):
        tnt_func.errors.LawError: law 6 (observers) is broken at train start (epoch 0, step 0): the observer <fun...
          state.params: 2 of 2 elements differ, by at most 1
        ...
    """
    case = Case.of(unit, state, batches, eval_batches, callbacks, options)
    retained: list[Event] = []
    guarded = [_guarded(observer) for observer in observers]
    *_, last = case.events()
    unwatched = _fold(case, ())
    try:
        for chosen in ([retained.append], guarded, [*guarded[::-1], retained.append], guarded[:1]):
            said = f"with {len(chosen)} observers a run gives something else than with none"
            _check_same(unwatched, _fold(case, chosen), said, _WATCHES)
    finally:
        for observer in observers:
            if isinstance(observer, Closable):
                observer.close()
    said = "the run returns another state than its last event has"
    _check_same({"state": freeze(last.state)}, unwatched, said, _WATCHES)


def _check_same(ours: Mapping[str, Any], theirs: Mapping[str, Any], said: str, advice: str) -> None:
    for name, frozen in ours.items():
        if lines := changes(frozen, theirs[name], name):
            raise law_error("observers", "at the last event", said, lines, advice)


_WATCHES = (
    "An observer watches. It copies what it keeps for longer or changes (tensor.clone()), draws from a generator of "
    "its own (torch.Generator()), and leaves decisions to a callback."
)


def _fold(case: Case, observers: Sequence[Observer]) -> Mapping[str, Any]:
    """What the entry point itself returns."""
    run = {TrainUnit: train, EvalUnit: evaluate, PredictUnit: predict, FitUnit: fit}[type(case.unit)]
    result: Any = run(case.whole, thaw(case.first), *case.feeds, observers=observers, **case.options)
    state, outputs = result if isinstance(case.unit, PredictUnit) else (result, None)
    return {"state": freeze(state), "outputs": freeze(outputs)}


def _guarded(observer: Observer) -> Observer:
    """The observer, watched at every event; not closed with the first run."""

    def observe(event: Event) -> None:
        state, batch, stood = freeze(event.state), freeze(event.batch), stands()
        observer(event)
        lines = changes(state, freeze(event.state), "state") or changes(batch, freeze(event.batch), "batch")
        went = moved(stood)
        if lines or went:
            did = "wrote into the event" if lines else f"drew from the global generator of {went[0]}"
            at = f"at {where(event.phase, event.point, event.state)}"
            raise law_error("observers", at, f"the observer {observer!r} {did}", lines, _WATCHES)

    return observe


@expects(EvalUnit, PredictUnit, FitUnit)
def check_evaluation(
    unit: EvalUnit | PredictUnit | FitUnit,
    state: State,
    batches: Any,
    *,
    eval_batches: Any = None,
    callbacks: Sequence[Callback] = (),
    **options: Any,
) -> None:
    """Law 7. Evaluation is a read: it changes its own counters and metrics, callbacks' memory and `stop`, and no more.

    Compared by value, so that in-place writes are seen; likewise of prediction. Of a FitUnit every evaluation is
    checked, and where none of them changed a memory or requested a stop, training must go the very same way without.

    Args:
        unit, state, batches, eval_batches, callbacks, options: as in `check_unit`.

    Raises:
        LawError: an evaluation changed something else.

    Example:
        >>> import torch
        >>> from tnt_func.rng import key
        >>> unit = EvalUnit(eval_step=lambda state, batch: (state, {"old": state.params.add_(1)}))
        >>> check_evaluation(unit, State(params=torch.zeros(2), key=key(0)), [1.0])
        Traceback (most recent call last):
        tnt_func.errors.LawError: law 7 (evaluation) is broken at eval step (epoch 0, step 0): eval_step changed ...
          state.params: 2 of 2 elements differ, by at most 1
        ...
    """
    case = Case.of(unit, state, batches, eval_batches, callbacks, options)
    inner: Phase = "eval" if isinstance(unit, FitUnit) else unit.phase
    before, reads, with_them = freeze(_readable(state, inner)), True, list[Any]()
    kept: Any = None

    def watch(call: Call) -> Any:
        if call.phase == "train":
            return call.make()
        was, result = freeze(_readable(call.args[0], call.phase)), call.make()
        for now in (call.args[0], result[0] if type(result) is tuple else result):
            if isinstance(now, State) and (lines := changes(was, freeze(_readable(now, call.phase)), "state")):
                said = f"{call.owner} changed what it may only read"
                raise law_error("evaluation", f"at {call.where()}", said, lines, _READS)
        return result

    for event in case.events(watch):
        if event.phase != "train":
            lines = changes(before, freeze(_readable(event.state, event.phase)), "state")
            if lines and event.point == "end":
                at = f"at {where(event.phase, event.point, event.state)}"
                raise law_error("evaluation", at, "something changed what an evaluation may only read", lines, _READS)
            continue
        before, last_kept = freeze(_readable(event.state, "eval")), kept
        kept = event.state.stop, freeze(event.state.memory)
        if event.resumable:
            reads = reads and kept == last_kept
            with_them.append(_model(event.state))
    if isinstance(unit, FitUnit) and reads:
        never = case.events(evaluate_every_n_epochs=0, evaluate_every_n_steps=0)
        without = [event.state for event in never if event.resumable]
        for ours, theirs in zip(with_them, without, strict=False):
            for part, frozen in _model(theirs).items():
                if lines := changes(ours[part], frozen, f"state.{part}"):
                    at = f"after {where('train', 'step', theirs)}"
                    said = "without the evaluations, which left no memory and no stop, training goes another way"
                    raise law_error("evaluation", at, said, lines, _READS)


_READS = (
    "An evaluation reads. It returns what it computes as its output, callbacks remember what they decide in their own "
    "state.memory and apply it at on_train_step_start, and nothing is written in place or kept outside the state."
)


def _readable(state: State, phase: Phase) -> State:
    """What an evaluation or prediction may read and not change."""
    metrics = {other: accumulators for other, accumulators in state.metrics.items() if other != phase}
    progress = state.progress.put(phase, Progress())
    return state.replace(metrics=metrics, progress=progress, memory={}, output=None, stop=None)


def _model(state: State) -> Any:
    return {part: freeze(getattr(state, part)) for part in ("params", "buffers", "opt_state")}

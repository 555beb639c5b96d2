"""All laws of a unit at once."""

from collections.abc import Sequence
from typing import Any

from torch.distributed.device_mesh import DeviceMesh

from tnt_func.arguments import expects
from tnt_func.distributed.world import Ranks
from tnt_func.errors import UsageError
from tnt_func.events import Observer
from tnt_func.state import State
from tnt_func.testing.calls import check_purity, check_structure
from tnt_func.testing.case import Case
from tnt_func.testing.composition import check_composition, check_metric
from tnt_func.testing.grammar import check_grammar
from tnt_func.testing.ranks import check_ranks, share_errors
from tnt_func.testing.resume import check_resume
from tnt_func.testing.runs import check_determinism, check_evaluation, check_observers
from tnt_func.unit import Callback, EvalUnit, FitUnit, PredictUnit, TrainUnit, Unit, attach, parts


@expects(TrainUnit, EvalUnit, PredictUnit, FitUnit)
def check_unit(
    unit: Unit,
    state: State,
    batches: Any,
    *,
    eval_batches: Any = None,
    callbacks: Sequence[Callback] = (),
    observers: Sequence[Observer] = (),
    mesh: DeviceMesh | None = None,
    **options: Any,
) -> None:
    """Every law that applies to a unit, its metrics and its callbacks, one after another.

    A small model and a few small batches will do: the laws keep every state of a run, and run it some fifty times.
    Three batches and two epochs find what shows at a later step and in a later epoch.

    Args:
        unit: of any kind. A FitUnit is run by `fit`, and its predict unit, if it has one, by `predict`.
        state: where every run begins; it is left as it is.
        batches: what `train`, `evaluate` or `predict` takes: a list, a DataLoader, an array, a Pipeline, or a function
            of the epoch, `lambda epoch: make_batches(epoch)`; not an iterator, for it is read many times.
        eval_batches: likewise, of a FitUnit's evaluations and predictions; `batches`, if not given.
        callbacks: attached to the unit, in order.
        observers: tried with the unit; closed at the end.
        mesh: of several processes, each of which calls this with the unit of one process and the same data. The laws
            are tried on every rank, then `check_ranks` compares them; what one rank finds is an error on all.
        options: what else the entry point takes: `max_epochs`, `max_steps`, `evaluate_every_n_steps` and so on. Without
            a limit, two epochs more than the state has.

    Raises:
        LawError: a law is broken; the message says which, where, on which leaf, who did it, and what to write instead.
        UsageError: the run takes no step, so that nothing would be checked.

    Example:
        >>> import torch
        >>> from tnt_func.rng import key
        >>> steps = []
        >>> def train_step(state, batch):
        ...     steps.append(batch)
        ...     return state.replace(params=state.params - 0.1 * len(steps)), {}
        >>> check_unit(TrainUnit(train_step=train_step), State(params=torch.zeros(2), key=key(0)), [1.0, 2.0])
        Traceback (most recent call last):
        tnt_func.errors.LawError: law 2 (determinism) is broken at train step_end (epoch 0, step 1): ...
          state.params: 2 of 2 elements differ, by at most 0.5
        ...
    """
    if mesh is not None:
        run = {"eval_batches": eval_batches, "callbacks": callbacks, **options}
        error: Exception | None = None
        try:
            check_unit(unit, state, batches, observers=observers, **run)
        except Exception as found:
            error = found
        share_errors(Ranks.of(mesh), error)
        return check_ranks(unit, state, batches, mesh=mesh, **run)
    case = Case.of(unit, state, batches, eval_batches, callbacks, options)
    steps = [event for event in case.events() if event.point == "step_end"]
    if not steps:
        raise UsageError(
            f"no step was taken of batches={case.data!r} with {dict(case.options)}; laws of no step hold of anything. "
            "Pass batches, and limits above the counters that the state has."
        )
    run = {"eval_batches": case.eval_data, "callbacks": case.callbacks, **case.options}
    check_purity(unit, state, batches, **run)
    check_determinism(unit, state, batches, **run)
    check_structure(unit, state, batches, **run)
    check_grammar(unit, state, batches, **run)
    if not isinstance(unit, TrainUnit):
        check_evaluation(unit, state, batches, **run)
    if isinstance(unit, TrainUnit | FitUnit):
        check_resume(unit, state, batches, **run)
    check_observers(unit, state, batches, observers=observers, **run)
    check_composition(unit, state, batches, **run)
    for part in parts(unit):
        outputs = [event.state.output for event in steps if event.phase == part.phase]
        for metric in part.metrics.values() if outputs else ():
            check_metric(metric, outputs)
    if isinstance(unit, FitUnit) and (predict_unit := attach(unit, *callbacks).predict_unit) is not None:
        check_unit(predict_unit, state, case.eval_data)

"""Negative controls: what breaks a law, beside its sound twin. A check that no control can make fail checks nothing.

The zoo itself is in `broken`.

Example:
    >>> from tnt_func.testing.broken import CONTROLS
    >>> control = CONTROLS["parameters_in_place"]
    >>> sorted(control.violations(broken=True)), sorted(control.violations(broken=False))
    (['purity'], [])
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from tnt_func import rng
from tnt_func.errors import LawError
from tnt_func.events import Observer
from tnt_func.metrics import Metric
from tnt_func.state import State
from tnt_func.testing.calls import check_purity, check_structure
from tnt_func.testing.case import Case
from tnt_func.testing.composition import check_composition, check_metric
from tnt_func.testing.grammar import check_grammar
from tnt_func.testing.resume import check_resume
from tnt_func.testing.runs import check_determinism, check_evaluation, check_observers
from tnt_func.unit import Callback, EvalUnit, FitUnit, PredictUnit, TrainUnit


@dataclass(frozen=True)
class Subject:
    """What a law is tried on: a case and observers of it, or a metric and outputs."""

    case: Case | None = None
    observers: Sequence[Observer] = ()
    metric: Metric | None = None
    outputs: Sequence[Any] = ()

    def check(self, law: str) -> None:
        """Try one law, where it applies."""
        if self.case is None:
            if law == "composition" and self.metric is not None:
                check_metric(self.metric, self.outputs)
        elif isinstance(self.case.unit, APPLIES.get(law, object)):
            self.case.check(CHECKS[law], **({"observers": self.observers} if law == "observers" else {}))


CHECKS: Mapping[str, Callable[..., None]] = {
    "purity": check_purity,
    "determinism": check_determinism,
    "structure": check_structure,
    "grammar": check_grammar,
    "evaluation": check_evaluation,
    "resume": check_resume,
    "observers": check_observers,
    "composition": check_composition,
}
"""The check of each law, in the order in which `check_unit` tries them."""

APPLIES: Mapping[str, Any] = {"resume": TrainUnit | FitUnit, "evaluation": EvalUnit | PredictUnit | FitUnit}
"""The units that a law speaks of, where it does not speak of all."""

Make: TypeAlias = Callable[[bool], Subject]


@dataclass(frozen=True)
class Control:
    """One way to break a law.

    Args:
        name: of the function that makes it.
        law: the law that `check_unit` names, the first of those it breaks.
        words: what the message has in it: the leaf, the hook, the cure.
        also: the other laws that fall with it.
        make: the subject, broken or sound; anew at every call, since some remember.
    """

    name: str
    law: str
    words: tuple[str, ...]
    also: frozenset[str]
    make: Make

    def violations(self, *, broken: bool) -> dict[str, str]:
        """The laws that are named when every check is run, with the first message of each.

        Example:
            >>> CONTROLS["mean_of_means"].violations(broken=True).keys()
            dict_keys(['composition'])
        """
        found: dict[str, str] = {}
        for law in CHECKS:
            try:
                self.make(broken).check(law)
            except LawError as error:
                named = str(error).partition("(")[2].partition(")")[0]
                found.setdefault(named, str(error))
        return found


CONTROLS: dict[str, Control] = {}
"""Every control by its name."""


def control(law: str, *words: str, also: Sequence[str] = ()) -> Callable[[Make], Make]:
    """Put a control into the zoo.

    Args:
        law, words, also: as in `Control`.
    """

    def enter(make: Make) -> Make:
        name = getattr(make, "__name__", "")
        CONTROLS[name] = Control(name, law, words, frozenset(also), make)
        return make

    return enter


EVERYWHERE = ("determinism", "resume", "observers", "composition")
"""The laws that hold one run against another: what remembers outside the state breaks them all."""


def first_state() -> State:
    """Where every run in the zoo begins.

    Example:
        >>> first_state().params["w"]
        tensor([1., 1.])
    """
    return State(
        params={"w": torch.ones(2)},
        buffers={"mean": torch.zeros(2)},
        opt_state={"lr": torch.tensor(0.5, dtype=torch.float64)},
        memory={"seen": [0.0], "kind": None},
        key=rng.key(0),
    )


def batches() -> list[torch.Tensor]:
    """What it is fed.

    Example:
        >>> batches()[0]
        tensor([1., 2.])
    """
    return [torch.tensor(values) for values in ([1.0, 2.0], [3.0, 4.0], [5.0, 6.0])]


def descend(state: State, batch: Any) -> tuple[State, Any]:
    """A sound step.

    Example:
        >>> descend(first_state(), torch.tensor([1.0, 3.0]))[0].params["w"]
        tensor([1.0000, 1.2000])
    """
    w = state.params["w"] - 0.1 * (state.params["w"] - batch)
    return with_w(state, w), {"loss": w.square().mean()}


def read(state: State, batch: Any) -> tuple[State, Any]:
    """A sound step of an evaluation.

    Example:
        >>> read(first_state(), None)[1]
        {'loss': tensor(2.)}
    """
    return state, {"loss": state.params["w"].sum()}


def with_w(state: State, w: Any) -> State:
    return state.replace(params={"w": w})


def trained(step: Any = descend, data: Any = None, callbacks: Sequence[Callback] = (), **unit: Any) -> Subject:
    feed = batches() if data is None else data
    return Subject(Case.of(TrainUnit(train_step=step, **unit), first_state(), feed, None, callbacks))


def fitted(step: Any = descend, callbacks: Sequence[Callback] = (), eval_step: Any = read, **unit: Any) -> Subject:
    whole = FitUnit(train_unit=TrainUnit(train_step=step), eval_unit=EvalUnit(eval_step=eval_step, **unit))
    return Subject(Case.of(whole, first_state(), batches(), batches()[:1], callbacks))

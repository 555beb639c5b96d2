"""Units that look at their process, which no process finds out alone: the negative controls of `check_ranks`."""

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

import tnt_func as tnt
from tnt_func.testing.broken.control import CONTROLS, descend, fitted, trained
from tnt_func.testing.case import Case

WORDS = tuple(f"word {number}" for number in range(50))


def _rank() -> int:
    return int(os.environ.get("RANK", 0))


def _environment(state: tnt.State, batch: Any) -> Any:
    late = state.progress.train.steps == 2
    return descend(state, batch + _rank() % 2 if late else batch)


def _error(state: tnt.State, batch: Any) -> Any:
    if _rank() == 1 and state.progress.train.steps == 2:
        raise ValueError("rank 1 has had enough")
    return descend(state, batch)


def _in_place(state: tnt.State, batch: Any) -> Any:
    if _rank() == 1:
        state.params["w"].add_(0)
        state.params["w"].sub_(1)
    return descend(state, batch)


def _order(state: tnt.State, batch: Any) -> Any:
    """Two processes iterate over a set in one order only if they were given the same PYTHONHASHSEED."""
    # Eight of the places, which two orders share once in 10**13: four for each element, in what float32 tells apart.
    places = torch.tensor([WORDS.index(word) for word in set(WORDS)][:8], dtype=torch.float32).reshape(2, 4)
    return descend(state, batch + places @ torch.tensor([1.0, 50.0, 2500.0, 125000.0]))


def _group(state: tnt.State) -> tnt.State:
    return state.remember("odd", dist.get_rank() % 2)


def _stop(state: tnt.State) -> tnt.State:
    return state.request_stop("enough") if _rank() == 1 else state


def _data(epoch: int) -> Any:
    return [torch.ones(2) + (_rank() % 2 if epoch == 1 else 0)] * 2


def _keys() -> Case:
    """A state whose dicts were filled in another order on odd ranks."""
    case = trained().case
    assert case is not None
    names = ["a", "b"] if _rank() % 2 == 0 else ["b", "a"]
    state = case.state.replace(memory={**{name: torch.zeros(1) for name in names}, **case.state.memory})
    return Case.of(case.unit, state, case.data)


def _case(subject: Any) -> Case:
    assert subject.case is not None
    return subject.case


LOOKING: dict[str, Callable[[], Case]] = {
    "generator": lambda: _case(CONTROLS["undeclared_torch"].make(True)),
    "clock": lambda: _case(CONTROLS["clock"].make(True)),
    "environment": lambda: _case(trained(_environment)),
    "group": lambda: _case(
        fitted(callbacks=[tnt.Callback(name="odd", memory=lambda state: 0, on_eval_epoch_end=_group)])
    ),
    "error": lambda: _case(trained(_error)),
    "stop": lambda: _case(trained(callbacks=[tnt.Callback(name="full", on_train_epoch_end=_stop)])),
    "data": lambda: _case(trained(data=_data)),
    "keys": _keys,
}
"""By name. Of their own accord they look for their rank and what differs with it, where there is more than one."""

ORDER: Callable[[], Case] = lambda: _case(trained(_order))  # noqa: E731
IN_PLACE: Callable[[], Case] = lambda: _case(trained(_in_place))  # noqa: E731
SOUND: Callable[[], Case] = lambda: _case(trained())  # noqa: E731

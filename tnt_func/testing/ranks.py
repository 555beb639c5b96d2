"""Law 2 across processes: the same unit, state and data give the same bits on every rank.

A unit that passes every law in one process may still read what is of the process: where a generator stands, the rank,
the environment, the order of a set, a clock. Replicas then part, and nobody is told.

Example:
    >>> from tnt_func.distributed import init, mesh
    >>> from tnt_func.rng import key
    >>> unit = TrainUnit(train_step=lambda state, batch: (state.replace(params=state.params + batch), {}))
    >>> with init(device="cpu") as world:
    ...     check_ranks(unit, State(params=0, key=key(0)), [1, 2], mesh=mesh(world))
"""

import base64
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from tnt_func import pytree as trees
from tnt_func import rng
from tnt_func.arguments import expects
from tnt_func.checkpoint.values import decode, encode
from tnt_func.distributed.collectives import Exchange, rows_of_all
from tnt_func.distributed.shards import is_laid_out
from tnt_func.distributed.world import Ranks
from tnt_func.errors import LawError, UsageError, UsageTypeError
from tnt_func.state import State, content, digest
from tnt_func.testing.case import Case, law_error
from tnt_func.testing.generators import standing
from tnt_func.testing.snapshot import SHOWN, freeze, thaw
from tnt_func.testing.tape import Moment, record
from tnt_func.unit import Callback, EvalUnit, FitUnit, PredictUnit, TrainUnit, Unit


@expects(TrainUnit, EvalUnit, PredictUnit, FitUnit)
def check_ranks(
    unit: Unit,
    state: State,
    batches: Any,
    *,
    mesh: DeviceMesh,
    batch: Literal["shared", "own"] = "shared",
    eval_batches: Any = None,
    callbacks: Sequence[Callback] = (),
    **options: Any,
) -> None:
    """Law 2, across ranks. Each makes the whole run; its events, their states and batches are the same on all of them.

    The global generators stand at other places on each rank. What differs first is named, on every rank alike: the
    event, the step or hook, the leaves, the ranks. Ranks wait for each other at the end of the run alone. Where all
    processes are forks of one, or share a PYTHONHASHSEED, they have one order of sets, and cannot differ by it.

    Args:
        unit: as one process runs it; where batch="own", as `data_parallel` makes it.
        state: whole, and the same on every rank: not `shard`ed.
        batches: "shared" if every rank is given the same ones; "own" if each has its part, pipeline.shard(rank, size),
            of which states and outputs know nothing.
        mesh: the ranks.
        eval_batches, callbacks, options: as in `check_unit`.

    Raises:
        LawError: ranks differ, or one of them has an error that another has not.
        UsageError: the State lies in parts.

    Example:
        >>> from tnt_func.distributed import init, mesh
        >>> from tnt_func.rng import key
        >>> unit = TrainUnit(train_step=lambda state, batch: (state, {}))
        >>> with init(device="cpu") as world:
        ...     check_ranks(unit, State(params=0, key=key(0)), iter([1]), mesh=mesh(world))
        Traceback (most recent call last):
        tnt_func.errors.UsageError: batches is a one-shot list_iterator; the laws run a unit many times, ...
    """
    case, ranks = Case.of(unit, state, batches, eval_batches, callbacks, options), Ranks.of(mesh)
    if any(map(is_laid_out, trees.leaves(state))):
        raise UsageError(
            "check_ranks was given a State of which ranks hold parts; it compares whole ones. Write "
            "check_ranks(unit, gather(state), ...)."
        )
    tape, error = list[Moment](), None
    with standing({name: 1000 * place + ranks.rank for place, name in enumerate(rng.ALL, 1)}):
        try:
            tape.extend(record(case))
        except Exception as found:
            error = found
    share_errors(ranks, error)
    told = [_told(moment, batch) for moment in tape]
    for place, of_ranks in enumerate(itertools.zip_longest(*of_all(ranks, told))):
        if others := _others(of_ranks):
            raise _difference(ranks, others, tape[place] if place < len(tape) else None, batch)


def share_errors(ranks: Ranks, error: Exception | None) -> None:
    """Raise where any rank has an error: its own, or one that tells of the first.

    Raises:
        Exception: that of this rank; a LawError where it is another's.
    """
    failed = Exchange(ranks, "check_ranks", 0, [float(error is not None)]).wait()
    if not any(bad for (bad,) in failed):
        return
    said = of_all(ranks, error and f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    rank = next(rank for rank, text in enumerate(said) if text)
    law, at = said[rank].removeprefix("LawError: "), f"on rank {rank}, and not on rank {ranks.rank}"
    raise LawError(f"{law}\nSo it is {at}.") if law != said[rank] else law_error("determinism", at, law, [], _ADVICE)


def of_all(ranks: Ranks, value: Any) -> list[Any]:
    """A value of each rank, in rank order, as JSON."""
    if ranks.size == 1:
        return [value]
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    return [json.loads(bytes(content(row))) for (row,) in rows_of_all(ranks, [text])]


class _Said(NamedTuple):
    """What a rank has at one place of an event: who made it, and the leaves by path."""

    owner: str
    leaves: Mapping[str, Any]


def _told(moment: Moment, batch: str) -> list[Any]:
    """Where a rank is, all that it has there in one word, and the order of the leaves, which ranks must share."""
    state = thaw(moment.state)
    return [moment.place, digest([state, moment.event.reason, _batch(moment, batch)]), trees.paths(state)]


def _batch(moment: Moment, batch: str) -> Any:
    return None if batch == "own" or moment.batch is None else thaw(moment.batch)


def _others(of_ranks: Sequence[Any]) -> list[int]:
    """The ranks that have something else than the first."""
    return [rank for rank, value in enumerate(of_ranks) if value != of_ranks[0]]


def _difference(ranks: Ranks, others: list[int], moment: Moment | None, batch: str) -> LawError:
    """The error that says where ranks part; the same on each of them."""
    where = f"rank {others[0]} differs" if len(others) == 1 else f"ranks {', '.join(map(str, others))} differ"
    places = of_all(ranks, moment and moment.place)
    at = f"at {places[0] or places[others[0]]}"
    if places[0] != places[others[0]]:
        there = [f"is at {place}" if place else "has ended" for place in (places[0], places[others[0]])]
        said = f"rank {others[0]} {there[1]}, where rank 0 {there[0]}"
        return law_error("determinism", at, said, [], _ADVICE)
    assert moment is not None
    for said in _made(ranks, moment, batch):
        mine, theirs = said[0], said[others[0]]
        if mine.owner != theirs.owner:
            text = f"{where} from rank 0, where {theirs.owner} is called and not {mine.owner}"
            return law_error("determinism", at, text, [], _ADVICE)
        if lines := _lines(mine.leaves, theirs.leaves):
            text = f"{where} from rank 0, and {mine.owner} is where it begins"
            return law_error("determinism", at, text, lines, _ADVICE)
    return law_error("determinism", at, f"{where} from rank 0 in what the loop does between the hooks", [], _ADVICE)


def _made(ranks: Ranks, moment: Moment, batch: str) -> Iterator[list[_Said]]:
    """What led to a moment, one thing after another, as every rank has it."""
    made = [_Said(f"the {moment.event.phase} data", _named(_batch(moment, batch), "batch"))]
    for call, result in moment.calls:
        after, output = result if call.point == "step" and isinstance(result, tuple) else (result, None)
        made.append(_Said(call.owner, {**_named(after, "state"), **_named(output, "output")}))
    what = "what the loop does between the hooks" if moment.event.point != "start" else "the state that it is given"
    made.append(_Said(what, {**_named(thaw(moment.state), "state"), "reason": moment.event.reason}))
    sent = [[owner, {path: _sent(leaf) for path, leaf in leaves.items()}] for owner, leaves in made]
    for of_ranks in zip(*of_all(ranks, sent), strict=False):
        yield [_Said(owner, {path: _found(leaf) for path, leaf in leaves.items()}) for owner, leaves in of_ranks]


def _sent(leaf: Any) -> Any:
    """A leaf as JSON; what a checkpoint cannot hold as it prints."""
    if isinstance(leaf, Tensor):
        whole = (leaf if leaf.layout is torch.strided else leaf.to_dense()).resolve_conj().resolve_neg().contiguous()
        return [encode(leaf.dtype), [*leaf.shape], base64.b64encode(bytes(content(whole))).decode()]
    try:
        return [encode(leaf)]
    except UsageTypeError:
        return [repr(leaf)]


def _found(sent: Any) -> Any:
    """The leaf that was sent."""
    kind, *rest = sent
    if not rest:
        return decode(kind)
    shape, text = rest
    found = torch.empty(shape, dtype=decode(kind))
    memoryview(content(found)).cast("B")[:] = base64.b64decode(text)
    return found


def _named(tree: Any, name: str) -> dict[str, Any]:
    """Leaves by path, on the CPU; counters, the key and the reason to stop of a State as text."""
    tree = thaw(freeze(tree))
    found = {f"{name}{path}": x.cpu() if isinstance(x, Tensor) else x for path, x in trees.named_leaves(tree)}
    if isinstance(tree, State):
        found |= {f"{name}.{field}": repr(getattr(tree, field)) for field in ("key", "progress", "stop")}
    return found


def _lines(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """How the leaves of a rank differ from those of the first."""
    lines = [f"{path}: on rank 0 alone" for path in mine if path not in theirs]
    lines += [f"{path}: not on rank 0" for path in theirs if path not in mine]
    for path in mine:
        lines += trees.diff(mine[path], theirs[path], path) if path in theirs else []
    if not lines and list(mine) != list(theirs):
        here, there = next(pair for pair in zip(mine, theirs, strict=True) if pair[0] != pair[1])
        lines = [f"{here}: {there} is in its place there; the keys of a dict come in another order"]
    return lines if len(lines) <= SHOWN else [*lines[:SHOWN], f"and {len(lines) - SHOWN} more"]


_ADVICE = (
    "What a step, a hook or the data does is a function of the state, on whatever process. Declare what a unit draws, "
    'draws=("torch",); read no rank, no clock and no environment there; put what comes out of a set in order, '
    "sorted(names); give every rank the same state, replicate(state, mesh)."
)

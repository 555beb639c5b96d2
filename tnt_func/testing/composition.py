"""Law 8: callbacks compose as hooks do, metrics as monoids do."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch

from tnt_func import pytree as trees
from tnt_func.arguments import expects
from tnt_func.errors import LawError, StructureError
from tnt_func.metrics import Metric
from tnt_func.state import State
from tnt_func.testing.case import Case, law_error
from tnt_func.testing.snapshot import changes, freeze, thaw
from tnt_func.testing.tape import compare, record
from tnt_func.types import Output, typed
from tnt_func.unit import Callback, EvalUnit, FitUnit, PredictUnit, TrainUnit, Unit, attach


@expects(TrainUnit, EvalUnit, PredictUnit, FitUnit)
def check_composition(
    unit: Unit,
    state: State,
    batches: Any,
    *,
    eval_batches: Any = None,
    callbacks: Sequence[Callback] = (),
    **options: Any,
) -> None:
    """Law 8. Attaching callbacks has an identity and is associative; `callbacks=[a, b]` is `attach(unit, a, b)`.

    All ways to attach the callbacks, a callback without hooks among them, give the same events and bits.

    Args:
        unit, state, batches, eval_batches, callbacks, options: as in `check_unit`.

    Raises:
        LawError: a run differs; the message says which, where first, and who did it.

    Example:
        >>> from tnt_func.rng import key
        >>> seen = []
        >>> def count(state):
        ...     seen.append(state)
        ...     return state.remember("count", len(seen))
        >>> callback = Callback(name="count", memory=lambda state: 0, on_train_step_end=count)
        >>> unit = TrainUnit(train_step=lambda state, batch: (state, {}))
        >>> check_composition(unit, State(params=0, key=key(0)), [1.0], callbacks=[callback])
        Traceback (most recent call last):
        tnt_func.errors.LawError: law 8 (composition) is broken at train step_end (epoch 0, step 1): ...
          state.memory['count']: int 1 became int 3
        ...
    """
    case = Case.of(unit, state, batches, eval_batches, callbacks, options)
    tape = list(record(case))
    for cut in range(len(callbacks) + 1):
        first, rest = callbacks[:cut], callbacks[cut:]
        ways = {f"attach(unit, {_names(first)}) run with callbacks=[{_names(rest)}]": (attach(unit, *first), rest)}
        if first and rest:
            ways[f"attach(attach(unit, {_names(first)}), {_names(rest)})"] = (attach(attach(unit, *first), *rest), [])
        if cut in (0, len(callbacks)):
            ways[f"a callback without hooks in place {cut}"] = (attach(unit, *first, IDLE, *rest), [])
        for way, (partly, given) in ways.items():
            compare(tape, record(case, unit=partly, callbacks=given), "composition", way, _ADVICE)


IDLE = Callback(name="tnt_func.testing without hooks")
"""The identity of attaching."""

_ADVICE = (
    "A callback is its hooks, its name and its memory. What it counts, caches or is told elsewhere does not follow it "
    "from one unit to another: keep it in state.memory[name], with memory= for its first value."
)


def _names(callbacks: Sequence[Callback]) -> str:
    return ", ".join(callback.name for callback in callbacks)


@typed
def check_metric(metric: Metric, outputs: Sequence[Output], *, rtol: float | None = None, seed: int = 0) -> None:
    """Law 8 of a metric: its accumulators are a monoid, so that no cut of the outputs into shards changes its value.

    Checked are: `empty()` is the identity of `merge`; `merge` is associative; shards merged in order give the value of
    the whole, wherever the cuts; `of` and `merge` write to nothing and give the same bits again; an accumulator
    out of a checkpoint goes on as the one that went in.

    Args:
        metric: to be checked.
        outputs: what a step returns, one by one; three or more.
        rtol: how far values may differ, as a part of the largest value of any output or cut; 1e-9 for float64, 1e-4
            for float32 and 1e-2 for half precision, if not given. Integers may not differ.
        seed: of the cuts that are tried where there are many.

    Raises:
        LawError: the metric breaks one of these; the message says which, and on which outputs.

    Example:
        >>> from tnt_func.metrics import mean
        >>> outputs = [{"loss": loss, "n": n} for loss, n in ((1.0, 1), (4.0, 2), (9.0, 3))]
        >>> check_metric(mean("loss", weight="n"), outputs)
    """
    choice = torch.Generator().manual_seed(seed)
    ones = [_one(metric, output, index) for index, output in enumerate(outputs)]
    scale = max((_size(value) for one in ones for value in trees.leaves(one.value())), default=0.0)
    empty, count = metric.empty(), len(ones)
    whole = _merged(metric, ones)

    def check(said: str, ours: Any, theirs: Any) -> None:
        x, y = ours.value(), theirs.value()
        pairs = zip(trees.leaves(x), trees.leaves(y), strict=False)
        if trees.structure(x) != trees.structure(y) or not all(_near(a, b, rtol, scale * count) for a, b in pairs):
            raise _no_monoid(said, changes(freeze(x), freeze(y), "value"))

    for index, one in enumerate(ones):
        for way, merged in ("empty().merge(a)", _merge(empty, one)), ("a.merge(empty())", _merge(one, empty)):
            check(f"empty() is no identity: {way} is not a, for a of output {index}", one, merged)
    if lines := changes(freeze(metric.empty()), freeze(empty), "empty()"):
        raise _no_monoid("empty() is another after it was merged with", lines)
    for first, second in _pairs(count, choice):
        a, b, c = (_merged(metric, ones[i:j]) for i, j in ((0, first), (first, second), (second, count)))
        shards = f"outputs 0:{first}, {first}:{second} and {second}:{count}"
        left, right = _merge(_merge(a, b), c), _merge(a, _merge(b, c))
        check(f"merge is not associative on {shards}", left, right)
        check(f"the value depends on the cut into {shards}", whole, left)
        check(
            f"an accumulator out of a checkpoint goes on otherwise, on {shards}",
            left,
            _merge(a, _merge(thaw(freeze(b)), c)),
        )


def _pairs(count: int, choice: torch.Generator) -> list[tuple[int, int]]:
    pairs = list(itertools.combinations_with_replacement(range(count + 1), 2))
    return [pairs[index] for index in torch.randperm(len(pairs), generator=choice)[:CUTS].tolist()]


CUTS = 64
"""How many cuts into three shards a metric is tried on."""


def _one(metric: Metric, output: Output, index: int) -> Any:
    before = freeze(output)
    one = metric.of(output)
    if lines := changes(before, freeze(output), f"outputs[{index}]"):
        raise _no_monoid(f"of(output) wrote into output {index}", lines)
    try:
        trees.check_leaves(one, "accumulator")
    except StructureError as error:
        raise _no_monoid(f"of(output) gives an accumulator that no checkpoint can hold: {error}", []) from None
    if lines := changes(freeze(one), freeze(metric.of(output)), "accumulator"):
        raise _no_monoid(f"of(output) gives other bits the second time, for output {index}", lines)
    return one


def _merged(metric: Metric, ones: Sequence[Any]) -> Any:
    return functools.reduce(_merge, ones, metric.empty())


def _merge(a: Any, b: Any) -> Any:
    before = freeze([a, b])
    merged = a.merge(b)
    if lines := changes(before, freeze([a, b]), "operands"):
        raise _no_monoid("merge wrote into its operands", lines)
    return merged


ROUNDING = {torch.float64: 1e-9, torch.complex128: 1e-9, torch.float32: 1e-4, torch.complex64: 1e-4}
"""How far sums in another order may differ, by dtype."""


def _near(a: Any, b: Any, rtol: float | None, scale: float) -> bool:
    if not isinstance(a, torch.Tensor | float):
        return trees.same_leaf(a, b)
    x, y = torch.as_tensor(a), torch.as_tensor(b)
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    if not (x.is_floating_point() or x.is_complex()):
        return torch.equal(x, y)
    part = ROUNDING.get(x.dtype, 1e-2) if rtol is None else rtol
    return torch.allclose(x, y, rtol=part, atol=part * scale, equal_nan=True)


def _size(value: Any) -> float:
    """How large the numbers of a value are, infinities aside."""
    if not isinstance(value, torch.Tensor | bool | int | float):
        return 0.0
    numbers = torch.as_tensor(value).detach().to(torch.complex128).abs()
    return float(numbers[numbers.isfinite()].sum())


def _no_monoid(said: str, lines: Sequence[str]) -> LawError:
    return law_error("composition", "in a metric", said, lines, _MONOID)


_MONOID = (
    "An accumulator holds sums from which value() is computed, and not the value itself: a weighted sum and a weight "
    "for a mean. merge returns a new one, empty() is what adds nothing: 0 of a sum, infinity of a minimum."
)

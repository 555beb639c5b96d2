"""An optimizer from a rule for one parameter.

The rule is written once, out of place, for a single tensor: so it runs under `torch.func.vmap`, `torch.func.grad` and
`torch.compile(fullgraph=True)`. Eager, on plain tensors, a kernel for lists of tensors takes its place where there is
one. Numbers are computed in float64 and cast at the end; parameters of fewer bits than float32 are updated in float32.

Of parameters that lie in parts on a mesh, a rule that is elementwise updates the part that is here; any other is given
the DTensors, whose arithmetic is that of the whole.
"""

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from tnt_func.errors import StructureError, UsageError, kind_of
from tnt_func.meshes import parts_of, placed
from tnt_func.optim.base import Optimizer
from tnt_func.optim.layout import PLAIN_TENSORS, Layout, check_grads, cloned, is_traced, kind, laid_out, layout
from tnt_func.optim.state import OptState, Settings
from tnt_func.types import PyTree

Numbers: TypeAlias = Mapping[str, Any]
KERNELS = {"cpu", "cuda"}
kernels: Any = torch
"""Where the kernels for lists of tensors are, which torch does not declare."""
_requires_grad = operator.attrgetter("requires_grad")


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How a parameter is updated.

    Args:
        slots: what is remembered of each parameter, by name: its first value, made of the parameter.
        numbers: `(hyper-parameters, t) -> numbers`, in float64; t is the number of updates of the parameter, this one
            counted, a float or float64 []. Elementwise and without branches.
        leaf: `(numbers, param, grad, *slots) -> (param, *slots)`.
        leaves: `(numbers, params, grads, *slots) -> None`, the same for lists of tensors of one dtype and device, each
            laid out in memory as its parameter; writes into params and slots, and into nothing else.
        check: raises for parameters that the rule cannot update.
        elementwise: whether an element of the parameter and of each slot becomes what it does whatever the others are,
            and wherever it is.

    Example:
        >>> rule = Rule(slots={}, numbers=lambda h, t: {"lr": h["lr"] / t}, leaf=lambda n, p, g: (p - n["lr"] * g,))
        >>> optimizer, w = leafwise(Settings(lr=1.0), rule), torch.tensor(0.0)
        >>> w, opt_state = optimizer.update(torch.tensor(1.0), optimizer.init(w), w)
        >>> optimizer.update(torch.tensor(1.0), opt_state, w)[0]
        tensor(-1.5000)
    """

    slots: Mapping[str, Callable[[Tensor], Tensor]]
    numbers: Callable[[Mapping[str, Any], Any], Numbers]
    leaf: Callable[..., tuple[Tensor, ...]]
    leaves: Callable[..., None] | None = None
    check: Callable[[Layout], None] = lambda here: None
    elementwise: bool = False


def leafwise(settings: Settings, rule: Rule) -> Optimizer:
    """The optimizer that updates every parameter which has a gradient by a rule.

    Its slots are those of the rule, trees like the parameters, and `count`, int64 [leaves]: updates of each of them.

    Example:
        >>> from tnt_func.optim import adam
        >>> list(adam(1e-3).init({"w": torch.ones(2)}).slots)
        ['count', 'exp_avg', 'exp_avg_sq']
    """

    names = {"count", *rule.slots}

    def init(params: PyTree) -> OptState:
        here = layout(params)
        rule.check(here)
        firsts = {
            name: here.give([None if leaf is None else first(leaf) for leaf in here.leaves])
            for name, first in rule.slots.items()
        }
        return settings.init({"count": torch.zeros(len(here.leaves), dtype=torch.int64), **firsts})

    def update(grads: PyTree, state: OptState, params: PyTree) -> tuple[PyTree, OptState]:
        plan = _plan_of(state, params)
        grad = None if plan is None else plan.fitting(grads)
        if plan is None or grad is None:
            return at_length(grads, state, params, False)
        values = settings.now(state, traced=False)
        columns = cloned(*plan.columns)
        plan.run(rule, values, grad, columns)
        leaves, *slots = map(plan.placed, columns)
        params = plan.here.give(leaves)
        count = state.slots["count"] + 1
        after = settings.after(
            state, values, {"count": count, **dict(zip(rule.slots, map(plan.here.give, slots), strict=True))}
        )
        plan.moved(params, leaves, columns).keep(after)
        return params, after

    def consume(grads: PyTree, state: OptState, params: PyTree) -> tuple[PyTree, OptState]:
        plan = _plan_of(state, params)
        grad = None if plan is None else plan.fitting(grads)
        if plan is None or grad is None:
            return at_length(grads, state, params, True)
        values = settings.now(state, traced=False)
        plan.run(rule, values, grad, plan.columns)
        plan.count += 1
        state.slots["count"].add_(1)
        return params, settings.move(state, values)

    def at_length(grads: PyTree, state: OptState, params: PyTree, consumes: bool) -> tuple[PyTree, OptState]:
        here = layout(params)
        grad = here.take(grads, "grads")
        check_grads(here, grad)
        _check_own(state, names)
        old = [here.leaves, *(here.take(state.slots[name], f"opt_state.slots[{name!r}]") for name in rule.slots)]
        traced = settings.traced(state)
        lying, parts = old, parts_of(*old, grad) if rule.elementwise and not traced else None
        if parts is not None:
            *old, grad = parts
        values = settings.now(state, traced=traced)
        there = [leaf is not None for leaf in grad]
        count = state.slots["count"] + (1 if all(there) else torch.tensor(there))
        new = [[*column] for column in old]
        for t, places in _alike(grad, [0] * len(grad) if traced else count.tolist()):
            of_all = len(places) == len(grad)
            numbers = rule.numbers(values, (count if of_all else count[places]).double() if traced else t)
            if of_all:
                new = _apply(rule, numbers, grad, old, consumes)
                break
            alike = [[column[place] for place in places] for column in old]
            for column, leaves in zip(
                new, _apply(rule, numbers, [grad[place] for place in places], alike, consumes), strict=True
            ):
                for place, leaf in zip(places, leaves, strict=True):
                    column[place] = leaf
        trees = [params, *(state.slots[name] for name in rule.slots)]
        given = new if parts is None else [*map(_placed_unless_same, new, old, lying)]
        params, *slots = map(here.give, given, trees) if consumes else map(here.give, given)
        after = settings.after(state, values, {"count": count, **dict(zip(rule.slots, slots, strict=True))})
        if not traced and rule.leaves is not None and all(there):
            _Plan.keep_where_possible(Layout(given[0], here.structure), params, new, count.tolist(), after)
        return params, after

    return Optimizer(init, update, consume=consume)


class _Plan:
    """What is known of a state and its parameters before the gradients are: found once for all steps of a run.

    It is there where one call of the kernel updates all of them, and goes with the state, beside its fields.

    Args:
        here: the parameters' layout.
        params: whose they are; others make the plan void.
        columns: the parameters' leaves, then those of each slot; the parts that are here, of what lies on a mesh.
        kinds: of each leaf.
        count: updates of every parameter so far.
    """

    __slots__ = ("columns", "count", "here", "kinds", "params")

    def __init__(self, here: Any = None, params: Any = None, columns: Any = (), kinds: Any = (), count: int = 0):
        self.here, self.params, self.columns, self.kinds, self.count = here, params, columns, kinds, count

    def __reduce__(self) -> tuple[Any, ...]:
        return _Plan, ()

    @classmethod
    def keep_where_possible(
        cls, here: Layout, params: PyTree, columns: list[list[Tensor]], counts: list[int], state: OptState
    ) -> None:
        """Keep the plan of a state, if there can be one."""
        flat = [leaf for column in columns for leaf in column]
        plain = flat and PLAIN_TENSORS.issuperset(map(type, flat)) and not any(map(_requires_grad, flat))
        if not plain or not all(map(Tensor.is_contiguous, flat)):
            return
        one = {(leaf.dtype, leaf.device) for leaf in flat}
        dtype, device = next(iter(one))
        if len({*counts}) == len(one) == 1 and device.type in KERNELS and dtype in (torch.float32, torch.float64):
            cls(here, params, columns, [*map(kind, columns[0])], counts[0]).keep(state)

    def keep(self, state: OptState) -> None:
        """Let it go with a state."""
        state.__dict__["_plan"] = self

    def moved(self, params: PyTree, leaves: list[Any], columns: list[list[Tensor]]) -> "_Plan":
        """The plan after an update."""
        return _Plan(Layout(leaves, self.here.structure), params, columns, self.kinds, self.count + 1)

    def placed(self, column: list[Tensor]) -> list[Any]:
        """A new column as the parameters lie."""
        return column if self.here.leaves is self.columns[0] else [*map(placed, column, self.here.leaves)]

    def fitting(self, grads: PyTree) -> list[Tensor] | None:
        """The gradients' leaves, if they are as the plan has it."""
        leaves = self.here.take(grads, "grads")
        if self.here.leaves is not self.columns[0]:
            if (parts := parts_of(self.here.leaves, leaves)) is None:
                return None
            leaves = parts[1]
        fits = (
            PLAIN_TENSORS.issuperset(map(type, leaves))
            and [*map(kind, leaves)] == self.kinds
            and all(map(Tensor.is_contiguous, leaves))
            and not (torch.is_grad_enabled() and any(map(_requires_grad, leaves)))
        )
        return leaves if fits else None

    def run(self, rule: Rule, values: Numbers, grads: list[Tensor], columns: list[list[Tensor]]) -> None:
        """Update the columns."""
        assert rule.leaves is not None
        params, *slots = columns
        rule.leaves(rule.numbers(values, self.count + 1), params, grads, *slots)


def _check_own(state: Any, names: set[str]) -> None:
    """Refuse what another optimizer remembers."""
    if isinstance(state, OptState) and state.slots.keys() == names:
        return
    given = f"one with the slots {sorted(state.slots)}" if isinstance(state, OptState) else kind_of(state)
    raise StructureError(
        f"an optimizer was given an opt_state of another: {given}; its own has the slots {sorted(names)}. Write "
        "state.replace(opt_state=optimizer.init(state.params)), or train with the optimizer that made it."
    )


def _plan_of(state: OptState, params: PyTree) -> _Plan | None:
    """The plan that goes with a state, if it is for these parameters and values may be looked at."""
    plan = getattr(state, "_plan", None)
    return None if plan is None or plan.params is not params or is_traced(()) else plan


def _alike(grads: list[Any], counts: list[int]) -> Iterable[tuple[int, list[int]]]:
    """The gradients that there are, by dtype, device and count: the count and the places of each kind."""
    places: dict[Any, list[int]] = {}
    for place, (grad, count) in enumerate(zip(grads, counts, strict=True)):
        if grad is not None:
            places.setdefault((grad.dtype, grad.device, count), []).append(place)
    return ((count, found) for (_, _, count), found in places.items())


def _apply(
    rule: Rule, numbers: Numbers, grads: list[Tensor], old: list[list[Tensor]], consumes: bool
) -> list[list[Tensor]]:
    """New parameters and slots, of old ones and gradients that are all alike; the old ones, written over, if may be."""
    first, columns = grads[0], [old[0], grads, *old[1:]]
    if first.is_complex():
        columns = [[torch.view_as_real(leaf) for leaf in column] for column in columns]
    own, work = columns[0][0].dtype, torch.promote_types(columns[0][0].dtype, torch.float32)
    if own != work:
        columns = [[leaf.to(work) for leaf in column] for column in columns]
    traced = {name: x.to(first.device, work) for name, x in numbers.items() if isinstance(x, Tensor)}
    kernel = not traced and rule.leaves is not None and first.device.type in KERNELS and _all_plain(columns)
    if kernel:
        # The kernels write, and some read every tensor in the order of the parameter's memory.
        p, *others = columns
        g, *slots = (laid_out(column, p) for column in others)
        new = [p, *slots] if consumes or own != work else cloned(p, *slots)
        rule.leaves(numbers, new[0], g, *new[1:])  # pyright: ignore[reportOptionalCall]
    else:
        of_each = {name: x.unbind() for name, x in traced.items() if x.dim()}
        mine = [{name: parts[n] for name, parts in of_each.items()} for n in range(len(grads))]
        rows = zip(mine, *columns, strict=True)
        new = zip(*(rule.leaf({**numbers, **traced, **its}, *row) for its, *row in rows), strict=True)
    if own != work:
        new = ([leaf.to(own) for leaf in column] for column in new)
    if first.is_complex():
        new = ([torch.view_as_complex(leaf) for leaf in column] for column in new)
    new = [list(column) for column in new]
    return [*map(_written, old, new)] if consumes and kernel else new


def _placed_unless_same(new: list[Any], old: list[Any], lying: list[Any]) -> list[Any]:
    """New parts where the old ones lie; what was there, where they are the same."""
    return [like if own is was else placed(own, like) for own, was, like in zip(new, old, lying, strict=True)]


def _written(old: list[Tensor], new: list[Tensor]) -> list[Tensor]:
    """The old tensors with the values of the new ones."""
    return [was if was is leaf else was.copy_(leaf) for was, leaf in zip(old, new, strict=True)]


def _all_plain(columns: list[list[Tensor]]) -> bool:
    """Whether kernels may have the tensors: no subclasses, no gradients flowing back."""
    held = [*columns[0], *columns[1]]
    return PLAIN_TENSORS.issuperset(map(type, held)) and not (
        torch.is_grad_enabled() and any(map(_requires_grad, held))
    )


def decayed(grad: Tensor, param: Tensor, numbers: Numbers) -> Tensor:
    """grad + weight_decay param.

    Example:
        >>> decayed(torch.zeros(1), torch.ones(1), {"weight_decay": 0.5})
        tensor([0.5000])
    """
    decay = numbers["weight_decay"]
    return grad if not isinstance(decay, Tensor) and decay == 0 else grad + decay * param


def decayed_all(grads: list[Tensor], params: list[Tensor], numbers: Numbers) -> list[Tensor]:
    """`decayed` of lists, eager.

    Example:
        >>> decayed_all([torch.zeros(1)], [torch.ones(1)], {"weight_decay": 0.5})
        (tensor([0.5000]),)
    """
    decay = numbers["weight_decay"]
    return grads if decay == 0 else kernels._foreach_add(grads, params, alpha=decay)


def check_not_negative(**given: Any) -> None:
    """Refuse numbers below 0, or not a number, by name; schedules are let through.

    Example:
        >>> check_not_negative(lr=0.1, weight_decay=lambda step: 0.1)
    """
    for name, value in given.items():
        if not callable(value) and not 0 <= value:
            raise UsageError(f"{name}={value} was given; it is 0 or more. Write {name}={abs(value)}.")


def check_betas(betas: tuple[float, float]) -> None:
    """Refuse averages that forget nothing, or less.

    Example:
        >>> check_betas((0.9, 0.999))
    """
    if not all(0 <= beta < 1 for beta in betas):
        raise UsageError(f"betas={betas} was given; each is at least 0 and below 1. Write betas=(0.9, 0.999), say.")

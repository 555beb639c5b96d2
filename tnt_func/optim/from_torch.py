"""Imperative optimizers as pure ones, to the bit.

An update makes a fresh optimizer of the class over copies of the parameters, gives it copies of what it remembered and
of the gradients, lets it step, and reads off what came of it. For Adam, AdamW and SGD the function behind their `step`
is called on copies instead. Either way the implementation is the one that torch picks by default on the device;
gradients are laid out in memory as their parameters are, as `backward` does.

Many a class makes what it remembers of a parameter in its first step, of the gradient. So `init` lets one step on
copies with zero gradients, to see what there will be to remember, and an update gives it nothing to remember of a
parameter that has not been `started`.

Example:
    >>> optimizer = from_torch(torch.optim.NAdam, lr=0.1)
    >>> w = torch.tensor(1.0)
    >>> optimizer.update(torch.tensor(3.0), optimizer.init(w), w)[0]
    tensor(0.8944)
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from tnt_func import pytree as trees
from tnt_func.errors import ContractError, UsageError
from tnt_func.factories import factory
from tnt_func.meshes import is_laid_out, parts_of, placed
from tnt_func.optim.base import Optimizer
from tnt_func.optim.imperative import copies_of, first_step, frozen, like_given, numbers_of, step, thawed
from tnt_func.optim.layout import (
    ByName,
    Predicate,
    check_grads,
    cloned,
    first_claim,
    is_traced,
    laid_out,
    layout,
    paths,
    unless_same,
)
from tnt_func.optim.state import OptState, Settings, as_leaf
from tnt_func.types import PyTree

SCHEDULED = ("lr", "weight_decay")
Columns: TypeAlias = dict[str, list[Any]]
"""What is remembered of each parameter, by name; None where there is nothing."""

Kernel: TypeAlias = Callable[[dict[str, Any], list[Tensor], list[Tensor], Columns, list[bool]], list[bool]]
"""`(options, params, grads, memory, started) -> started`; writes into `params` and `memory`."""


@factory
def from_torch(
    cls: type[torch.optim.Optimizer], *, groups: Sequence[tuple[Predicate, Mapping[str, Any]]] = (), **options: Any
) -> Optimizer:
    """A subclass of `torch.optim.Optimizer` as an Optimizer, equal to it bit for bit.

    Runs eagerly; under `torch.func.vmap`, `torch.func.grad` and `torch.compile`, take a native optimizer.

    Args:
        cls: any of torch's but LBFGS, or another that remembers in `state[parameter]` and in numbers of `param_groups`.
        groups: pairs; the first whose predicate holds for a parameter's name gives it a group with those options.
        options: as the class takes them. Numbers become hyper-parameters in the state; `lr` and `weight_decay` may be a
            `Schedule` of the updates done.

    Returns:
        An Optimizer. Its state is an OptState; where there are groups, a tuple of one for each, in order, that of the
        other parameters last. `slots` has the names of the class, and `started`, bool [leaves].

    Raises:
        UsageError: the class, or an option, has no pure counterpart; or, later, refuses the parameters, or is traced.
        ContractError: in an update, the class remembers in another place, or what it did not in its first step.

    Example:
        >>> optimizer = from_torch(torch.optim.SGD, lr=0.5, groups=[(lambda name: name == "bias", {"lr": 0.1})])
        >>> params = {"weight": torch.ones(1), "bias": torch.ones(1)}
        >>> optimizer.update({"weight": torch.ones(1), "bias": torch.ones(1)}, optimizer.init(params), params)[0]
        {'weight': tensor([0.5000]), 'bias': tensor([0.9000])}
    """
    if issubclass(cls, torch.optim.LBFGS):
        raise UsageError(
            "from_torch was given LBFGS, whose step evaluates the loss as often as it likes; an update is given one "
            "gradient. Write optim.adam(...), or a step of your own around torch.optim.LBFGS."
        )
    own = [dict(changes) for _, changes in groups] + [{}]
    for name, value in [pair for given in (options, *own) for pair in given.items()]:
        if isinstance(value, Tensor) or (name == "differentiable" and value):
            raise UsageError(
                f"from_torch was given {name}={value}; hyper-parameters are numbers, tensors only in the state, and "
                "nothing flows back through a step. Write a number, or a native optimizer to differentiate."
            )

    def at_start(given: Mapping[str, Any]) -> dict[str, Any]:
        return {name: x(0) if name in SCHEDULED and callable(x) else x for name, x in given.items()}

    def make(copies: list[Any], owners: list[int]) -> Any:
        members: list[list[Any]] = [[] for _ in own]
        for x, owner in zip(copies, owners, strict=True):
            if x is not None:
                members[owner].append(x)
        starts = [{"params": mine, **at_start(given)} for mine, given in zip(members, own, strict=True)]
        return cls(starts, **at_start(options))

    # With parameters that any class takes: what is wrong with the options is to be seen here and now.
    made = make([torch.zeros(1, 1) for _ in own], [*range(len(own))])
    if unknown := {name for mine in own for name in mine} - made.defaults.keys():
        raise UsageError(
            f"from_torch was given a group with {sorted(unknown)}; {cls.__name__} has {sorted(made.defaults)}. Write "
            "one of those."
        )
    every = [{**options, **mine} for mine in own]
    adapter = _Adapter(
        make,
        templates=made.param_groups,
        group_of=first_claim([claims for claims, _ in groups]),
        settings=[
            Settings(**{name: x for name, x in given.items() if name in SCHEDULED and callable(x)}) for given in every
        ],
        kernel=KERNELS.get(cls),
        elementwise=cls in ELEMENTWISE,
    )
    return Optimizer(adapter.init, adapter.update, consume=adapter.consume, traceable=False)


@dataclass(frozen=True)
class _Adapter:
    """The functions of `from_torch`.

    Args:
        make: an optimizer of copies of the parameters, and the group of each.
        templates: all options of each group, as given.
        group_of: the group of every parameter.
        settings: the schedules of each group.
        kernel: what is called on lists in place of an optimizer's step.
        elementwise: whether each element is updated whatever the others are: of parameters that lie in parts on a mesh,
            the parts that are here.
    """

    make: Callable[[list[Any], list[int]], Any]
    templates: list[dict[str, Any]]
    group_of: ByName[int]
    settings: list[Settings]
    kernel: Kernel | None
    elementwise: bool

    def init(self, params: PyTree) -> PyTree:
        here = layout(params)
        owners, path = self.group_of(here), paths(here)
        optimizer, copies = first_step(lambda copies: self.make(copies, owners), here.leaves)
        states: list[OptState] = []
        for n, (group, template, settings) in enumerate(
            zip(optimizer.param_groups, self.templates, self.settings, strict=True)
        ):
            memories = [
                optimizer.state.get(x, {}) if owner == n else {} for x, owner in zip(copies, owners, strict=True)
            ]
            slots: dict[str, PyTree] = {"started": torch.zeros(len(owners), dtype=torch.bool)}
            for name in dict.fromkeys(name for memory in memories for name in memory):
                column = [
                    frozen(memory[name], f"state of params{path[place]}[{name!r}]") if name in memory else None
                    for place, memory in enumerate(memories)
                ]
                slots[name] = here.give([None if x is None else trees.map(torch.zeros_like, x) for x in column])
            state = settings.init(slots)
            given = {name: x for name, x in numbers_of(template).items() if name not in state.scheduled}
            _changed(group, template, {**given, **state.scheduled})
            states.append(replace(state, hyperparameters={name: as_leaf(x) for name, x in given.items()}))
        return states[0] if len(states) == 1 else tuple(states)

    def update(self, grads: PyTree, state: PyTree, params: PyTree) -> tuple[PyTree, PyTree]:
        return self._update(grads, state, params, consumes=False)

    def consume(self, grads: PyTree, state: PyTree, params: PyTree) -> tuple[PyTree, PyTree]:
        return self._update(grads, state, params, consumes=True)

    def _update(self, grads: PyTree, state: PyTree, params: PyTree, *, consumes: bool) -> tuple[PyTree, PyTree]:
        if is_traced([]):
            raise UsageError(
                "an optimizer of from_torch was called inside torch.compile or torch.func; it runs eagerly. Write a "
                "native one: optim.adamw(...) for torch.optim.AdamW."
            )
        here = layout(params)
        states: list[OptState] = [state] if isinstance(state, OptState) else [*state]
        lists = _Lists(
            leaves=[*here.leaves],
            grads=here.take(grads, "grads"),
            owners=self.group_of(here),
            values=[settings.now(one, traced=False) for settings, one in zip(self.settings, states, strict=True)],
            columns=[{k: here.take(tree, k) for k, tree in one.slots.items() if k != "started"} for one in states],
            started=[one.slots["started"].tolist() for one in states],
            consumes=consumes,
        )
        check_grads(here, lists.grads, sparse=self.kernel is not _adam)
        own = lists.parts() if self.elementwise else None
        of = lists if own is None else own
        changes = self.by_step(of) if self.kernel is None else self.by_kernel(of, self.kernel)
        if own is not None:
            lists = own.placed(lists)
        for n, settings in enumerate(self.settings):
            was = states[n].slots
            slots = {k: here.give(column, was[k] if consumes else None) for k, column in lists.columns[n].items()}
            if consumes and lists.started[n] == was["started"].tolist() and all(slots[k] is was[k] for k in slots):
                after = settings.move(states[n], lists.values[n])
            else:
                started = torch.tensor(lists.started[n], dtype=torch.bool)
                after = settings.after(states[n], lists.values[n], {"started": started, **slots})
            states[n] = replace(after, hyperparameters={**after.hyperparameters, **changes[n]}) if changes[n] else after
        new = here.give(lists.leaves, params if consumes else None)
        return new, states[0] if isinstance(state, OptState) else unless_same(state, tuple(states))

    def by_step(self, lists: "_Lists") -> list[dict[str, Any]]:
        """Put new values into the lists, by a step of a fresh optimizer; the numbers that it changed in each group."""
        copies = copies_of(lists.leaves, own=not lists.consumes)
        optimizer = self.make(copies, lists.owners)
        given = [
            {name: like_given(x, template[name]) for name, x in now.items()}
            for template, now in zip(self.templates, lists.values, strict=True)
        ]
        for group, now in zip(optimizer.param_groups, given, strict=True):
            group.update(now)
        members = [(place, lists.owners[place]) for place, grad in enumerate(lists.grads) if grad is not None]
        for place, owner in members:
            if lists.started[owner][place]:
                optimizer.state[copies[place]] = thawed(lists.memory(owner, place), own=not lists.consumes)
        step(optimizer, copies, lists.grads)
        for place, owner in members:
            known, memory = lists.memory(owner, place), optimizer.state.get(copies[place], {})
            now = {name: frozen(value, f"state[{name!r}]") for name, value in memory.items()}
            if now and (now.keys() != known.keys() or any(_kind(now[name]) != _kind(known[name]) for name in now)):
                raise ContractError(
                    f"{type(optimizer).__name__}.step remembers {trees.paths(now)} of a parameter, in its first step "
                    f"{trees.paths(known)}; a state keeps its structure. Set the options that need it from the start."
                )
            lists.put(owner, place, copies[place].detach(), now, started=bool(now))
        groups = zip(optimizer.param_groups, self.templates, given, strict=True)
        return [_changed(group, template, now) for group, template, now in groups]

    def by_kernel(self, lists: "_Lists", kernel: Kernel) -> list[dict[str, Any]]:
        """The same by one call for each group."""
        for n, now in enumerate(lists.values):
            places = [place for place, grad in enumerate(lists.grads) if grad is not None and lists.owners[place] == n]
            if not places:
                continue
            with torch.no_grad():
                held = [lists.leaves, *lists.columns[n].values()]
                given = [[column[place] for place in places] for column in held]
                p, *remembered = given if lists.consumes else cloned(*given)
                mine = dict(zip(lists.columns[n], remembered, strict=True))
                g = [lists.grads[place] for place in places]
                g = g if any(x.is_sparse for x in g) else laid_out(g, p)
                began = kernel({**self.templates[n], **now}, p, g, mine, [lists.started[n][place] for place in places])
            for row, place in enumerate(places):
                lists.put(n, place, p[row], {name: column[row] for name, column in mine.items()}, started=began[row])
        return [{} for _ in lists.values]


@dataclass(frozen=True)
class _Lists:
    """The trees of an update taken apart, in lists of its own: by parameter, or by group and then parameter.

    Whether it consumes says that the tensors in them may be written to.
    """

    leaves: list[Any]
    grads: list[Any]
    owners: list[int]
    values: list[dict[str, Any]]
    columns: list[Columns]
    started: list[list[bool]]
    consumes: bool

    def parts(self) -> "_Lists | None":
        """These, of the parts that this rank has; None where nothing lies on a mesh, or not all in one way."""
        columns = [column for group in self.columns for column in group.values()]
        lying = [[x if is_laid_out(x) else None for x in column] for column in columns]
        rows = (pair for column in columns for pair in zip(column, self.leaves, strict=True))
        if any(_has_rows(x) and is_laid_out(leaf) for x, leaf in rows):
            return None
        if (found := parts_of(self.leaves, self.grads, *lying)) is None:
            return None
        leaves, grads, *own = found
        filled = iter([[*map(_first, mine, column)] for mine, column in zip(own, columns, strict=True)])
        return replace(self, leaves=leaves, grads=grads, columns=self._columns(filled), started=self.started)

    def placed(self, before: "_Lists") -> "_Lists":
        """These parts where those of before lie; what was there, where it was written to."""

        def put(new: Any, like: Any) -> Any:
            return like if is_laid_out(like) and new is like.to_local() else placed(new, like)

        with torch.no_grad():
            leaves = [*map(put, self.leaves, before.leaves)]
            pairs = zip(self.columns, before.columns, strict=True)
            new = iter([[*map(put, own[k], was[k])] for own, was in pairs for k in own])
        return replace(self, leaves=leaves, columns=self._columns(new))

    def _columns(self, new: Iterator[list[Any]]) -> list[Columns]:
        return [{k: next(new) for k in group} for group in self.columns]

    def memory(self, group: int, place: int) -> dict[str, Any]:
        return {name: column[place] for name, column in self.columns[group].items() if column[place] is not None}

    def put(self, group: int, place: int, leaf: Tensor, memory: Mapping[str, Any], *, started: bool) -> None:
        self.leaves[place], self.started[group][place] = leaf, started
        for name, value in memory.items():
            self.columns[group][name][place] = value


def _first(own: Any, other: Any) -> Any:
    return other if own is None else own


def _has_rows(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and not is_laid_out(value)


def _kind(value: Any) -> Any:
    """What must stay of what is remembered under a name, besides a tensor's shape."""
    return None if isinstance(value, Tensor) else trees.structure(value)


def _changed(group: Mapping[str, Any], template: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a parameter group that a step has changed, as leaves."""
    new = {name: x for name, x in group.items() if name != "params" and x is not given.get(name, template.get(name))}
    numbers = numbers_of(new)
    if odd := [
        name for name, x in new.items() if name not in template or (name not in numbers and x != template[name])
    ]:
        raise ContractError(
            f"a step put {', '.join(f'{name!r}: {new[name]!r}' for name in odd)} into param_groups; from_torch takes "
            "classes that change the numbers that were there at first. Write the optimizer as init and update."
        )
    return {name: as_leaf(x) for name, x in numbers.items() if x != given[name]}


def _adam(o: dict[str, Any], p: list[Tensor], g: list[Tensor], memory: Columns, started: list[bool]) -> list[bool]:
    adam(
        p,
        g,
        memory["exp_avg"],
        memory["exp_avg_sq"],
        memory.get("max_exp_avg_sq", []),
        memory["step"],
        foreach=o["foreach"],
        capturable=o["capturable"],
        fused=o["fused"],
        has_complex=any(map(torch.is_complex, p)),
        decoupled_weight_decay=o["decoupled_weight_decay"],
        amsgrad=o["amsgrad"],
        beta1=o["betas"][0],
        beta2=o["betas"][1],
        lr=o["lr"],
        weight_decay=o["weight_decay"],
        eps=o["eps"],
        maximize=o["maximize"],
    )
    return [True] * len(p)


def _sgd(o: dict[str, Any], p: list[Tensor], g: list[Tensor], memory: Columns, started: list[bool]) -> list[bool]:
    buffers = memory.get("momentum_buffer", [None] * len(p))
    if o["momentum"] != 0 and "momentum_buffer" not in memory:
        raise ContractError(
            f"momentum={o['momentum']} was set on a state of SGD that has no momentum_buffer; a state keeps its "
            "structure. Make the optimizer with a momentum."
        )
    buffers = [buffer if begun else None for buffer, begun in zip(buffers, started, strict=True)]
    sgd(
        p,
        # Its kernel for lists adds the momentum into the gradients.
        [x.clone() for x in g] if o["nesterov"] else g,
        buffers,
        has_sparse_grad=any(x.is_sparse for x in g),
        foreach=o["foreach"],
        fused=o["fused"],
        weight_decay=o["weight_decay"],
        momentum=o["momentum"],
        lr=o["lr"],
        dampening=o["dampening"],
        nesterov=o["nesterov"],
        maximize=o["maximize"],
    )
    if o["momentum"] == 0:
        return started
    memory["momentum_buffer"] = buffers
    return [True] * len(p)


ELEMENTWISE = {
    getattr(torch.optim, name)
    for name in "Adadelta Adagrad Adam AdamW Adamax ASGD NAdam RAdam RMSprop Rprop SGD".split()
}
KERNELS: dict[Any, Kernel] = {torch.optim.Adam: _adam, torch.optim.AdamW: _adam, torch.optim.SGD: _sgd}

"""Laws of optimizers: chains are a monoid, `from_torch` is the imperative class to the bit, windows are big batches.

Each law is a function that raises; below it the optimizers that obey it, and one that does not and is found out.
"""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from tnt_func import optim, rng, schedules
from tnt_func import pytree as trees
from tnt_func.asserts import assert_trees_close, assert_trees_equal
from tnt_func.errors import TreeError
from tnt_func.optim import GradientTransform, Optimizer

Params = dict[str, Any]
seeds = st.integers(0, 2**16)
shapes = st.lists(st.sampled_from([(), (0,), (1,), (3,), (2, 3), (3, 1, 2)]), min_size=1, max_size=4)


def drawn(seed: int, sizes: Sequence[tuple[int, ...]], dtype: torch.dtype = torch.float64, holes: int = 0) -> Params:
    """Numbers, and None for the leaves whose bit is set in `holes`."""
    draw = torch.Generator().manual_seed(seed)
    made = [torch.randn(size, generator=draw, dtype=torch.float64).to(dtype) for size in sizes]
    return {f"p{n}": None if holes >> n & 1 else leaf for n, leaf in enumerate(made)}


def run(optimizer: Any, params: Params, grads: Sequence[Params]) -> tuple[Any, Any]:
    """What the last update gives: of a transform gradients, of an optimizer parameters."""
    state, new = optimizer.init(params), params
    for grad in grads:
        new, state = optimizer.update(grad, state, params)
        params = new if isinstance(optimizer, Optimizer) else params
    return new, state


transforms = st.sampled_from(
    [
        optim.clip_by_global_norm(0.7),
        optim.clip_by_value(schedules.exponential(1.0, gamma=0.5)),
        optim.add_decayed_weights(0.3, mask=lambda path: "1" not in path),
        optim.centralize(),
        optim.add_noise(rng.key(5)),
    ]
)
optimizers = st.sampled_from(
    [
        optim.sgd(0.1, momentum=0.9),
        optim.adamw(schedules.linear(0.1, 0.0, steps=3)),
        optim.accumulate(optim.lion(0.1), every=2),
        optim.grouped(optim.rmsprop(0.1), [(lambda path: "0" in path, {"lr": 0.2})]),
        optim.from_torch(torch.optim.NAdam),
    ]
)


def check_chain(
    chain: Callable[..., Any], links: Sequence[Any], cuts: Sequence[int], params: Params, grads: Any
) -> None:
    """Law 8: however links are bracketed, with identities among them, a chain does the same and remembers the same."""
    whole = run(chain(*links), params, grads)
    from_left = reduce(lambda before, link: chain(before, link), links, chain())
    from_right = reduce(lambda after, link: chain(link, after), reversed(links), chain())
    edges = [0, *sorted(cuts), len(links)]
    pieces = [chain(chain(), *links[a:b], chain()) for a, b in zip(edges, edges[1:], strict=False)]
    for bracketed in (from_left, from_right, chain(*pieces)):
        assert_trees_equal(run(bracketed, params, grads), whole)


@given(st.lists(transforms, max_size=3), st.none() | optimizers, st.data(), shapes, seeds)
def test_chains_are_a_monoid(links: list[Any], last: Any, data: st.DataObject, sizes: Any, seed: int):
    links = [*links, *([last] if last else [])]
    cuts = data.draw(st.lists(st.integers(0, len(links)), max_size=2))
    grads = [drawn(seed + n + 1, sizes, holes=data.draw(st.integers(0, 7))) for n in range(3)]
    check_chain(optim.chain, links, cuts, drawn(seed, sizes), grads)


def test_a_chain_that_nests_its_states_is_found_out():
    def nesting(*links: Any) -> Any:
        inner = optim.chain(*links)
        return GradientTransform(inner.init, inner.update)

    clip = optim.clip_by_value(0.5)
    with pytest.raises(TreeError):
        check_chain(nesting, [clip, clip], [1], drawn(0, [(2,)]), [drawn(1, [(2,)])])


def check_parity(
    cls: Any,
    ours: Callable[..., Optimizer],
    options: Params,
    groups: Sequence[Any],
    params: Params,
    grads: Sequence[Params],
) -> None:
    """Law 10: the bits of the imperative class, whatever the gradients that are missing, with lr set from outside."""
    theirs = {key: torch.nn.Parameter(p.clone()) for key, p in params.items()}
    left, param_groups = dict(theirs), []
    for claims, changes in groups:
        mine = [key for key in left if claims(f"['{key}']")]
        param_groups.append({"params": [left.pop(key) for key in mine], **changes})
    imperative = cls([*param_groups, {"params": [*left.values()]}], **options)
    optimizer = ours(cls, groups=groups, **options)
    state = optimizer.init(params)
    for n, grad in enumerate(grads):
        state = optim.set_hyperparameters(state, lr=0.1 / (n + 1))
        for group in imperative.param_groups:
            group["lr"] = 0.1 / (n + 1)
        for key, p in theirs.items():
            p.grad = None if grad[key] is None else grad[key].clone()
        imperative.step()
        before = trees.map(lambda x: None if x is None else x.clone(), (grad, state, params))
        new = optimizer.update(grad, state, params)
        assert_trees_equal((grad, state, params), before, name="what was given")
        params, state = new
        assert_trees_equal(params, {key: p.detach() for key, p in theirs.items()})


flags = st.fixed_dictionaries({}, optional={"foreach": st.sampled_from([True, False, None]), "maximize": st.booleans()})
decays = st.fixed_dictionaries({}, optional={"weight_decay": st.sampled_from([0, 0.1])})
IMPERATIVE: dict[Any, tuple[st.SearchStrategy[Any], ...]] = {
    torch.optim.SGD: (
        flags,
        decays,
        st.sampled_from([{}, {"momentum": 0.9, "nesterov": True}, {"momentum": 0.5, "dampening": 0.5}]),
    ),
    torch.optim.Adam: (flags, decays, st.sampled_from([{}, {"amsgrad": True}, {"betas": (0.5, 0.0)}])),
    torch.optim.AdamW: (decays, st.sampled_from([{}, {"fused": True}, {"amsgrad": True, "maximize": True}])),
    torch.optim.NAdam: (flags, decays, st.sampled_from([{}, {"decoupled_weight_decay": True}])),
    torch.optim.RAdam: (flags, decays, st.sampled_from([{}, {"eps": 1e-3}])),
    torch.optim.Adamax: (flags, decays),
    torch.optim.Adadelta: (flags, decays, st.sampled_from([{}, {"rho": 0.5}])),
    torch.optim.Adagrad: (flags, decays, st.sampled_from([{}, {"initial_accumulator_value": 1, "lr_decay": 0.5}])),
    torch.optim.ASGD: (flags, decays, st.sampled_from([{}, {"t0": 1, "lambd": 0.1}])),
    torch.optim.RMSprop: (flags, decays, st.sampled_from([{}, {"centered": True}, {"momentum": 0.9}])),
    torch.optim.Rprop: (flags, st.sampled_from([{}, {"step_sizes": (1e-3, 1)}])),
}
imperative = st.sampled_from([*IMPERATIVE]).flatmap(
    lambda cls: st.tuples(*IMPERATIVE[cls]).map(lambda parts: (cls, reduce(lambda a, b: a | b, parts, {})))
)


@given(imperative, shapes, st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), seeds, st.data())
def test_from_torch_gives_the_bits_of_the_class(
    choice: Any, sizes: Any, dtype: torch.dtype, seed: int, data: st.DataObject
):
    cls, options = choice
    own = data.draw(st.sampled_from([{}, {"lr": 0.3}, {"maximize": True}]))
    groups = data.draw(st.sampled_from([[], [(lambda path: "1" in path, own), (lambda path: "2" in path, {})]]))
    grads = [drawn(seed + n + 1, sizes, dtype, holes=data.draw(st.integers(0, 15))) for n in range(4)]
    check_parity(cls, optim.from_torch, options, groups, drawn(seed, sizes, dtype), grads)


def test_another_implementation_of_the_class_is_found_out():
    def fused(cls: Any, **options: Any) -> Optimizer:
        return optim.from_torch(cls, fused=True, **options)

    def native(cls: Any, groups: Any, **options: Any) -> Optimizer:
        return optim.adamw(**options)

    params, grads = drawn(0, [(9999,)], torch.float32), [drawn(n, [(9999,)], torch.float32) for n in range(9)]
    for other in (fused, native):
        with pytest.raises(TreeError, match="elements differ"):
            check_parity(torch.optim.AdamW, other, {}, [], params, grads)


def check_accumulation(accumulate: Any, optimizer: Optimizer, every: int, cuts: Sequence[int], seed: int) -> None:
    """Law 13: windows of equal micro-batches are big batches; where a run is cut, and copied, moves no window."""
    draw = torch.Generator().manual_seed(seed)
    x, y = torch.randn(4 * every * 3, 3, generator=draw).double(), torch.randn(4 * every * 3, generator=draw).double()

    def gradient(params: Params, rows: slice) -> Params:
        return torch.func.grad(lambda p: ((x[rows] @ p["w"] + p["b"] - y[rows]) ** 2).mean())(params)

    small = big = {"w": torch.ones(3).double(), "b": torch.zeros(()).double()}
    wrapped = accumulate(optimizer, every=every)
    state, whole = wrapped.init(small), optimizer.init(big)
    for n in range(3 * every):
        small, state = wrapped.update(gradient(small, slice(4 * n, 4 * n + 4)), state, small)
        if n in cuts:
            state = trees.map(lambda leaf: None if leaf is None else leaf.clone(), state)
        if (n + 1) % every == 0:
            big, whole = optimizer.update(gradient(big, slice(4 * (n + 1 - every), 4 * n + 4)), whole, big)
        assert_trees_close(small, big, rtol=1e-12, atol=1e-12)


@given(optimizers, st.integers(1, 4), st.lists(st.integers(0, 11), max_size=3), seeds)
def test_windows_are_big_batches(optimizer: Optimizer, every: int, cuts: list[int], seed: int):
    check_accumulation(optim.accumulate, optimizer, every, cuts, seed)


def test_windows_that_add_up_or_start_anew_are_found_out():
    def adding(optimizer: Optimizer, every: int) -> Optimizer:
        inner = optim.accumulate(optimizer, every)
        return Optimizer(inner.init, lambda g, s, p: inner.update(trees.map(lambda x: x * every, g), s, p))

    def forgetful(optimizer: Optimizer, every: int) -> Optimizer:
        inner, calls = optim.accumulate(optimizer, every), iter(range(100))
        return Optimizer(inner.init, lambda g, s, p: inner.update(g, inner.init(p) if next(calls) == 1 else s, p))

    for broken in (adding, forgetful):
        with pytest.raises(TreeError):
            check_accumulation(broken, optim.sgd(0.1), 3, [], 0)

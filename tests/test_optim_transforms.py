"""Transforms of gradients: torch's bits where torch has them, the formula otherwise, eager and traced."""

import math
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tnt_func import optim, rng, schedules
from tnt_func import pytree as trees
from tnt_func.asserts import assert_max_compilations, assert_trees_close, assert_trees_equal
from tnt_func.errors import UsageError
from tnt_func.optim import GradientTransform

Params = dict[str, Any]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
DEVICES = ["cpu", *["cuda"] * torch.cuda.is_available()]


def some(seed: int, *dtypes: torch.dtype, device: str = "cpu", scale: float = 1.0) -> Params:
    draw = torch.Generator().manual_seed(seed)
    return {
        f"{dtype} {list(shape)}": (scale * torch.randn(shape, generator=draw)).to(device, dtype)
        for dtype in dtypes or DTYPES
        for shape in ((), (7,), (4, 3), (2, 3, 4), (0, 2))
    }


def apply(transform: GradientTransform, grads: Params, params: Params, updates: int = 1) -> Params:
    state, new = transform.init(params), grads
    for _ in range(updates):
        new, state = transform.update(grads, state, params)
    return new


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("most", [1e-6, 1.0, 1e3, 0.0])
@pytest.mark.parametrize("dtypes", [DTYPES, [torch.float32], [torch.bfloat16], [torch.float64]], ids=str)
def test_clipping_gives_the_bits_of_torch(dtypes: list[torch.dtype], most: float, device: str):
    for scale in (1.0, 1e-6):
        check_clipping(some(0, *dtypes, device=device, scale=scale), most)


def check_clipping(grads: Params, most: float):
    theirs = {key: torch.nn.Parameter(torch.zeros_like(g)) for key, g in grads.items()}
    for clip, ours in (
        (torch.nn.utils.clip_grad_norm_, optim.clip_by_global_norm(most)),
        (torch.nn.utils.clip_grad_value_, optim.clip_by_value(most)),
    ):
        for key, p in theirs.items():
            p.grad = grads[key].clone()
        clip(theirs.values(), most)
        assert_trees_equal(apply(ours, grads, grads), {key: p.grad for key, p in theirs.items()})


def test_what_is_not_finite_is_clipped_as_torch_does():
    for bad in (math.inf, math.nan):
        grads = {"a": torch.tensor([1.0, bad]), "b": torch.ones(2)}
        theirs = {key: torch.nn.Parameter(torch.zeros(2)) for key in grads}
        for key, p in theirs.items():
            p.grad = grads[key].clone()
        torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0)
        ours = apply(optim.clip_by_global_norm(1.0), grads, grads)
        assert_trees_equal(ours, {key: p.grad for key, p in theirs.items()})


def test_weights_decay_where_the_mask_holds():
    params, grads = some(0), some(1)
    new = apply(optim.add_decayed_weights(0.1, mask=lambda path: "[7]" in path), grads, params)
    for key, g in grads.items():
        assert new[key].equal(g.add(params[key], alpha=0.1)) if "[7]" in key else new[key] is g


def test_gradients_are_centralized_over_all_axes_but_the_first():
    new, grads = apply(optim.centralize(), some(1), some(0)), some(1)
    assert new["torch.float32 [7]"] is not None and new["torch.float32 [7]"].equal(grads["torch.float32 [7]"])
    torch.testing.assert_close(new["torch.float64 [2, 3, 4]"].mean((1, 2)), torch.zeros(2).double(), rtol=0, atol=1e-15)
    difference = grads["torch.float64 [4, 3]"] - new["torch.float64 [4, 3]"]
    torch.testing.assert_close(difference, difference[:, :1].expand(4, 3))


def noise_of(
    key: int = 0, updates: int = 1, path: str = "w", shape: tuple[int, ...] = (200, 100), **options: Any
) -> Tensor:
    zeros = {path: torch.zeros(shape, dtype=torch.float64)}
    return apply(optim.add_noise(rng.key(key), **options), zeros, zeros, updates)[path]


def test_noise_is_normal_and_falls():
    noise = noise_of(eta=4.0)
    assert abs(float(noise.mean())) < 0.05 and abs(float(noise.std()) - 2.0) < 0.05
    assert abs(float(((noise / 2) ** 4).mean()) - 3.0) < 0.2
    assert abs(float((noise[:, 1:] * noise[:, :-1]).mean())) < 0.1
    assert float(noise_of(eta=4.0, updates=8).std()) == pytest.approx(2.0 / 8**0.275, rel=0.03)


def test_noise_is_a_function_of_key_update_path_and_place():
    before = torch.get_rng_state()
    noise = noise_of()
    assert noise.equal(noise_of()) and torch.equal(before, torch.get_rng_state())
    others = [noise_of(1), noise_of(updates=2, gamma=0.0), noise_of(path="v")]
    for n, other in enumerate(others):
        assert abs(float(torch.corrcoef(torch.stack([noise.reshape(-1), other.reshape(-1)]))[0, 1])) < 0.03, n
    assert noise.unique().numel() == noise.numel()
    assert noise_of(2**64 - 1).isfinite().all()


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile makes C++, and there is no g++")
def test_noise_is_the_same_where_it_is_compiled_to_machine_code():
    zeros = {"w": torch.zeros(3), "b": torch.zeros((), dtype=torch.float64)}
    transform = optim.add_noise(rng.key(2**64 - 1), eta=1.0)
    update, eager, compiled = torch.compile(transform.update, fullgraph=True), *[transform.init(zeros)] * 2
    for _ in range(2):
        ours, compiled = update(zeros, compiled, zeros)
        expected, eager = transform.update(zeros, eager, zeros)
        assert_trees_close(ours, expected, rtol=1e-6, atol=1e-6)


def test_complex_gradients_get_noise_in_both_parts():
    zeros = {"w": torch.zeros(10_000, dtype=torch.complex64)}
    noise = apply(optim.add_noise(rng.key(0), eta=1.0), zeros, zeros)["w"]
    assert float(noise.real.std()) == pytest.approx(0.5**0.5, rel=0.05)
    assert float(noise.abs().square().mean()) == pytest.approx(1.0, rel=0.05)


TRANSFORMS: dict[str, Callable[[Any], GradientTransform]] = {
    "clip_by_global_norm": optim.clip_by_global_norm,
    "clip_by_value": optim.clip_by_value,
    "add_decayed_weights": optim.add_decayed_weights,
    "centralize": lambda number: optim.centralize(),
    "add_noise": lambda number: optim.add_noise(rng.key(3), eta=number),
}
every_transform = pytest.mark.parametrize("name", TRANSFORMS)


@every_transform
def test_structure_stays_and_nothing_given_is_changed(name: str):
    params, transform = some(0), TRANSFORMS[name](schedules.exponential(0.5, gamma=0.5))
    state = transform.init(params)
    grads = some(1) | {next(iter(params)): None}
    given = grads, state, params
    copies = trees.map(lambda x: x.clone() if isinstance(x, Tensor) else x, given)
    new, after = transform.update(*given)
    assert_trees_equal(given, copies)
    assert trees.structure((new, after)) == trees.structure((grads, state))
    assert [trees.describe(x) for x in new.values()] == [trees.describe(x) for x in grads.values()]
    assert after.step == 1
    holes = dict.fromkeys(params)
    assert transform.update(holes, after, params)[0] == holes


@every_transform
def test_compiled_and_vmapped_it_is_the_same(name: str):
    params, transform = some(0), TRANSFORMS[name](schedules.exponential(0.5, gamma=0.5))
    state, grads = transform.init(params), [some(n + 1) for n in range(3)]
    eager, traced = [], []
    update = torch.compile(transform.update, backend="eager", fullgraph=True)
    torch.compiler.reset()
    after, compiled = state, state
    with assert_max_compilations(1):
        for grad in grads:
            new, after = transform.update(grad, after, params)
            ours, compiled = update(grad, compiled, params)
            eager.append(new)
            traced.append(ours)
    assert_trees_close(traced, eager, rtol=1e-2, atol=1e-2)
    wide = {key: x for key, x in params.items() if x.dtype != torch.bfloat16}
    assert_trees_close(
        [{key: x[key] for key in wide} for x in traced],
        [{key: x[key] for key in wide} for x in eager],
        rtol=1e-5,
        atol=1e-6,
    )
    several = (
        trees.map(lambda *x: torch.stack(x), *grads),
        *(trees.map(lambda x: torch.stack([x] * 3), t) for t in (state, params)),
    )
    members, _ = torch.func.vmap(transform.update)(*several)
    alone = [transform.update(grad, state, params)[0] for grad in grads]
    stacked = trees.map(lambda *x: torch.stack(x), *alone)
    assert_trees_close({key: members[key] for key in wide}, {key: stacked[key] for key in wide}, rtol=1e-5, atol=1e-6)


def test_members_of_a_vmap_have_limits_and_keys_of_their_own():
    params, grads = some(0, torch.float64), some(1, torch.float64)
    members = [optim.chain(optim.clip_by_global_norm(n + 0.5), optim.add_noise(rng.key(n), eta=1.0)) for n in range(2)]
    states, transform = [member.init(params) for member in members], members[0]
    alone = [member.update(grads, state, params)[0] for member, state in zip(members, states, strict=True)]
    stacked = trees.map(lambda *x: torch.stack(x), *states)
    together, _ = torch.func.vmap(transform.update, in_dims=(None, 0, None))(grads, stacked, params)
    assert_trees_close(together, trees.map(lambda *x: torch.stack(x), *alone), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: optim.clip_by_global_norm(-1.0),
        lambda: optim.clip_by_value(-1.0),
        lambda: optim.add_decayed_weights(-1.0),
        lambda: optim.add_noise(rng.key(0), gamma=-1.0),
    ],
    ids=["norm", "value", "decay", "noise"],
)
def test_negative_numbers_are_refused(wrong: Callable[[], Any]):
    with pytest.raises(UsageError, match="=-1.0 was given; it is 0 or more"):
        wrong()

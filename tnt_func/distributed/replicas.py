"""The same State on every rank, and a unit that takes its step on all parts of a batch at once.

`replicate` makes states the same, `data_parallel` keeps them so: gradients, outputs and buffers are those of the whole
batch on every rank, so the optimizer, callbacks and observers do on each what they would do in one process.

Laws:
    On parts of a batch, the step is that of the batch in one process, up to rounding, where the objective is a weighted
    mean over samples that draws nothing. In a world of one it is the unit's own, to the bit.

Example:
    >>> from tnt_func import optim, rng
    >>> from tnt_func.data import source
    >>> from tnt_func.distributed.world import init, mesh
    >>> from tnt_func.recipes import supervised
    >>> from tnt_func.runs import train
    >>> layer, data = torch.nn.Linear(1, 1), (torch.linspace(-1, 1, 8)[:, None], torch.linspace(-2, 2, 8)[:, None])
    >>> with init() as world:
    ...     unit, state = supervised(layer, torch.nn.functional.mse_loss, optim.sgd(0.1), key=rng.key(0))
    ...     batches = source(data).shuffle(rng.key(1)).batch(4).shard(world.rank, world.size)
    ...     unit = data_parallel(unit, mesh(world)).train_unit
    ...     train(unit, replicate(state, mesh(world)), batches, max_epochs=3).progress.train.steps
    6
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from tnt_func import pytree as trees
from tnt_func import rng
from tnt_func.checkpoint.values import decode, encode
from tnt_func.descent import Differentiate, Objective, Slope
from tnt_func.distributed.collectives import Exchange, Scalars, Sums, broadcast
from tnt_func.distributed.outputs import Sharing, averaged, check_rows, joined, of_step
from tnt_func.distributed.world import Ranks, together
from tnt_func.errors import ContractError, StructureError, UsageError
from tnt_func.metrics import Metric
from tnt_func.optim.layout import layout
from tnt_func.state import State
from tnt_func.transforms.seams import Around, on_descent
from tnt_func.types import Batch, Generator, Output, Phase, PyTree, typed
from tnt_func.unit import EvalUnit, FitUnit, Hook, PredictUnit, TrainUnit, hook_of, parts, step_of, then

Combine = Literal["mean"]
U = TypeVar("U", TrainUnit, EvalUnit, PredictUnit, FitUnit)


@typed
def replicate(state: State, mesh: DeviceMesh) -> State:
    """The State of the first rank, on every rank; counters, key, and leaves that are no tensors included.

    Args:
        state: of the same structure, shapes and dtypes on every rank; the values of other ranks do not matter. Where
            each rank's tensors are, they stay.
        mesh: with one axis.

    Raises:
        StructureError: the states differ in more than values; what differs is named.

    Example:
        >>> from tnt_func.distributed.world import init, mesh
        >>> with init() as world:
        ...     replicate(State(params=torch.ones(2), key=rng.key(0)), mesh(world)).params
        tensor([1., 1.])
    """
    ranks = Ranks.of(mesh)
    if ranks.size == 1:
        return state
    leaves, structure = trees.flatten(state)
    kinds = {
        f"state{path}": trees.describe(leaf).partition(" on ")[0] if isinstance(leaf, Tensor) else type(leaf).__name__
        for path, leaf in trees.named_leaves(state)
    }
    others = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
    told = _told(ranks, [kinds, encode([state.key, state.progress, state.stop, others])])
    differ = [
        f"{name} is {kinds.get(name, 'not there')} on rank {ranks.rank} and {told[0].get(name, 'not there')} on rank 0"
        for name in {**kinds, **told[0]}
        if kinds.get(name) != told[0].get(name)
    ]
    # All ranks learn whether all agree, so that none waits for one that raised.
    verdicts = Exchange(ranks, "replicate", 0, [float(bool(differ))]).wait()
    if any(verdict for (verdict,) in verdicts):
        rank = next(rank for rank, (verdict,) in enumerate(verdicts) if verdict)
        raise StructureError(
            f"replicate was given states that differ: {'; '.join(differ[:8]) or f'rank {rank} names the leaves'}. "
            "Ranks begin with states of one structure: make unit and state in the same way on each."
        )
    tensors = iter(broadcast(ranks, trees.tensors(state)))
    key, progress, stop, values = decode(told[1])
    found = iter(values)
    whole = [next(tensors) if isinstance(leaf, Tensor) else next(found) for leaf in leaves]
    return trees.unflatten(whole, structure).replace(key=key, progress=progress, stop=stop)


def _told(ranks: Ranks, value: Any) -> Any:
    """A value of rank 0, as JSON."""
    text = json.dumps(value).encode()
    size = torch.tensor([len(text)])
    together("a broadcast", lambda: dist.broadcast(size, group=ranks.group, group_src=0))
    data = torch.zeros(int(size), dtype=torch.uint8)
    if ranks.rank == 0:
        data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    together("a broadcast", lambda: dist.broadcast(data, group=ranks.group, group_src=0))
    return json.loads(bytes(data.tolist()))


@typed
def data_parallel(
    unit: U,
    mesh: DeviceMesh,
    *,
    weight: str = "num_samples",
    summed: Sequence[str] = (),
    merged: Sequence[str] = (),
    buffers: Combine | None = None,
) -> U:
    """The unit on several ranks, each of which has a part of every batch: `pipeline.shard(world.rank, world.size)`.

    grad = sum(w_r grad_r) / sum(w_r), with w_r the weight that rank r names in its output; so are the value, and the
    output's 0-d tensors and floats. The weight itself is added up, and what else is `summed`. Tensors that have a row a
    sample are joined in rank order, which is that of the batch. So every rank has the output of the whole batch, of
    which metrics are taken. What a step draws (dropout) comes from the rank too, and so depends on the world's size.

    Apply it last, around `microbatch` and the rest: then micro-batches are summed up before ranks tell each other.

    Args:
        unit: of any kind; its train step is made by `minimize`, and outputs are mappings, but for predictions.
        mesh: with one axis, of those that share a batch.
        weight: the entry of the output, a number, that the objective is a mean over: samples, tokens that count.
        summed: further entries to add up.
        merged: metrics that each rank takes of its own output, to be merged over ranks by their own monoid. The output
            then has their accumulators and no rows: for logits too many to be sent around.
        buffers: "mean" takes the weighted mean over ranks of floating buffers that a step changes, BatchNorm's
            averages; whole numbers are the same on each. Without it, changing buffers is an error.

    Raises:
        UsageError: the step is not made by `minimize`, a metric is not there, or the mesh has several axes.
        ContractError: at a step, where the output has no weight or what is neither number nor rows, or buffers change.
        RankError: at a step, where ranks are at different points, or one has left.

    Example:
        >>> from tnt_func import optim
        >>> from tnt_func.descent import minimize
        >>> from tnt_func.distributed.world import init, mesh
        >>> with init() as world:
        ...     unit = data_parallel(TrainUnit(train_step=minimize(max, optim.sgd(0.1))), mesh(world))
        >>> unit.train_step.differentiate.sharing.weight
        'num_samples'

    References:
        torch.nn.parallel.DistributedDataParallel, for equal parts.
    """
    if unknown := set(merged) - {name for part in parts(unit) for name in part.metrics}:
        raise UsageError(
            f"data_parallel was given merged={sorted(unknown)}, which no part of the unit has; it names metrics. "
            f"Write one of {sorted({name for part in parts(unit) for name in part.metrics})}."
        )
    ranks = Ranks.of(mesh)
    if isinstance(unit, FitUnit):
        changed: dict[str, Any] = {
            f"{part.phase}_unit": _parallel(part, ranks, weight, summed, merged, buffers) for part in parts(unit)
        }
        return replace(unit, **changed)
    return _parallel(unit, ranks, weight, summed, merged, buffers)


def _parallel(unit: Any, ranks: Ranks, weight: str, summed: Sequence[str], merged: Sequence[str], buffers: Any) -> Any:
    own = {name: metric for name, metric in unit.metrics.items() if name in merged}
    sharing = Sharing(ranks, weight, frozenset((weight, *summed)), own)
    metrics = {
        name: Metric(metric.empty, of_step(name)) if name in own else metric for name, metric in unit.metrics.items()
    }
    if isinstance(unit, TrainUnit):
        unit = on_descent(
            unit,
            "data_parallel",
            lambda descent: replace(
                descent, differentiate=Averaged(descent.differentiate, sharing, buffers, unit.draws)
            ),
        )
    else:
        around = Whole(step_of(unit), sharing, unit.phase, unit.draws)
        unit = replace(unit, **{f"{unit.phase}_step": around})
    if ranks.size == 1:
        return replace(unit, metrics=metrics)
    point = f"on_{unit.phase}_epoch_end"
    chain = then(
        ("data_parallel", _ends_together(ranks, unit.phase)),
        (f"{type(unit).__name__}.{point}", hook_of(unit, unit.phase, "epoch_end")),
    )
    return replace(unit, metrics=metrics, **{point: chain})


def _ends_together(ranks: Ranks, phase: Phase) -> Hook:
    """A hook at which a rank whose data ended before that of others finds out, and they."""

    def agree(state: State) -> State:
        Exchange(ranks, f"{phase} epoch end", state.progress.of(phase).steps, []).wait()
        return state

    return agree


def _key(ranks: Ranks, state: State, phase: Phase) -> rng.Key:
    """What a rank draws from in a step."""
    return rng.fold_in(
        rng.fold_in(rng.fold_in(state.key, f"{phase} on rank"), ranks.rank), state.progress.of(phase).steps
    )


@dataclass(frozen=True)
class Averaged:
    """The slope of a batch out of those of its parts, one on each rank."""

    differentiate: Differentiate
    sharing: Sharing
    buffers: Combine | None
    draws: tuple[Generator, ...]

    def __call__(self, objective: Objective, params: PyTree, state: State, batch: Batch) -> Slope:
        """The weighted mean of the ranks' slopes."""
        sharing, ranks = self.sharing, self.sharing.ranks
        if ranks.size == 1:
            slope = self.differentiate(objective, params, state, batch)
            self._changed(state.buffers, slope.buffers)
            return slope._replace(output=sharing.alone(slope.output))
        key = _key(ranks, state, "train")
        slope = rng.drawing(key, self.draws, False, self.differentiate, objective, params, state, batch)
        here = layout(params)
        own = here.take(slope.grads, "grads")
        entries = sharing.told_apart(slope.output)
        weight = slope.output[sharing.weight]
        places = self._changed(state.buffers, slope.buffers)
        buffers, structure = trees.flatten(slope.buffers)
        changed = [buffers[place] for place in places]
        given = [grad is not None for grad in own]
        steps = state.progress.train.steps
        scalars = Scalars(
            ranks, "train step", steps, _as_words(given), [weight, slope.value, *entries.numbers.values()]
        )
        sums = Sums(ranks, [*own, *changed], [*here.leaves, *changed], weight)
        facts, values = scalars.wait()
        (*grads,) = sums.wait(values[:, 0].sum())
        had = [any(one) for one in zip(*(_as_flags(words, len(given)) for words in facts), strict=True)]
        for place, mean in zip(places, grads[len(given) :], strict=True):
            buffers[place] = mean
        return Slope(
            averaged(values[:, 0], values[:, 1:2])[0][0].to(slope.value.dtype),
            trees.unflatten(buffers, structure),
            sharing.whole(slope.output, entries, values[:, [0, *range(2, values.shape[1])]]),
            here.give([grad if there else None for grad, there in zip(grads, had, strict=False)]),
        )

    def _changed(self, before: PyTree, after: PyTree) -> list[int]:
        """The places of the buffers that are to be averaged."""
        if after is before:
            return []
        old, new = trees.leaves(before), trees.leaves(after)
        changed = [place for place, (a, b) in enumerate(zip(old, new, strict=True)) if a is not b]
        if self.buffers is not None:
            return [place for place in changed if isinstance(new[place], Tensor) and new[place].is_floating_point()]
        if moved := [place for place in changed if not trees.same_leaf(old[place], new[place])]:
            paths = trees.paths(after)
            raise ContractError(
                f"the step changes state.buffers{paths[moved[0]]}, and every rank has seen another part of the batch; "
                'how they become one is to be said. Write data_parallel(unit, mesh, buffers="mean") for the weighted '
                "mean over ranks, or put layers that keep averages in eval mode."
            )
        return []


@dataclass(frozen=True)
class Whole(Around):
    """A step of evaluation or prediction whose output is that of the whole batch."""

    sharing: Sharing
    phase: Phase
    draws: tuple[Generator, ...]

    def __call__(self, state: State, batch: Batch) -> tuple[State, Output]:
        """The step."""
        sharing, ranks = self.sharing, self.sharing.ranks
        if ranks.size == 1:
            after, output = self.inner(state, batch)
            return after, output if self.phase == "predict" else sharing.alone(output)
        key = _key(ranks, state, self.phase)
        after, output = rng.drawing(key, self.draws, False, self.inner, state, batch)
        if self.phase == "predict":
            check_rows(output)
            return after, joined(ranks, output)
        return after, sharing.output(f"{self.phase} step", state.progress.of(self.phase).steps, output)


def _as_words(flags: Sequence[bool]) -> list[float]:
    """Flags as numbers, 32 in each."""
    return [
        float(sum(1 << bit for bit, flag in enumerate(flags[start : start + 32]) if flag))
        for start in range(0, len(flags), 32)
    ]


def _as_flags(words: Sequence[float], count: int) -> list[bool]:
    """What `_as_words` was given.

    Example:
        >>> _as_flags(_as_words([True, False, True]), 3)
        [True, False, True]
    """
    return [bool(int(words[place // 32]) >> place % 32 & 1) for place in range(count)]

"""A unit that takes its step on all parts of a batch at once, however the State lies.

Gradients, outputs and buffers are those of the whole batch on every rank, so the optimizer, callbacks and observers do
on each what they would do in one process. Parameters that are cut are put together for the step, by one message for
many, and each rank gets its part of the gradient, by another.

Laws:
    On parts of a batch, the step is that of the batch in one process, up to rounding, where the objective is a weighted
    mean over samples that draws nothing. In a world of one it is the unit's own, to the bit.

Example:
    >>> import torch
    >>> from tnt_func import optim, rng
    >>> from tnt_func.data import source
    >>> from tnt_func.distributed.replicas import replicate
    >>> from tnt_func.distributed.world import init, mesh
    >>> from tnt_func.recipes import supervised
    >>> from tnt_func.runs import train
    >>> layer, x = torch.nn.Linear(1, 1), torch.linspace(-1, 1, 8)[:, None]
    >>> with init() as world:
    ...     unit, state = supervised(layer, torch.nn.functional.mse_loss, optim.sgd(0.1), key=rng.key(0))
    ...     batches = source((x, 2 * x)).shuffle(rng.key(1)).batch(4).shard(world.rank, world.size)
    ...     unit = data_parallel(unit, mesh(world)).train_unit
    ...     train(unit, replicate(state, mesh(world)), batches, max_epochs=3).progress.train.steps
    6
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from tnt_func import pytree as trees
from tnt_func import rng
from tnt_func.compiling.steps import Compiled, Gradients
from tnt_func.descent import Descent, Differentiate, Objective, Slope
from tnt_func.distributed.batchnorm import Begun, check_same, checksums, synchronised
from tnt_func.distributed.collectives import Exchange, Scalars
from tnt_func.distributed.outputs import Sharing, averaged, check_rows, joined, like, of_step, over
from tnt_func.distributed.shards import gather, laid_like, lies_out, settled, settled_like, summed
from tnt_func.distributed.world import Ranks
from tnt_func.errors import ContractError, UsageError
from tnt_func.factories import factory
from tnt_func.metrics import Metric
from tnt_func.optim.layout import Layout, is_traced, layout, paths
from tnt_func.state import State
from tnt_func.transforms.microbatches import OnceAStep
from tnt_func.transforms.seams import Around, inside, on_descent, on_train_step
from tnt_func.types import Batch, Generator, Output, Phase, PyTree
from tnt_func.unit import EvalUnit, FitUnit, Hook, PredictUnit, TrainUnit, hook_of, parts, step_of, then

Combine = Literal["mean", "synchronised"]
IN_A_GRAPH = (
    "a step of data_parallel was traced, by tnt.compiled or torch.func; ranks talk to each other in it, which is in no "
    "graph. Apply data_parallel last: tnt.distributed.data_parallel(tnt.compiled(unit), mesh)."
)
R = TypeVar("R")
U = TypeVar("U", TrainUnit, EvalUnit, PredictUnit, FitUnit)


@factory
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

    Where the State lies is its own affair: `replicate`, or `shard` for parameters of which each rank keeps a part.

    Apply it last, around `microbatch`, `compiled` and the rest: micro-batches are summed up before ranks tell each
    other, and of a compiled step the gradient is a graph, after which ranks talk, and the update is as it is.

    Args:
        unit: of any kind; its train step is made by `minimize`, and outputs are mappings, but for predictions.
        mesh: the ranks that share a batch, along all of its axes.
        weight: the entry of the output, a number, that the objective is a mean over: samples, tokens that count.
        summed: further entries to add up.
        merged: metrics that each rank takes of its own output, to be merged over ranks by their own monoid. The output
            then has their accumulators and no rows: for logits too many to be sent around.
        buffers: "mean" takes the weighted mean over ranks of floating buffers that a step changes, BatchNorm's
            averages; whole numbers are the same on each. "synchronised" is for those of `sync_batchnorm`, which are
            the same already, and are compared once an epoch; ranks' objectives are then differentiated as one. Without
            either, changing buffers is an error.

    Raises:
        UsageError: the step is not made by `minimize`, is compiled with the update in its graph, or takes micro-batches
            that were to be synchronised; a metric is not there. At a step, where it is traced.
        ContractError: at a step, where the output has no weight or what is neither number nor rows, or buffers change,
            or are not the same.
        RankError: at a step, where ranks are at different points, or one has left.

    Example:
        >>> from tnt_func import optim
        >>> from tnt_func.descent import minimize
        >>> from tnt_func.distributed.world import init, mesh
        >>> with init() as world:
        ...     unit = data_parallel(TrainUnit(train_step=minimize(max, optim.sgd(0.1))), mesh(world))
        >>> unit.train_step.inner.differentiate.sharing.weight
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

        def averaging(descent: Descent) -> Descent:
            own = descent.differentiate
            if buffers == "synchronised":
                own = synchronised(own, sharing)
            return replace(descent, differentiate=Averaged(own, sharing, buffers, unit.draws))

        unit = on_train_step(unit, _by_gradients)
        unit = on_descent(unit, "data_parallel", averaging)
        unit = on_train_step(unit, Placed)
    else:
        step = Begun(step_of(unit), ranks, unit.phase) if buffers == "synchronised" else step_of(unit)
        around = Whole(step, sharing, unit.phase, unit.draws)
        unit = replace(unit, **{f"{unit.phase}_step": around})
    if ranks.size == 1:
        return replace(unit, metrics=metrics)
    point = f"on_{unit.phase}_epoch_end"
    chain = then(
        ("data_parallel", _ends_together(ranks, unit.phase)),
        (f"{type(unit).__name__}.{point}", hook_of(unit, unit.phase, "epoch_end")),
    )
    return replace(unit, metrics=metrics, **{point: chain})


def _by_gradients(step: Any) -> Any:
    """A train step of which the gradient alone is a graph, where one is compiled: ranks talk before the update."""

    def opened(compiled: Compiled) -> Any:
        if compiled.form == "step":
            raise UsageError(
                "data_parallel was given a step compiled as one graph, form='step', the update in it; ranks sum up "
                "gradients before they update. Write data_parallel(tnt.compiled(unit), mesh), or form='gradients'."
            )
        return replace(compiled, form="gradients").gradients_alone()

    return inside(step, Compiled, opened) or step


def _ends_together(ranks: Ranks, phase: Phase) -> Hook:
    """A hook at which a rank whose data ended before that of others finds out, and they."""

    def agree(state: State) -> State:
        Exchange(ranks, f"{phase} epoch end", state.progress.of(phase).steps, []).wait()
        return state

    return agree


def _drawing(
    ranks: Ranks, state: State, phase: Phase, draws: tuple[Generator, ...], function: Callable[..., R], *args: Any
) -> R:
    """Call what draws, in a step, from what is this rank's own."""
    if not draws:
        return function(*args)
    key = rng.fold_in(rng.fold_in(state.key, f"{phase} on rank"), ranks.rank)
    return rng.drawing(rng.fold_in(key, state.progress.of(phase).steps), draws, False, function, *args)


@dataclass(frozen=True)
class Averaged(OnceAStep):
    """The slope of a batch out of those of its parts, one on each rank."""

    differentiate: Differentiate
    sharing: Sharing
    buffers: Combine | None
    draws: tuple[Generator, ...]

    def __call__(self, objective: Objective, params: PyTree, state: State, batch: Batch) -> Slope:
        """The weighted mean of the ranks' slopes, cut as the parameters are."""
        if is_traced(()):
            raise UsageError(IN_A_GRAPH)
        if self.sharing.ranks.size == 1:
            slope = self._of_part(objective, params, state, batch)
            self._changed(state.buffers, slope.buffers)
            return slope._replace(output=self.sharing.alone(slope.output), grads=laid_like(slope.grads, params))
        ranks, args = self.sharing.ranks, (objective, params, state, batch)
        slope = _drawing(ranks, state, "train", self.draws, self._of_part, *args)
        return self._of_all(slope, layout(params), state)

    def _of_part(self, objective: Objective, params: PyTree, state: State, batch: Batch) -> Slope:
        """The slope of this rank's part of the batch, in whole tensors."""
        whole = gather(params)
        if whole is not params:
            state = state.replace(params=whole if params is state.params else gather(state.params))
            if isinstance(self.differentiate, Gradients):
                # A graph takes plain tensors, and reads of a State no more than it is differentiated with.
                memory = {name: slot for name, slot in state.memory.items() if not lies_out(slot)}
                state = state.replace(opt_state=(), memory=memory)
        return self.differentiate(objective, whole, state, batch)

    @torch.no_grad()
    def _of_all(self, slope: Slope, here: Layout, state: State) -> Slope:
        sharing, ranks, whole = self.sharing, self.sharing.ranks, self.buffers == "synchronised"
        entries, weight = sharing.told_apart(slope.output), slope.output[sharing.weight]
        grads, places = here.take(slope.grads, "grads"), self._changed(state.buffers, slope.buffers)
        slope, count = slope._replace(grads=None), len(grads)
        buffers, structure = trees.flatten(slope.buffers) if places else ([], None)
        # A parameter has a gradient where any rank has found one.
        missing = [grad is None for grad in grads]
        words = _as_words(missing) if any(missing) else [0.0] * -(-count // 32)
        seen = checksums(state, slope.buffers) if whole else {}
        values = [weight, slope.value, *entries.numbers.values()]
        keys = here.structure if type(here.structure) is tuple else paths(here)
        names = (*keys, *entries.names)
        facts = [*words, *seen.values()]
        told, numbers = Scalars(ranks, "train step", state.progress.train.steps, names, facts, values).wait()
        check_same([*seen], [each[len(words) :] for each in told])
        means, sums = averaged(numbers)
        share = over(1.0 if whole else numbers[ranks.rank][0], sums[0])
        lies = [*here.leaves, *(buffers[place] for place in places)]
        # The gradients are held by this list alone, which lets go of them.
        grads += lies[count:]
        new = summed(ranks, grads, lies, share)
        for place, mean in zip(places, new[count:], strict=True):
            buffers[place] = mean
        new = new[:count]
        if any(missing):
            missed = zip(*(_as_flags(each, count) for each in told), strict=True)
            new = [None if all(ranked) else grad for ranked, grad in zip(missed, new, strict=True)]
        return Slope(
            like(means[1], slope.value),
            trees.unflatten(buffers, structure) if structure else slope.buffers,
            sharing.whole(slope.output, entries, means[2:], sums[2:]),
            here.give(new),
        )

    def _changed(self, before: PyTree, after: PyTree) -> list[int]:
        """The places of the buffers that are to be averaged."""
        if after is before or self.buffers == "synchronised":
            return []
        old, new = trees.leaves(before), trees.leaves(after)
        changed = [place for place, (a, b) in enumerate(zip(old, new, strict=True)) if a is not b]
        if self.buffers is not None:
            return [place for place in changed if isinstance(new[place], Tensor) and new[place].is_floating_point()]
        if moved := [place for place in changed if not trees.same_leaf(old[place], new[place])]:
            names = trees.paths(after)
            raise ContractError(
                f"the step changes state.buffers{names[moved[0]]}, and every rank has seen another part of the batch; "
                'how they become one is to be said. Write data_parallel(unit, mesh, buffers="mean") for the weighted '
                'mean over ranks, buffers="synchronised" where sync_batchnorm made the module, or put layers that keep '
                "averages in eval mode."
            )
        return []


@dataclass(frozen=True)
class Placed(Around):
    """A train step whose state is laid out afterwards as it was before."""

    def __call__(self, state: State, batch: Batch) -> tuple[State, Output]:
        """The step."""
        if not lies_out(state.params):
            return self.inner(state, batch)
        after, output = self.inner(state, batch)
        return settled(after, state), settled_like(output, None)


@dataclass(frozen=True)
class Whole(Around):
    """A step of evaluation or prediction that sees whole parameters, and whose output is that of the whole batch."""

    sharing: Sharing
    phase: Phase
    draws: tuple[Generator, ...]

    def __call__(self, state: State, batch: Batch) -> tuple[State, Output]:
        """The step."""
        if is_traced(()):
            raise UsageError(IN_A_GRAPH)
        sharing, ranks = self.sharing, self.sharing.ranks
        whole = state.replace(params=gather(state.params), memory=gather(state.memory))
        if ranks.size == 1:
            after, output = self.inner(whole, batch)
        else:
            after, output = _drawing(ranks, state, self.phase, self.draws, self.inner, whole, batch)
        after = after.replace(
            params=state.params if after.params is whole.params else after.params,
            memory=state.memory if after.memory is whole.memory else after.memory,
        )
        if self.phase != "predict":
            steps = state.progress.of(self.phase).steps
            return after, sharing.output(f"{self.phase} step", steps, output)
        check_rows(output)
        return after, joined(ranks, output)


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

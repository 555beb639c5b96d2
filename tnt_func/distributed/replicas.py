"""The same State on every rank.

Example:
    >>> from tnt_func import rng
    >>> from tnt_func.distributed.world import init, mesh
    >>> with init() as world:
    ...     replicate(State(params=torch.ones(2), key=rng.key(0)), mesh(world)).params
    tensor([1., 1.])
"""

import json
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from tnt_func import pytree as trees
from tnt_func.checkpoint.values import decode, encode
from tnt_func.distributed.collectives import Exchange, broadcast
from tnt_func.distributed.shards import is_laid_out
from tnt_func.distributed.world import Ranks, together
from tnt_func.errors import StructureError, UsageError
from tnt_func.state import State
from tnt_func.types import typed


@typed
def replicate(state: State, mesh: DeviceMesh) -> State:
    """The State of the first rank, on every rank; counters, key, and leaves that are no tensors included.

    Args:
        state: of the same structure, shapes and dtypes on every rank; the values of other ranks do not matter. Where
            each rank's tensors are, they stay.
        mesh: the ranks.

    Raises:
        UsageError: the State lies in parts.
        StructureError: the states differ in more than values; what differs is named.

    Example:
        >>> from tnt_func import rng
        >>> from tnt_func.distributed.world import init, mesh
        >>> with init() as world:
        ...     replicate(State(params=torch.ones(2), key=rng.key(0)), mesh(world)).params
        tensor([1., 1.])
    """
    ranks = Ranks.of(mesh)
    leaves, structure = trees.flatten(state)
    if any(map(is_laid_out, leaves)):
        raise UsageError(
            "replicate was given a State of which ranks hold parts; it makes whole ones the same. Write "
            "shard(replicate(state, mesh), mesh), or gather(state) to have the whole."
        )
    if ranks.size == 1:
        return state
    kinds = {
        f"state{path}": trees.describe(leaf).partition(" on ")[0] if isinstance(leaf, Tensor) else type(leaf).__name__
        for path, leaf in trees.named_leaves(state)
    }
    others = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
    said = told(ranks, [kinds, encode([state.key, state.progress, state.stop, others])])
    differ = [
        f"{name} is {kinds.get(name, 'not there')} on rank {ranks.rank} and {said[0].get(name, 'not there')} on rank 0"
        for name in {**kinds, **said[0]}
        if kinds.get(name) != said[0].get(name)
    ]
    # Tensors are sent, and gradients summed, in the order of the leaves.
    differ += [
        f"{here} on rank {ranks.rank} stands where {there} stands on rank 0: a dict was filled in another order"
        for here, there in zip(kinds, said[0], strict=False)
        if here != there and not differ
    ][:1]
    # All ranks learn whether all agree, so that none waits for one that raised.
    verdicts = Exchange(ranks, "replicate", 0, [float(bool(differ))]).wait()
    if any(verdict for (verdict,) in verdicts):
        rank = next(rank for rank, (verdict,) in enumerate(verdicts) if verdict)
        raise StructureError(
            f"replicate was given states that differ: {'; '.join(differ[:8]) or f'rank {rank} names the leaves'}. "
            "Ranks begin with states of one structure: make unit and state in the same way on each."
        )
    tensors = iter(broadcast(ranks, trees.tensors(state)))
    key, progress, stop, values = decode(said[1])
    found = iter(values)
    whole = [next(tensors) if isinstance(leaf, Tensor) else next(found) for leaf in leaves]
    return trees.unflatten(whole, structure).replace(key=key, progress=progress, stop=stop)


def told(ranks: Ranks, value: Any) -> Any:
    """A value of the first rank, on every rank; as JSON."""
    if ranks.size == 1:
        return value
    text = json.dumps(value).encode()
    size = torch.tensor([len(text)])
    together("a broadcast", lambda: dist.broadcast(size, group=ranks.group, group_src=0))
    data = torch.zeros(int(size), dtype=torch.uint8)
    if ranks.rank == 0:
        data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    together("a broadcast", lambda: dist.broadcast(data, group=ranks.group, group_src=0))
    return json.loads(bytes(data.tolist()))

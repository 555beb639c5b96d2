"""What a graph calculates once for many readers: the bias correction, say, that all elements of a parameter share.

Inductor writes the expression of a small tensor into every loop that reads it, and C++ compilers cannot take a `pow`
out of a loop: with AdamW that was a fifth of a small step, and half of that of an ensemble. A tensor with memory of its
own is read instead; and inductor gives memory to what `as_strided` looks at.

References:
    torch._inductor.lowering.as_strided; torch._inductor.ir.StorageBox.should_realize_on_reuse.
"""

import math
import operator
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

COSTLY = frozenset(
    f"aten.{name}" for name in "cos erf exp exp2 expm1 log log10 log1p log2 pow rsqrt sigmoid sin sqrt tan tanh".split()
)
OFTEN = 16
"""Readers' elements for each of its own from which on a tensor is calculated once: as many as a vector has."""


def settle(module: GraphModule) -> int:
    """Give memory to small tensors that take a costly function and that larger ones read; how many there are.

    Args:
        module: a graph of torch's operations, each with the tensor that it makes as `meta["val"]`; it is changed.

    Example:
        >>> from torch.fx.experimental.proxy_tensor import make_fx
        >>> module = make_fx(lambda beta, t, x: x / (1 - beta**t))(torch.tensor(0.9), torch.tensor(3), torch.ones(64))
        >>> settle(module), settle(make_fx(torch.sqrt)(torch.ones(64)))
        (1, 0)
        >>> module(torch.tensor(0.5), torch.tensor(1), torch.ones(2))
        tensor([2., 2.])
    """
    costly, settled = set[Node](), 0
    for node in [*module.graph.nodes]:
        made = _made(node)
        if made is None or not _is_elementwise(node):
            continue
        if _name(node) not in COSTLY and costly.isdisjoint(node.all_input_nodes):
            continue
        if not all(isinstance(size, int) for size in made.shape) or not made.is_contiguous():
            continue
        if not any(_elements(reader) >= OFTEN * made.numel() for reader in _readers(node)):
            costly.add(node)
            continue
        with module.graph.inserting_after(node):
            apart = module.graph.call_function(
                torch.ops.aten.as_strided.default, (node, [*made.shape], [*made.stride()])
            )
        apart.meta = dict(node.meta)
        node.replace_all_uses_with(apart, delete_user_cb=lambda user: user is not apart)  # noqa: B023
        settled += 1
    module.recompile()
    return settled


def _readers(node: Node) -> Iterator[Node]:
    """What reads a tensor, itself or a view of it."""
    for user in node.users:
        if user.op == "call_function" and (getattr(user.target, "is_view", False) or user.target is operator.getitem):
            yield from _readers(user)
        else:
            yield user


def _elements(node: Node) -> int:
    """Of what it makes; a size that may vary counts as many."""
    made = _made(node)
    return 0 if made is None else math.prod(size if isinstance(size, int) else OFTEN for size in made.shape)


def _made(node: Node) -> Tensor | None:
    made = node.meta.get("val") if node.op == "call_function" else None
    return made if isinstance(made, Tensor) else None


def _is_elementwise(node: Node) -> bool:
    return torch.Tag.pointwise in getattr(node.target, "tags", ()) or _name(node) == "aten._to_copy"


def _name(node: Node) -> str:
    return str(getattr(node.target, "overloadpacket", ""))

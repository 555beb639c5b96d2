"""What is changed of a graph before inductor makes code for a CPU of it. None of it changes a number but by rounding.

References:
    torch._inductor.lowering.as_strided; torch._inductor.ir.StorageBox.should_realize_on_reuse;
    torch._inductor.fx_passes.post_grad.addmm.
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
WIDE = (torch.float32, torch.float64)
OFTEN = 16
"""Readers' elements for each of its own from which on a tensor is calculated once: as many as a vector has."""


def settle(module: GraphModule) -> int:
    """Give memory to small tensors that take a costly function and that larger ones read; how many there are.

    Inductor writes the expression of a small tensor into every loop that reads it, and C++ compilers cannot take a
    `pow` out of a loop: with AdamW, a fifth of a small step, and half of that of an ensemble. What has memory is read
    instead, and inductor gives some to what `as_strided` looks at.

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


def part_biases(module: GraphModule) -> int:
    """Write `x @ w + bias` as a product and a sum, which goes into the loop that follows; how many there are.

    Of `addmm` torch first writes the bias into all rows, through its dispatcher: a seventh of a small step.

    Args:
        module: as above; sums of less than float32 stay as they are, for they would be rounded once more.

    Example:
        >>> from torch.fx.experimental.proxy_tensor import make_fx
        >>> given = torch.ones(2), torch.ones(3, 4), torch.ones(4, 2)
        >>> module = make_fx(torch.addmm)(*given)
        >>> part_biases(module), torch.equal(module(*given), torch.addmm(*given))
        (1, True)
    """
    aten, parted = torch.ops.aten, 0
    for node in [*module.graph.nodes]:
        made = _made(node)
        if node.target is not aten.addmm.default or node.kwargs or made is None or made.dtype not in WIDE:
            continue
        bias, left, right = node.args
        with module.graph.inserting_before(node):
            product = module.graph.call_function(aten.mm.default, (left, right))
            # Inductor would make an `addmm` of `product + bias` again; this has the same bits.
            negative = module.graph.call_function(aten.neg.default, (bias,))
            whole = module.graph.call_function(aten.sub.Tensor, (product, negative))
        whole.meta = dict(node.meta)
        node.replace_all_uses_with(whole)
        module.graph.erase_node(node)
        parted += 1
    module.recompile()
    return parted


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

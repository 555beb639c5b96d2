"""What a module consists of: parameters, bytes and floating point operations, for each of its submodules.

Example:
    >>> from torch import nn
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> print(module_summary(net, torch.ones(3, 4), backward=True))
    module  type        parameters  trainable  bytes  forward FLOPs  backward FLOPs
    (all)   Sequential          58         58    232            288             384
      0     Linear              40         40    160            192             192
      1     ReLU                 0          0      0              0               0
      2     Linear              18         18     72             96             192
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from tnt_func import pytree as trees
from tnt_func import rng
from tnt_func.errors import UsageError
from tnt_func.types import typed


class ModuleRow(NamedTuple):
    """What is told of one module, all inside it included; what is shared inside it counts once.

    Args:
        name: as `named_modules` has it; "" is the whole.
        type: name of its class.
        parameters, trainable: elements of parameters, and of those that require gradients.
        bytes: of parameters and buffers.
        forward_flops, backward_flops: by torch's counter; None where they were not counted.

    Example:
        >>> module_summary(nn.Linear(4, 2)).rows[0].parameters
        10
    """

    name: str
    type: str
    parameters: int
    trainable: int
    bytes: int
    forward_flops: int | None
    backward_flops: int | None


@dataclass(frozen=True)
class ModuleSummary:
    """What `module_summary` returns; its `str` is a table.

    Args:
        rows: the whole first, then as `named_modules` goes.
        depth: levels below the whole that the table shows; None is all.

    Example:
        >>> module_summary(nn.Linear(4, 2))
        ModuleSummary(Linear, 10 parameters, 10 trainable, 40 bytes, 1 module)
    """

    rows: tuple[ModuleRow, ...]
    depth: int | None = None

    def __repr__(self) -> str:
        whole, n = self.rows[0], len(self.rows)
        flops = [
            f"{count:,} {way} FLOPs"
            for way, count in (("forward", whole.forward_flops), ("backward", whole.backward_flops))
            if count is not None
        ]
        sizes = f"{whole.parameters:,} parameters, {whole.trainable:,} trainable, {whole.bytes:,} bytes"
        return f"ModuleSummary({', '.join([whole.type, sizes, *flops])}, {n} module{'s' * (n > 1)})"

    def __str__(self) -> str:
        heads = ["module", "type", "parameters", "trainable", "bytes", "forward FLOPs", "backward FLOPs"]
        columns = [index for index in range(len(heads)) if self.rows[0][index] is not None]
        lines = [[heads[index] for index in columns]]
        for row in self.rows:
            level = row.name.count(".") + 1 if row.name else 0
            if self.depth is None or level <= self.depth:
                name = "  " * level + row.name.rpartition(".")[2] if row.name else "(all)"
                lines.append([name, row.type, *(f"{row[index]:,}" for index in columns[2:])])
        widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if index < 2 else cell.rjust(width)
                for index, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        )


@typed
def module_summary(
    module: nn.Module,
    *inputs: Any,
    keywords: Mapping[str, Any] | None = None,
    backward: bool = False,
    depth: int | None = None,
) -> ModuleSummary:
    """What a module consists of, and what running it on these inputs takes.

    FLOPs are those of products of matrices, convolutions and attention. They are counted on a copy of the module, in
    the mode that it is in, so neither it nor a random generator is touched; a copy takes as much memory.

    Args:
        module: any module whose parameters are initialised.
        inputs, keywords: what it is called with; without any, FLOPs are not counted.
        backward: whether those of the backward pass are counted as well, from the sum of all outputs. Where an input
            needs no gradient torch's counter cannot always tell which of several branches they belong to.
        depth: levels of submodules that the table shows; None is all.

    Raises:
        UsageError: the module has parameters that are not initialised; backward is asked for without inputs, or of
            outputs that depend on no parameter.

    Example:
        >>> summary = module_summary(nn.Conv2d(3, 8, 3), torch.zeros(1, 3, 10, 10))
        >>> summary.rows[0].forward_flops == 2 * (8 * 8) * (3 * 3 * 3) * 8
        True

    References:
        torch.utils.flop_counter.FlopCounterMode.
    """
    if lazy := [name for name, parameter in module.named_parameters() if is_lazy(parameter)]:
        raise UsageError(
            f"module_summary was given a {type(module).__name__} whose {lazy[0]!r} is not initialised; its size is "
            "known after a first call. Call the module once before."
        )
    called = bool(inputs or keywords)
    if backward and not called:
        raise UsageError(
            "module_summary(module, backward=True) was given no inputs; FLOPs are counted by a call. Write "
            "module_summary(module, inputs, backward=True)."
        )
    forward, both = _counted(module, inputs, keywords or {}, backward) if called else ({}, {})
    names: dict[int, list[str]] = {}
    for name, part in module.named_modules(remove_duplicate=False):
        names.setdefault(id(part), []).append(f"{type(module).__name__}.{name}".removesuffix("."))
    rows: list[ModuleRow] = []
    for name, part in module.named_modules():
        parameters = list(part.parameters())
        held = [*parameters, *part.buffers()]
        # The counter has a module under one of its names.
        flops = [sum(counts.get(each, 0) for each in names[id(part)]) for counts in (forward, both)]
        rows.append(
            ModuleRow(
                name,
                type(part).__name__,
                sum(each.numel() for each in parameters),
                sum(each.numel() for each in parameters if each.requires_grad),
                sum(each.nbytes for each in held),
                flops[0] if called else None,
                flops[1] - flops[0] if backward else None,
            )
        )
    return ModuleSummary(tuple(rows), depth)


def _counted(
    module: nn.Module, inputs: tuple[Any, ...], keywords: Mapping[str, Any], backward: bool
) -> tuple[dict[str, int], dict[str, int]]:
    """FLOPs by the counter's names of modules: after the forward pass, and after the backward pass."""
    from torch.utils.flop_counter import FlopCounterMode  # Imports Triton, where that is installed.

    def counts() -> dict[str, int]:
        return {name: sum(by_operation.values()) for name, by_operation in counter.get_flop_counts().items()}

    copied, counter = copy.deepcopy(module), FlopCounterMode(display=False)
    with rng.preserved(), torch.set_grad_enabled(backward), counter:
        output = copied(*inputs, **keywords)
        forward = counts()
        if backward:
            differentiable = [each for each in trees.tensors(output) if each.requires_grad]
            if not differentiable:
                raise UsageError(
                    f"module_summary(..., backward=True) was given a {type(module).__name__} whose outputs depend on "
                    "no parameter that is trained; there is no backward pass. Leave backward out."
                )
            torch.stack([each.sum() for each in differentiable]).sum().backward()
    return forward, counts()

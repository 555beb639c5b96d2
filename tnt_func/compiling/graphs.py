"""A function of tensors as a graph of torch's operations, found by running it once on tensors without storage.

What the function does is seen where torch dispatches it, `torch.autograd.grad` and `torch.func` included; what Python
reads that is no tensor is read once. The graph returns what is new; what comes back as it was given is not in it.

Example:
    >>> def function(leaves): return [leaves[0] + 1, leaves[1], "text"], []
    >>> graph = trace(function, [torch.ones(2), torch.ones(3)], dynamic=[False, False])
    >>> graph.used, graph.sources
    ([0], [('new', 0), ('old', 1), ('constant', 'text')])
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.fx import GraphModule

from tnt_func.compiling.templates import Source

Function: TypeAlias = Callable[[list[Any]], tuple[list[Any], Sequence[tuple[int, int]]]]
"""Leaves in, leaves out, and which of those (second) are to be written into which of the given ones (first)."""


@dataclass(frozen=True)
class Graph:
    """What a function does to tensors.

    Args:
        module: takes the used leaves and the constants, returns a list of what is new.
        inputs: tensors without storage like those that the module takes.
        used: places of the leaves that it takes.
        constants: tensors that the function had from elsewhere.
        sources: of every leaf of the result.
        shapes: the sizes that may vary, and what was assumed of them.
        varying: tensors without storage like the leaves of which a size may vary, by place.
    """

    module: GraphModule
    inputs: list[Tensor]
    used: list[int]
    constants: list[Tensor]
    sources: list[Source]
    shapes: Any
    varying: dict[int, Tensor]


def trace(function: Function, leaves: Sequence[Any], dynamic: Sequence[bool]) -> Graph:
    """The graph of a function.

    Args:
        function: its tensors require no gradients.
        leaves: of which tensors become inputs of the graph, and others are read once.
        dynamic: of which leaves the first dimension may vary; it is 2 at least.

    Raises:
        Whatever the function raises on tensors without values.
    """
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    shapes = ShapeEnv(allow_scalar_outputs=False, allow_dynamic_output_shape_ops=False)
    mode = FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True)
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    fakes = [_without_storage(mode, leaves[place], dynamic[place], place) for place in places]
    sources: list[Source] = []

    def flat(*tensors: Tensor) -> list[Any]:
        given = [*leaves]
        for place, tensor in zip(places, tensors, strict=True):
            given[place] = tensor
        results, writes = function(given)
        found = _Results(dict(zip(places, tensors, strict=True)), results)
        found.write(writes)
        sources[:] = found.sources
        return found.new

    with mode:
        module = make_fx(flat, tracing_mode="real")(*fakes)
    constants = _lifted(module)
    module.graph.eliminate_dead_code()
    held = [node for node in module.graph.nodes if node.op == "placeholder"]
    used = [place for place, node in zip(places, held, strict=False) if node.users]
    inputs = [fake for fake, node in zip(fakes, held, strict=False) if node.users]
    for node in held[: len(places)]:
        if not node.users:
            module.graph.erase_node(node)
    module.recompile()
    inputs += [mode.from_tensor(constant, static_shapes=True) for constant in constants]
    varying = {place: fake for place, fake in zip(places, fakes, strict=True) if dynamic[place]}
    return Graph(module, inputs, used, constants, sources, shapes, varying)


def drawing(module: GraphModule) -> list[str]:
    """The operations of a graph that draw random numbers, each once.

    Example:
        >>> drawing(trace(lambda leaves: ([leaves[0] + torch.rand(2)], []), [torch.ones(2)], [False]).module)
        ['aten.rand']
    """
    found = [
        node for node in module.graph.nodes if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    ]
    return [*dict.fromkeys(str(node.target.overloadpacket) for node in found if not _drops_nothing(node))]


def _drops_nothing(node: Any) -> bool:
    """Whether it is attention, say, whose dropout is 0."""
    for place, argument in enumerate(node.target._schema.arguments):
        if argument.name == "dropout_p":
            given = node.args[place] if place < len(node.args) else node.kwargs.get("dropout_p", argument.default_value)
            return given == 0
    return False


class _Results:
    """What a function returns, told apart from what it was given: `sources`, and what is `new`."""

    def __init__(self, given: dict[int, Tensor], results: list[Any]):
        self._given, self._results = given, results
        self._ids = {id(tensor): place for place, tensor in given.items()}
        self._owners = {_storage(tensor): place for place, tensor in given.items()}
        self._places: dict[int, int] = {}
        self.new: list[Any] = []
        self.sources: list[Source] = [self._source(result) for result in results]

    def _source(self, result: Any) -> Source:
        if isinstance(result, torch.SymInt) and (size := result.node.maybe_as_int()) is not None:
            return "constant", size
        if not isinstance(result, Tensor | torch.SymInt | torch.SymFloat | torch.SymBool):
            return "constant", result
        if not isinstance(result, Tensor):
            return "new", self._returned(result, copied=False)
        # Tensors that were given may share storage among themselves.
        owner = self._ids.get(id(result), self._owners.get(_storage(result)))
        if owner is not None and _same(self._given[owner], result):
            return "old", owner
        # A view of what was given is copied, so that no result shares storage with it.
        return "new", self._returned(result, copied=owner is not None)

    def _returned(self, result: Any, copied: bool) -> int:
        if id(result) not in self._places:
            self._places[id(result)] = len(self.new)
            self.new.append(result.clone() if copied else result)
        return self._places[id(result)]

    def write(self, writes: Sequence[tuple[int, int]]) -> None:
        """Write new results over what was given, in pairs of what and by which; they are returned no more."""
        pairs = {
            place: target
            for target, place in writes
            if self.sources[place][0] == "new"
            and target in self._given
            and _alike(self._given[target], self._results[place])
        }
        written = {*pairs.values()}
        for place, (kind, where) in enumerate(self.sources):
            if kind == "old" and where in written:
                self.sources[place] = "new", self._returned(self._results[place], copied=True)
        with torch.no_grad():
            for place, target in pairs.items():
                self._given[target].copy_(self.new[self.sources[place][1]])
                self.sources[place] = "old", target
        kept = sorted({where for kind, where in self.sources if kind == "new"})
        self.new = [self.new[where] for where in kept]
        number = {where: n for n, where in enumerate(kept)}
        self.sources = [(kind, number[where] if kind == "new" else where) for kind, where in self.sources]


def _without_storage(mode: Any, leaf: Tensor, dynamic: bool, place: int) -> Tensor:
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    leaf = leaf.detach()  # another object each time, should a tensor be given twice
    if not dynamic:
        return mode.from_tensor(leaf, static_shapes=True)
    sizes = [DimDynamic.DYNAMIC, *[DimDynamic.STATIC] * (leaf.dim() - 1)]
    context = StatelessSymbolicContext(dynamic_sizes=sizes)
    return mode.from_tensor(leaf, source=ConstantSource(f"leaf_{place}"), symbolic_context=context)


def _storage(tensor: Tensor) -> Any:
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)


def _same(a: Tensor, b: Tensor) -> bool:
    if a is b:
        return True
    if a.layout is not torch.strided or a.dtype != b.dtype or a.dim() != b.dim():
        return False
    return a.stride() == b.stride() and a.shape == b.shape and a.storage_offset() == b.storage_offset()


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and a.layout == b.layout


def _lifted(module: GraphModule) -> list[Tensor]:
    """Make the tensors that a graph holds its last inputs, and give them."""
    constants: dict[str, Tensor] = {}
    last = [node for node in module.graph.nodes if node.op == "placeholder"][-1:]
    inputs: dict[str, Any] = {}
    for node in [node for node in module.graph.nodes if node.op == "get_attr"]:
        if node.target not in inputs:
            constants[node.target] = getattr(module, node.target)
            place = module.graph.inserting_after(last[0]) if last else module.graph.inserting_before()
            with place:
                last = [module.graph.placeholder(f"constant_{len(inputs)}")]
            inputs[node.target] = last[0]
            last[0].meta = dict(node.meta)
        node.replace_all_uses_with(inputs[node.target])
        module.graph.erase_node(node)
    for name in constants:
        delattr(module, name)
    return [*constants.values()]

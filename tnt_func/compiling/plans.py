"""One compilation: which states and batches it is for, and what it makes of them."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tnt_func import pytree as trees
from tnt_func.compiling.backends import Backend, Run, lower
from tnt_func.compiling.graphs import Graph, drawing, trace
from tnt_func.compiling.templates import Parts, giving, taking
from tnt_func.types import PyTree


class Plan:
    """A function of trees, compiled for trees of certain containers, shapes, strides, dtypes and devices.

    Args:
        function: `parts -> parts`.
        parts: what it is given, by name.
        varies: names of parts whose tensors may vary in their first dimension, where that is 2 at least.
        donated: names of parts whose new values are written into the old ones.
        backend, options: see `lower`.

    Attributes:
        described: every leaf of the parts by its path, in words.
        places: of the leaves of each part, among those that `take` gives.
        made: what the function returns, by name: a tree of that structure, and where each leaf comes from.
        give: puts together what the function returns, of the new leaves and the taken ones.
        draws: operations of the graph that draw random numbers.
        code: what runs the graph; it takes the leaves at the places `used`, and the tensors `held`.

    Example:
        >>> plan = Plan(lambda parts: {"y": parts["x"] + 1}, {"x": torch.ones(2)}, backend="aot_eager")
        >>> plan.run(plan.take({"x": torch.zeros(2)}))
        {'y': tensor([1., 1.])}
        >>> plan.take({"x": torch.zeros(3)}) is None
        True
    """

    def __init__(
        self,
        function: Callable[[Parts], Parts],
        parts: Parts,
        *,
        varies: Sequence[str] = (),
        donated: Sequence[str] = (),
        backend: Backend = "inductor",
        options: Mapping[str, Any] | None = None,
    ):
        self.described = self.describe(parts)
        columns = {name: trees.leaves(tree) for name, tree in parts.items()}
        structures = {name: trees.structure(tree) for name, tree in parts.items()}
        spans = dict(zip(parts, _spans(map(len, columns.values())), strict=True))
        leaves = [leaf for column in columns.values() for leaf in column]
        dynamic = [name in varies and _may_vary(leaf) for name, column in columns.items() for leaf in column]
        results: Parts = {}

        def flat(leaves: list[Any]) -> tuple[list[Any], list[tuple[int, int]]]:
            results.clear()
            results.update(
                function({n: trees.unflatten([leaves[at] for at in spans[n]], its) for n, its in structures.items()})
            )
            out = [trees.leaves(tree) for tree in results.values()]
            writes: list[tuple[int, int]] = []
            for (name, tree), span in zip(results.items(), _spans(map(len, out)), strict=True):
                if name in donated and trees.structure(tree) == structures[name]:
                    writes += zip(spans[name], span, strict=True)
            return [leaf for column in out for leaf in column], writes

        graph = trace(flat, leaves, dynamic)
        sources = iter(graph.sources)
        made = {name: [*itertools.islice(sources, len(trees.leaves(tree)))] for name, tree in results.items()}
        # What comes back as it was given is not made; a part of tensors of which none is read is not looked at again.
        made = {
            name: its for name, its in made.items() if name not in spans or its != [("old", at) for at in spans[name]]
        }
        read = {*graph.used, *(where for its in made.values() for kind, where in its if kind == "old")}
        looked_at = {
            name: tree
            for name, tree in parts.items()
            if name in made
            or not columns[name]
            or not read.isdisjoint(spans[name])
            or not all(map(_is_tensor, columns[name]))
        }
        taken = [at for name in looked_at for at in spans[name]]
        place = {at: n for n, at in enumerate(taken)}
        self.places = dict(zip(looked_at, _spans(len(columns[name]) for name in looked_at), strict=True))
        self.made = {
            name: (
                trees.map(lambda _: 0, results[name]),
                [(kind, place[where] if kind == "old" else where) for kind, where in its],
            )
            for name, its in made.items()
        }
        self.draws = drawing(graph.module)
        self._take = taking(looked_at)
        self.give = giving(self.made)
        self.used = [place[at] for at in graph.used]
        self._takes_all = graph.used == taken
        self.held: list[Any] = graph.constants
        self.code: Run = lower(graph.module, graph.inputs, backend, options or {})
        self._watch(
            graph, [leaves[at] for at in taken], {place[at]: x for at, x in graph.varying.items() if at in place}
        )

    def _watch(self, graph: Graph, leaves: list[Any], varying: dict[int, Tensor]) -> None:
        """What has to hold of leaves for the plan to be theirs."""
        self._tensors = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self._others = [(place, leaf) for place, leaf in enumerate(leaves) if not isinstance(leaf, Tensor)]
        self._varying = [place for place in varying if _is_open(varying[place])]
        sizes = [
            [None if place in self._varying and not n else size for n, size in enumerate(leaves[place].shape)]
            for place in self._tensors
        ]
        strides = [[*leaves[place].stride()] for place in self._tensors]
        self._guard = guarding([leaves[place] for place in self._tensors], sizes, strides)
        self._shapes = graph.shapes
        self._assumed = graph.shapes.produce_guards_expression([varying[place] for place in self._varying])
        self._sizes = {tuple([leaves[place].shape[0] for place in self._varying])}

    @staticmethod
    def describe(parts: Parts) -> dict[str, str]:
        """Every leaf by its path, in words."""
        return {f"{name}{path}": _kind(leaf) for name, tree in parts.items() for path, leaf in trees.named_leaves(tree)}

    def take(self, parts: Parts) -> list[Any] | None:
        """The leaves of what the function is to be given; None where the plan is not for it."""
        leaves = self._take(parts)
        if leaves is None:
            return None
        tensors = [leaves[place] for place in self._tensors] if self._others else leaves
        # The guard admits no tensor twice.
        if not self._guard(*tensors) and not self._guard(*_told_apart(tensors)):
            return None
        for place, value in self._others:
            if not trees.same_leaf(leaves[place], value):
                return None
        if self._varying:
            sizes = tuple([leaves[place].shape[0] for place in self._varying])
            if sizes not in self._sizes and not self._admits(leaves, sizes):
                return None
        return leaves

    def _admits(self, leaves: list[Any], sizes: tuple[int, ...]) -> bool:
        """Whether what was assumed of sizes holds of these."""
        given = [leaves[place] for place in self._varying]
        if min(sizes) < 2 or (self._assumed and not self._shapes.evaluate_guards_expression(self._assumed, given)):
            return False
        self._sizes.add(sizes)
        return True

    def run(self, leaves: list[Any]) -> Parts:
        """What the function returns, but for parts that come back as they were given."""
        return self.give(self.execute(leaves), leaves)

    def execute(self, leaves: list[Any]) -> list[Any]:
        """The leaves that are new, as `made` refers to them; what is donated is written over."""
        given = leaves if self._takes_all else [leaves[place] for place in self.used]
        return self.code(given + self.held)


def guarding(tensors: list[Tensor], sizes: Any = None, strides: Any = None) -> Callable[..., bool]:
    """Whether tensors have the shapes, strides, dtypes and devices of these, and none is given twice.

    Args:
        tensors: that others are to be like.
        sizes, strides: of each tensor, with None where any will do; all of them are its own by default.
    """
    sizes = [[*tensor.shape] for tensor in tensors] if sizes is None else sizes
    strides = [[*tensor.stride()] for tensor in tensors] if strides is None else strides
    guards: Any = torch._C._dynamo.guards.TensorGuards  # pyright: ignore
    return guards(*_told_apart(tensors), dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check


def _spans(lengths: Any) -> list[range]:
    """The places of columns one after another."""
    return [range(*span) for span in itertools.pairwise(itertools.accumulate(lengths, initial=0))]


def _told_apart(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors, as another object where one comes again."""
    seen: set[int] = set()
    return [tensor.detach() if id(tensor) in seen or seen.add(id(tensor)) else tensor for tensor in tensors]


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, Tensor)


def _may_vary(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] > 1 and leaf.is_contiguous()


def _is_open(leaf: Tensor) -> bool:
    """Whether tracing left its first dimension open."""
    size: Any = leaf.shape[0]
    return isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None


def _kind(leaf: PyTree) -> str:
    if not isinstance(leaf, Tensor):
        return trees.describe(leaf)
    strides = "" if leaf.is_contiguous() else f" with strides {leaf.stride()}"
    return f"{trees.describe(leaf)}{strides}{' that requires grad' if leaf.requires_grad else ''}"

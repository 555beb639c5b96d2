"""One compilation: which states and batches it is for, and what it makes of them."""

import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from tnt_func import pytree as trees
from tnt_func.compiling.backends import Backend, Run, lower
from tnt_func.compiling.graphs import Graph, Source, trace
from tnt_func.compiling.templates import Template
from tnt_func.types import PyTree

Parts: TypeAlias = dict[str, PyTree]
"""Trees by name: what a function is given, or what it returns."""


class Made:
    """A part of what a function returns, and the places of its leaves among all there are."""

    def __init__(self, name: str, template: Template, places: list[int]):
        self.name, self._give = name, template.give
        self._pick = operator.itemgetter(*places) if len(places) > 1 else lambda pool: [pool[at] for at in places]

    def of(self, pool: list[Any]) -> PyTree:
        """The tree."""
        return self._give(self._pick(pool))


class Plan:
    """A function of trees, compiled for trees of certain containers, shapes, strides, dtypes and devices.

    Args:
        function: `parts -> parts`.
        parts: what it is given, by name.
        varies: names of parts whose tensors may vary in their first dimension, where that is 2 at least.
        donated: names of parts whose new values are written into the old ones.
        backend, options: see `lower`.

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
        given = {name: Template.of(tree) for name, tree in parts.items()}
        columns = {name: template.take(parts[name]) or [] for name, template in given.items()}
        leaves = [leaf for column in columns.values() for leaf in column]
        ends = [*itertools.accumulate(map(len, columns.values()), initial=0)]
        spans = {name: range(*span) for name, span in zip(given, itertools.pairwise(ends), strict=True)}
        dynamic = [name in varies and _may_vary(leaf) for name, column in columns.items() for leaf in column]
        results: list[tuple[str, Template, range]] = []

        def flat(leaves: list[Any]) -> tuple[list[Any], list[tuple[int, int]]]:
            inside = {name: template.give([leaves[n] for n in spans[name]]) for name, template in given.items()}
            out, writes = list[Any](), list[tuple[int, int]]()
            results.clear()
            for name, tree in function(inside).items():
                template = Template.of(tree)
                span = range(len(out), len(out) + template.structure.num_leaves)
                results.append((name, template, span))
                out += trees.leaves(tree)
                if name in donated and template.structure == given[name].structure:
                    both = list(zip(spans[name], span, strict=True))
                    writes += [
                        pair for pair in both if all(isinstance(x, Tensor) for x in (leaves[pair[0]], out[pair[1]]))
                    ]
            return out, writes

        graph = trace(flat, leaves, dynamic)
        returned = {name: [graph.sources[n] for n in span] for name, _, span in results}
        kept = {name for name in returned.keys() & spans.keys() if returned[name] == [("old", n) for n in spans[name]]}
        made = {name: sources for name, sources in returned.items() if name not in kept}
        read = {*graph.used, *(where for sources in made.values() for kind, where in sources if kind == "old")}
        # Another part that holds tensors only, and of which none is read, is not looked at again.
        plain = {
            name for name, column in columns.items() if column and all(isinstance(leaf, Tensor) for leaf in column)
        }
        unread = {name for name in plain - made.keys() if read.isdisjoint(spans[name])}
        taken = [n for name, span in spans.items() if name not in unread for n in span]
        place = {n: at for at, n in enumerate(taken)}

        self._take = [(name, template.takes) for name, template in given.items() if name not in unread]
        self._run: Run = lower(graph.module, graph.inputs, backend, options or {})
        self._held: list[Any] = graph.constants
        self._used = None if graph.used == taken else [place[n] for n in graph.used]
        self._constants: list[Any] = []
        news = len({where for sources in made.values() for kind, where in sources if kind == "new"})

        def at(source: Source) -> int:
            kind, where = source
            if kind == "constant":
                self._constants.append(where)
                return news + len(taken) + len(self._constants) - 1
            return where if kind == "new" else news + place[where]

        templates = {name: template for name, template, _ in results}
        self._made = [Made(name, templates[name], [at(source) for source in sources]) for name, sources in made.items()]
        self._watch(
            graph, [leaves[n] for n in taken], {place[n]: fake for n, fake in graph.varying.items() if n in place}
        )
        self.described = self.describe(parts)

    def _watch(self, graph: Graph, leaves: list[Any], varying: dict[int, Tensor]) -> None:
        """What has to hold of leaves for the plan to be theirs."""
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        tensors = _told_apart([leaves[place] for place in places])
        self._varying = [place for place in varying if _is_open(varying[place])]
        sizes = [
            [None if place in self._varying and not n else size for n, size in enumerate(leaves[place].shape)]
            for place in places
        ]
        strides = [[*tensor.stride()] for tensor in tensors]
        guards: Any = torch._C._dynamo.guards.TensorGuards  # pyright: ignore
        self._guard = guards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
        self._others = [(place, leaf) for place, leaf in enumerate(leaves) if not isinstance(leaf, Tensor)]
        self._tensors = places
        self._shapes = graph.shapes
        self._assumed = graph.shapes.produce_guards_expression([varying[place] for place in self._varying])
        self._sizes = {tuple([leaves[place].shape[0] for place in self._varying])}

    @staticmethod
    def describe(parts: Parts) -> dict[str, str]:
        """Every leaf by its path, in words."""
        return {f"{name}{path}": _kind(leaf) for name, tree in parts.items() for path, leaf in trees.named_leaves(tree)}

    def take(self, parts: Parts) -> list[Any] | None:
        """The leaves of what the function is to be given; None where the plan is not for it."""
        leaves: list[Any] = []
        for name, take in self._take:
            if not take(parts[name], leaves):
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
        given = [*leaves] if self._used is None else [leaves[place] for place in self._used]
        pool = [*self._run(given + self._held), *leaves, *self._constants]
        return {made.name: made.of(pool) for made in self._made}


def _told_apart(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors, as another object where one comes again."""
    seen: set[int] = set()
    return [tensor.detach() if id(tensor) in seen or seen.add(id(tensor)) else tensor for tensor in tensors]


def _may_vary(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] > 1 and leaf.is_contiguous()


def _is_open(leaf: Tensor) -> bool:
    """Whether tracing left its first dimension open."""
    size: Any = leaf.shape[0]
    return isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None


def _kind(leaf: Any) -> str:
    if not isinstance(leaf, Tensor):
        return trees.describe(leaf)
    strides = "" if leaf.is_contiguous() else f" with strides {leaf.stride()}"
    return f"{trees.describe(leaf)}{strides}{' that requires grad' if leaf.requires_grad else ''}"

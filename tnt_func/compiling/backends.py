"""What runs a graph: inductor's machine code, or the same graph operation by operation."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.fx import GraphModule

from tnt_func.compiling.decompositions import decompositions
from tnt_func.compiling.rewrites import part_biases, settle

Backend: TypeAlias = Literal["inductor", "aot_eager"]
Run: TypeAlias = Callable[[list[Any]], Any]
"""Takes its inputs as one list, which it may empty, and returns what is new."""

OPTIONS = {"fallback_random": True, "size_asserts": False, "cpp_wrapper": True}


def lower(graph: GraphModule, inputs: list[Tensor], backend: Backend, options: Mapping[str, Any]) -> Run:
    """A graph, ready to run.

    Args:
        graph: of tensors that require no gradients; it may write into its inputs, and returns none of them.
        inputs: tensors without storage, like those that it will be given.
        backend: "inductor", or "aot_eager", which takes the same road and compiles nothing.
        options: of inductor.
    """
    from torch._functorch import config as functorch
    from torch._functorch.compile_utils import fx_graph_cse
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    found: list[Any] = []

    def inner(graph: GraphModule, inputs: Any, **kwargs: Any) -> Any:
        if backend == "aot_eager":
            from torch._functorch._aot_autograd.utils import make_boxed_func

            kwargs.clear()
            compiled: Any = make_boxed_func(graph.forward)
        else:
            if cpu:
                # Decompositions write what goes back apart from what goes forth, and calculate things twice.
                graph.graph = fx_graph_cse(graph.graph)
                settle(graph)
            compiled = compile_fx_inner(graph, inputs, **kwargs)
        returned = next(iter(reversed(graph.graph.nodes))).args[0]
        found.append((compiled, len(inputs), len(returned)))
        return compiled

    count = len(next(iter(reversed(graph.graph.nodes))).args[0])
    cpu = all(isinstance(x, Tensor) and x.device.type == "cpu" for x in inputs)
    patches = {**OPTIONS, "cpp_wrapper": cpu, **options}
    if cpu:
        part_biases(graph)
    # Its cache keeps what goes round the graph too, which is not used here; that of the graph's code is.
    with torch.no_grad(), functorch.patch(enable_autograd_cache=False):
        whole: Any = compile_fx(
            graph,
            inputs,
            inner_compile=inner,
            config_patches=patches,
            decompositions=decompositions() if cpu else None,
        )
    if len(found) == 1 and found[0][1:] == (len(inputs), count):
        compiled = found[0][0]
        return getattr(compiled, "current_callable", None) or compiled
    return lambda given: whole(*given)

"""Everything a run knows, as one immutable tree.

A State is exactly what a checkpoint holds: no functions, no live optimizers, no generators. Nothing is remembered
anywhere else, so a State alone decides how a run goes on.

Laws:
    `replace` shares what it does not change and never writes. `progress`, `key` and `stop` are static: no leaves.
    Equal states have equal digests, in every process and on every platform.

Example:
    >>> state = State(params={"w": torch.ones(2)}, key=key(0))
    >>> later = state.replace(params={"w": torch.zeros(2)})
    >>> state.params["w"], later.params["w"]
    (tensor([1., 1.]), tensor([0., 0.]))
"""

import ctypes
import hashlib
import struct
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch

from tnt_func import pytree as trees
from tnt_func.errors import ConsumedError, UsageError
from tnt_func.progress import RunProgress
from tnt_func.pytree import pytree
from tnt_func.rng import Key, key
from tnt_func.types import PyTree

__all__ = ["State", "digest", "keep", "key"]

T = TypeVar("T")


@pytree(static=("key", "progress", "stop"))
@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class State:
    """One immutable pytree: what the run has learned, where it stands, and what it draws from.

    Args:
        params: what the optimizer changes, usually a dict from names to tensors.
        key: the random key of the run; every scope of the loop derives from it.
        buffers: what a step changes without gradients, BatchNorm's averages say.
        opt_state: the optimizer's state, hyper-parameters included.
        progress: epochs and steps completed in each phase.
        metrics: accumulators of the open epoch, by phase and name.
        memory: named slots of callbacks and unit transforms.
        output: what the step returned; set only between a step and its step_end hooks.
        stop: why the run is finishing, or None.

    Example:
        >>> State(params={"w": torch.ones(2)}, key=key(0)).progress.train.steps
        0
    """

    params: PyTree
    key: Key
    buffers: PyTree = field(default_factory=dict[str, Any])
    opt_state: PyTree = field(default_factory=dict[str, Any])
    progress: RunProgress = field(default_factory=RunProgress)
    metrics: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    memory: Mapping[str, PyTree] = field(default_factory=dict[str, PyTree])
    output: PyTree = None
    stop: str | None = None

    def replace(self, **changes: Any) -> "State":
        """This state with some fields changed; the rest is shared, not copied.

        Raises:
            UsageError: State has no such field.

        Example:
            >>> state = State(params=1.0, key=key(0))
            >>> state.replace(params=2.0).params, state.params
            (2.0, 1.0)
        """
        if not FIELDS.issuperset(changes):
            unknown = sorted(changes.keys() - FIELDS)
            raise UsageError(f"state.replace was given {unknown}; a State has {sorted(FIELDS)}. Write one of those.")
        new = object.__new__(State)
        new.__dict__.update(self.__dict__)
        new.__dict__.update(changes)
        return new

    def remember(self, name: str, value: PyTree) -> "State":
        """This state with one slot of memory changed.

        Example:
            >>> State(params=1.0, key=key(0)).remember("best", 0.5).memory["best"]
            0.5
        """
        return self.replace(memory={**self.memory, name: value})

    def request_stop(self, reason: str) -> "State":
        """This state, asking the run to finish: the open epoch is closed, its hooks and due evaluation run.

        The first reason given is kept.

        Example:
            >>> State(params=1.0, key=key(0)).request_stop("converged").request_stop("later").stop
            'converged'
        """
        return self if self.stop is not None else self.replace(stop=reason)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Comes to what is not there: a field that a step has taken, one inside of a block, or no field at all."""
            if name not in FIELDS:
                raise AttributeError(f"a State has no {name!r}; it has {sorted(FIELDS)}.")
            if "_between" in self.__dict__:
                raise ConsumedError(
                    f"state.{name} was read between two fused steps; it is there where a block ends, after every step "
                    "that is a multiple of fuse. Read it at step_done, or every so many steps that are a multiple."
                )
            raise ConsumedError(
                f"state.{name} was read after a donating step had consumed the state; its tensors are those of a later "
                "state now. Read the state that the step returned, or keep a copy before: kept = tnt.keep(state)."
            )

    def __repr__(self) -> str:
        """At most eight lines: sizes, counters, the first leaves of every part; no value of a tensor."""
        if "params" not in self.__dict__:
            what = "between fused steps" if "_between" in self.__dict__ else "consumed"
            return f"State({what}, key={self.key}, train={self.progress.train})"
        counters = [f"{phase}={p}" for phase, p in self.progress._asdict().items() if phase == "train" or any(p)]
        stop = [] if self.stop is None else [f"stop={self.stop!r}"]
        found = _digest_of_few(self, CHEAP)
        known = [] if found is None else [f"digest={found[:12]}"]
        head = f"State({', '.join([_size(self), f'key={self.key}', *counters, *stop, *known])})"
        return "\n  ".join([head, *(f"{name}: {text}" for name, text in _parts(self))])

    def _repr_html_(self) -> str:
        """A table for notebooks: the same, the metrics' values, and a list of leaves to open."""
        from html import escape

        if "params" not in self.__dict__:
            return escape(repr(self))
        digest_of_it = _digest_of_few(self, 256 * CHEAP) or "tnt.digest(state) computes it"
        rows = [("key", self.key), *self.progress._asdict().items(), ("stop", self.stop), ("digest", digest_of_it)]
        rows += [
            (f"{phase} {name}", _value(accumulator))
            for phase, accumulators in self.metrics.items()
            for name, accumulator in accumulators.items()
        ]
        cells = [(name, escape(str(value))) for name, value in rows]
        for name in TREES:
            if leaves := _named(getattr(self, name)):
                listed = "<br>".join(map(escape, _bounded(leaves, LISTED)))
                cells.append((name, f"<details><summary>{_size(getattr(self, name))}</summary>{listed}</details>"))
        table = "".join(f"<tr><th>{escape(name)}</th><td>{cell}</td></tr>" for name, cell in cells)
        return f"<table><caption>State, {_size(self)}</caption>{table}</table>"


FIELDS = frozenset(field.name for field in fields(State))
TREES = ("params", "buffers", "opt_state", "memory", "output")
SHOWN, LISTED = 4, 100
"""Leaves, slots or metrics that a line of a repr names, and leaves of a part that a notebook lists."""
WIDTH = 60
"""Characters that one of them gets."""
CHEAP = 1 << 20
"""Bytes on the CPU of which a repr computes the digest, in a millisecond; a notebook of 256 times as many."""


def keep(state: T) -> T:
    """A copy that no later step consumes: every tensor in memory of its own.

    What watches a run that donates (`tnt.donate`) and holds on to a state keeps a copy of it. Tensors that share memory
    do not in the copy.

    Args:
        state: a State, or any tree.

    Example:
        >>> state = State(params={"w": torch.ones(2)}, key=key(0))
        >>> kept = keep(state)
        >>> _ = state.params["w"].zero_()
        >>> kept.params["w"]
        tensor([1., 1.])
    """
    return cast(T, trees.map(_cloned, state))


def _cloned(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf


def digest(state: PyTree) -> str:
    """A name for a state's exact content: 64 hexadecimal digits, equal for equal states and for no others.

    Covers containers, static fields, paths, types, shapes and the bits of every leaf, little-endian; not devices, nor
    the order of a dict's keys. Leaves are fetched to the CPU, which waits for the device.

    Args:
        state: a State, or any tree.

    Raises:
        UsageError: the bytes of a leaf are not here: it is in parts on several ranks, or was freed.

    Example:
        >>> a = State(params={"w": torch.ones(2)}, key=key(0))
        >>> digest(a) == digest(a.replace(params={"w": torch.ones(2)}))
        True
        >>> digest(a) == digest(a.replace(params={"w": torch.ones(2).double()}))
        False

    References:
        SHA-256, FIPS 180-4.
    """
    hasher = hashlib.sha256(f"{_outline(trees.structure(state))}\n".encode())
    for path, leaf in sorted(trees.named_leaves(state), key=lambda pair: pair[0]):
        if isinstance(leaf, torch.Tensor):
            hasher.update(f"{path} {leaf.dtype} {leaf.layout} {list(leaf.shape)}\n".encode())
            data = _bytes(leaf)
            hasher.update(content(data))
        else:
            value = struct.pack("<d", leaf).hex() if isinstance(leaf, float) else ascii(leaf)
            hasher.update(f"{path} {type(leaf).__name__} {value}\n".encode())
    return hasher.hexdigest()


def _outline(structure: trees.Structure) -> str:
    """The containers and static fields of a tree, the keys of a dict sorted."""
    if structure.is_leaf():
        return "*"
    children = [_outline(child) for child in structure.children()]
    if structure.type is dict:
        children = sorted(f"{key!a}: {child}" for key, child in zip(structure.context, children, strict=True))
    static = ascii(structure.context.values) if isinstance(structure.context, trees.Static) else ""
    return f"{structure.type.__name__}{static}[{', '.join(children)}]"


def content(tensor: torch.Tensor) -> "ctypes.Array[ctypes.c_ubyte]":
    """The bytes of a contiguous tensor on the CPU, not copied: they are there as long as the tensor is.

    Raises:
        UsageError: they are not here.

    Example:
        >>> tensor = torch.tensor([1, 2], dtype=torch.uint8)
        >>> list(content(tensor))
        [1, 2]
    """
    address = tensor.data_ptr()
    if tensor.nbytes and not address:
        raise UsageError(
            f"the bytes of {trees.describe(tensor)} were asked for, and are not here: it is in parts on several ranks, "
            "or its storage was freed. Write tnt.distributed.gather(state) for the whole of it."
        )
    return (ctypes.c_ubyte * tensor.nbytes).from_address(address)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes on the CPU, in order, little-endian."""
    tensor = tensor.detach().to("cpu")
    dense = tensor if tensor.layout is torch.strided else tensor.to_dense()
    flat = dense.resolve_conj().resolve_neg().contiguous()
    if sys.byteorder == "big":
        flat = flat.clone()
        cast(Any, flat.untyped_storage()).byteswap(flat.dtype)
    # An axis of one element may have any stride and count as contiguous; a view as bytes asks for stride 1.
    return flat.as_strided((flat.numel(),), (1,)).view(torch.uint8)


def _size(tree: PyTree) -> str:
    values = [leaf for leaf in trees.leaves(tree) if leaf is not None]
    sizes = [leaf.numel() * leaf.element_size() for leaf in values if isinstance(leaf, torch.Tensor)]
    if values and not sizes:
        return f"{len(values):,} value{'s' * (len(values) != 1)}"
    return f"{len(sizes):,} tensor{'s' * (len(sizes) != 1)}, {sum(sizes):,} bytes"


def _parts(state: State) -> Iterator[tuple[str, str]]:
    """What a repr says of every part that has something in it."""
    for name in TREES:
        tree = getattr(state, name)
        if name == "memory" and tree:
            yield name, ", ".join(_bounded([f"{slot} ({_size(value)})" for slot, value in tree.items()], SHOWN))
        elif leaves := _named(tree):
            yield name, f"{_size(tree)}: {', '.join(_bounded(leaves, SHOWN))}"
    phases = {phase: list(found) for phase, found in state.metrics.items() if found}
    if phases:
        yield "metrics", "; ".join(f"{phase}: {', '.join(_bounded(names, SHOWN))}" for phase, names in phases.items())


def _named(tree: PyTree) -> list[str]:
    """Every leaf but None as its path and what it is."""
    return [f"{path} {trees.describe(leaf)}".lstrip() for path, leaf in trees.named_leaves(tree) if leaf is not None]


def _bounded(items: list[str], count: int) -> list[str]:
    shown = [item if len(item) <= WIDTH else f"{item[: WIDTH - 3]}..." for item in items[:count]]
    return [*shown, f"and {len(items) - count:,} more"] if len(items) > count else shown


def _value(accumulator: Any) -> str:
    try:
        value = accumulator.value()
    except Exception:
        return "no value yet"  # What has seen nothing may have none; a picture is no place to find that out.
    one = isinstance(value, torch.Tensor) and value.numel() == 1
    return f"{value.item():.6g}" if one and not value.is_complex() else trees.describe(value)


def _digest_of_few(state: State, limit: int) -> str | None:
    """The digest where it is had for little: of a limited number of bytes that lie in memory here."""
    if torch._C._functorch.peek_interpreter_stack() is not None:  # pyright: ignore
        return None
    tensors = trees.tensors(state)
    few = sum(leaf.numel() * leaf.element_size() for leaf in tensors) <= limit
    return digest(state) if few and all(_lies_here(leaf) for leaf in tensors) else None


def _lies_here(tensor: torch.Tensor) -> bool:
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout is torch.strided
    # A tensor whose storage was freed has an address of 0.
    return plain and tensor.is_cpu and not tensor.is_quantized and (not tensor.numel() or tensor.data_ptr() != 0)

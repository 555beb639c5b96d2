"""What a checkpoint holds beside the bytes of its tensors: one strict JSON text, under a checksum of its own.

Containers are told by the names of their classes, never by importing them: a State is rebuilt inside the structure of
another one, so reading a checkpoint runs no code that the checkpoint chose.

Laws:
    `parse(text(manifest))` is the manifest; a text of which any byte was changed is refused.
"""

import ast
import functools
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tnt_func import pytree as trees
from tnt_func.checkpoint.tensors import CODES, Entry, Layout
from tnt_func.checkpoint.values import Json, decode, dtype_of, encode
from tnt_func.errors import CheckpointError, StructureError, UsageTypeError
from tnt_func.progress import RunProgress
from tnt_func.rng import Key

SCHEMA = 1
LEAF = "leaf"
_HEAD, _TAIL = '{"crc32": "', '",\n'


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What `inspect` gives: the content of a checkpoint without the bytes of its tensors.

    Args:
        tnt_func, torch: the versions that wrote it.
        static: the State's key, progress and stop.
        outlines: the containers of every part of the State, by prefix.
        values: the leaves that are no tensors, by path.
        layout: where the tensors are, with their dtypes and shapes.
        metrics: by phase and name, the numbers that `best` compares.
        schema: of the JSON.
    """

    tnt_func: str
    torch: str
    static: Mapping[str, Any]
    outlines: Mapping[str, Json]
    values: Mapping[str, Any]
    metrics: Mapping[str, Mapping[str, float]]
    layout: Layout = Layout(0, 0, {})
    schema: int = SCHEMA

    @functools.cached_property
    def leaves(self) -> dict[str, str]:
        """Every leaf in few words, by path."""
        tensors = {name: str(entry) for name, entry in self.layout.entries.items()}
        return tensors | {name: trees.describe(value) for name, value in self.values.items()}

    @property
    def slots(self) -> dict[str, str]:
        """The names of the slots of memory, by prefix."""
        found = [prefix for prefix in self.outlines if prefix.startswith(".memory")]
        return {prefix: ast.literal_eval(prefix.removeprefix(".memory"))[0] for prefix in found}

    def text(self) -> str:
        """This manifest as JSON; its first line is a checksum of the rest."""
        tensors = {name: _entry_as_json(entry) for name, entry in self.layout.entries.items()}
        parts = {
            "schema": self.schema,
            "tnt_func": self.tnt_func,
            "torch": self.torch,
            "static": {name: encode(value) for name, value in self.static.items()},
            "metrics": {phase: {name: encode(x) for name, x in found.items()} for phase, found in self.metrics.items()},
            "header": {"bytes": self.layout.header, "crc32": f"{self.layout.crc32:08x}"},
            "outlines": self.outlines,
            "values": {name: encode(value) for name, value in self.values.items()},
            "tensors": tensors,
        }
        body = ",\n".join(f"{json.dumps(name)}: {_lines(part)}" for name, part in parts.items()) + "}\n"
        return f"{_HEAD}{zlib.crc32(body.encode()):08x}{_TAIL}{body}"


def _lines(part: Json) -> str:
    """JSON with an entry a line."""
    if not isinstance(part, dict):
        return json.dumps(part, allow_nan=False)
    inside = ",\n".join(f" {json.dumps(name)}: {json.dumps(x, allow_nan=False)}" for name, x in part.items())
    return f"{{\n{inside}\n}}" if inside else "{}"


def parse(text: bytes, where: object) -> Manifest:
    """The manifest of a text.

    Args:
        text: of `checkpoint.json`.
        where: its path, for messages.

    Raises:
        CheckpointError: it was changed, cut short, or written by a later version.
    """
    start = len(_HEAD) + 8 + len(_TAIL)
    if text[:start] != f"{_HEAD}{zlib.crc32(text[start:]):08x}{_TAIL}".encode():
        raise CheckpointError(
            f"{where} is damaged: its checksum differs. Restore another checkpoint; tnt.checkpoint.resume finds the "
            "latest good one."
        )
    try:
        found = json.loads(text)
        if isinstance(found["schema"], int) and found["schema"] > SCHEMA:
            raise CheckpointError(
                f"{where} was written by tnt_func {found['tnt_func']} in schema {found['schema']}; this version reads "
                f"schemas up to {SCHEMA}. Install that version."
            )
        header = found["header"]
        entries = {name: _entry_of_json(entry) for name, entry in found["tensors"].items()}
        manifest = Manifest(
            tnt_func=found["tnt_func"],
            torch=found["torch"],
            static={name: decode(value) for name, value in found["static"].items()},
            outlines=found["outlines"],
            values={name: decode(value) for name, value in found["values"].items()},
            metrics={phase: {name: float(decode(x)) for name, x in f.items()} for phase, f in found["metrics"].items()},
            layout=Layout(header["bytes"], int(header["crc32"], 16), entries),
            schema=found["schema"],
        )
        _check(manifest)
        return manifest
    except (LookupError, TypeError, ValueError, AttributeError, SyntaxError, RecursionError) as error:
        raise CheckpointError(f"{where} is no manifest of a checkpoint: {error!r}. Restore another one.") from error


def _check(manifest: Manifest) -> None:
    """What a sound manifest satisfies, since nothing that was read may lead out of the file or past a tensor's end."""
    static = {"key": Key, "progress": RunProgress, "stop": type(None) if manifest.static["stop"] is None else str}
    if manifest.schema != SCHEMA or {name: type(value) for name, value in manifest.static.items()} != static:
        raise ValueError("it has no key, progress and stop in a schema known here")
    if any(f".memory[{name!r}]" != prefix or type(name) is not str for prefix, name in manifest.slots.items()):
        raise ValueError("a slot of memory has no name")
    if manifest.values.keys() & manifest.layout.entries.keys():
        raise ValueError("a leaf is there twice")
    end = 0
    for name, entry in sorted(manifest.layout.entries.items(), key=lambda pair: pair[1].start):
        if entry.dtype not in CODES or any(type(size) is not int or size < 0 for size in entry.shape):
            raise ValueError(f"{name} has the dtype or shape of no tensor")
        length = torch.Size(entry.shape).numel() * dtype_of(entry.dtype).itemsize
        if (entry.start, entry.end) != (end, end + length):
            raise ValueError(f"the bytes of {name} are not where they belong")
        if entry.stride is not None and not _dense(entry.shape, entry.stride):
            raise ValueError(f"{name} has the strides of no dense tensor")
        end = entry.end


def _dense(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether elements with these strides fill their memory, each with a place of its own."""
    place = 1
    for step, size in sorted((step, size) for step, size in zip(stride, shape, strict=True) if size != 1):
        if step != place:
            return False
        place *= size
    return True


def _entry_as_json(entry: Entry) -> Json:
    fields = {"dtype": entry.dtype, "shape": entry.shape, "bytes": [entry.start, entry.end]}
    stride = {} if entry.stride is None else {"stride": entry.stride}
    grad = {"requires_grad": True} if entry.requires_grad else {}
    return {**fields, "crc32": f"{entry.crc32:08x}", **stride, **grad}


def _entry_of_json(entry: Json) -> Entry:
    start, end = entry["bytes"]
    stride = tuple(entry["stride"]) if "stride" in entry else None
    grad = entry.get("requires_grad", False)
    return Entry(entry["dtype"], tuple(entry["shape"]), start, end, int(entry["crc32"], 16), stride, grad)


def outline(structure: trees.Structure, where: str) -> Json:
    """The containers of a tree as JSON, with the static fields of its classes.

    Args:
        structure: of the tree.
        where: its path, for messages.

    Raises:
        StructureError: a static field or a key of a dict is nothing that a checkpoint holds.

    Example:
        >>> outline(trees.structure({"a": (1, 2)}), ".memory")
        {'type': 'dict', 'keys': ["'a'"], 'children': [{'type': 'tuple', 'children': ['leaf', 'leaf']}]}
    """
    if structure.is_leaf():
        return LEAF
    node, children = _container(structure, where)
    return {**node, "children": [outline(child, where) for child in children]}


def adopt(structure: trees.Structure, node: Json) -> bool:
    """Give a structure the static fields of an outline; whether it has the same containers otherwise.

    The structure is one that `flatten` has just made: its contexts are its own.

    Example:
        >>> adopt(trees.structure((1, [2])), outline(trees.structure((3, [4])), ""))
        True
        >>> adopt(trees.structure((1, [2])), outline(trees.structure((3, (4,))), ""))
        False
    """
    if structure.is_leaf() or node == LEAF:
        return structure.is_leaf() and node == LEAF
    mine, children = _container(structure, "")
    static, below = node.get("static", []), node["children"]
    if any(mine.get(part) != node.get(part) for part in ("type", "keys", "context")):
        return False
    if len(static) != len(mine.get("static", [])) or len(below) != len(children):
        return False
    if static:
        structure.context.values = tuple(decode(value) for value in static)
    return all(adopt(child, node) for child, node in zip(children, below, strict=True))


def _container(structure: trees.Structure, where: str) -> tuple[dict[str, Json], list[trees.Structure]]:
    """What an outline says of one container, and its children; those of a dict in the order of their keys."""
    node: dict[str, Json] = {"type": structure.type.__name__}
    context, children = structure.context, list(structure.children())
    if structure.type is dict:
        if odd := [key for key in context if type(key) not in (str, int, bool, type(None))]:
            raise StructureError(
                f"state{where} has the key {odd[0]!r}; a checkpoint names leaves by their path, so keys of dicts are "
                "strings and integers. Use str(key)."
            )
        pairs = sorted(zip(map(ascii, context), children, strict=True), key=lambda pair: pair[0])
        return {**node, "keys": [key for key, _ in pairs]}, [child for _, child in pairs]
    if isinstance(context, trees.Static):
        static = [_static(value, f"{where}, a {node['type']},") for value in context.values]
        return ({**node, "static": static} if static else node), children
    return (node if context is None else {**node, "context": ascii(context)}), children


def _static(value: Any, where: str) -> Json:
    try:
        return encode(value)
    except UsageTypeError as error:
        raise StructureError(f"state{where} has a static field that no checkpoint could hold: {error}") from error

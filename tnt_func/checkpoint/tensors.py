"""The file of a checkpoint's tensors, in the safetensors format: bytes by name, with a header that says where.

Any reader of safetensors reads it. It is written and read here, in a few lines, for what the format leaves open: every
large tensor begins at a multiple of 64 bytes, as torch's own memory does, so that a tensor mapped from the file gives
the bits that it gave in memory; the header is under a checksum; and a bare installation can save and resume.

Law:
    What is read is what was written, to the bit, strides of dense tensors included; or it is an error.

References:
    The safetensors format, https://huggingface.co/docs/safetensors.
"""

import ctypes
import itertools
import json
import mmap
import os
import stat
import struct
import sys
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from tnt_func import pytree as trees
from tnt_func.checkpoint.values import dtype_of
from tnt_func.errors import CheckpointError, StructureError

ALIGNMENT = 64
MAPPED = 1 << 20
"""Bytes from which on a tensor stays in the file's pages; a smaller one is copied, and does not keep the file open."""

CODES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    # The format has no pairs of float64 or float16, so complex numbers are stored as tensors with a last axis of two.
    "complex128": "F64",
    "complex64": "F32",
    "complex32": "F16",
}


@dataclass(frozen=True)
class Entry:
    """Where a tensor is in the file and what it was.

    Args:
        dtype, shape: of the tensor.
        start, end: of its bytes, counted from the end of the header.
        crc32: of its bytes.
        stride: in elements, of a dense tensor that was not contiguous.
        requires_grad: whether it did.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    crc32: int
    stride: tuple[int, ...] | None = None
    requires_grad: bool = False

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


@dataclass(frozen=True)
class Layout:
    """What a file of tensors holds: its header's checksum and length, and where every tensor is."""

    header: int
    crc32: int
    entries: Mapping[str, Entry]

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return self.header + max((entry.end for entry in self.entries.values()), default=0)


def check(name: str, leaf: Tensor) -> None:
    """Refuse a tensor that no file could hold.

    Raises:
        StructureError: it is sparse, quantized, on the meta device, or of a class of its own.

    Example:
        >>> check(".params", torch.ones(2).to_sparse())
        Traceback (most recent call last):
        tnt_func.errors.StructureError: state.params is a Tensor, float32[2] sparse_coo; a checkpoint holds dense, ...
    """
    plain = type(leaf) in (Tensor, torch.nn.Parameter) and leaf.layout is torch.strided and not leaf.is_meta
    if not plain or _name(leaf.dtype) not in CODES:
        raise StructureError(
            f"state{name} is a {type(leaf).__name__}, {trees.describe(leaf)}; a checkpoint holds dense, plain tensors "
            "that have memory, of numbers or booleans. Convert it: to_dense(), dequantize(), full_tensor()."
        )


def write(file: BinaryIO, tensors: Mapping[str, Tensor]) -> Layout:
    """Write tensors, each to a place of its own, leaves that share storage too.

    Args:
        file: written from where it stands, not flushed.
        tensors: plain tensors by name, on any device.

    Example:
        >>> import io
        >>> file = io.BytesIO()
        >>> write(file, {".params": torch.ones(2, 3)}).entries[".params"].end
        24
    """
    if sys.byteorder == "big":
        raise CheckpointError("this machine is big-endian, and checkpoints are little-endian. Save on another one.")
    # What keeps the alignment of what follows goes first.
    order = sorted(tensors, key=lambda name: tensors[name].nbytes % ALIGNMENT != 0)
    ends = itertools.accumulate((tensors[name].nbytes for name in order), initial=0)
    places = dict(zip(order, itertools.pairwise(ends), strict=True))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, (start, end) in places.items():
        tensor = tensors[name]
        shape = [*tensor.shape, 2] if tensor.is_complex() else list(tensor.shape)
        header[name] = {"dtype": CODES[_name(tensor.dtype)], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    text = struct.pack("<Q", len(text)) + text
    file.write(text)
    entries = {name: _write(file, tensors[name], *place) for name, place in places.items()}
    return Layout(len(text), zlib.crc32(text), entries)


def _write(file: BinaryIO, tensor: Tensor, start: int, end: int) -> Entry:
    # A dense tensor's strides are kept, since a transposed weight rounds differently; others come back contiguous.
    dense = torch.empty_like(tensor, device="meta", requires_grad=False).stride() == tensor.stride()
    stride = tuple(tensor.stride()) if dense and not tensor.is_contiguous() else None
    here = tensor.detach().to("cpu").resolve_conj().resolve_neg()
    here = (torch.view_as_real(here) if here.is_complex() else here).contiguous()
    data = memoryview((ctypes.c_ubyte * here.nbytes).from_address(here.data_ptr())) if here.nbytes else b""
    file.write(data)
    return Entry(
        _name(tensor.dtype), tuple(tensor.shape), start, end, zlib.crc32(data), stride, bool(tensor.requires_grad)
    )


class Mapped:
    """A file of tensors, mapped into memory. What is read of it is private: nothing is ever written back.

    Args:
        path: the file.
        layout: what it must hold.

    Raises:
        CheckpointError: it is missing, no plain file, of another length, or has another header.
    """

    def __init__(self, path: Path, layout: Layout):
        if sys.byteorder == "big":
            raise CheckpointError("this machine is big-endian, and checkpoints are little-endian. Load on another one.")
        with opened(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size != layout.size:
                raise CheckpointError(f"{path} has {size} bytes and had {layout.size} when it was written. {DAMAGED}")
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self._path, self._layout = path, layout
        if zlib.crc32(memoryview(self._bytes)[: layout.header]) != layout.crc32:
            raise CheckpointError(f"the header of {path} is damaged: its checksum differs. {DAMAGED}")

    def verify(self, names: Iterable[str]) -> None:
        """Compare the bytes of tensors with their checksums.

        Raises:
            CheckpointError: some differ; all are named.
        """
        view, head = memoryview(self._bytes), self._layout.header
        entries = {name: self._layout.entries[name] for name in names}
        bad = [name for name, e in entries.items() if zlib.crc32(view[head + e.start : head + e.end]) != e.crc32]
        if bad:
            named = ", ".join(f"state{name}" for name in bad[:8]) + (f" and {len(bad) - 8} more" if bad[8:] else "")
            raise CheckpointError(f"{named} in {self._path} is damaged: its checksum differs. {DAMAGED}")

    def read(self, name: str, device: torch.device) -> Tensor:
        """One tensor, which shares no memory with another."""
        entry = self._layout.entries[name]
        dtype, offset, length = dtype_of(entry.dtype), self._layout.header + entry.start, entry.end - entry.start
        if length >= MAPPED and offset % ALIGNMENT == 0 and entry.stride is None:
            tensor = torch.frombuffer(self._bytes, dtype=dtype, count=length // dtype.itemsize, offset=offset)
        else:
            tensor = torch.empty(length // dtype.itemsize, dtype=dtype)
            if length:
                raw = torch.frombuffer(self._bytes, dtype=torch.uint8, count=length, offset=offset)
                tensor.view(torch.uint8).copy_(raw)
        tensor = tensor.reshape(entry.shape)
        if entry.stride is not None:
            tensor = torch.empty_strided(entry.shape, entry.stride, dtype=dtype).copy_(tensor)
        return tensor.to(device).requires_grad_(entry.requires_grad)


DAMAGED = "A checkpoint is whole or of no use. Restore another one; tnt.checkpoint.resume finds the latest good one."


def opened(path: Path) -> BinaryIO:
    """A file of a checkpoint, opened to be read; links out of its directory are not followed, pipes not waited for.

    Raises:
        CheckpointError: it is missing, unreadable, or no plain file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be opened: {error.strerror}. {DAMAGED}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{path} is no plain file. {DAMAGED}")
    return os.fdopen(descriptor, "rb")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

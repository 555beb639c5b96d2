"""Where pipelines begin: tensors and arrays, datasets, sequences, files that are mapped into memory.

Example:
    >>> images, labels = torch.rand(6, 2), torch.arange(6)
    >>> [batch[1].tolist() for batch in source((images, labels)).batch(4).batches()]
    [[0, 1, 2, 3], [4, 5]]
"""

import sys
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch.utils.data import DataLoader, IterableDataset, Sampler, TensorDataset

from tnt_func import rng
from tnt_func.data.pipelines import Elements
from tnt_func.data.stages import Items, Stream, Table
from tnt_func.errors import DataError, UsageError, UsageTypeError, kind_of
from tnt_func.rng import Key
from tnt_func.types import Generator, typed


@runtime_checkable
class Indexed(Protocol):
    """What has a length and an element for every index."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


@runtime_checkable
class InBulk(Protocol):
    """A dataset that reads many elements at once, as Hugging Face's do."""

    def __getitems__(self, indices: list[int], /) -> list[Any]: ...


@typed
def source(
    data: Any, key: Key | None = None, *, draws: tuple[Generator, ...] | None = None, name: str = "source"
) -> Elements:
    """A pipeline of what there is.

    Args:
        data: a tensor or array, or a tuple or dict of them, whose first dimensions agree: an element is a row, a copy;
            or a map-style dataset, of torch or of Hugging Face, or a list, tuple or range: an element is an item.
        key: of what a dataset draws; the stages after it take it where they are given none.
        draws: the global generators that a dataset's `__getitem__` draws from, as augmentations in it do. None is all
            three for a dataset, which then needs a key, and none for arrays, lists, tuples, ranges and a TensorDataset,
            which run no code of yours.
        name: what the key is folded with.

    Raises:
        UsageTypeError: it cannot be indexed: an iterable dataset, a sampler, a loader, an iterator.
        UsageError: a dataset has no key and may draw; or tensors have different lengths.
        DataError: there is no element.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> list(source({"x": torch.tensor([1.0, 2.0])}).batches())
        [{'x': tensor(1.)}, {'x': tensor(2.)}]
        >>> len(source(TensorDataset(torch.zeros(3), torch.ones(3))))
        3
    """
    if type(data) is TensorDataset:
        data = data.tensors
    columns = list(_columns(data))
    if columns and all(_has_rows(column) for column in columns):
        lengths = {len(column) for column in columns}
        if len(lengths) > 1:
            raise UsageError(
                f"source(...) was given columns of {sorted(lengths)} rows; a row is one element of each. Write "
                "source(columns) of tensors that have the same first dimension."
            )
        stage = Table(data, lengths.pop(), None if key is None else Stream(key, name, ()))
        return _filled(stage)
    refused = isinstance(data, str | bytes | Mapping | DataLoader | Sampler | IterableDataset | torch.Tensor)
    if refused or not isinstance(data, Indexed):
        raise UsageTypeError(
            f"source({kind_of(data)}) was given; a source has a length and an element for every index. {_instead(data)}"
        )
    if draws is None:
        draws = () if _runs_no_code(data) else rng.ALL
    if draws and key is None:
        raise UsageError(
            f"source({kind_of(data)}) was given no key; its items may draw, and what is drawn comes from a key. Write "
            "source(dataset, tnt.key(0)), or source(dataset, draws=()) if it draws nothing."
        )
    bulk = data.__getitems__ if isinstance(data, InBulk) and not draws else None
    return _filled(Items(data, bulk, None if key is None else Stream(key, name, draws)))


@typed
def mapped(path: Any, *, dtype: Any = None, shape: tuple[int, ...] | None = None, offset: int = 0) -> Any:
    """An array that stays in its file: a numpy.memmap, to be read only. Runs no code of the file's, and no pickle.

    Args:
        path: of a .npy file, or of a raw one if dtype and shape are given.
        dtype: of a raw file: NumPy's, or its name.
        shape: of a raw file; -1 in the first place is as many rows as there are.
        offset: bytes of a raw file before the first number.

    Raises:
        DataError: it is no .npy file, or one of Python objects; or a raw file is shorter than the shape.
        UsageError: only one of dtype and shape is given.

    Example:
        >>> import numpy, tempfile
        >>> with tempfile.NamedTemporaryFile(suffix=".npy") as file:
        ...     numpy.save(file.name, numpy.eye(3))
        ...     [row.tolist() for row in source(mapped(file.name)).take(1).batches()]
        [[1.0, 0.0, 0.0]]
    """
    import numpy

    if (dtype is None) != (shape is None):
        raise UsageError(
            f"mapped({str(path)!r}, dtype={dtype}, shape={shape}) was given; a raw file says neither, a .npy file "
            "both. Write mapped(path) for a .npy file, or mapped(path, dtype='float32', shape=(-1, 784))."
        )
    try:
        if dtype is None or shape is None:
            return numpy.lib.format.open_memmap(path, mode="r")
        kind = numpy.dtype(dtype)
        if kind.hasobject:
            raise ValueError("Python objects have no place in a raw file")
        if shape[:1] == (-1,):
            with open(path, "rb") as file:
                size = file.seek(0, 2) - offset
            rows, rest = divmod(size, kind.itemsize * int(numpy.prod(shape[1:], dtype=int)))
            if rest:
                raise ValueError(f"{size} bytes are {rows} rows and {rest} bytes")
            shape = (rows, *shape[1:])
        return numpy.memmap(path, kind, "r", offset, shape)
    except ValueError as error:
        raise DataError(
            f"mapped({str(path)!r}) was given, which cannot be mapped: {error}. A file is .npy with numbers in it, or "
            "raw numbers of a dtype and shape; pickles run code and are not opened. Write numpy.save(path, array) of "
            "an array of numbers to make one."
        ) from error


def _columns(data: Any) -> Iterator[Any]:
    if type(data) is not tuple and type(data) is not dict:
        yield data
        return
    for column in data.values() if isinstance(data, dict) else data:
        yield from _columns(column)


def _has_rows(column: Any) -> bool:
    numbers = isinstance(column, torch.Tensor) or (_is_array(column) and column.dtype.kind in "biufc")
    return numbers and column.ndim > 0


def _is_array(data: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(data, numpy.ndarray)


def _runs_no_code(data: Any) -> bool:
    return type(data) in (list, tuple, range) or _is_array(data)


def _filled(stage: Items | Table) -> Elements:
    if len(stage) == 0:
        raise DataError(
            "source(...) was given data without elements; an epoch has at least one. Look at how it was loaded, and "
            "write source(data) of what is not empty."
        )
    return Elements(stage)


def _instead(data: Any) -> str:
    if isinstance(data, str | bytes):
        return "Write source(mapped(path)) of a file, or source(list(text))."
    if isinstance(data, DataLoader):
        return "Write source(loader.dataset), or give the loader itself to train."
    if isinstance(data, Sampler):
        return "Write source(dataset).shuffle(tnt.key(0)): pipelines order elements themselves."
    if isinstance(data, Mapping | torch.Tensor):
        return "Write source({'x': tensor, 'y': tensor}), each with a first dimension that counts elements."
    return "Write source(list(data)), or give a stream to train as it is: DataLoader(dataset, batch_size=32)."

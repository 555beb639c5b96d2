"""Where pipelines begin."""

import pickle
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset

import tnt_func as tnt
from tnt_func import pytree as trees
from tnt_func.data import Elements, mapped, source
from tnt_func.errors import DataError, UsageError, UsageTypeError

KEY = tnt.key(0)


class Squares(Dataset[Any]):
    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> Any:
        return index**2, torch.rand(())


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(range(3))


def given(elements: Elements, epoch: int = 0) -> list[Any]:
    return list(elements.batches(epoch))


def test_tensors_are_rows_and_rows_are_copies():
    x, y = torch.arange(6.0).reshape(3, 2), torch.arange(3)
    assert trees.equal(given(source((x, y))), [(x[i], y[i]) for i in range(3)])
    assert trees.equal(given(source({"x": x, "y": (y, y)})), [{"x": x[i], "y": (y[i], y[i])} for i in range(3)])
    assert trees.equal(given(source(TensorDataset(x, y)).batch(2)), [[x[:2], y[:2]], [x[2:], y[2:]]])
    before = x.clone()
    for row, _ in given(source((x, y))):
        row.zero_()
    for (batch,) in given(source((x,)).batch(3)):
        batch.zero_()
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", ["float32", "float64", "int16", "bool", "complex64"])
def test_arrays_are_rows_of_numpy_and_batches_of_torch(dtype: str):
    array = np.arange(6).astype(dtype)
    elements = source({"flat": array, "rows": array.reshape(6, 1)})
    first = given(elements)[1]
    assert type(first["flat"]) is array.dtype.type and type(first["rows"]) is np.ndarray
    assert trees.equal(given(elements.batch(6)), given(elements.map(lambda row: row, draws=()).batch(6)))
    assert given(elements.batch(6))[0]["flat"].numpy().dtype == dtype


def test_whatever_has_a_length_and_items_is_a_source():
    assert given(source([3, 1])) == [3, 1] and given(source((3, "a"))) == [3, "a"]
    assert given(source(range(10**12)).take(2)) == [0, 1] and given(source(np.array(["a", "b"]))) == ["a", "b"]
    assert trees.equal(given(source([torch.ones(2), torch.zeros(2)])), [torch.ones(2), torch.zeros(2)])


def test_a_dataset_draws_from_the_key():
    elements = source(Squares(), KEY, draws=("torch",))
    torch.manual_seed(1)
    first = given(elements)
    torch.manual_seed(2)
    assert trees.equal(given(elements), first) and not trees.equal(given(elements, 1), first)
    assert not trees.equal(given(source(Squares(), tnt.key(1))), first)
    assert [square for square, _ in first] == [0, 1, 4, 9, 16]


def test_a_hugging_face_dataset_is_read_in_bulk():
    datasets = pytest.importorskip("datasets", reason="needs the huggingface extra: datasets")
    rows = datasets.Dataset.from_dict({"text": ["a", "b", "c", "d"], "label": [0, 1, 0, 1]})
    elements = source(rows, draws=()).shuffle(KEY)
    order = [row["text"] for row in given(elements)]
    assert sorted(order) == ["a", "b", "c", "d"]
    batches = given(elements.batch(2))
    assert [text for batch in batches for text in batch["text"]] == order
    assert batches[0]["label"].dtype == torch.int64
    with pytest.raises(UsageError, match=r"source\(a Dataset\) was given no key; its items may draw.* draws=\(\)"):
        source(rows)


def test_mapped_files_are_rows(tmp_path: Path):
    array = np.arange(12, dtype="float32").reshape(4, 3)
    np.save(tmp_path / "a.npy", array)
    array.tofile(tmp_path / "a.raw")
    for file in (
        mapped(tmp_path / "a.npy"),
        mapped(str(tmp_path / "a.raw"), dtype="float32", shape=(-1, 3)),
        mapped(tmp_path / "a.raw", dtype=np.float32, shape=(4, 3)),
    ):
        assert isinstance(file, np.memmap) and not file.flags.writeable
        batches = given(source(file).batch(3))
        assert torch.equal(torch.cat(batches), torch.tensor(array))
        batches[0].zero_()  # a copy
        assert np.array_equal(file, array)
    assert np.array_equal(mapped(tmp_path / "a.raw", dtype="float32", shape=(3, 3), offset=12), array[1:])


def test_a_mapped_file_is_sent_by_its_name(tmp_path: Path):
    np.save(tmp_path / "big.npy", np.arange(10**6))
    elements = source({"x": mapped(tmp_path / "big.npy"), "y": np.arange(10**6)[::2].repeat(2)})
    small = source(mapped(tmp_path / "big.npy"))
    assert len(pickle.dumps(small)) < 2_000
    again = pickle.loads(pickle.dumps(elements))
    assert trees.equal(given(again.take(2).batch(2)), given(elements.take(2).batch(2)))


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(pickle.dumps([1, 2])),
        lambda path: np.save(path, np.array([{"a": 1}, None]), allow_pickle=True),
        lambda path: (np.savez(path.with_suffix(".npz"), a=np.ones(2)), path.with_suffix(".npz").rename(path)),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\x93NUMPY\x01\x00"),
    ],
    ids=["pickle", "objects", "npz", "empty", "cut short"],
)
def test_what_is_no_array_is_not_opened(write: Callable[[Path], Any], tmp_path: Path):
    path = tmp_path / "bad.npy"
    write(path)
    with pytest.raises(
        DataError, match="bad.npy'\\) was given, which cannot be mapped: .* pickles run code.* Write numpy"
    ):
        mapped(path)


def test_a_raw_file_says_what_it_holds(tmp_path: Path):
    (tmp_path / "raw").write_bytes(b"\0" * 10)
    with pytest.raises(DataError, match="10 bytes are 2 rows and 2 bytes"):
        mapped(tmp_path / "raw", dtype="int32", shape=(-1, 1))
    with pytest.raises(DataError, match="cannot be mapped"):
        mapped(tmp_path / "raw", dtype="int32", shape=(5,))
    with pytest.raises(DataError, match="Python objects"):
        mapped(tmp_path / "raw", dtype=object, shape=(1,))
    with pytest.raises(UsageError, match="a raw file says neither"):
        mapped(tmp_path / "raw", dtype="int32")


@pytest.mark.parametrize(
    ("data", "error", "said"),
    [
        (Stream(), UsageTypeError, r"source\(a Stream\) was given; a source has a length.* DataLoader\(dataset"),
        (iter([1]), UsageTypeError, r"source\(a list_iterator\) was given.* Write source\(list\(data\)\)"),
        (RandomSampler([1, 2]), UsageTypeError, "a RandomSampler.* pipelines order elements themselves"),
        (DataLoader(Squares()), UsageTypeError, r"a DataLoader.* Write source\(loader.dataset\), or give the loader"),
        ("train.npy", UsageTypeError, r"a str.* Write source\(mapped\(path\)\)"),
        ({"a": [1, 2]}, UsageTypeError, "a dict.* first dimension that counts elements"),
        (torch.tensor(1.0), UsageTypeError, "a Tensor.* first dimension"),
        (None, UsageTypeError, r"source\(None\)"),
        (Squares(), UsageError, r"source\(a Squares\) was given no key.* source\(dataset, tnt.key\(0\)\)"),
        ((torch.zeros(2), torch.zeros(3)), UsageError, r"columns of \[2, 3\] rows.* the same first dimension"),
        ([], DataError, "without elements; an epoch has at least one"),
        (torch.zeros(0, 2), DataError, "without elements"),
        ((), DataError, "without elements"),
    ],
    ids="stream iterator sampler loader path lists 0-d None dataset columns list tensor tuple".split(),
)
def test_what_is_no_source_is_told(data: Any, error: type[Exception], said: str):
    with pytest.raises(error, match=said):
        source(data)


def test_random_is_seeded_for_a_dataset():
    class Dice(Squares):
        def __getitem__(self, index: int) -> Any:
            return random.random(), np.random.rand()

    random.seed(0)
    first = given(source(Dice(), KEY))
    random.seed(1)
    assert given(source(Dice(), KEY)) == first and len(set(first)) == 5

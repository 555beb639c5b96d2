"""What restore gives, and what it refuses: other structures, damage, code, paths that lead elsewhere."""

import os
import pickle
import random
import shutil
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

import tnt_func as tnt
from tnt_func import pytree as trees
from tnt_func.checkpoint import inspect, restore, save
from tnt_func.checkpoint.manifest import SCHEMA, parse
from tnt_func.checkpoint.parts import Opaque
from tnt_func.errors import CheckpointError, StructureError, UsageError
from tnt_func.metrics import mean
from tnt_func.progress import Progress, RunProgress
from tnt_func.state import State, digest
from tnt_func.testing.snapshot import freeze

GOLDEN = Path(__file__).parent / "data" / "checkpoint_schema_1"
DIGEST = "56842bcc4a4512511aa3fac9cc69f9cf9155ebd092424ed40478440e6e1bc22d"
FILES = ("checkpoint.json", "tensors.safetensors")


def golden_state() -> State:
    """A state with a leaf of every kind. The version that made schema 1 saved it in GOLDEN; it loads for ever."""
    w = torch.arange(6.0).reshape(2, 3)
    dtypes = (torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool, torch.complex128)
    return State(
        params={"fc.weight": w, 'it\'s "quoted"/..\\é': w.t(), "trained": torch.nn.Parameter(torch.ones(2))},
        buffers={"empty": torch.zeros(0, 3), "scalar": torch.tensor(-0.0), **{str(d): w.to(d) for d in dtypes}},
        opt_state=(torch.tensor(float("nan")), [{"step": torch.tensor(7)}]),
        key=tnt.key(2**64 - 1),
        progress=RunProgress(Progress(1, 9, 2), Progress(2, 4, 0)),
        metrics={"train": {"loss": mean("loss").of({"loss": 0.5})}},
        memory={"plain": [None, True, 2**70, 0.1, -0.0, float("nan"), float("-inf"), "text\ud800"], "state": small()},
        stop="enough",
    )


def small(**memory: Any) -> State:
    return State(params={"w": torch.ones(2), "b": torch.zeros(1)}, key=tnt.key(1), memory=memory)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save(tmp_path / "saved", golden_state())
    return tmp_path / "saved"


def test_a_checkpoint_of_an_earlier_version_loads():
    like = golden_state().replace(key=tnt.key(0), stop=None, progress=RunProgress())
    assert trees.equal(restore(GOLDEN, like), golden_state())
    assert digest(restore(GOLDEN, like)) == DIGEST
    assert inspect(GOLDEN).schema == 1


def test_tensors_are_safetensors_for_every_reader(saved: Path):
    load_file = pytest.importorskip("safetensors.torch").load_file
    found = load_file(saved / FILES[1])
    assert torch.equal(found[".params['fc.weight']"], torch.arange(6.0).reshape(2, 3))
    assert set(found) == set(inspect(saved).layout.entries)


def test_no_two_restored_leaves_share_memory_and_strides_are_kept(saved: Path, tmp_path: Path):
    state = restore(saved, golden_state())
    assert state.params['it\'s "quoted"/..\\é'].stride() == (1, 3)
    big = torch.arange(2.0**19)
    save(tmp_path / "big", small().replace(params={"a": big, "b": big, "odd": torch.ones(2**19 + 1)}))
    params = restore(
        tmp_path / "big", small().replace(params={"a": big, "b": big, "odd": torch.ones(2**19 + 1)})
    ).params
    assert all(leaf.data_ptr() % 64 == 0 for leaf in params.values())
    params["a"].zero_()
    assert torch.equal(params["b"], big)
    assert torch.equal(restore(tmp_path / "big", small().replace(params=params)).params["a"], big)


@pytest.mark.parametrize(
    ("like", "words"),
    [
        (small().replace(params={"w": torch.ones(3), "b": torch.zeros(1)}), "state.params['w'] is float32[2] in the"),
        (small().replace(params={"w": torch.ones(2).double(), "b": torch.zeros(1)}), "float64[2] in `like`"),
        (small().replace(params={"w": torch.ones(2)}), "state.params['b'] is in the checkpoint alone"),
        (small().replace(params={**small().params, "c": 1}), "state.params['c'] is not in the checkpoint"),
        (small().replace(params=[torch.ones(2), torch.zeros(1)]), "state.params['b'] is in the checkpoint alone"),
        (small().replace(opt_state=()), "the containers of state.opt_state differ"),
        (small(ema=1.0), "the callback, unit transform or metric of that name is new. Write new_slots=True"),
        (small().replace(metrics={"train": {"loss": mean("x").empty()}}), "state.metrics['train']['loss'] is not in"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, like: State, words: str):
    save(tmp_path / "x", small())
    before = freeze(like)
    with pytest.raises(StructureError) as caught:
        restore(tmp_path / "x", like)
    assert words in str(caught.value) and freeze(like) == before


def test_new_slots_begin_afresh_and_unknown_ones_are_kept(tmp_path: Path):
    save(tmp_path / "x", small(old={"a": torch.ones(2), "n": float("nan")}))
    state = restore(tmp_path / "x", small(new=3), new_slots=True)
    assert state.memory["new"] == 3 and isinstance(state.memory["old"], Opaque)
    step: Any = lambda state, batch: (state.replace(params=state.params), {})  # noqa: E731
    state = tnt.train(tnt.TrainUnit(train_step=step), state, [1], max_epochs=1)
    save(tmp_path / "y", state)
    again = restore(
        tmp_path / "y", tnt.prepare(tnt.TrainUnit(train_step=step), small(old={"a": torch.zeros(2), "n": 0.0}))
    )
    assert trees.equal(again.memory["old"], {"a": torch.ones(2), "n": float("nan")})


def test_leaves_of_memory_and_metrics_are_as_the_checkpoint_has_them(tmp_path: Path):
    held = small(best=0.5, kept=torch.ones(2)).replace(metrics={"train": {"x": mean("x").of({"x": torch.ones(3)})}})
    save(tmp_path / "x", held)
    like = small(best=None, kept=None).replace(metrics={"train": {"x": mean("x").empty()}})
    assert trees.equal(restore(tmp_path / "x", like), held)


def test_some_leaves_for_fine_tuning(tmp_path: Path):
    save(tmp_path / "x", small().replace(params={"encoder.w": torch.ones(2), "head.w": torch.ones(3)}))
    like = small().replace(params={"encoder.w": torch.zeros(2), "head.w": torch.zeros(5)}, key=tnt.key(9))
    state = restore(tmp_path / "x", like, only=lambda path: path.startswith(".params['encoder"))
    assert torch.equal(state.params["encoder.w"], torch.ones(2)) and state.key == tnt.key(9)
    assert state.params["head.w"] is like.params["head.w"]
    with pytest.raises(StructureError, match=r"state.params\['head.w'\] is float32\[3\]"):
        restore(tmp_path / "x", like, only=lambda path: "head" in path)
    with pytest.raises(UsageError, match="chose none"):
        restore(tmp_path / "x", like, only=lambda path: False)


def test_placement(saved: Path):
    like = golden_state()
    assert restore(saved, like, device="meta").params["fc.weight"].is_meta
    shapes = trees.map(lambda leaf: leaf.to("meta") if isinstance(leaf, torch.Tensor) else leaf, like)
    assert trees.equal(restore(saved, shapes), like)


def damages(files: dict[str, bytes], count: int, choice: random.Random) -> Any:
    """Damaged copies of a checkpoint: flipped bits, changed and inserted bytes, holes, truncation."""
    for _ in range(count):
        name = choice.choice(FILES)
        data, at = bytearray(files[name]), choice.randrange(len(files[name]))
        match choice.choice(("bit", "byte", "cut", "hole", "insert", "append", "move")):
            case "bit":
                data[at] ^= 1 << choice.randrange(8)
            case "byte":
                data[at] ^= choice.randrange(1, 256)
            case "cut":
                del data[at:]
            case "hole":
                del data[at : at + 1 + choice.randrange(9)]
            case "insert":
                data.insert(at, choice.randrange(256))
            case "append":
                data += bytes([choice.randrange(256)])
            case _:
                data[at:] = data[at + 1 :] + data[at : at + 1]
        if bytes(data) != files[name]:
            yield name, bytes(data)


def test_every_damage_is_refused_and_named(saved: Path):
    files = {name: (saved / name).read_bytes() for name in FILES}
    like = golden_state()
    before, refused = freeze(like), 0
    for name, data in damages(files, 600, random.Random(0)):
        (saved / name).write_bytes(data)
        with pytest.raises(CheckpointError) as caught:
            restore(saved, like)
        assert name in str(caught.value)
        (saved / name).write_bytes(files[name])
        refused += 1
    assert refused > 500 and freeze(like) == before and trees.equal(restore(saved, like), like)


def test_every_byte_of_every_tensor_names_its_leaf(saved: Path):
    layout, data = inspect(saved).layout, (saved / FILES[1]).read_bytes()
    for name, entry in layout.entries.items():
        if entry.start == entry.end:
            continue
        at = layout.header + random.Random(0).randrange(entry.start, entry.end)
        (saved / FILES[1]).write_bytes(data[:at] + bytes([data[at] ^ 64]) + data[at + 1 :])
        with pytest.raises(CheckpointError) as caught:
            restore(saved, golden_state())
        assert f"state{name} in " in str(caught.value)


@pytest.mark.parametrize("name", FILES)
def test_missing_and_swapped_files_are_refused(saved: Path, tmp_path: Path, name: str):
    save(tmp_path / "other", golden_state().replace(params={k: v + 1 for k, v in golden_state().params.items()}))
    content = (saved / name).read_bytes()
    (saved / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        restore(saved, golden_state())
    shutil.copy(tmp_path / "other" / name, saved / name)
    with pytest.raises(CheckpointError, match=FILES[1]):
        restore(saved, golden_state())
    (saved / name).unlink()
    (saved / name).mkdir()
    with pytest.raises(CheckpointError, match="no plain file"):
        restore(saved, golden_state())
    (saved / name).rmdir()
    os.mkfifo(saved / name)
    with pytest.raises(CheckpointError, match="no plain file"):
        restore(saved, golden_state())
    (saved / name).unlink()
    (tmp_path / "elsewhere").write_bytes(content)
    (saved / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="cannot be opened"):
        restore(saved, golden_state())


class Exploding:
    def __reduce__(self) -> Any:
        return os.mkdir, ("exploded",)


def test_no_pickle_is_ever_executed(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    bomb = pickle.dumps(Exploding())
    (saved / "data.pkl").write_bytes(bomb)
    assert trees.equal(restore(saved, golden_state()), golden_state())
    for name in FILES:
        content = (saved / name).read_bytes()
        for planted in (bomb, content[: len(content) // 2] + bomb, bomb + content[len(bomb) :]):
            (saved / name).write_bytes(planted)
            with pytest.raises(CheckpointError):
                restore(saved, golden_state())
        (saved / name).write_bytes(content)
    assert not Path("exploded").exists()
    pickle.loads(bomb)
    assert Path("exploded").exists(), "the bomb is one"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"bytes": [0, ', '"bytes": [-8, '),
        ('"bytes": [0, ', '"bytes": [64, '),
        ('"shape": [2, 3]', '"shape": [2, 3000000]'),
        ('"dtype": "float32"', '"dtype": "load"'),
        ('"stride": [1, 3]', '"stride": [1, 300000000]'),
        ('"Key"', '"State"'),
        (".memory['plain']", ".memory[__import__('os')]"),
        ('{"int":', '{"eval":'),
        ('"schema": 1', '"schema": 0'),
        ('"values": {', '"values": 3, "v": {'),
        ('"stop": "enough"', f'"stop": {"[" * 5000}{"]" * 5000}'),
    ],
)
def test_a_forged_manifest_leads_nowhere(saved: Path, old: str, new: str):
    """Whoever can write a checksum can still not make it read past a tensor, make a class or run code."""
    body = (saved / FILES[0]).read_text().partition(",\n")[2]
    assert old in body
    forged = body.replace(old, new)
    (saved / FILES[0]).write_text(f'{{"crc32": "{zlib.crc32(forged.encode()):08x}",\n{forged}')
    with pytest.raises(CheckpointError, match="no manifest of a checkpoint"):
        inspect(saved)


def test_a_later_schema_says_which_version_wrote_it(saved: Path):
    body = (saved / FILES[0]).read_text().partition(",\n")[2].replace('"schema": 1', '"schema": 2')
    with pytest.raises(CheckpointError, match=f"schema 2; this version reads schemas up to {SCHEMA}"):
        parse(f'{{"crc32": "{zlib.crc32(body.encode()):08x}",\n{body}'.encode(), "it")

"""Worlds of one, two and four real processes do what one process does; what goes wrong on one ends all."""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_runs import apart, events, prepared
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

import tnt_func as tnt

RUNS = Path(__file__).with_name("distributed_runs.py")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")
Found = list[dict[str, Any]]


def launched(*command: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(RUNS.parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **environment}
    return subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module", params=(1, 2, 4))
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a world has written; a world of one is started without torchrun."""
    size, directory = request.param, tmp_path_factory.mktemp("world")
    start = (sys.executable,) if size == 1 else (*TORCHRUN, "--nproc-per-node", size)
    done = launched(*start, RUNS, "checks", directory)
    assert done.returncode == 0, done.stderr
    return directory


@pytest.fixture(scope="module")
def found(directory: Path) -> Found:
    """What every rank of a world found."""
    return [json.loads(path.read_text()) for path in sorted(directory.glob("rank-*.json"))]


def same(found: Found, name: str) -> Any:
    """What all ranks agree on."""
    values = [each[name] for each in found]
    assert all(value == values[0] for value in values), f"{name}: {values}"
    return values[0]


def test_every_event_has_the_state_of_one_process_on_every_rank(found: Found):
    assert same(found, "apart") <= 1e-10
    assert same(found, "order")
    same(found, "digest")
    if len(found) == 1:
        assert same(found, "digest") == same(found, "digest alone")
    else:
        assert min(each["apart unsynchronised"] for each in found) > 1e-3


def test_parameters_in_parts_make_the_same_run(found: Found):
    """Cut in rows and columns; where there are four ranks, over two, and the same on the other two."""
    assert same(found, "parts apart") <= 1e-10
    assert same(found, "parts layouts") == 1
    same(found, "parts digest")
    assert same(found, "parts back")
    held = [each["parts held"] for each in found]
    assert held == [1] if len(found) == 1 else max(held) < 0.75


def test_samples_come_in_one_order_whatever_the_size_of_the_world(found: Found):
    steps = zip(*(each["seen"] for each in found), strict=True)
    assert [[*itertools.chain(*parts)] for parts in steps] == same(found, "seen alone")


def test_metrics_of_rows_may_be_merged_by_their_monoid(found: Found):
    assert same(found, "merged") == 0
    assert not {"output", "targets"} & {*same(found, "merged has no rows")}


def test_buffers_that_change_are_averaged_or_refused(found: Found):
    same(found, "buffers")
    assert same(found, "buffers moved") > 0
    assert "state.buffers['layers.1.running_mean']" in same(found, "buffers refused")
    assert 'buffers="mean"' in same(found, "buffers refused")


def test_predictions_are_joined(found: Found):
    assert same(found, "predictions")


def test_a_rank_without_weight_counts_for_nothing_and_a_parameter_of_one_rank_is_trained_on_all(found: Found):
    size = len(found)
    batches = {rank: rank + 1.0 for rank in range(size) if rank > 0 or size == 1}
    every = sum(x if rank == size - 1 else 2 * x for rank, x in batches.items()) / len(batches)
    own = size / len(batches)
    expected = {"all": 1 - every - 0.5, "own": 1 - own - 0.5, "idle": 1.0}
    assert same(found, "params") == pytest.approx(expected, rel=1e-12)
    assert same(found, "loss") == pytest.approx(sum(2 * x for x in batches.values()) / len(batches), rel=1e-12)


def test_dropout_is_of_the_rank_and_states_stay_the_same(found: Found):
    same(found, "dropout")
    assert len({tuple(each["drawn"]) for each in found}) == len(found)


def test_a_signal_to_one_rank_pauses_all_at_one_step_from_which_they_go_on(found: Found):
    assert [each["signalled"] for each in found] == [False] * (len(found) - 1) + [True]
    assert same(found, "paused") == 11
    assert same(found, "kept") == ["step-000000000008-epoch-000001", "step-000000000011-epoch-000001"]
    assert same(found, "resumed")
    assert same(found, "ended") == same(found, "parts digest")


def test_what_many_ranks_have_saved_goes_on_in_one_process(directory: Path):
    (saved, *parts) = sorted((directory / "checkpoints").iterdir(), reverse=True)
    unit, like = prepared()
    resumed, whole = (events(unit, state, lambda data: data) for state in (tnt.distributed.restore(saved, like), like))
    assert parts and apart(resumed[-1].state, whole[-1].state) <= 1e-10


def test_checkpoints_are_the_same_in_every_layout_and_refused_when_damaged(found: Found):
    assert same(found, "checkpoints") == same(found, "left over") == []
    assert found[0]["save refused"].startswith("UsageError: ") and "a path that exists" in found[0]["save refused"]
    assert all("rank 0 could not save" in each["save refused"] for each in found[1:])
    if len(found) > 1:
        assert "damaged: its checksum differs" in found[-1]["damaged"]
        assert found[0]["damaged"] == "nothing was refused"
        assert all("damaged: its checksum differs" in each["damaged for others"] for each in found)


def test_replicas_are_those_of_the_first_rank(found: Found):
    same(found, "replicated")
    assert same(found, "replicated is the first")
    for each in found[1:]:
        assert each["replicate refused"].startswith("StructureError: replicate was given states that differ: ")
    if len(found) > 1:
        assert f"state.memory['more'] is int on rank {len(found) - 1}" in found[-1]["replicate refused"]


def test_ranks_that_part_are_told_where_each_is(found: Found):
    if len(found) == 1:
        assert same(found, "uneven") == same(found, "entries") == "nothing was refused"
        return
    assert "rank 0 at train epoch end 3, with 0 numbers; rank 1 at train step 3" in same(found, "uneven")
    assert "rank 0 at train step 0, with 4 numbers; rank 1 at train step 0, with 5" in same(found, "entries")


def test_after_a_kill_a_run_ends_as_ever_and_the_first_error_is_shown(tmp_path: Path):
    done = launched(*TORCHRUN, "--nproc-per-node", 2, "--max-restarts", 1, RUNS, "faults", tmp_path)
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert 1 <= same(ranks, "start") <= 13 and same(ranks, "ended") == same(ranks, "unbroken")
    assert done.returncode == 1
    (root,) = re.findall(r"Root Cause \(first observed failure\):\n(.*)", done.stderr, re.DOTALL)
    assert "rank      : 1" in root and "ValueError: the disk of rank 1 is full" in root


def test_a_rank_that_never_joins_is_named():
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    script = "import tnt_func as tnt; tnt.distributed.init(device='cpu', timeout=5)"
    environment = {"RANK": "1", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    done = launched(sys.executable, "-c", script, **environment)
    assert "RankError: rank 1 has waited 5 seconds, and of 3 ranks not all have joined: 0, 2 missing" in done.stderr, (
        done.stderr
    )


def test_a_world_is_joined_once_and_left():
    with tnt.distributed.init(device="cpu") as world:
        assert world == tnt.distributed.World(0, 1, 0, torch.device("cpu"))
        with pytest.raises(tnt.errors.UsageError, match="joined already"):
            tnt.distributed.init()
    assert not torch.distributed.is_initialized()
    with pytest.raises(tnt.errors.UsageError, match="local rank 0, and the machine has 1"):
        tnt.distributed.init(device="tpu")


def test_what_cannot_be_shared_is_refused():
    step = tnt.minimize(lambda params, state, batch: (params.sum(), (state.buffers, batch)), tnt.optim.sgd(0.1))
    unit, w = tnt.TrainUnit(train_step=step), torch.ones(2)
    state = tnt.State(params=w, key=tnt.key(0), opt_state=tnt.optim.sgd(0.1).init(w))
    with tnt.distributed.init(device="cpu") as world:
        mesh = tnt.distributed.mesh(world)
        parallel = tnt.distributed.data_parallel(unit, mesh)
        for output, said in [({}, "given the output \\[\\]; it weighs"), (3, "the output an int; it weighs")]:
            with pytest.raises(tnt.errors.ContractError, match=said):
                tnt.step(parallel, state, output)
        with pytest.raises(tnt.errors.ContractError, match="'count': int 3; .*write summed=\\['count'\\]"):
            tnt.step(parallel, state, {"num_samples": 1, "count": 3})
        with pytest.raises(tnt.errors.UsageError, match="merged=\\['auroc'\\], which no part of the unit has"):
            tnt.distributed.data_parallel(unit, mesh, merged=["auroc"])
        with pytest.raises(tnt.errors.UsageError, match="cuts params, float32\\[2\\], in dimension 1; it has 1"):
            tnt.distributed.shard(state, mesh, lambda path: 1)
        with pytest.raises(tnt.errors.UsageError, match="lies in parts|ranks hold parts"):
            tnt.distributed.replicate(tnt.distributed.shard(state, mesh), mesh)
        with pytest.raises(tnt.errors.UsageError, match="made by|makes"):
            tnt.distributed.data_parallel(tnt.TrainUnit(train_step=lambda state, batch: (state, {})), mesh)
        with pytest.raises(tnt.errors.UsageError, match="ranks=3.* for 1 processes"):
            tnt.distributed.mesh(world, ranks=3)

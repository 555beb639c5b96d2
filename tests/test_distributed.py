"""Worlds of one, two and four real processes do what one process does, and go on with what another world has saved."""

import fcntl
import itertools
import json
import os
from typing import Any

import pytest
import torch
from distributed_runs import LAYOUTS, NOTHING
from distributed_worlds import Found, process, same

import tnt_func as tnt

SIZES = tuple(LAYOUTS)


@pytest.fixture(scope="session")
def everything(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What all worlds have found; made once, also where several processes share the tests."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with open(base / "distributed.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        where = base / "distributed"
        if not (where / "found.json").exists():
            where.mkdir()
            done = process("distributed_resumptions.py", where, os.urandom(2)[0])
            assert done.returncode == 0, f"{done.args}\n{done.stderr}"
    return json.loads((where / "found.json").read_text())


@pytest.fixture(params=SIZES)
def found(request: pytest.FixtureRequest, everything: dict[str, Any]) -> Found:
    """What every rank of a world found."""
    return everything["worlds"][str(request.param)]


LAID = [(size, layout) for size, layouts in LAYOUTS.items() for layout in layouts]


@pytest.mark.parametrize(("size", "layout"), LAID)
def test_thirty_steps_are_those_of_one_process_however_the_state_lies(
    size: int, layout: str, everything: dict[str, Any]
):
    """Micro-batches, clipping, accumulation, a schedule, an average, uneven batches; every event on every rank."""
    ranks: Found = [each[layout] for each in everything["worlds"][str(size)]]
    assert same(ranks, "apart") <= 1e-10
    assert same(ranks, "order")
    assert same(ranks, "back")
    assert same(ranks, "placements") == 1
    same(ranks, "digest")
    held = [each["held"] for each in ranks]
    assert held == [1] * size if layout == "replicated" or size == 1 else max(held) < 0.75


@pytest.mark.parametrize(("size", "layout"), LAID)
def test_samples_come_in_one_order_whatever_the_size_of_the_world(size: int, layout: str, everything: dict[str, Any]):
    ranks: Found = everything["worlds"][str(size)]
    steps = zip(*(each[layout]["seen"] for each in ranks), strict=True)
    assert [[*itertools.chain(*parts)] for parts in steps] == same(ranks, "seen alone")


def test_what_is_not_the_run_of_one_process_is_seen(found: Found):
    """Ranks that share nothing, or weigh uneven parts alike; a rank that strays by a rounding."""
    assert sum(norm > 0.3 for norm in same(found, "norms")) > 20, "too little is clipped to tell"
    if len(found) == 1:
        assert found[0]["replicated"]["digest"] == found[0]["digest alone"]
        return
    assert min(each["apart unsynchronised"] for each in found) > 1e-3
    assert same(found, "apart unweighted") > 1e-6
    assert max(each["apart strayed"] for each in found) <= 1e-10
    strayed = [each["digest strayed"] for each in found]
    assert strayed[-1] not in strayed[:-1] and len(set(strayed[:-1])) == 1


@pytest.mark.parametrize("size", SIZES)
def test_a_run_goes_on_in_another_world_and_layout_from_any_step(size: int, everything: dict[str, Any]):
    """Bitwise where both are the same; what one process has saved, and in one process, is among them."""
    ends, ranks = everything["ends"], everything["resumed"][str(size)]
    assert all(rank == ranks[0] for rank in ranks)
    pairs = {(*name.split(" ")[0].split("-")[:2], name.split(" ")[1]) for name in ranks[0]}
    assert {(n, layout) for n, layout, _ in pairs} == {(n, each) for n, rank in ends.items() for each in rank[0]}
    for name, (gap, digest) in ranks[0].items():
        assert gap <= 1e-10, name
        if name.startswith(f"{size}-") and digest:
            assert digest == same(ends[str(size)], name.split("-")[1]), name


def test_what_a_unit_reads_of_its_process_is_named(found: Found):
    assert same(found, "sound") == []
    looking = {name: [each["looking"][name] for each in found] for name in found[0]["looking"]}
    if len(found) == 1:
        assert {*itertools.chain(*looking.values())} == {NOTHING}
        return
    others = "rank 1 differs" if len(found) == 2 else "ranks 1, 3 differ"
    said = {
        "generator": "rank 1 differs from rank 0, and train_step is where it begins\n  state.params['w']: 2 of 2 ",
        "clock": "rank 1 differs from rank 0, and train_step is where it begins",
        "environment": f"at train step_end (epoch 0, step 3): {others} from rank 0, and train_step is where it begins",
        "group": "callback 'odd' on_eval_epoch_end is where it begins\n  state.memory['odd']: int 0 became int 1",
        "error": "on rank 1, and not on rank 0: ValueError: rank 1 has had enough",
        "stop": "callback 'full' on_train_epoch_end is where it begins\n  state.stop: str 'None' became",
        "data": "at train fetched (epoch 1, step 2): rank 1 differs from rank 0, and the train data is where it begins",
        "keys": "the state that it is given is where it begins\n  state.memory['a']: state.memory['b'] is in its place",
    }
    for name, texts in looking.items():
        assert texts[0].startswith("LawError: law 2 (determinism) is broken ") and said[name] in texts[0], texts[0]
        assert name == "error" or len({*texts}) == 1
    assert same(found, "own") == NOTHING
    assert "the train data is where it begins" in same(found, "own as shared")
    if len(found) == 2:
        assert looking.keys() == said.keys()
        (sound, alone), (_, own) = (each["all laws"] for each in found)
        assert sound == NOTHING and own.startswith("LawError: law 1 (purity) is broken at train step (epoch 0, step 0)")
        assert alone == own + "\nSo it is on rank 1, and not on rank 0."


def test_metrics_of_rows_may_be_merged_by_their_monoid(found: Found):
    assert same(found, "merged") <= 1e-10
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
    # Summed in the order of the leaves, gradients would change places in silence.
    said = "rank 1 has other parameters or outputs than rank 0, or has them in another order; here they are"
    assert size == 1 or all(each["turned refused"].startswith(f"RankError: {said}") for each in found)


def test_dropout_is_of_the_rank_and_states_stay_the_same(found: Found):
    same(found, "dropout")
    assert len({tuple(each["drawn"]) for each in found}) == len(found)


def test_a_signal_to_one_rank_pauses_all_at_one_step_which_all_have_saved(found: Found):
    assert [each["signalled"] for each in found] == [False] * (len(found) - 1) + [True]
    assert same(found, "paused") == 11
    assert same(found, "kept") == ["step-000000000008-epoch-000001", "step-000000000011-epoch-000001"]
    assert same(found, "resumed")


def test_checkpoints_are_the_same_in_every_layout_and_refused_when_damaged(found: Found):
    assert same(found, "checkpoints") == same(found, "left over") == []
    assert found[0]["save refused"].startswith("UsageError: ") and "a path that exists" in found[0]["save refused"]
    assert all("rank 0 could not save" in each["save refused"] for each in found[1:])
    if len(found) > 1:
        assert "damaged: its checksum differs" in found[-1]["damaged"]
        assert found[0]["damaged"] == "nothing was refused"
        assert all("damaged: its checksum differs" in each["damaged for others"] for each in found)


def test_replicas_are_those_of_the_first_rank(found: Found):
    same(found, "replicas")
    assert same(found, "replicas are the first")
    for each in found[1:]:
        assert each["replicate refused"].startswith("StructureError: replicate was given states that differ: ")
    if len(found) > 1:
        assert "on rank 0: a dict was filled in another order" in found[-1]["replicas turned"]
        assert f"state.memory['more'] is int on rank {len(found) - 1}" in found[-1]["replicate refused"]


def test_a_log_belongs_to_one_rank(found: Found):
    for name in ("log run.jsonl", "log run.csv"):
        texts = [each[name] for each in found]
        assert sorted(text == NOTHING for text in texts) == [False] * (len(found) - 1) + [True]
        assert all("is being written by another process" in text for text in texts if text != NOTHING)
    assert same(found, "log rank-r.jsonl") == NOTHING


def test_ranks_that_part_are_told_where_each_is(found: Found):
    if len(found) == 1:
        assert same(found, "uneven") == same(found, "entries") == "nothing was refused"
        return
    assert "rank 0 at train epoch end 3, with 0 numbers; rank 1 at train step 3" in same(found, "uneven")
    assert "rank 0 at train step 0, with 5 numbers; rank 1 at train step 0, with 6" in same(found, "entries")


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
        saving = tnt.observers.every(tnt.distributed.checkpointer("runs", mesh), steps=2)
        with pytest.raises(tnt.errors.UsageError, match="given a part of the events"):
            tnt.train(unit, state, [1], max_epochs=1, observers=[saving])
        with pytest.raises(tnt.errors.UsageError, match="lies in parts|ranks hold parts"):
            tnt.distributed.replicate(tnt.distributed.shard(state, mesh), mesh)
        with pytest.raises(tnt.errors.UsageError, match="made by|makes"):
            tnt.distributed.data_parallel(tnt.TrainUnit(train_step=lambda state, batch: (state, {})), mesh)
        with pytest.raises(tnt.errors.UsageError, match="ranks=3.* for 1 processes"):
            tnt.distributed.mesh(world, ranks=3)

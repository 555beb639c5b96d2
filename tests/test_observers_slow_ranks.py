"""The rank that the others wait for is named, on real processes; and nobody else."""

import itertools
import multiprocessing
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import tnt_func as tnt
from tnt_func.errors import UsageError
from tnt_func.observers import warn_on_slow_rank

RANKS = 2


def run(rank: int, at: Path, slow: int | None, told: Any) -> None:
    """Twelve steps by a clock that goes three times as fast on a slow rank while its data is fetched."""
    dist.init_process_group("gloo", init_method=f"file://{at}", rank=rank, world_size=RANKS)
    now = itertools.count(0.0)

    def clock() -> float:
        return next(now)

    def data(epoch: int) -> Any:
        for batch in range(12):
            for _ in range(20 * (rank == slow)):
                clock()
            yield batch

    unit = tnt.TrainUnit(train_step=lambda state, batch: (state, {}))
    watching = warn_on_slow_rank(every_n_steps=4, share=0.5, clock=clock)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tnt.train(unit, tnt.State(params=0, key=tnt.key(0)), data, max_epochs=1, observers=[watching])
    told.put((rank, [str(warning.message) for warning in caught]))
    dist.destroy_process_group()


@pytest.mark.parametrize("slow", [None, 1])
def test_the_slow_rank_is_named_by_rank_0(tmp_path: Path, slow: int | None):
    context = multiprocessing.get_context("fork")
    told = context.Queue()
    ranks = [context.Process(target=run, args=(rank, tmp_path / "store", slow, told)) for rank in range(RANKS)]
    for process in ranks:
        process.start()
    said = dict(told.get(timeout=600) for _ in ranks)
    for process in ranks:
        process.join()
    assert said[1] == []
    assert len(said[0]) == (0 if slow is None else 2)  # At steps 8 and 12; what came before 4 is not judged.
    assert all(message.startswith("rank 1 holds the others up: of the ") for message in said[0])
    assert all("% of that was waiting for data" in message for message in said[0])


def test_alone_it_is_silent():
    unit = tnt.TrainUnit(train_step=lambda state, batch: (state, {}))
    first = tnt.State(params=torch.zeros(()), key=tnt.key(0))
    with warnings.catch_warnings(record=True) as caught:
        tnt.train(unit, first, [1] * 4, max_epochs=1, observers=[warn_on_slow_rank(every_n_steps=1)])
    assert caught == []


@pytest.mark.parametrize("given", [{"every_n_steps": 0}, {"share": 0}, {"share": 1}])
def test_arguments_that_cannot_work(given: Any):
    with pytest.raises(UsageError, match="Write every_n_steps=100, share=0.1"):
        warn_on_slow_rank(**given)

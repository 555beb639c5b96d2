import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tnt_func as tnt
from tnt_func import optim
from tnt_func.ensembles import Table
from tnt_func.errors import UsageError, UsageTypeError

GRID = {"lr": [0.1, 0.5, 1.0], "weight_decay": [0.0, 0.3]}


def made(seed: int = 0, lr: Any = 0.1) -> tuple[tnt.FitUnit, tnt.State]:
    torch.manual_seed(seed)
    return tnt.supervised(nn.Linear(3, 2).double(), F.cross_entropy, optim.sgd(lr), key=tnt.key(0))


def data() -> list[Any]:
    noise = torch.Generator().manual_seed(0)
    return [(torch.randn(6, 3, generator=noise, dtype=torch.float64), torch.arange(6) % 2) for _ in range(2)]


def test_every_point_is_the_run_with_its_hyperparameters():
    unit, state = made()
    grid = tnt.sweep(unit, GRID)
    end = tnt.fit(grid.unit, grid.start(state), data(), data(), max_epochs=2)
    table = grid.table(end)
    assert len(table) == 6 and list(table.columns) == ["lr", "weight_decay", "loss"]
    for index, (point, row) in enumerate(zip(grid.points, table, strict=True)):
        first = state.replace(opt_state=optim.set_hyperparameters(state.opt_state, **point))
        alone = tnt.fit(unit, first, data(), data(), max_epochs=2)
        tnt.asserts.assert_trees_close(tnt.member(end, index).params, alone.params, rtol=0, atol=1e-12)
        assert row == {**point, "loss": pytest.approx(tnt.metrics.compute(alone, "eval")["loss"].item(), abs=1e-12)}
    assert table.grid("loss").shape == (3, 2) and table.grid("loss")[2, 1] == table.columns["loss"][5]
    assert grid.table(end, "train").columns["loss"] != table.columns["loss"]


def test_seeds_at_each_point_give_mean_and_deviation():
    unit, _ = made()
    states = [made(seed)[1] for seed in range(3)]
    grid = tnt.sweep(unit, {"lr": [0.1, 0.5]}, seeds=3)
    end = tnt.fit(grid.unit, grid.start(*states), data(), data(), max_epochs=1)
    losses = tnt.metrics.compute(end, "eval")["loss"].reshape(2, 3)
    table = grid.table(end)
    assert table.columns["loss"] == pytest.approx(losses.mean(1).tolist())
    assert table.columns["loss.std"] == pytest.approx(losses.std(1).tolist())
    assert optim.get(end.opt_state, "lr").tolist() == [0.1] * 3 + [0.5] * 3


def test_a_tuple_of_numbers_is_one_value():
    unit, state = tnt.supervised(nn.Linear(3, 2), F.cross_entropy, optim.adamw(0.1), key=tnt.key(0))
    grid = tnt.sweep(unit, {"betas": [(0.9, 0.99), (0.5, 0.9)]})
    first, second = optim.get(grid.start(state).opt_state, "betas")
    assert (first.tolist(), second.tolist()) == ([0.9, 0.5], [0.99, 0.9])


def test_the_best_row_is_never_nan():
    table = Table({"lr": (1, 2, 3)}, {"lr": [1, 2, 3], "loss": [math.nan, 0.25, 0.5]})
    assert table.best("loss")["lr"] == 2 and table.best("loss", "max")["lr"] == 3
    assert str(table) == "lr  loss\n 1   nan\n 2  0.25\n 3   0.5"
    assert table.to_pandas().loss[2] == 0.5
    with pytest.raises(UsageTypeError, match="mode='minimum'"):
        table.best("loss", "minimum")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match="all 1 are NaN"):
        Table({"lr": (1,)}, {"lr": [1], "loss": [math.nan]}).best("loss")


def trained_only(unit: tnt.FitUnit, state: tnt.State) -> Table:
    grid = tnt.sweep(unit.train_unit, GRID)
    return grid.table(tnt.train(grid.unit, grid.start(state), data(), max_epochs=1))


WRONG: dict[str, Callable[[], Any]] = {
    "every axis has a value": lambda: tnt.sweep(made()[0], {}),
    "given {'lr': \\[\\]}": lambda: tnt.sweep(made()[0], {"lr": []}),
    "given 2 states, and the sweep has seeds=1": lambda: tnt.sweep(made()[0], GRID).start(made()[1], made()[1]),
    "hyper-parameters are \\['lr', 'weight_decay'\\]": lambda: tnt.sweep(made()[0], {"beta": [1]}).start(made()[1]),
    "follows the schedule": lambda: tnt.sweep(made()[0], GRID).start(made(lr=lambda step: 0.1)[1]),
    "without metrics of the phase 'eval'; it has those of \\['train'\\]": lambda: trained_only(*made()),
    "of 1 members; the sweep has 6 points": lambda: tnt.sweep(made()[0], GRID).table(tnt.stack([made()[1]])),
    "'accuracy' was asked": lambda: Table({}, {"loss": [1.0]}).grid("accuracy"),
}


@pytest.mark.parametrize("words", WRONG)
def test_what_cannot_be_swept_is_refused(words: str):
    with pytest.raises(UsageError, match=words):
        WRONG[words]()

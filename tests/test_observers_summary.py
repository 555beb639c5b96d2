"""Parameters, bytes and FLOPs of modules against those on paper, and that nothing of the module is touched."""

import copy

import pytest
import torch
from torch import nn

import tnt_func as tnt
from tnt_func.errors import UsageError
from tnt_func.observers import module_summary


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout()), nn.Linear(8, 2).requires_grad_(False)
    )


def test_the_parts_are_told_with_all_that_is_in_them():
    summary = module_summary(net(), torch.ones(3, 4), backward=True)
    found = {row.name: row[2:] for row in summary.rows}
    norm = 16 * 4 + 16 * 4 + 8  # Weight and bias; averages; an int64 count.
    first, second = 2 * 3 * 4 * 8, 2 * 3 * 8 * 2
    # The frozen layer has a gradient for its input alone, the first one for its weight alone.
    assert found == {
        "": (40 + 16 + 18, 40 + 16, 160 + norm + 72, first + second, first + second),
        "0": (56, 56, 160 + norm, first, first),
        "0.0": (40, 40, 160, first, first),
        "0.1": (16, 16, norm, 0, 0),
        "0.2": (0, 0, 0, 0, 0),
        "1": (18, 0, 72, second, second),
    }


def test_the_table_has_the_levels_that_are_asked_for():
    assert str(module_summary(net(), depth=1)).splitlines() == [
        "module  type        parameters  trainable  bytes",
        "(all)   Sequential          74         56    368",
        "  0     Sequential          56         56    296",
        "  1     Linear              18          0     72",
    ]
    assert (
        repr(module_summary(net(), torch.ones(3, 4)))
        == "ModuleSummary(Sequential, 74 parameters, 56 trainable, 368 bytes, 288 forward FLOPs, 6 modules)"
    )


def test_what_is_shared_counts_once():
    linear = nn.Linear(4, 4)
    shared = nn.ModuleDict({"a": nn.Sequential(linear), "b": nn.Sequential(linear)})
    tied = nn.Sequential(shared["a"], shared["b"])
    rows = {row.name: row for row in module_summary(tied, torch.ones(3, 4)).rows}
    assert rows[""].parameters == 20 and rows["1"].parameters == 20
    assert rows[""].forward_flops == rows["0.0"].forward_flops == 2 * (2 * 3 * 4 * 4)


def test_neither_the_module_nor_a_generator_is_touched():
    module, generator = net(), torch.get_rng_state()
    before = copy.deepcopy(module.state_dict())
    module_summary(module, torch.ones(3, 4), backward=True)
    assert tnt.pytree.equal(dict(module.state_dict()), dict(before)) and torch.equal(torch.get_rng_state(), generator)
    assert all(parameter.grad is None for parameter in module.parameters()) and module.training


class Scaled(nn.Module):
    def forward(self, x: torch.Tensor, *, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"out": x @ scale}


def test_keyword_inputs_and_outputs_of_any_kind():
    x, scale = torch.ones(3, 4), torch.ones(4, 2, requires_grad=True)
    (row,) = module_summary(Scaled(), x, keywords={"scale": scale}, backward=True).rows
    assert (row.parameters, row.forward_flops, row.backward_flops) == (0, 48, 48)


@pytest.mark.parametrize(
    ("module", "inputs", "said"),
    [
        (nn.LazyLinear(2), (torch.ones(3, 4),), "'weight' is not initialised; .* Call the module once before"),
        (nn.Linear(2, 2), (), r"no inputs; .* Write module_summary\(module, inputs, backward=True\)"),
        (nn.ReLU(), (torch.ones(2),), "depend on no parameter that is trained; .* Leave backward out"),
    ],
    ids=["lazy", "no inputs", "no gradient"],
)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_what_cannot_be_told_is_an_error(module: nn.Module, inputs: tuple[torch.Tensor, ...], said: str):
    with pytest.raises(UsageError, match=said):
        module_summary(module, *inputs, backward=True)

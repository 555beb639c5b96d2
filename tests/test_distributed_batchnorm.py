"""Nets with BatchNorm on one process and on four are the same run; what would make them another is refused."""

from typing import Any

import pytest
import torch
from distributed_worlds import Found, found_by, same
from torch import nn

import tnt_func as tnt


@pytest.fixture(scope="module", params=(1, 4))
def found(request: pytest.FixtureRequest) -> Found:
    """What every rank of a world found."""
    return found_by("distributed_batchnorm.py", request.param)


@pytest.mark.parametrize("kind", ["plain", "cumulative", "no averages", "rematerialised"])
def test_parts_are_trained_on_and_evaluated_as_the_whole_in_one_process(found: Found, kind: str):
    same(found, kind)
    assert found[0][kind]["apart"] <= (1e-10 if len(found) > 1 else 0)
    assert found[0]["rematerialised"] == found[0]["plain"]
    rows = [each["rows"] for each in found]
    assert len(found) == 1 or (rows[0] == [0, 0, 0, 0] and rows[3] == [5, 3, 2, 6])


def test_rows_that_weigh_nothing_are_normalised_with(found: Found):
    assert same(found, "masked") <= 1e-10


def test_derivatives_are_those_of_the_whole_the_second_too(found: Found):
    assert found[0]["twice"] <= 1e-11


def test_noise_does_not_depend_on_who_has_which_part(found: Found):
    assert all(same(found, "noise")) and len(found[0]["noise"]) == (3 if len(found) == 1 else 5)


def test_half_precision_has_averages_of_full_precision(found: Found):
    assert same(found, "half")[1:] == [True, ["torch.float32", "torch.int64"]]


def test_what_cannot_be_made_right_is_refused(found: Found):
    assert "given 0, a Own whose forward may be any" in same(found, "own")
    assert "a LazyBatchNorm1d whose ['weight', 'bias'] have no shape yet" in same(found, "lazy")
    assert "found by Microbatches; ranks normalise a batch together" in same(found, "micro-batches")
    assert same(found, "inside") == "nothing was refused"
    assert same(found, "single").startswith("ValueError: Expected more than 1 value per channel")
    if len(found) == 1:
        assert same(found, "outside") == same(found, "unconverted") == "nothing was refused"
        return
    assert "state.buffers['stem.1.running_mean'], which on rank 1 is not" in same(found, "unconverted")
    assert "outside of data_parallel" in same(found, "outside")


def test_ranks_of_which_one_has_fewer_batches_are_told(found: Found):
    for name, phase in (("uneven", "train"), ("uneven evaluation", "eval")):
        expected = f"rank 0 at {phase} epoch end 3, with 0 numbers; rank 1 at {phase} step 3"
        assert same(found, name) == "nothing was refused" if len(found) == 1 else expected in same(found, name)


def test_the_converted_module_has_the_tensors_and_hooks_of_the_other_and_one_layer_stays_one():
    norm = nn.BatchNorm2d(3, momentum=None)
    norm.register_forward_hook(_one_more)
    module = nn.Sequential(norm, nn.Sequential(norm), nn.BatchNorm1d(2).eval(), nn.InstanceNorm1d(2))
    x = torch.randn(4, 3, 2, 2)
    found: Any
    with tnt.distributed.init(device="cpu") as world:
        mesh = tnt.distributed.mesh(world)
        found = tnt.distributed.sync_batchnorm(module, mesh)
        assert found[0] is found[1][0] and type(module[0]) is nn.BatchNorm2d
        assert type(found[3]) is nn.InstanceNorm1d and not found[2].training
        assert tnt.digest({**found.state_dict()}) == tnt.digest(dict(module.state_dict()))
        assert torch.equal(found[1](x), module[1](x)) and torch.equal(found[1](x), module[1](x))
        assert tnt.digest({**found.state_dict()}) == tnt.digest(dict(module.state_dict()))
        again = tnt.distributed.sync_batchnorm(found[0], mesh)
        assert type(again) is type(found[0]) and again is not found[0]
        with pytest.raises(ValueError, match="expected 4D input"):
            found[0](x[0])


def _one_more(module: nn.Module, inputs: Any, output: Any) -> Any:
    return output + 1

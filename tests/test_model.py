"""A module as a pure function."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tnt_func import pytree
from tnt_func.errors import StructureError, UsageError, UsageTypeError
from tnt_func.model import from_module


class Tied(nn.Module):
    """Two inputs, one by keyword; the embedding is also the head; a dataclass out."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, *, shift: Tensor) -> "Scores":
        return Scores(self.head(self.embedding(tokens) + shift))


@dataclass
class Scores:
    scores: Tensor


def bits(module: nn.Module) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in (*module.parameters(), *module.buffers())]


def test_batch_norm_averages_are_returned_and_nothing_is_written():
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    model, before, x = from_module(module), bits(module), torch.randn(4, 2)
    given = pytree.map(torch.clone, (model.params, model.buffers))
    output, buffers = model.apply(model.params, model.buffers, x, train=True)
    assert pytree.equal(given, (model.params, model.buffers)) and pytree.equal(before, bits(module))
    expected = module(x)
    assert torch.equal(output, expected)
    assert pytree.equal(buffers, {name: buffer.clone() for name, buffer in module.named_buffers()})


def test_evaluation_returns_the_very_buffers():
    module = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.9))
    model, x = from_module(module), torch.randn(4, 3)
    output, buffers = model.apply(model.params, model.buffers, x, train=False)
    assert buffers is model.buffers and torch.equal(output, module.eval()(x))


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_users_module_is_left_alone(training: bool):
    module = nn.Sequential(nn.Dropout(0.5)).train(training)
    model = from_module(module)
    x = torch.ones(100)
    assert not torch.equal(model.apply({}, {}, x, train=True)[0], x)
    assert torch.equal(model.apply({}, {}, x, train=False)[0], x)
    assert [part.training for part in module.modules()] == [training, training]


def test_a_submodule_put_in_eval_mode_stays_so():
    module = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    module[0].eval()
    model = from_module(module)
    _, buffers = model.apply(model.params, model.buffers, torch.randn(4, 2), train=True)
    changed = {name for name, buffer in buffers.items() if not torch.equal(buffer, model.buffers[name])}
    assert changed == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}


def test_tied_weights_are_one_entry_and_stay_tied():
    module = Tied()
    model = from_module(module)
    assert list(model.params) == ["embedding.weight"]
    tokens, shift = torch.tensor([1, 4]), torch.randn(3)
    assert torch.equal(
        model.apply(model.params, model.buffers, tokens, train=True, shift=shift)[0].scores,
        module(tokens, shift=shift).scores,
    )
    doubled = pytree.map(lambda leaf: leaf * 2, model.params)
    module.embedding.weight.data.mul_(2)
    assert torch.equal(
        model.apply(doubled, {}, tokens, train=False, shift=shift)[0].scores, module(tokens, shift=shift).scores
    )


def test_frozen_parameters_are_buffers():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    module[0].requires_grad_(False)
    by_flag = from_module(module)
    by_name = from_module(module, trainable=lambda name, parameter: name == "1.bias")
    assert sorted(by_flag.params) == ["1.bias", "1.weight"] and sorted(by_flag.buffers) == ["0.bias", "0.weight"]
    assert list(by_name.params) == ["1.bias"]
    x = torch.randn(3, 2)
    for model in (by_flag, by_name):
        output, buffers = model.apply(model.params, model.buffers, x, train=True)
        assert torch.equal(output, module(x)) and buffers is model.buffers


def test_a_buffer_that_forward_reassigns_is_returned():
    class Counting(nn.Module):
        count: Tensor

        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.tensor(0))

        def forward(self, x: Tensor) -> Tensor:
            self.count = self.count + 1
            return x

    model = from_module(Counting())
    _, buffers = model.apply({}, model.buffers, torch.ones(1), train=True)
    assert buffers["count"] == 1 and model.buffers["count"] == 0
    assert model.apply({}, buffers, torch.ones(1), train=True)[1]["count"] == 2


def test_the_models_tensors_are_copies():
    module = nn.Linear(1, 1)
    model = from_module(module)
    with torch.no_grad():
        module.weight.fill_(7)
    assert not torch.equal(model.params["weight"], module.weight)
    assert not model.params["weight"].requires_grad


def scripted() -> Any:
    return torch.jit.script(nn.Linear(1, 1))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: nn.DataParallel(nn.Linear(1, 1)), UsageTypeError, "DataParallel.*module.module"),
        (lambda: torch.compile(nn.Linear(1, 1)), UsageTypeError, "OptimizedModule.*_orig_mod"),
        (lambda: nn.LazyLinear(1), UsageError, "have no shape yet.*Run one batch"),
        (scripted, UsageTypeError, "scripted module cannot be copied"),
    ],
)
def test_modules_that_are_no_plain_functions_are_refused(make: Any, error: type[Exception], words: str):
    with pytest.raises(error, match=words):
        from_module(make())


def test_wrapped_and_sharded_modules_are_refused(tmp_path: Any):
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(UsageTypeError, match="DistributedDataParallel.*module.module"):
            from_module(DistributedDataParallel(nn.Linear(1, 1)))
        sharded: Any = fully_shard(nn.Linear(1, 1), mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(UsageTypeError, match="FSDP"):
            from_module(sharded)
    finally:
        distributed.destroy_process_group()


def test_tensors_that_are_missing_are_named():
    model = from_module(nn.Linear(2, 1))
    with pytest.raises(StructureError, match=r"without \['bias'\].* trees like model.params"):
        model.apply({"weight": model.params["weight"]}, model.buffers, torch.ones(1, 2), train=True)
    assert model.apply(model.params, model.buffers, torch.ones(1, 2), train=True)[0].shape == (1, 1)

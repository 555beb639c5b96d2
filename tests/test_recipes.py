"""`supervised` and `minimize`: AutoUnit's core, as a composition."""

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tnt_func as tnt
from tnt_func import optim, pytree
from tnt_func.errors import DataError
from tnt_func.testing import check_unit

Batch = tuple[Tensor, Tensor]
STEPS = 50


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).to(dtype)


def batches(count: int, size: int = 4, dtype: torch.dtype = torch.float32) -> list[Batch]:
    noise = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 3, generator=noise, dtype=dtype), torch.randint(0, 2, (size,), generator=noise))
        for _ in range(count)
    ]


CLIPS: dict[str, tuple[list[optim.GradientTransform], Any]] = {
    "none": ([], lambda parameters: None),
    "norm": ([optim.clip_by_global_norm(0.3)], lambda parameters: nn.utils.clip_grad_norm_(parameters, 0.3)),
    "value": ([optim.clip_by_value(0.05)], lambda parameters: nn.utils.clip_grad_value_(parameters, 0.05)),
}
CYCLE: dict[str, Any] = {"max_lr": 1e-2, "total_steps": STEPS, "anneal_strategy": "cos", "cycle_momentum": False}


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("schedule", ["constant", "warm-up cosine"])
def test_supervised_ends_on_the_bits_of_the_imperative_loop(every: int, clip: str, schedule: str):
    module, data = network(), batches(STEPS * every)
    transforms, clip_gradients = CLIPS[clip]
    one_cycle = tnt.schedules.from_torch_scheduler(torch.optim.lr_scheduler.OneCycleLR, lr=1e-2, **CYCLE)
    lr = 1e-2 if schedule == "constant" else one_cycle
    optimizer = optim.chain(*transforms, optim.from_torch(torch.optim.AdamW, lr=lr))
    if every > 1:
        optimizer = optim.accumulate(optimizer, every=every)
    unit, state = tnt.supervised(module, F.cross_entropy, optimizer, key=tnt.key(0))
    state = tnt.train(unit.train_unit, state, data, max_epochs=1)

    imperative = torch.optim.AdamW(module.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(imperative, **CYCLE) if schedule != "constant" else None
    for window in zip(*[iter(data)] * every, strict=True):
        imperative.zero_grad()
        for x, y in window:
            (F.cross_entropy(module(x), y) / every).backward()
        clip_gradients(module.parameters())
        imperative.step()
        if scheduler is not None:
            scheduler.step()
    assert pytree.diff(state.params, {name: p.detach() for name, p in module.named_parameters()}) == []


def test_a_short_epoch_loses_no_update_and_an_evaluation_shifts_no_window():
    """AutoUnit gives no update where an epoch is shorter than a window, and counts evaluation steps into windows."""
    data = batches(3)
    optimizer = optim.accumulate(optim.sgd(0.1), every=4)
    unit, first = tnt.supervised(network(), F.cross_entropy, optimizer, key=tnt.key(0))
    alone = tnt.train(unit.train_unit, first, data, max_epochs=4)
    watched = tnt.fit(unit, first, data, batches(2), max_epochs=4, evaluate_every_n_steps=1)
    in_one = tnt.train(unit.train_unit, first, data * 4, max_epochs=1)
    assert pytree.equal(alone.params, in_one.params) and pytree.equal(alone.params, watched.params)
    assert not pytree.equal(alone.params, first.params)


def test_an_open_window_at_the_end_is_applied_by_flush():
    """12 steps in windows of 5 leave 2 gradients over; nothing is dropped in silence."""
    optimizer = optim.accumulate(optim.sgd(0.1), every=5)
    unit, state = tnt.supervised(network(), F.cross_entropy, optimizer, key=tnt.key(0))
    state = tnt.train(unit.train_unit, state, batches(12), max_epochs=1)
    params, opt_state = optim.flush(optimizer, state.opt_state, state.params)
    assert not pytree.equal(params, state.params)
    again, _ = optim.flush(optimizer, opt_state, params)
    assert pytree.equal(again, params)


def test_the_loss_is_the_mean_over_samples_whatever_the_accumulation():
    """AutoUnit divides the logged loss by the accumulation count."""
    data = [*batches(2, size=4), *batches(1, size=1)]
    module = network()
    expected = sum(F.cross_entropy(module(x), y, reduction="sum").item() for x, y in data) / 9
    optimizer = optim.accumulate(optim.sgd(0.1), every=3)
    unit, state = tnt.supervised(module, F.cross_entropy, optimizer, key=tnt.key(0))
    state = tnt.train(unit.train_unit, state, data, max_epochs=1)
    assert float(tnt.metrics.compute(state, "train")["loss"]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ({"image": torch.ones(2, 3), "label": torch.tensor([0, 1])}, "a dict of 2: ['image', 'label']"),
        (torch.ones(2, 3), "a Tensor [2, 3]"),
        ((torch.ones(2, 3), torch.tensor([0, 1]), torch.ones(2)), "a tuple of 3"),
    ],
    ids=["mapping", "tensor", "three"],
)
def test_a_batch_that_is_no_pair_is_refused_and_not_taken_apart(batch: Any, said: str):
    """Two keys, and two rows, are a pair to Python."""
    unit, state = tnt.supervised(network(), F.cross_entropy, optim.sgd(0.1), key=tnt.key(0))
    with pytest.raises(DataError, match=re.escape(said)):
        tnt.train(unit.train_unit, state, [batch], max_epochs=1)
    with pytest.raises(DataError, match=re.escape(said)):
        tnt.evaluate(unit.eval_unit, state, [batch])


def test_prediction_takes_inputs_alone_in_a_tuple_and_no_row_of_a_tensor():
    module = network()
    unit, state = tnt.supervised(module, F.cross_entropy, optim.sgd(0.1), key=tnt.key(0))
    assert unit.predict_unit is not None
    inputs = torch.ones(5, 3)
    for batch in ((inputs,), [inputs, torch.zeros(5)]):
        assert torch.equal(tnt.predict(unit.predict_unit, state, [batch])[1][0], module(inputs).detach())
    for batch in (inputs, {"x": inputs}, ()):
        with pytest.raises(DataError, match=r"its batches are \(inputs, targets\) or \(inputs,\)"):
            tnt.predict(unit.predict_unit, state, [batch])


def test_a_none_batch_ends_no_epoch():
    seen: list[Any] = []
    unit = tnt.TrainUnit(train_step=lambda state, batch: (seen.append(batch), (state, {}))[1])
    tnt.train(unit, tnt.State(params={}, key=tnt.key(0)), [1, None, 2], max_epochs=1)
    assert seen == [1, None, 2]


class Several(nn.Module):
    """Two inputs, BatchNorm, Dropout, a tied and a frozen layer."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(3, 4), nn.Linear(3, 4)
        self.right.weight = self.left.weight
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.body = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 2))

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.body(self.frozen(self.left(left) + self.right(right)))


@pytest.mark.parametrize("by", ["position", "keyword"])
def test_any_module_trains_unwritten_and_keeps_the_laws(by: str):
    torch.manual_seed(0)
    module = Several()
    before = copy.deepcopy(module.state_dict())
    data: list[Any] = [((x, -x) if by == "position" else {"left": x, "right": -x}, y) for x, y in batches(3)]
    unit, state = tnt.supervised(module, F.cross_entropy, optim.adamw(1e-2), key=tnt.key(0))
    assert not any(name.startswith("frozen") for name in state.params)
    frozen = state.buffers["frozen.weight"]
    check_unit(unit, state, data, eval_batches=data[:1])
    state = tnt.fit(unit, state, data, data[:1], max_epochs=2)
    assert pytree.equal(before, module.state_dict()) and module.training
    assert all(parameter.grad is None for parameter in module.parameters())
    assert torch.equal(state.buffers["frozen.weight"], frozen)
    assert state.buffers["body.0.num_batches_tracked"] == 6


def test_metrics_are_scored_in_training_and_evaluation_and_prediction_gives_outputs():
    scores: Any = {"accuracy": lambda output, targets: (output.argmax(-1) == targets).float().mean()}
    module, data = network(), batches(2)
    unit, state = tnt.supervised(module, F.cross_entropy, optim.sgd(0.0), key=tnt.key(0), metrics=scores)
    state = tnt.fit(unit, state, data, data, max_epochs=1)
    computed = [tnt.metrics.compute(state, phase) for phase in ("train", "eval")]
    assert computed[0] == computed[1] and computed[0].keys() == {"loss", "accuracy"}
    assert unit.predict_unit is not None
    _, outputs = tnt.predict(unit.predict_unit, state, data)
    assert pytree.equal(outputs, [module(x).detach() for x, _ in data])


def test_a_metric_reads_the_output_and_the_targets_of_every_step():
    given = {"right": tnt.metrics.confusion_matrix(task="multiclass", num_classes=2), "share": share_of_ones}
    unit, state = tnt.supervised(network(), F.cross_entropy, optim.sgd(0.1), key=tnt.key(0), metrics=given)
    data = batches(3)
    whole = tnt.metrics.compute(tnt.evaluate(unit.eval_unit, state, data), "eval")
    assert unit.predict_unit is not None
    outputs = torch.cat(tnt.predict(unit.predict_unit, state, data)[1]).argmax(-1)
    targets = torch.cat([y for _, y in data])
    counted = torch.stack([torch.stack([((targets == a) & (outputs == b)).sum() for b in (0, 1)]) for a in (0, 1)])
    assert torch.equal(whole["right"], counted) and whole["share"] == (outputs == 1).double().mean()
    check_unit(unit, state, data)


def share_of_ones(output: Tensor, targets: Tensor) -> Tensor:
    return (output.argmax(-1) == 1).float().mean()


def test_an_adversarial_pair_takes_turns_on_its_own_parts():
    """Two optimizers, each for its part; an objective reads the other's parameters from the state."""
    sgd = optim.sgd(0.1)

    def pull(params: Any, state: tnt.State, batch: Tensor) -> Any:
        return (params - state.params["right"]).square().sum(), (state.buffers, {"gap": 1.0})

    def push(params: Any, state: tnt.State, batch: Tensor) -> Any:
        return -(params - state.params["left"]).square().sum(), (state.buffers, {"gap": 2.0})

    params = {"left": torch.tensor([0.0]), "right": torch.tensor([1.0])}
    state = tnt.State(params=params, key=tnt.key(0), opt_state={name: sgd.init(p) for name, p in params.items()})
    unit = tnt.alternate(
        tnt.TrainUnit(train_step=tnt.minimize(pull, sgd, part="left")),
        tnt.TrainUnit(train_step=tnt.minimize(push, sgd, part="right")),
    )
    after_one = tnt.train(unit, state, [0.0], max_steps=1)
    assert after_one.params["left"] == pytest.approx(0.2) and after_one.params["right"] is params["right"]
    after_two = tnt.train(unit, after_one, [0.0], max_steps=2)
    assert after_two.params["right"] == pytest.approx(1.16)

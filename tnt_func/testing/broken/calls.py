"""What a single call must not do: write (law 1), reshape (3), or move counters and keys (4)."""

from typing import Any

import torch

from tnt_func import rng
from tnt_func.progress import RunProgress
from tnt_func.state import State
from tnt_func.testing.broken.control import (
    EVERYWHERE,
    Subject,
    control,
    descend,
    fitted,
    trained,
    with_w,
)
from tnt_func.unit import Callback

# Law 1, purity.


@control("purity", "train step (epoch 0, step 0): train_step wrote into the state", "state.params['w']", "sub_")
def parameters_in_place(broken: bool) -> Subject:
    def train_step(state: State, batch: Any) -> Any:
        w = state.params["w"]
        return with_w(state, w.sub_(batch) if broken else w.sub(batch)), {}

    return trained(train_step)


@control("purity", "train_step wrote into the state", "state.buffers['mean']")
def buffers_in_place(broken: bool) -> Subject:
    def train_step(state: State, batch: Any) -> Any:
        mean = state.buffers["mean"] if broken else state.buffers["mean"].clone()
        torch.nn.functional.batch_norm(torch.stack((batch, batch + 1)), mean, torch.ones(2), training=True)
        return state.replace(buffers={"mean": mean}), {}

    return trained(train_step)


@control("purity", "train_step wrote into the batch", "batch: 2 of 2 elements", also=EVERYWHERE)
def batch_in_place(broken: bool) -> Subject:
    def train_step(state: State, batch: Any) -> Any:
        return descend(state, batch.mul_(0.5) if broken else batch.mul(0.5))

    return trained(train_step)


@control("purity", "train_step wrote into the state", "state.params['w']", ".grad: written")
def backward(broken: bool) -> Subject:
    def train_step(state: State, batch: Any) -> Any:
        w = state.params["w"] if broken else state.params["w"].detach().requires_grad_()
        loss = (w - batch).square().sum()
        loss.backward()
        assert w.grad is not None
        return with_w(state, (w - 0.1 * w.grad.clone()).detach().requires_grad_(broken)), {}

    subject = trained(train_step)
    assert subject.case is not None
    subject.case.state.params["w"].requires_grad_(broken)
    return subject


@control("purity", "train_step wrote into the state", "state.params['w']", "requires_grad=True", also=("structure",))
def requires_grad_in_place(broken: bool) -> Subject:
    def train_step(state: State, batch: Any) -> Any:
        w = state.params["w"].requires_grad_() if broken else state.params["w"].detach().requires_grad_()
        (grad,) = torch.autograd.grad((w - batch).square().sum(), w)
        return with_w(state, (w - 0.1 * grad).detach()), {}

    return trained(train_step)


@control("purity", "train epoch_end (epoch 1, step 3): TrainUnit.on_train_epoch_end wrote", "state.params['w']")
def hook_in_place(broken: bool) -> Subject:
    def halve(state: State) -> State:
        return with_w(state, state.params["w"].mul_(0.5) if broken else state.params["w"].mul(0.5))

    return trained(on_train_epoch_end=halve)


@control("purity", "callback 'list' on_train_step_end wrote", "state.memory['seen'][1]: new")
def list_in_place(broken: bool) -> Subject:
    def remember(state: State) -> State:
        seen = state.memory["seen"]
        if broken and len(seen) == 1:
            seen.append(1.0)
        return state.remember("seen", seen if broken else [seen[0] + 1.0])

    return trained(callbacks=[Callback(name="list", on_train_step_end=remember)])


@control("purity", "after train start", "wrote into the state of that event later on", "state.params['w']")
def earlier_state_in_place(broken: bool) -> Subject:
    first: list[Any] = []

    def train_step(state: State, batch: Any) -> Any:
        if state.progress.train.steps == 0:
            first[:] = [state.params["w"]]
        elif broken:
            first[0].zero_()
        return descend(state, batch)

    return trained(train_step)


@control(
    "purity",
    "eval step (epoch 0, step 0): eval_step wrote into the state",
    "state.params['w']",
    also=("resume", "evaluation"),
)
def evaluation_in_place(broken: bool) -> Subject:
    def eval_step(state: State, batch: Any) -> Any:
        w = state.params["w"]
        return state, {"loss": (w.add_(1) if broken else w.add(1)).sum()}

    return fitted(eval_step=eval_step)


# Law 3, structure.


@control(
    "structure", "train step (epoch 0, step 2): train_step changed", "state.params['w']: float32[2] became float64[2]"
)
def dtype_drift(broken: bool) -> Subject:
    def train_step(state: State, batch: Any) -> Any:
        state, output = descend(state, batch)
        third = broken and state.progress.train.steps == 2
        return with_w(state, state.params["w"].double()) if third else state, output

    return trained(train_step)


@control(
    "structure",
    "train step (epoch 0, step 1): train_step changed",
    "state.buffers['mean']: float32[2] became float32[3]",
)
def shape_drift(broken: bool) -> Subject:
    def train_step(state: State, batch: Any) -> Any:
        size = 3 if broken and state.progress.train.steps else 2
        return state.replace(buffers={"mean": torch.ones(size)}), {}

    return trained(train_step)


@control("structure", "train_step changed", "state.buffers['mean']: float32[2] became float32[2] on meta")
def device_drift(broken: bool) -> Subject:
    def train_step(state: State, batch: Any) -> Any:
        device = "meta" if broken and state.progress.train.steps else "cpu"
        return state.replace(buffers={"mean": torch.ones(2, device=device)}), {}

    return trained(train_step)


@control(
    "structure", "train_step changed", "state.params['w']: float32[2] became float32[2] that requires grad", "detach"
)
def graph_kept(broken: bool) -> Subject:
    def train_step(state: State, batch: Any) -> Any:
        w = state.params["w"].detach().requires_grad_()
        (grad,) = torch.autograd.grad((w - batch).square().sum(), w)
        after = w - 0.1 * grad
        return with_w(state, after if broken else after.detach()), {}

    return trained(train_step)


@control(
    "structure", "TrainUnit.on_train_step_end changed", "state.memory['best']: nothing became int", "memory function"
)
def slot_that_appears(broken: bool) -> Subject:
    memory = {} if broken else {"best": lambda state: 0}
    return trained(memory=memory, on_train_step_end=lambda state: state.remember("best", 1))


@control("structure", "callback 'kind' on_train_epoch_end changed", "state.memory['kind']: NoneType became float")
def none_that_becomes_a_number(broken: bool) -> Subject:
    callback = Callback(name="kind", on_train_epoch_end=lambda state: state.remember("kind", 1.0 if broken else None))
    return trained(callbacks=[callback])


@control("structure", "the loop itself says so", "train_step changed state.params['w'] from float32[2] to float64[2]")
def dtype_drift_at_once(broken: bool) -> Subject:
    def train_step(state: State, batch: Any) -> Any:
        w = state.params["w"]
        return with_w(state, w.double() if broken else w), {}

    return trained(train_step)


# Law 4, grammar: the loop itself looks, at every call.


@control("grammar", "the loop itself says so", "train_step changed state.progress", "state.memory")
def counter_by_hand(broken: bool) -> Subject:
    def train_step(state: State, batch: Any) -> Any:
        return state.replace(progress=RunProgress() if broken else state.progress), {}

    return trained(train_step)


@control("grammar", "after train step_start (epoch 0, step 1)", "TrainUnit.on_train_step_end changed state.key")
def key_by_hand(broken: bool) -> Subject:
    def advance(state: State) -> State:
        late = broken and state.progress.train.steps == 2
        return state.replace(key=rng.fold_in(state.key, "next")) if late else state

    return trained(on_train_step_end=advance)


@control("grammar", "train_step set state.stop to 'enough'", "on_train_step_end")
def stop_in_a_step(broken: bool) -> Subject:
    return trained(lambda state, batch: (state.request_stop("enough") if broken else state, {}))


@control("grammar", "train_step returned a State", "return state.replace(...), {'loss': loss}")
def output_forgotten(broken: bool) -> Subject:
    return trained(lambda state, batch: state if broken else (state, {}))


@control("grammar", "callback 'next' on_train_epoch_end raised StopIteration", "next(iterator, default)")
def stop_iteration(broken: bool) -> Subject:
    rates = iter([0.5])

    def lower(state: State) -> State:
        rate = torch.tensor(next(rates) if broken else next(rates, 0.5), dtype=torch.float64)
        return state.replace(opt_state={"lr": rate})

    return trained(callbacks=[Callback(name="next", on_train_epoch_end=lower)])

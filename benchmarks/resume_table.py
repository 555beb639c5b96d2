"""Which libraries end on the same parameters when a run is stopped and continued in a fresh process.

40 samples, shuffled, in batches of 4; a small network with dropout; Adam; 30 steps. Stopped at step 15, mid-epoch, or
at step 20, at the end of the second epoch; saved and resumed as each library documents it. The third column draws
random augmentation from torch, NumPy and `random` besides. Every run is a process of its own; a library that is not
installed is left out. tnt_func is stopped at every step from 1 to 29, without workers and with two.

    python benchmarks/resume_table.py [NAME ...]
"""

import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import random
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

STEPS, EPOCH, BATCH = 30, 10, 4
COLUMNS = {"mid-epoch": (15, False), "epoch boundary": (20, False), "mid-epoch, augmentation": (15, True)}


class Samples(Dataset[Any]):
    def __init__(self, augmented: bool):
        self.augmented = augmented
        self.rows = torch.randn(EPOCH * BATCH, 5, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.rows[index]
        noise = torch.randn(4) + np.random.randn() + random.random() if self.augmented else torch.zeros(4)
        return {"x": row[:4] + 0.1 * noise, "labels": row[4:]}


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 1))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": nn.functional.mse_loss(self.layers(x), labels)}


def network() -> Network:
    torch.manual_seed(1)
    return Network()


def digest(tensors: Iterable[torch.Tensor]) -> str:
    return hashlib.sha256(b"".join(tensor.detach().numpy().tobytes() for tensor in tensors)).hexdigest()


def loader(augmented: bool, workers: int = 0, kind: Any = DataLoader) -> Any:
    return kind(Samples(augmented), batch_size=BATCH, shuffle=True, num_workers=workers)


def of_tnt(augmented: bool) -> Any:
    import tnt_func as tnt

    def objective(params: Any, state: Any, batch: Any) -> Any:
        loss = torch.func.functional_call(module, params, (batch["x"], batch["labels"]))["loss"]
        return loss, (state.buffers, {"loss": loss})

    module, optimizer = network(), tnt.optim.adam(1e-2)
    params = {name: leaf.detach() for name, leaf in module.named_parameters()}
    first = tnt.State(params=params, opt_state=optimizer.init(params), key=tnt.key(0))
    return tnt, tnt.TrainUnit(train_step=tnt.minimize(objective, optimizer)), first


def tnt_func(folder: Path, stop: int, resume: bool, augmented: bool, workers: int = 0) -> Iterable[torch.Tensor]:
    tnt, unit, first = of_tnt(augmented)
    state = tnt.checkpoint.resume(folder, like=tnt.prepare(unit, first))
    pause_when, saving = tnt.pausing.until(lambda: next(asked)), tnt.observers.checkpointer(folder)
    # A pause ends the process as a signal would; step 20 is asked at its step and at its epoch's end.
    asked = iter([False] * (stop - 1 + (stop - 1) // EPOCH) + [True] if stop < STEPS else [False] * 99)
    data = loader(augmented, workers)
    state = tnt.train(unit, state, data, max_steps=STEPS, observers=[saving], pause_when=pause_when)
    return state.params.values()


def tnt_func_everywhere(folder: Path, stop: int, resume: bool, augmented: bool, workers: int) -> str:
    """Where the checkpoints of every step lead, once a first process has written them."""
    tnt, unit, first = of_tnt(augmented)
    like, data = tnt.prepare(unit, first), loader(augmented, workers)
    if not resume:
        saving = tnt.observers.checkpointer(folder, every_n_steps=1)
        return digest(tnt.train(unit, first, data, max_steps=STEPS, observers=[saving]).params.values())
    ends = dict[str, list[int]]()
    for path in tnt.checkpoint.checkpoints(folder)[:-1]:
        state = tnt.checkpoint.restore(path, like)
        steps = state.progress.train.steps
        ends.setdefault(digest(tnt.train(unit, state, data, max_steps=STEPS).params.values()), []).append(steps)
    return f"{len(ends)} {sum(map(len, ends.values()))} {min(ends)}"


def lightning(folder: Path, stop: int, resume: bool, augmented: bool, kind: Any = DataLoader) -> Iterable[torch.Tensor]:
    import lightning as L
    from lightning.pytorch.callbacks import ModelCheckpoint

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = network()

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return self.network(**batch)["loss"]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), 1e-2)

    L.seed_everything(0, verbose=False)
    module = Module()
    saving = ModelCheckpoint(folder, filename="saved", every_n_train_steps=15 if stop == STEPS else stop)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = L.Trainer(max_steps=stop, callbacks=[saving], **quiet)  # pyright: ignore[reportArgumentType]
    trainer.fit(module, loader(augmented, kind=kind), ckpt_path=folder / "saved.ckpt" if resume else None)
    return module.parameters()


def lightning_stateful(folder: Path, stop: int, resume: bool, augmented: bool) -> Iterable[torch.Tensor]:
    from torchdata.stateful_dataloader import StatefulDataLoader

    return lightning(folder, stop, resume, augmented, StatefulDataLoader)


def ignite(
    folder: Path, stop: int, resume: bool, augmented: bool, deterministic: bool = False
) -> Iterable[torch.Tensor]:
    from ignite.engine import Engine, Events
    from ignite.engine.deterministic import DeterministicEngine
    from ignite.handlers import Checkpoint, DiskSaver
    from ignite.utils import manual_seed

    manual_seed(0)
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)

    def step(engine: Any, batch: Any) -> float:
        model.train()
        optimizer.zero_grad()
        loss = model(**batch)["loss"]
        loss.backward()
        optimizer.step()
        return loss.item()

    trainer = (DeterministicEngine if deterministic else Engine)(step)
    everything = {"model": model, "optimizer": optimizer, "trainer": trainer}
    if resume:
        Checkpoint.load_objects(everything, torch.load(next(folder.glob("*.pt")), weights_only=False))
    if stop < STEPS:
        saver = Checkpoint(everything, DiskSaver(str(folder), require_empty=False))
        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=stop), saver)
        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=stop), trainer.terminate)
    manual_seed(0)
    trainer.run(loader(augmented), max_epochs=STEPS // EPOCH)
    return model.parameters()


def ignite_deterministic(folder: Path, stop: int, resume: bool, augmented: bool) -> Iterable[torch.Tensor]:
    return ignite(folder, stop, resume, augmented, deterministic=True)


def accelerate(
    folder: Path, stop: int, resume: bool, augmented: bool, seedable: bool = False
) -> Iterable[torch.Tensor]:
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration, set_seed

    set_seed(0)
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=seedable))
    model = network()
    model, optimizer, data = accelerator.prepare(model, torch.optim.Adam(model.parameters(), 1e-2), loader(augmented))
    done = 0
    if resume:
        accelerator.load_state(str(folder))
        done = int((folder / "steps").read_text())
    for epoch in range(done // EPOCH, STEPS // EPOCH):
        data.set_epoch(epoch)
        for batch in accelerator.skip_first_batches(data, done % EPOCH) if done % EPOCH else data:
            optimizer.zero_grad()
            accelerator.backward(model(**batch)["loss"])
            optimizer.step()
            done += 1
            if done == stop:
                if stop < STEPS:
                    accelerator.save_state(str(folder))
                    (folder / "steps").write_text(str(done))
                return model.parameters()
    raise AssertionError("the run ended early")


def accelerate_seedable(folder: Path, stop: int, resume: bool, augmented: bool) -> Iterable[torch.Tensor]:
    return accelerate(folder, stop, resume, augmented, seedable=True)


def trainer(folder: Path, stop: int, resume: bool, augmented: bool) -> Iterable[torch.Tensor]:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            control.should_training_stop = control.should_save = state.global_step == stop
            return control

    arguments = TrainingArguments(
        str(folder), max_steps=STEPS, per_device_train_batch_size=BATCH, learning_rate=1e-2, save_strategy="no",
        report_to=[], disable_tqdm=True, use_cpu=True, seed=0, logging_strategy="no",
    )  # fmt: skip
    model = network()
    training = Trainer(model, arguments, train_dataset=Samples(augmented), callbacks=[Stop()])
    training.train(resume_from_checkpoint=str(next(folder.glob("checkpoint-*"))) if resume else None)
    return model.parameters()


CONTESTANTS: dict[str, tuple[Callable[..., Any], str, str]] = {
    "tnt_func": (tnt_func, "tnt_func", "tnt-func"),
    "Lightning, DataLoader": (lightning, "lightning", "lightning"),
    "Lightning, StatefulDataLoader": (lightning_stateful, "torchdata", "lightning"),
    "Ignite, Engine": (ignite, "ignite", "pytorch-ignite"),
    "Ignite, DeterministicEngine": (ignite_deterministic, "ignite", "pytorch-ignite"),
    "Accelerate, default": (accelerate, "accelerate", "accelerate"),
    "Accelerate, seedable sampler": (accelerate_seedable, "accelerate", "accelerate"),
    "HF Trainer": (trainer, "transformers", "transformers"),
}
WORKERS = "tnt_func, everywhere"


def process(name: str, folder: Path, stop: int, resume: bool, augmented: bool, workers: int = 0) -> str:
    command = [sys.executable, __file__, "--one", name, folder, stop, int(resume), int(augmented), workers]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment)
    if done.returncode:
        return "error: " + done.stderr.strip().splitlines()[-1]
    return done.stdout.strip().splitlines()[-1]


def one(name: str, folder: str, *numbers: str) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    stop, resume, augmented, workers = map(int, numbers)
    if name == WORKERS:
        print(tnt_func_everywhere(Path(folder), stop, bool(resume), bool(augmented), workers))
    else:
        print(digest(CONTESTANTS[name][0](Path(folder), stop, bool(resume), bool(augmented))))


def verdict(name: str, stop: int, augmented: bool, whole: dict[bool, str]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        if augmented not in whole:
            whole[augmented] = process(name, Path(folder), STEPS, False, augmented)
    with tempfile.TemporaryDirectory() as folder:
        process(name, Path(folder), stop, False, augmented)
        end = process(name, Path(folder), STEPS, True, augmented)
    return end if end.startswith("error") else "same" if end == whole[augmented] else "differs"


def everywhere(workers: int) -> str:
    with tempfile.TemporaryDirectory() as folder:
        whole = process(WORKERS, Path(folder), STEPS, False, True, workers)
        kinds, count, end = process(WORKERS, Path(folder), STEPS, True, True, workers).split()
    return f"{count} splits, {'all the same' if (kinds, end) == ('1', whole) else 'some differ'}"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one(*sys.argv[2:])
        sys.exit()
    print(f"| | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}")
    for name in sys.argv[1:] or CONTESTANTS:
        _, module, package = CONTESTANTS[name]
        if importlib.util.find_spec(module) is None:
            continue
        whole = dict[bool, str]()
        cells = [verdict(name, stop, augmented, whole) for stop, augmented in COLUMNS.values()]
        print(f"| {name} {importlib.metadata.version(package)} | {' | '.join(cells)} |", flush=True)
    for workers in (0, 2):
        print(f"tnt_func, augmentation, steps 1 to 29 and ends of epochs, {workers} workers: {everywhere(workers)}")

"""Histograms, images, text and hyper-parameters as TensorBoard's event reader has them, each once after a resume."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator as PluginEventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from tensorboard.util.tensor_util import make_ndarray
from test_observers_recorder import tags

import tnt_func as tnt
from tnt_func.errors import UsageError
from tnt_func.observers import History, recorder, tensorboard_summaries, tensorboard_writer

PLUGIN: Any = plugin_data_pb2
KEPT = {"histograms": 0, "images": 0, "tensors": 0}
DATA = [torch.full((3,), x) for x in (0.5, 0.25)]


def train_step(state: tnt.State, batch: torch.Tensor) -> Any:
    params = {**state.params, "w": state.params["w"] + batch}
    return state.replace(params=params), {"loss": batch.sum(), "grads": {"w": batch}}


UNIT = tnt.TrainUnit(train_step=train_step)
ODD = torch.tensor([math.nan, 1.0, -math.inf, 3.0, 1.0], dtype=torch.bfloat16)
FIRST = tnt.State(params={"w": torch.arange(3.0), "deep": (ODD, torch.zeros(0), 3)}, key=tnt.key(0))
GRAY = torch.linspace(0, 1, 6).reshape(1, 2, 3)


def trees(event: tnt.Event) -> Any:
    return {"params": event.state.params, "grads": (event.state.output or {"grads": None})["grads"]}


def images(event: tnt.Event) -> dict[str, torch.Tensor]:
    batch = torch.full((2, 3, 4, 4), 200, dtype=torch.uint8)
    return {"gray": GRAY.bfloat16(), "batch": batch}


def text(event: tnt.Event) -> dict[str, str]:
    return {"said": f"**{event.state.progress.train.steps}**"}


def trained(state: tnt.State, observers: Sequence[Any], max_epochs: int) -> tnt.State:
    return tnt.train(UNIT, state, DATA, max_epochs=max_epochs, observers=observers)


def read(directory: Path) -> EventAccumulator:
    reader = EventAccumulator(str(directory), size_guidance=KEPT)
    reader.Reload()
    return reader


def usual(directory: Path, **options: Any) -> Any:
    writer = tensorboard_writer(directory, **options)
    summaries = tensorboard_summaries(
        writer, every_n_steps=1, every_n_epochs=1, histograms=trees, images=images, text=text
    )
    return writer, summaries


def test_each_kind_is_read_back(tmp_path: Path):
    _, summaries = usual(tmp_path)
    trained(FIRST, [summaries], 1)
    reader = read(tmp_path)
    assert sorted(reader.Tags()["histograms"]) == ["grads/w", "params/deep/0", "params/w"]
    steps = [1, 2, 2]
    w = [event.histogram_value for event in reader.Histograms("params/w")]
    assert [event.step for event in reader.Histograms("params/w")] == steps
    assert [(h.min, h.max, h.num, h.sum) for h in w] == [
        (0.5, 2.5, 3, 4.5),
        (0.75, 2.75, 3, 5.25),
        (0.75, 2.75, 3, 5.25),
    ]
    assert w[0].sum_squares == 0.25 + 2.25 + 6.25 and len(w[0].bucket) == 64 and w[0].bucket_limit[-1] == 2.5
    assert {i: n for i, n in enumerate(w[0].bucket) if n} == {0: 1, 32: 1, 63: 1}
    (odd, *_) = [event.histogram_value for event in reader.Histograms("params/deep/0")]
    assert (odd.min, odd.max, odd.num, odd.bucket[0], odd.bucket[-1]) == (1, 3, 3, 2, 1)
    same = [event.histogram_value for event in reader.Histograms("grads/w")]
    assert [(h.min, h.max, list(h.bucket)) for h in same] == [(x, x, [3]) for x in (0.5, 0.25)]
    (gray, *_) = reader.Images("gray")
    pixels = np.asarray(Image.open(io.BytesIO(gray.encoded_image_string)))
    assert pixels.shape == (2, 3, 3) and pixels[:, :, 0].tolist() == (GRAY.bfloat16().float() * 255).byte()[0].tolist()
    (batch, *_) = reader.Images("batch")
    grid = np.asarray(Image.open(io.BytesIO(batch.encoded_image_string)))
    assert grid.shape == (4, 8, 3) and (grid == 200).all()
    said = reader.Tensors("said/text_summary")
    assert [(event.step, make_ndarray(event.tensor_proto).item()) for event in said] == [
        (1, b"**1**"),
        (2, b"**2**"),
        (2, b"**2**"),
    ]


def test_a_resumed_run_has_each_once_beside_its_rows(tmp_path: Path):
    history = History()
    writer, summaries = usual(tmp_path, hparams={"lr": 0.5, "layers": (1, 2), "on": True})
    observers = [recorder(history, writer, every_n_steps=1), summaries]
    after_one = trained(FIRST, observers, 1)
    trained(after_one, observers, 2)
    trained(after_one, observers[::-1], 3)
    reader = read(tmp_path)
    steps = [1, 2, 2, 3, 4, 4, 5, 6, 6]
    for found in (reader.Histograms("params/w"), reader.Images("gray"), reader.Tensors("said/text_summary")):
        assert [event.step for event in found] == steps
    scalars = {
        tag: [(event.step, float(make_ndarray(event.tensor_proto)).hex()) for event in reader.Tensors(tag)]
        for tag in reader.Tags()["tensors"]
        if tag in tags(history)
    }
    assert scalars == tags(history) and len(history) == 6
    assert [event.step for event in reader.Tensors("epoch/train_summaries")] == steps


def hparams(directory: Path) -> list[dict[str, Any]]:
    """Of every record that tells some, in any file."""
    found = []
    for path in directory.glob("events.*"):
        reader = PluginEventAccumulator(str(path))
        reader.Reload()
        if "_hparams_/session_start_info" in reader.Tags()["tensors"]:
            content = reader.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
            told = PLUGIN.HParamsPluginData.FromString(content).session_start_info.hparams
            found.append({name: getattr(value, value.WhichOneof("kind")) for name, value in told.items()})
    return found


@pytest.mark.filterwarnings("ignore:.* rows of an earlier run")
def test_hyper_parameters_are_told_once_and_anew_where_they_change(tmp_path: Path):
    state = trained(FIRST, [recorder(tensorboard_writer(tmp_path, hparams={"lr": 0.5, "layers": (1, 2)}))], 0)
    assert hparams(tmp_path) == []
    for lr in (0.5, 0.5, 0.25, None):
        options = {} if lr is None else {"hparams": {"lr": lr, "layers": (1, 2), "on": True, "name": "a"}}
        state = trained(state, [recorder(tensorboard_writer(tmp_path, **options), every_n_steps=1)], 9)
        assert hparams(tmp_path) == [{"lr": lr or 0.25, "layers": "(1, 2)", "on": True, "name": "a"}]
        state = tnt.State(params=state.params, key=state.key)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"text": text}, "one of them at least is given"),
        ({"text": text, "every_n_steps": 0}, "at least 1"),
        ({"every_n_epochs": 1}, "nothing to show"),
    ],
)
def test_arguments_that_cannot_work(tmp_path: Path, options: Any, said: str):
    with pytest.raises(UsageError, match=said):
        tensorboard_summaries(tensorboard_writer(tmp_path), **options)


def test_an_image_of_another_shape_is_named(tmp_path: Path):
    writer = tensorboard_writer(tmp_path)
    summaries = tensorboard_summaries(writer, every_n_steps=1, images=lambda event: {"x": GRAY[0]})
    with pytest.raises(UsageError, match=r"images gave 'x' of the shape \[2, 3\].*Write image\[None\]"):
        trained(FIRST, [summaries], 1)


@pytest.mark.parametrize(
    ("shown", "said"),
    [
        ({"text": lambda event: "Once"}, "text= gave a str; what is shown has names. Write text=lambda event"),
        ({"images": lambda event: torch.ones(1, 2, 2)}, "images= gave a Tensor; what is shown has names"),
        ({"images": lambda event: {"a": [[1]]}}, r"'a', a list; an image is a tensor. Write torch.as_tensor\(image\)"),
    ],
    ids=["text", "images", "an image"],
)
def test_what_is_shown_has_names(tmp_path: Path, shown: Any, said: str):
    writer, first = tensorboard_writer(tmp_path), tnt.State(params=0, key=tnt.key(0))
    unit = tnt.TrainUnit(train_step=lambda state, batch: (state, {}))
    with pytest.raises(UsageError, match=said):
        tnt.train(unit, first, [1], max_epochs=1, observers=[tensorboard_summaries(writer, every_n_steps=1, **shown)])

"""Donated, compiled and micro-batched units train on ranks as alone; orders that cannot be right are refused."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from distributed_forms import FORMS

RUNS = Path(__file__).with_name("distributed_forms.py")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
Found = list[dict[str, Any]]


@pytest.fixture(scope="module", params=(1, 2))
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What every rank of a world found; a world of one is started without torchrun."""
    size, directory = request.param, tmp_path_factory.mktemp("world")
    start = [sys.executable, *((*TORCHRUN, str(size)) if size > 1 else ()), RUNS, directory]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(RUNS.parent.parent)}
    done = subprocess.run(start, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads(path.read_text()) for path in sorted(directory.glob("rank-*.json"))]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_run_of_one_process(found: Found, form: str):
    assert all(gap <= 1e-12 for each in found for gap in each[form]["apart"].values()), found[0][form]["apart"]
    if len(found) == 1 and form != "compiled":
        assert found[0][form]["digests"]["whole"] == found[0][form]["alone"]


@pytest.mark.parametrize("form", FORMS)
def test_donated_is_not_donated_to_the_bit_on_every_rank(found: Found, form: str):
    digests = [each[form]["digests"] for each in found]
    assert all(each == digests[0] for each in digests)
    for at in ("whole", "parts"):
        assert len({digest for name, digest in digests[0].items() if name.startswith(at)}) == 1, digests[0]


def test_ranks_sum_once_a_step_whatever_is_inside(found: Found):
    once = [0, 0] if len(found) == 1 else [1, 1]
    assert all(each[form]["messages"] == once for each in found for form in FORMS)


def test_parts_that_were_given_are_consumed(found: Found):
    assert all(each["given"].startswith("state.params was read after a donating step") for each in found)


def test_orders_that_cannot_be_right_are_refused_with_the_one_that_is(found: Found):
    for each in found:
        said = each["refused"]
        for graph in ("in a graph", "in a graph of the gradient", "in a graph, to evaluate"):
            assert "data_parallel(tnt.compiled(unit), mesh)" in said[graph]
        assert "form='step', the update in it" in said["one graph"] and "form='gradients'" in said["one graph"]
        for parts in ("micro-batches", "micro-batches in half"):
            assert "data_parallel(tnt.transforms.microbatch(unit, 2), mesh)" in said[parts]

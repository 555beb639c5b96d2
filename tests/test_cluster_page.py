"""The commands of docs/cluster.md do what the page says: on two machines which are one, and without SLURM itself."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "cluster.md"
TEXT = PAGE.read_text()
BLOCKS = dict(re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL))
SCRIPT = (ROOT / "examples" / "torchrun_digits.py").read_text()
STEPS = 23
"""In an epoch of the example."""


def until(held: Callable[[], object], *running: subprocess.Popen[bytes]) -> None:
    """Wait for something that running processes bring about."""
    while not held():
        assert all(each.poll() is None for each in running), "it did not come about"
        time.sleep(0.02)


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("localhost", port)) == 0


@pytest.fixture
def port() -> Iterator[int]:
    """Kept from all who ask for any port, and free for who names it and reuses addresses, as torchrun does."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("localhost", 0))
        yield holder.getsockname()[1]


def example(folder: Path, epochs: int) -> None:
    """The example with another number of epochs: by far too many, and it ends when it is asked to, not before."""
    text, count = re.subn("^EPOCHS, BATCH = 12,", f"EPOCHS, BATCH = {epochs},", SCRIPT, flags=re.MULTILINE)
    assert count == 1
    (folder / "examples" / "torchrun_digits.py").write_text(text)


@pytest.fixture
def start(tmp_path: Path, port: int) -> Callable[..., subprocess.Popen[bytes]]:
    """What starts a block of the page in an empty folder, as if its machine were this one."""
    (tmp_path / "examples").mkdir()
    example(tmp_path, 10**6)
    found = tmp_path / "bin"
    found.mkdir()
    for name, text in {
        "srun": 'shift; exec "$@"',
        "scontrol": '[ "$1" = show ] && echo localhost || echo "$@" > asked',
    }.items():
        (found / name).write_text(f"#!/bin/sh\n{text}\n")
        (found / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(found), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        # A machine that has left counts as lost after so many seconds, 3 times.
        "PET_RDZV_CONF": "keep_alive_interval=2",
        **{"HEAD": "localhost", "GPUS": "1"},
        **{"SLURM_JOB_NODELIST": "localhost", "SLURM_NNODES": "1", "SLURM_JOB_ID": "7"},
    }

    def begin(language: str) -> subprocess.Popen[bytes]:
        # As the shell's own process, which the signal of the test then is for.
        text = BLOCKS[language].replace("29500", str(port)).replace("\ntorchrun ", "\nexec torchrun ")
        with (tmp_path / "printed").open("ab") as printed:
            command = ["bash", "-c", text]
            return subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=printed, stderr=subprocess.STDOUT)

    return begin


def steps(folder: Path) -> list[int]:
    """Of the checkpoints that there are."""
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("runs/digits/step-*"))


def ends(folder: Path) -> list[tuple[int, int]]:
    """Where runs have ended: step and number of processes."""
    found = re.findall(r"after step (\d+) on (\d) processes", (folder / "printed").read_text())
    return [(int(step), int(size)) for step, size in found]


def test_a_machine_is_asked_to_end_and_all_go_on_when_it_is_back(
    start: Callable[..., subprocess.Popen[bytes]], port: int, tmp_path: Path
):
    head = start("sh")
    until(lambda: listens(port), head)
    other = start("sh")
    until(lambda: steps(tmp_path), head, other)
    other.send_signal(signal.SIGTERM)
    assert other.wait() != 0
    until(lambda: ends(tmp_path), head)
    ((paused, size),) = ends(tmp_path)
    assert size == 2 and steps(tmp_path)[-1] == paused
    epochs = paused // STEPS + 2
    example(tmp_path, epochs)
    back = start("sh")
    assert (head.wait(), back.wait()) == (0, 0), (tmp_path / "printed").read_text()
    assert ends(tmp_path) == [(paused, 2), (epochs * STEPS, 2)]
    # The head has had two attempts, and each start of the other one.
    logs = [path.parent.parent.name for path in tmp_path.glob("logs/*/attempt_*/0/stdout.log")]
    assert sorted(logs) == ["attempt_0", "attempt_0", "attempt_0", "attempt_1"]


def test_a_job_that_is_to_end_saves_and_asks_to_be_started_again(
    start: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
):
    job = start("bash")
    until(lambda: steps(tmp_path), job)
    job.send_signal(signal.SIGTERM)
    assert job.wait() != 0
    assert (tmp_path / "asked").read_text() == "requeue 7\n"
    ((paused, size),) = ends(tmp_path)
    assert size == 1 and steps(tmp_path)[-1] == paused


def test_what_is_shown_is_a_shell_script():
    assert BLOCKS.keys() == {"sh", "bash"}
    for text in BLOCKS.values():
        parsed = subprocess.run(["bash", "-n", "-c", text], capture_output=True, text=True)
        assert (parsed.returncode, parsed.stderr) == (0, "")


def test_what_is_linked_is_there():
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert links and [link for link in links if "://" not in link and not (PAGE.parent / link).exists()] == []
    assert "(docs/cluster.md)" in (ROOT / "README.md").read_text()

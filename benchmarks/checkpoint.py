"""What saving and restoring cost, beside safetensors and torch.save; and how long an asynchronous save stalls training.

Every contestant writes the same tensors to the same disk and flushes them, and reads them back; the safetensors library
also computes the checksums that a checkpoint has. They take turns, in an order of chance, so that all meet the same
machine; ratios are of the same round. Files are read from the system's cache, as right after a crash of the process.

    python benchmarks/checkpoint.py [--megabytes 1000] [--rounds 7] [--directory PATH]
"""

import argparse
import ctypes
import gc
import importlib.util
import os
import random
import shutil
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import torch

import tnt_func as tnt

LEAVES = 48
BARS = {
    "tnt_func: save": "safetensors: save_file, checksum, fsync",
    "tnt_func: restore": "safetensors: load_file, checksum",
}


def crc32(tensor: torch.Tensor) -> int:
    return zlib.crc32(memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())))


def flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def contestants(state: tnt.State, folder: Path) -> dict[str, Callable[[], object]]:
    """Each once a round; what reads comes after what writes."""

    def save() -> None:
        shutil.rmtree(folder / "tnt", ignore_errors=True)
        tnt.checkpoint.save(folder / "tnt", state)

    def torch_save() -> None:
        (folder / "torch").unlink(missing_ok=True)
        torch.save(state.params, folder / "torch")
        flush(folder / "torch")

    found: dict[str, Callable[[], object]] = {
        "tnt_func: save": save,
        "tnt_func: restore": lambda: tnt.checkpoint.restore(folder / "tnt", state),
        "torch.save, fsync": torch_save,
        "torch.load": lambda: torch.load(folder / "torch", weights_only=True),
        "copying the tensors": lambda: [leaf.clone() for leaf in state.params.values()],
    }
    if importlib.util.find_spec("safetensors") is None:
        return found
    from safetensors.torch import load_file, save_file

    def library_save() -> None:
        (folder / "library").unlink(missing_ok=True)
        for leaf in state.params.values():
            crc32(leaf)
        save_file(state.params, folder / "library")
        flush(folder / "library")

    found["safetensors: save_file, checksum, fsync"] = library_save
    found["safetensors: load_file, checksum"] = lambda: [crc32(leaf) for leaf in load_file(folder / "library").values()]
    found["safetensors: load_file, checksum, copy"] = lambda: [
        (crc32(leaf), leaf.clone()) for leaf in load_file(folder / "library").values()
    ]
    return found


def timed(work: Callable[[], object]) -> float:
    gc.collect()
    begin = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - begin
    del result
    return seconds


def stall(state: tnt.State, folder: Path) -> tuple[float, float]:
    """Seconds that the observer's call takes when an asynchronous save begins, and until it is on the disk."""
    saving = tnt.observers.checkpointer(folder / "asynchronous", every_n_steps=1, asynchronous=True)
    done = tnt.Event("train", "step_done", state.replace(progress=state.progress.put("train", after())), resumable=True)
    saving(tnt.Event("train", "start", state))
    begin = time.perf_counter()
    saving(done)
    stalled = time.perf_counter() - begin
    saving.close()
    whole = time.perf_counter() - begin
    shutil.rmtree(folder / "asynchronous")
    return stalled, whole


def after() -> tnt.Progress:
    return tnt.Progress().after_step()


def line(name: str, seconds: list[float], size: float, ratios: list[float]) -> str:
    middle = statistics.median(seconds)
    shown = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})" if ratios else ""
    return f"| {name:<40} | {middle:6.2f} | {size / middle / 1e9:5.2f} | {shown:<20} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--directory", help="on the disk to measure; the system's for temporary files if not given")
    given = parser.parse_args()
    torch.set_num_threads(1)
    side = given.megabytes * 1_000_000 // 4 // LEAVES // 1024 * 1024
    state = tnt.State(params={f"layer{i}.weight": torch.randn(side) for i in range(LEAVES)}, key=tnt.key(0))
    size = sum(leaf.nbytes for leaf in state.params.values())
    times: dict[str, list[float]] = {}
    stalls = list[tuple[float, float]]()
    with tempfile.TemporaryDirectory(dir=given.directory) as name:
        every = contestants(state, Path(name))
        for turn in range(given.rounds + 1):
            writers = [name for name in every if "save" in name]
            readers = [name for name in every if "save" not in name]
            for contestant in [*random.sample(writers, len(writers)), *random.sample(readers, len(readers))]:
                seconds = timed(every[contestant])
                if turn:
                    times.setdefault(contestant, []).append(seconds)
            stalls.append(stall(state, Path(name)))
    print(f"{size / 1e6:.0f} MB in {LEAVES} tensors, medians of {given.rounds} rounds\n")
    print("| | s | GB/s | throughput of the peer's |\n|---|---|---|---|")
    for contestant, seconds in times.items():
        peer = times.get(BARS.get(contestant, ""), [])
        print(line(contestant, seconds, size, [b / a for a, b in zip(seconds, peer, strict=False)]))
    stalled, whole = (statistics.median(pair[i] for pair in stalls) for i in (0, 1))
    print(f"\nan asynchronous save stalls training for {1e3 * stalled:.1f} ms and is on the disk after {whole:.2f} s")

"""Whether verify passes what is honest and names what is not, in this process and from the shell."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from replay_runs import FIT, FIT_OPTIONS, LOADER, OPTIONS, START, TRAIN, trained

import tnt_func as tnt
from tnt_func.errors import UsageError
from tnt_func.replay import Record, Verdict, record, verify
from tnt_func.replay.shell import main

EACH: dict[str, Any] = {"digest_every_n_steps": 1, "checkpoint_every_n_steps": 4}
HERE = Path(__file__).parent


def verdict(directory: Path, **more: Any) -> Verdict:
    given = {"unit": TRAIN, "state": START, "data": LOADER, **OPTIONS, **more}
    return verify(directory, **given)


def rewritten(directory: Path, at: int, change: Callable[[bytes], bytes]) -> None:
    """One line of a record altered."""
    path = directory / "record.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[at] = change(lines[at])
    path.write_bytes(b"".join(lines))


def row(directory: Path, **wanted: Any) -> int:
    rows = enumerate(Record.read(directory).rows)
    return next(i for i, row in rows if all(getattr(row, name) == value for name, value in wanted.items()))


def test_an_honest_run_passes(tmp_path: Path):
    trained(tmp_path, **EACH)
    found = verdict(tmp_path)
    assert found.ok and found.segments == (5, 5) and not found.unchecked and not found.notes
    # Fifteen steps, and the five checkpoints before and after them.
    assert found.digests == 15 + 5 + 4
    assert str(found).endswith("the run gives what was recorded")


def test_an_honest_fit_passes(tmp_path: Path):
    options = dict(FIT_OPTIONS)
    tnt.fit(FIT, START, LOADER, options.pop("eval_data"), **options, observers=[record(tmp_path, **EACH)])
    assert verify(tmp_path, FIT, START, LOADER, **FIT_OPTIONS).ok
    other = {**FIT_OPTIONS, "evaluate_every_n_steps": 3}
    found = verify(tmp_path, FIT, START, LOADER, **other)
    assert found.problems[0] == "step 2, epoch 0: another eval.gap"


def test_an_honest_run_passes_whatever_its_hooks_and_cadences(tmp_path: Path):
    def clamped(state: tnt.State) -> tnt.State:
        return state.replace(params={**state.params, "b": state.params["b"].clamp(min=0.5)})

    unit = replace(FIT, train_unit=replace(TRAIN, on_train_start=clamped))
    options = dict(FIT_OPTIONS)
    uneven = {**EACH, "metrics_every_n_steps": 3, "digest_every_n_steps": 2}
    tnt.fit(unit, START, LOADER, options.pop("eval_data"), **options, observers=[record(tmp_path, **uneven)])
    assert verify(tmp_path, unit, START, LOADER, **FIT_OPTIONS).problems == ()


def test_one_altered_digest_is_named(tmp_path: Path):
    trained(tmp_path, **EACH)
    digest = Record.read(tmp_path).rows[row(tmp_path, row="step", step=6)].digest
    assert digest is not None
    other = ("0" if digest[0] != "0" else "1") + digest[1:]
    rewritten(tmp_path, row(tmp_path, row="step", step=6), lambda line: line.replace(digest.encode(), other.encode()))
    (problem,) = verdict(tmp_path).problems
    assert problem.startswith("step 6, epoch 1: no leaf") and "later ones agree, so it was altered" in problem


def test_one_altered_number_is_named(tmp_path: Path):
    trained(tmp_path, **EACH)
    rewritten(tmp_path, row(tmp_path, row="step", step=6), lambda line: line.replace(b'"loss":', b'"loss":1'))
    assert verdict(tmp_path).problems == ("step 6, epoch 1: another loss",)


def test_one_altered_checkpoint_is_named(tmp_path: Path):
    trained(tmp_path, **EACH)
    name = Record.read(tmp_path).rows[row(tmp_path, row="checkpoint", step=8)].checkpoint
    path = tmp_path / "checkpoints" / str(name)
    like = tnt.prepare(TRAIN, START, OPTIONS["callbacks"])
    state = tnt.checkpoint.restore(path, like)
    tensors = path / "tensors.safetensors"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    (problem,) = verdict(tmp_path).problems
    assert problem.startswith(f"checkpoint {name}: state") and "is damaged" in problem
    # Forged, with checksums that fit.
    for file in path.iterdir():
        file.unlink()
    path.rmdir()
    tnt.checkpoint.save(path, state.replace(params={**state.params, "b": state.params["b"] + 1}))
    assert verdict(tmp_path).problems == (f"checkpoint {name}: state.params['b'] is another than when it was saved",)


@pytest.mark.parametrize("every", [1, 4])
def test_one_altered_batch_is_named(every: int, tmp_path: Path):
    data = [torch.tensor([float(i)]) for i in range(5)]
    trained(tmp_path, data=data, digest_every_n_steps=every, checkpoint_every_n_steps=every)
    found = verdict(tmp_path, data=[*data[:2], data[2] + 1e-6, *data[3:]])
    assert found.problems[0] == "step 3: the batch is another"
    assert any("state.params['w'] is another at the digest" in problem for problem in found.problems)
    assert [problem[:8] for problem in found.problems if "batch" in problem] == ["step 3: ", "step 8: ", "step 13:"]


def test_another_step_function_is_named_by_the_first_state_that_differs(tmp_path: Path):
    trained(tmp_path, **EACH, mark_batches=False)
    odd = tnt.Callback(
        name="odd", on_train_step_end=lambda s: s.replace(params={**s.params, "b": s.params["b"] + 1e-3})
    )
    found = verdict(tmp_path, callbacks=[*OPTIONS["callbacks"], odd])
    assert found.problems[0] == (
        "step 1, epoch 0: state.params['b'] is another at the digest; the state is not the recorded one"
    )


def test_what_cannot_be_equal_is_refused_with_the_reason(tmp_path: Path):
    trained(tmp_path, **EACH, fingerprint="v1")
    with pytest.raises(UsageError, match="the key's seed was 3 then and 4 now"):
        verdict(tmp_path, state=START.replace(key=tnt.key(4)))
    with pytest.raises(UsageError, match="the fingerprint of the data was 'v1' then and 'v2' now"):
        verdict(tmp_path, fingerprint="v2")
    with pytest.raises(UsageError, match="the data's type was 'DataLoader' then and 'list' now; the data's length"):
        verdict(tmp_path, data=[torch.ones(1)])
    assert verdict(tmp_path, fingerprint="v1").ok
    version = f'"torch":"{torch.__version__}"'.encode()
    rewritten(tmp_path, 0, lambda line: line.replace(version, b'"torch":"1.0"'))
    with pytest.raises(UsageError, match="torch was '1.0' then"):
        verdict(tmp_path)


def test_another_first_state_is_named_and_so_is_what_else_changed(tmp_path: Path):
    trained(tmp_path, **EACH)
    rewritten(tmp_path, 0, lambda line: line.replace(b'"threads":', b'"threads":7'))
    found = verdict(tmp_path, state=START.replace(params={**START.params, "w": torch.zeros(3)}))
    assert found.problems == ("the first state: state.params['w']: float32[3]: 3 of 3 elements differ, by at most 1",)
    assert len(found.notes) == 1 and found.notes[0].startswith("threads: 7") and found.notes[0] in str(found)


def test_a_sample_says_what_it_did_not_check(tmp_path: Path):
    trained(tmp_path, **EACH)
    found = verdict(tmp_path, sample=2)
    assert found.ok and found.segments == (2, 5)
    missed = {step for first, last in found.unchecked for step in range(first, last + 1)}
    rows = Record.read(tmp_path).rows
    for step in range(1, 16):
        rewritten(tmp_path, row(tmp_path, row="step", step=step), lambda line: line.replace(b'"loss":', b'"loss":1'))
        assert verdict(tmp_path, sample=2).ok == (step in missed)
        rewritten(tmp_path, row(tmp_path, row="step", step=step), lambda line: line.replace(b'"loss":1', b'"loss":'))
    assert Record.read(tmp_path).rows == rows and "not checked: steps" in str(found)
    assert verdict(tmp_path, sample=9).segments == (5, 5)


def test_steps_after_the_last_digest_are_not_said_to_be_checked(tmp_path: Path):
    trained(tmp_path, digest_every_n_steps=4, checkpoint_every_n_steps=100)
    rows = Record.read(tmp_path)
    end = rows.ends[row(tmp_path, row="step", step=11)]
    (tmp_path / "record.jsonl").write_bytes((tmp_path / "record.jsonl").read_bytes()[:end])
    assert verdict(tmp_path).unchecked == ((9, 11),)


# The shell


def test_the_shell_verifies_in_a_fresh_process(tmp_path: Path):
    trained(tmp_path, **EACH)
    command = [sys.executable, "-m", "tnt_func", "verify", str(tmp_path), "--run", "replay_runs:made"]
    path = {"PYTHONPATH": f"{HERE}:{HERE.parent}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE, env=path, timeout=600)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0] == "5 of 5 checkpoints restored and gone on from, 24 digests compared"


def test_the_shell_ends_with_0_1_and_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    a, b, c = (str(tmp_path / name) for name in "abc")
    trained(Path(a), **EACH, config={"lr": 0.5})
    trained(Path(b), **EACH)
    trained(Path(c), **EACH, state=START.replace(params={**START.params, "b": torch.ones(2, 2)}))
    assert main(["diff", a, b]) == 0 and capsys.readouterr().out == "the same\n"
    assert main(["diff", a, c]) == 1 and "step 0: state.params['b']: states differ" in capsys.readouterr().out
    first = "checkpoints/step-000000000000-epoch-000000"
    assert main(["diff", f"{a}/{first}", f"{c}/{first}"]) == 1
    assert "float32[2, 2]: 4 of 4 elements differ, by at most 1" in capsys.readouterr().out
    assert main(["verify", b, "--run", "replay_runs:made", "--sample", "1"]) == 0
    assert "not checked: steps" in capsys.readouterr().out
    assert main(["verify", b, "--run", "replay_runs:made_otherwise"]) == 1
    for wrong in (["diff", a, "nowhere"], ["diff", a, f"{a}/{first}"], ["inspect", "nowhere"]):
        assert main(wrong) == 2 and capsys.readouterr().err
    for wrong in ("replay_runs:nothing", "replay_runs:absent", "replay_runs", "no_such_module:made"):
        assert main(["verify", b, "--run", wrong]) == 2 and f"--run {wrong}" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["verify", b])
    assert ended.value.code == 2


def test_an_error_of_the_users_code_is_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trained(tmp_path, **EACH)
    broken = replace(TRAIN, train_step=lambda state, batch: 1 / 0)
    monkeypatch.setattr("replay_runs.TRAIN", broken)
    assert main(["verify", str(tmp_path), "--run", "replay_runs:made"]) == 2


def test_the_shell_shows_records_and_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    trained(tmp_path, **EACH, code="v3", config={"lr": 0.5})
    first = tmp_path / "checkpoints" / "step-000000000000-epoch-000000"
    assert main(["inspect", str(tmp_path), str(first)]) == 0
    shown = capsys.readouterr().out
    for line in ("code         v3", "config       {'lr': 0.5}", "steps        1 to 15", "checkpoints  0, 4, 8, 12, 15"):
        assert line in shown
    assert ".params['w']" in shown and "float32[3]" in shown and "step  epoch  loss" in shown


def test_nothing_in_a_record_is_imported_or_executed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    trained(tmp_path, **EACH)
    (tmp_path / "replay_trap.py").write_text("raise SystemExit(3)")
    (tmp_path / "__init__.py").write_text("raise SystemExit(3)")
    rewritten(tmp_path, 0, lambda line: line.replace(b'"code":null', b'"code":"__import__(\'replay_trap\')"'))
    assert main(["inspect", str(tmp_path)]) == 0 and "replay_trap" in capsys.readouterr().out
    assert main(["diff", str(tmp_path), str(tmp_path)]) == 0
    assert main(["verify", str(tmp_path), "--run", "replay_runs:made"]) == 0

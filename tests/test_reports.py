"""What a report holds: the values of the record, once each; where runs part; nothing that could run."""

import json
import math
import random
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from report_runs import UNIT, ensemble, first, recorded

import tnt_func as tnt
from tnt_func.errors import CheckpointError, UsageError, UsageTypeError
from tnt_func.observers import History, Row, csv_writer, jsonl_writer
from tnt_func.replay import Record
from tnt_func.reports import plot, report
from tnt_func.reports.comparing import first_difference
from tnt_func.reports.reading import read
from tnt_func.reports.series import averaged, bands, thinned


def numbers(path: Path) -> dict[str, Any]:
    """What a page holds for its script."""
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.DOTALL)
    return json.loads(found)


def lines(path: Path) -> dict[tuple[int, str, str, str], list[tuple[int, str]]]:
    """The points in a page by run, phase, kind and name; of values their exact text."""
    return {
        (series["run"], series["phase"], series["kind"], series["name"]): [
            (step, float(value).hex()) for step, value in zip(series["x"], series["y"], strict=True)
        ]
        for chart in numbers(path)["charts"]
        for series in chart["series"]
    }


def points(rows: Sequence[Row], run: int = 0) -> dict[tuple[int, str, str, str], list[tuple[int, str]]]:
    found: dict[Any, list[tuple[int, str]]] = {}
    for row in rows:
        for name, value in row.metrics.items():
            found.setdefault((run, row.phase, row.kind, name), []).append((row.step, float(value).hex()))
    return found


# Values


def test_values_are_those_of_the_rows(tmp_path: Path):
    history = ensemble()
    assert lines(report(history, path=tmp_path / "report.html")) == points(history)


values = st.floats() | st.integers(-(2**60), 2**60)
metrics = st.dictionaries(st.text(min_size=1, max_size=8), values, min_size=1, max_size=4)
rows = st.lists(st.tuples(st.integers(0, 50), st.sampled_from(["train", "eval", "predict"]), metrics), min_size=1)


@settings(max_examples=50)
@given(rows=rows)
def test_any_history_is_drawn_as_it_is(rows: list[Any], tmp_path_factory: pytest.TempPathFactory):
    kinds: dict[str, Any] = {"train": "step", "eval": "epoch", "predict": "epoch"}
    history = History(Row(step, 0, phase, kinds[phase], m) for step, phase, m in sorted(rows, key=lambda row: row[0]))
    path = report(history, path=tmp_path_factory.getbasetemp() / "any.html")
    assert lines(path) == points(history)
    assert plot(history).html.count("<svg") == len(plot(history).metrics)


@pytest.mark.parametrize("writer", [csv_writer, jsonl_writer])
def test_a_file_of_rows_is_drawn_as_the_history_is(writer: Any, tmp_path: Path):
    history, written = ensemble(), writer(tmp_path / f"run.{writer.__name__[:-7]}")
    written.open((0, 0))
    for row in history:
        written.write(row)
    written.close()
    there = lines(report(history, path=tmp_path / "1.html"))
    assert lines(report(next(tmp_path.glob("run.*")), path=tmp_path / "2.html")) == there
    assert lines(report(tmp_path, path=tmp_path / "3.html")) == there


def test_a_directory_has_its_record_rows_checkpoints_and_configuration(tmp_path: Path):
    recorded(tmp_path / "run")
    path = report(tmp_path / "run", path=tmp_path / "deeper" / "report.html")
    found, record = lines(path), Record.read(tmp_path / "run")
    steps = {row.step: row.numbers or {} for row in record.rows if row.row == "step"}
    assert found[0, "train", "step", "loss"] == [(step, row["loss"].hex()) for step, row in steps.items()]
    assert [step for step, _ in found[0, "eval", "epoch", "loss"]] == [25, 50, 75, 100]
    assert [step for step, _ in found[0, "train", "step", "time.step"]] == list(range(5, 101, 5))
    text = path.read_text()
    digest = record.rows[-1].digest
    assert digest is not None and digest in text
    for shown in ("model.depth", "v3", "step-000000000100-epoch-000004", str(torch.__version__), "Where the time goes"):
        assert shown in text


def test_a_killed_and_resumed_run_is_one_line(tmp_path: Path):
    recorded(tmp_path / "whole")
    killed = tmp_path / "killed"
    asked = iter(range(1000))
    recorded(killed, pause_when=lambda: next(asked) == 47)
    # As SIGKILL may leave it: rows after the last checkpoint, and one torn.
    last = tnt.checkpoint.latest(killed / "checkpoints")
    assert last is not None and "46" in last.name
    shutil.rmtree(last)
    with open(killed / "rows.jsonl", "a") as file:
        file.write('{"step":50,"epoch":2,"pha')
    cut = lines(report(killed, path=tmp_path / "cut.html"))
    assert [step for step, _ in cut[0, "train", "step", "points.train.step_end"]] == list(range(5, 50, 5))
    recorded(killed)
    whole, resumed = (report(tmp_path / name, path=tmp_path / f"{name}.html") for name in ("whole", "killed"))

    def untimed(path: Path) -> dict[Any, Any]:
        return {name: found for name, found in lines(path).items() if not name[-1].startswith(("time.", "points."))}

    assert untimed(resumed) == untimed(whole)
    for name, found in lines(resumed).items():
        steps = [step for step, _ in found]
        assert steps == sorted(set(steps)), name
    assert [mark["step"] for mark in numbers(resumed)["marks"] if mark["kind"] == "resumed"] == [40]


def test_an_evaluation_is_drawn_where_it_was_not_again_at_the_epoch_that_follows(tmp_path: Path):
    observers = [tnt.replay.record(tmp_path / "run")]
    tnt.fit(UNIT, first(), [1.0] * 5, [1.0], max_epochs=2, evaluate_every_n_steps=3, observers=observers)
    found = lines(report(tmp_path / "run", path=tmp_path / "report.html"))
    assert [step for step, _ in found[0, "eval", "epoch", "loss"]] == [3, 6, 9]


def test_the_same_runs_give_the_same_bytes(tmp_path: Path):
    one, two = (report(ensemble(), path=tmp_path / f"{n}.html").read_bytes() for n in (1, 2))
    assert one == two


# Downsampling


@given(st.lists(st.floats(), min_size=20, max_size=120), st.integers(8, 60))
def test_thinning_keeps_ends_extremes_and_what_is_not_finite(column: list[float], points: int):
    kept = thinned([torch.tensor(column, dtype=torch.float64)], points)
    assert kept == sorted(set(kept)) and {0, len(column) - 1} <= set(kept)
    left, finite = [column[at] for at in kept], [value for value in column if math.isfinite(value)]
    assert {repr(value) for value in left if not math.isfinite(value)} == {
        repr(value) for value in column if not math.isfinite(value)
    }
    if finite:
        shown = [value for value in left if math.isfinite(value)]
        assert (min(shown), max(shown)) == (min(finite), max(finite))
    if len(finite) == len(column):
        assert len(kept) <= points + 2


def test_every_spike_of_a_long_run_is_kept(tmp_path: Path):
    steps, choice = 20_000, random.Random(0)
    spikes = sorted(choice.sample(range(1, steps), 15))
    history = History(Row(n, 0, "train", "step", {"loss": 7.0 + n if n in spikes else n % 3}) for n in range(1, steps))
    path = report(history, path=tmp_path / "report.html")
    found = dict(lines(path)[0, "train", "step", "loss"])
    assert len(found) < 5_000 and {n: (7.0 + n).hex() for n in spikes}.items() <= found.items()
    (series,) = numbers(path)["charts"][0]["series"]
    assert series["count"] == steps - 1


def test_the_smoothed_curve_of_a_long_run_is_made_of_means_of_all_its_values():
    values = torch.arange(1000, dtype=torch.float64)
    values[10] = torch.nan
    steps, means, counts = averaged(range(1000), values, 20)
    assert sum(counts) == 999
    weighted = sum(mean * count for mean, count in zip(means, counts, strict=True))
    assert weighted == pytest.approx(values.nansum().item(), rel=1e-6)
    assert steps == pytest.approx(means, rel=1e-6)


def test_many_metrics_of_a_long_run_share_the_room(tmp_path: Path):
    names = [f"group{n % 7}.metric{n}" for n in range(300)]
    history = History(Row(s, 0, "train", "step", dict.fromkeys(names, s * 1.1)) for s in range(1, 1_000))
    path = report(history, path=tmp_path / "report.html")
    assert path.stat().st_size < 5_000_000 and len(lines(path)) == 300


# Ensembles


def test_bands_are_those_of_the_members_that_are_finite():
    series = read(ensemble(), "run").series
    found = {(band.phase, band.name): band for band in bands(series)}
    band = found["train", "loss"]
    members = torch.tensor([one.values for one in series if one.phase == "train"], dtype=torch.float64).T
    for at in (0, 20, 149):
        assert band.mean[at].item() == pytest.approx(members[at].mean().item(), rel=1e-15)
        quarters = torch.tensor([0, 0.25, 0.75, 1], dtype=torch.float64)
        assert torch.equal(band.quantiles[at], members[at].quantile(quarters))
    finite = members[59][members[59].isfinite()]
    assert len(finite) == 3
    assert (band.quantiles[59, 0], band.quantiles[59, -1]) == (finite.min(), finite.max())


def test_the_record_of_an_ensemble_is_one_section(tmp_path: Path):
    members = {"loss": 1.0, "loss.std": 0.5, "loss.0": 0.5, "loss.1": 1.5, "time.step": 0.1}
    history = History(Row(n, 0, "train", "step", members) for n in (1, 2))
    charts = numbers(report(history, path=tmp_path / "report.html"))["charts"]
    assert [(chart["name"], chart["group"]) for chart in charts] == [
        ("loss", ""),
        ("loss.std", ""),
        ("time.step", "time"),
    ]
    assert [series["name"] for series in charts[0]["series"]] == ["loss", "loss.0", "loss.1"]
    assert [band["mean"] for band in charts[0]["bands"]] == [[1.0, 1.0]]


def test_numbered_hyperparameters_are_no_members(tmp_path: Path):
    history = History([Row(1, 0, "train", "step", {"optim.betas.0": 0.9, "optim.betas.1": 0.999})])
    (chart,) = numbers(report(history, path=tmp_path / "report.html"))["charts"]
    assert chart["bands"] == [] and [series["label"] for series in chart["series"]] == ["0", "1"]


# Comparison


def test_recorded_runs_are_compared_with_the_first(tmp_path: Path):
    for name, lr in (("a", 0.1), ("again", 0.1), ("b", 0.2)):
        recorded(tmp_path / name, lr=lr)
    path = report(*(tmp_path / name for name in ("a", "again", "b")), path=tmp_path / "report.html")
    text = path.read_text()
    assert "the same as a in all that both have, up to step 100" in text
    assert "state.opt_state[&#x27;lr&#x27;]: states differ" in text
    assert '<tr class="differs"><td>lr</td><td>0.1</td><td>0.1</td><td>0.2</td></tr>' in text
    assert '<tr class="differs"><td>model.depth' not in text
    (mark,) = numbers(path)["marks"]
    assert (mark["run"], mark["step"]) == (2, 0)
    assert {run for run, *_ in lines(path)} == {0, 1, 2}


def test_rows_are_compared_by_what_is_not_measured():
    rows = [Row(n, 0, "train", "step", {"loss": 1.0, "nan": math.nan, "time.step": 0.1}) for n in range(1, 6)]
    other = [row._replace(metrics={**row.metrics, "time.step": 0.2}) for row in rows]
    a, b = read(History(rows), "a"), read(History(other), "b")
    assert first_difference(a, b) is None
    other[3] = other[3]._replace(metrics={"loss": 1.5})
    found = first_difference(a, read(History(other), "b"))
    assert found is not None and (found.step, found.said) == (4, "train loss: 1 and 1.5")


def test_runs_have_names_of_their_own(tmp_path: Path):
    history = ensemble()
    for names, wanted in ((None, ["run 1", "run 2"]), (["x", "y"], ["x", "y"])):
        assert numbers(report(history, history, path=tmp_path / "r.html", names=names))["runs"] == wanted
    for parent in ("one", "two"):
        recorded(tmp_path / parent / "run")
    found = numbers(report(tmp_path / "one/run", tmp_path / "two/run", path=tmp_path / "r.html"))["runs"]
    assert [name[-7:] for name in found] == ["one/run", "two/run"]


# What is wrong


def test_the_shares_of_the_points_make_up_all_the_time(tmp_path: Path):
    rows = [
        Row(n, 0, "train", "step", {"points.train.fetched": 0.5, "points.train.step_end": 1.0 + (n == 4)})
        for n in (2, 4)
    ]
    text = report(History(rows), path=tmp_path / "report.html").read_text()
    cells = re.findall(r'</i>([^<]*)</td><td class="number">([^<]*)</td><td class="number">([^<]*)</td>', text)
    assert cells == [("train: waiting for data", "2", "25.0%"), ("train: step and on_train_step_end", "6", "75.0%")]
    (chart,) = numbers(tmp_path / "report.html")["charts"]
    assert [series["label"] for series in chart["series"]] == ["train.fetched", "train.step_end"]
    report(History(rows), History(rows), path=tmp_path / "report.html")
    assert len(numbers(tmp_path / "report.html")["charts"]) == 2


def test_what_a_stranger_wrote_cannot_run(tmp_path: Path):
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\u2028'\""
    history = History([Row(1, 0, "train", "step", {evil: 1.0, f"{evil}.0": math.nan, f"{evil}.1": 2.0})])
    config = {evil: {evil: [evil]}}
    unit = tnt.TrainUnit(train_step=lambda state, batch: (state, {evil: 1.0}))
    record = tnt.replay.record(tmp_path / "run", config=config, code=evil, fingerprint=evil)
    tnt.train(unit, tnt.State(params={evil: torch.ones(1)}, key=tnt.key(0)), [1], max_epochs=1, observers=[record])
    path = report(tmp_path / "run", history, path=tmp_path / "report.html", names=[evil, "b"], title=evil)
    text = path.read_text()
    assert text.count("<script") == 2 and "<img" not in text
    assert evil in numbers(path)["runs"]
    assert "<script" not in plot(history).html and "<img" not in plot(history).html


def test_what_is_no_run_is_refused(tmp_path: Path):
    (tmp_path / "notes.csv").write_text("a,b\n1,2\n")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "other.jsonl").write_text("[1]\n")
    with pytest.raises(UsageError, match="has no rows of a run"):
        report(tmp_path, path=tmp_path / "report.html")
    with pytest.raises(UsageError, match="is no directory"):
        report(tmp_path / "nowhere", path=tmp_path / "report.html")
    with pytest.raises(UsageError, match="is no directory"):
        report(tmp_path / "notes.csv", path=tmp_path / "report.html")
    with pytest.raises(UsageError, match="given no run"):
        report()
    with pytest.raises(UsageError, match="has no rows to draw"):
        report(History())
    with pytest.raises(UsageError, match="1 runs and the names"):
        report(ensemble(), names=["a", "b"])
    with pytest.raises(UsageTypeError, match="row 0 is an int"):
        report([1, 2])
    with pytest.raises(UsageTypeError):
        report(3)  # pyright: ignore
    with pytest.raises(UsageError, match=r"the steps of a run never fall"):
        report([*ensemble(), *ensemble()])
    with pytest.raises(UsageTypeError, match="several runs one by one"):
        report([tmp_path])  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match=r"which is a directory; .* Write path='.*report\.html'"):
        report(ensemble(), path=tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_run_that_has_no_row_yet_and_the_record_of_another_program_are_no_report(tmp_path: Path):
    record = tmp_path / "record.jsonl"
    record.write_bytes(b"")
    with pytest.raises(UsageError, match="has no rows of a run yet"):
        report(tmp_path, path=tmp_path / "report.html")
    for text in (b'{"loss": 1}\n', b'{"loss": 1}\n{"loss": 2}\n'):
        record.write_bytes(text)
        with pytest.raises(CheckpointError, match=r"line 1 of .* is damaged: .* record to another directory"):
            report(tmp_path, path=tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_two_runs_in_one_directory_are_refused(tmp_path: Path):
    for name, loss in (("a", 1.0), ("b", 2.0)):
        writer = jsonl_writer(tmp_path / f"{name}.jsonl")
        writer.open((0, 0))
        writer.write(Row(1, 0, "train", "step", {"loss": loss}))
        writer.close()
    with pytest.raises(UsageError, match="differ in train loss at step 1, so they are of two runs"):
        report(tmp_path)


def test_damage_is_said(tmp_path: Path):
    recorded(tmp_path)
    manifest = next((tmp_path / "checkpoints").iterdir()) / "checkpoint.json"
    manifest.write_text(manifest.read_text().replace("0", "1"))
    assert "is damaged: its checksum differs" in report(tmp_path, path=tmp_path / "report.html").read_text()
    rows = (tmp_path / "rows.jsonl").read_text().splitlines(keepends=True)
    for text in ('{"step":\n', '{"step":1,"epoch":0,"phase":"x","kind":"step","metrics":{}}\n'):
        (tmp_path / "rows.jsonl").write_text("".join([*rows[:3], text, *rows[3:]]))
        with pytest.raises(UsageError, match="begins as the rows of a run do, and goes on otherwise"):
            report(tmp_path)
    (tmp_path / "rows.jsonl").unlink()
    record = (tmp_path / "record.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "record.jsonl").write_text("".join([*record[:5], "x\n", *record[5:]]))
    with pytest.raises(CheckpointError, match="line 6 .* is damaged"):
        report(tmp_path)


# Plots and the shell


def test_a_plot_is_of_the_metrics_named(tmp_path: Path):
    recorded(tmp_path)
    assert plot(tmp_path).metrics == ("loss", "spike")
    assert repr(plot(tmp_path, "time.step", "loss")) == "Plot(time.step, loss)"
    drawn = plot(ensemble())._repr_html_()
    assert drawn.count("<polygon") == 2 and "<script" not in drawn
    with pytest.raises(UsageError, match="'accuracy'.* was given; the run has loss, spike"):
        plot(tmp_path, "accuracy")


def test_the_shell_writes_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    from tnt_func.replay.shell import main
    from tnt_func.reports.shell import command

    recorded(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    assert main(["report", "a"], command) == 0
    assert main(["report", "a", "a", "--names", "one", "two", "-o", "both.html"], command) == 0
    assert capsys.readouterr().out.split() == ["report.html", "both.html"]
    assert numbers(tmp_path / "both.html")["runs"] == ["one", "two"]
    assert main(["report", "nowhere"], command) == 2
    assert "UsageError" in capsys.readouterr().err
    (tmp_path / "file").write_text("kept")
    assert main(["report", "a", "-o", "file/report.html"], command) == 2
    said = capsys.readouterr().err
    assert said.startswith("CheckpointError: the report file/report.html could not be written: ")
    assert said.endswith("-o report.html in the shell.\n") and (tmp_path / "file").read_text() == "kept"

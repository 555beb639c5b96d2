"""One HTML file that shows a run, or several beside each other, and needs nothing else to be opened.

The numbers are in the page as JSON, exact, and a script in it draws them. Its content security policy lets that script
run and no other, and no request leave the page; all text is escaped, so the report of a stranger's run is safe to open.

Laws:
    The same runs give the same bytes. The values in a page are those of the runs; of long series the page has about
    `POINTS_OF_A_PAGE` in all, extremes and what is not finite always among them.
"""

import base64
import hashlib
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch

from tnt_func.errors import CheckpointError, UsageError
from tnt_func.reports.comparing import Parting, first_difference
from tnt_func.reports.reading import Run, read
from tnt_func.reports.series import HYPERPARAMETERS, POINTS, Band, Series, averaged, bands, thinned
from tnt_func.reports.tables import overview, parting_of, provenance, times
from tnt_func.types import typed

POINTS_OF_A_PAGE, POINTS_OF_A_LINE, FEWEST = 80_000, 4_000, 60
HUES = 8
SECTIONS = {
    "": "Metrics",
    HYPERPARAMETERS: "Hyper-parameters",
    "throughput": "Throughput",
    "time": "Time, in seconds a step",
    POINTS: "Time of every point, in seconds a step",
    "system": "Hardware",
    "gpu": "GPU",
}
"""The titles of the groups that the library itself writes, in their order; any other group has its own name."""


@typed
def report(
    *runs: str | os.PathLike[str] | Sequence[Any],
    path: str | os.PathLike[str] = "report.html",
    names: Sequence[str] | None = None,
    title: str | None = None,
) -> Path:
    """Write a report of a run, or of several compared with the first, as one HTML file.

    It shows the metrics of training and evaluation, raw and smoothed, with the spread of an ensemble's members,
    "loss.0", "loss.1" and so on, as a band; hyper-parameters; throughput, waiting for data and hardware where they were
    measured; where the time goes; configuration, digests and checkpoints; and of several runs the first step at which
    they differ.

    Args:
        runs: directories of runs, with what `tnt.replay.record`, `jsonl_writer`, `csv_writer` and `checkpointer` wrote
            there; single files of rows; or a `History`.
        path: of the file; what is there is replaced.
        names: of the runs, as shown; otherwise those of their directories.
        title: of the page; otherwise out of the names.

    Returns:
        The path.

    Raises:
        UsageError: no run is given, a directory has nothing of a run, names do not match, or the path is a directory.
        CheckpointError: a record is damaged, or the file cannot be written.

    Example:
        >>> import tempfile
        >>> import tnt_func as tnt
        >>> unit = tnt.TrainUnit(train_step=lambda state, batch: (state, {"loss": batch}))
        >>> history = tnt.observers.History()
        >>> observers = [tnt.observers.recorder(history, every_n_steps=1)]
        >>> _ = tnt.train(unit, tnt.State(params=0, key=tnt.key(0)), [2.0, 1.0], max_epochs=3, observers=observers)
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     report(history, path=f"{directory}/report.html").name
        'report.html'
    """
    if not runs:
        raise UsageError('report() was given no run. Write report("runs/7"), or report(history).')
    shown = _names(runs, names)
    read_runs = [read(source, name) for source, name in zip(runs, shown, strict=True)]
    path = Path(path)
    if path.is_dir():
        raise UsageError(
            f"path={str(path)!r} was given, which is a directory; a report is one file. Write "
            f"path={str(path / 'report.html')!r}."
        )
    content = page(read_runs, title)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    except OSError as error:
        raise CheckpointError(
            f"the report {path} could not be written: {error.strerror}. Make room, or give a path that can be written "
            "to: path='report.html', or -o report.html in the shell."
        ) from error
    return path


def _names(runs: Sequence[Any], names: Sequence[str] | None) -> list[str]:
    if names is not None:
        if len(names) != len(runs) or len(set(names)) != len(names):
            raise UsageError(
                f"report was given {len(runs)} runs and the names {list(names)}. Give each one of its own."
            )
        return list(names)
    paths = [Path(run) if isinstance(run, str | os.PathLike) else None for run in runs]
    found = ["run" if path is None else path.stem if path.is_file() else path.resolve().name for path in paths]
    for number, (path, count) in enumerate(zip(paths, map(Counter(found).get, found), strict=True)):
        if count != 1:
            found[number] = f"run {number + 1}" if path is None else str(path)
    return [name if found.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(found, 1)]


def page(runs: Sequence[Run], title: str | None = None) -> str:
    """The HTML of a report."""
    partings = [first_difference(runs[0], run) for run in runs[1:]]
    charts = _charts(runs)
    data = {"runs": [run.name for run in runs], "charts": charts, "marks": _marks(runs, partings)}
    # In a script's text "</script" and "<!--" would count.
    numbers = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    script, style = (Path(__file__).with_suffix(kind).read_text("utf-8") for kind in (".js", ".css"))
    policy = (
        f"default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; "
        f"script-src '{_hash(script)}'; style-src '{_hash(style)}'"
    )
    name = title or (runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared")
    first, *others = _sections(charts, several=len(runs) > 1) or [""]
    parts = [parting_of(runs, partings), first, overview(runs), *others, times(runs), provenance(runs)]
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{escape(name)}</title>
<style>{style}</style>
</head>
<body>
<main>
<header>
<h1>{escape(name)}</h1>
<p class="quiet">{" · ".join(_length(run, alone=len(runs) == 1) for run in runs)}</p>
</header>
{_tools(runs) if charts else ""}
{"".join(parts)}
<footer>
Written by tnt_func {sys.modules["tnt_func"].__version__}. Drag across a chart to look closer, double-click to go back.
</footer>
</main>
<script type="application/json" id="data">{numbers}</script>
<script>{script}</script>
</body>
</html>
"""


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _length(run: Run, *, alone: bool) -> str:
    length = f"{run.steps:,} step{'s' * (run.steps != 1)}, {run.epochs:,} epoch{'s' * (run.epochs != 1)}"
    return length if alone else f"{escape(run.name)}: {length}"


def _tools(runs: Sequence[Run]) -> str:
    chips = [
        f'<button type="button" data-run="{number}" aria-pressed="true"><i class="swatch h{number % HUES}"></i>'
        f"{escape(run.name)}</button>"
        for number, run in enumerate(runs)
    ]
    return f"""<div class="tools">
{f'<div class="chips">{"".join(chips)}</div>' if len(runs) > 1 else ""}
<label>Smoothing <input type="range" id="smoothing" min="0" max="100" value="25"></label>
<label><input type="checkbox" id="log"> Logarithmic</label>
<label title="a hundredth of the values at either end"><input type="checkbox" id="clip"> Clip outliers</label>
<button type="button" id="reset" hidden>Whole run</button>
</div>"""


def _sections(charts: Sequence[Mapping[str, Any]], *, several: bool) -> list[str]:
    """The figures that the script fills, a section for every group."""
    groups: dict[str, list[str]] = {group: [] for group in SECTIONS}
    # What never changes comes last in its section.
    for number, chart in sorted(enumerate(charts), key=lambda pair: pair[1]["constant"]):
        group, odd = chart["group"], chart["odd"]
        name = chart["name"].removeprefix(f"{group}.") if group else chart["name"]
        note = f'<p class="odds">{escape(odd)}</p>' if odd else ""
        groups.setdefault(group, []).append(
            f'<figure data-chart="{number}"><figcaption><span title="{escape(chart["name"])}">{escape(name)}</span>'
            f'<span class="legend"></span></figcaption>{note}<div class="plot"></div></figure>'
        )
    own = sorted(groups, key=lambda group: group in SECTIONS and group not in ("", HYPERPARAMETERS))
    found = list[str]()
    for group in filter(groups.get, own):
        title, inside = escape(SECTIONS.get(group, group)), f'<div class="charts">{"".join(groups[group])}</div>'
        small = several if group == POINTS else group != ""
        folded = f"<details><summary>{len(groups[group])} charts</summary>{inside}</details>"
        shown = folded if several and group == POINTS else inside
        found.append(f"<section{' class=minor' * small}><h2>{title}</h2>{shown}</section>")
    return found


def _marks(runs: Sequence[Run], partings: Sequence[Parting | None]) -> list[dict[str, Any]]:
    """Vertical lines: where runs part, and where a run was resumed."""
    parted = [
        {"step": at.step, "run": run, "kind": "parting", "text": f"{runs[run].name} parts from {runs[0].name}"}
        for run, at in enumerate(partings, 1)
        if at is not None
    ]
    resumed = [
        {"step": step, "run": number, "kind": "resumed", "text": f"{run.name} was resumed after step {step}"}
        for number, run in enumerate(runs)
        for step in run.resumed
    ]
    return parted + resumed


def _charts(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """What the script draws: a chart for every metric, of all runs and phases."""
    count = sum(len(run.series) for run in runs)
    points = max(FEWEST, min(POINTS_OF_A_LINE, POINTS_OF_A_PAGE // max(count, 1)))
    found: dict[str, dict[str, Any]] = {}
    for number, run in enumerate(runs):
        for one in run.series:
            # The points of one run are compared with each other, those of several each with its like.
            named = one.name if one.group == POINTS and len(runs) > 1 else one.chart
            blank: dict[str, Any] = {"name": named, "group": one.group, "noisy": one.group != HYPERPARAMETERS}
            blank |= {"constant": True, "odd": "", "series": [], "bands": []}
            chart = found.setdefault(named, blank)
            look = _look(one, number, run.name if len(runs) > 1 else None, len(chart["series"]))
            chart["series"].append({**_series(one, points), "member": one.member, **look})
            chart["constant"] &= one.values.count(one.values[0]) == len(one.values)
            chart["odd"] = "; ".join(filter(None, (chart["odd"], _odd(one, look["label"]))))
        for band in bands(run.series):
            look = _look(band, number, run.name if len(runs) > 1 else None, 0)
            found[band.name]["bands"].append({**_band(band, points), **look})
    for chart in found.values():
        if found.get(chart["group"], chart)["group"] == "":
            chart["group"] = ""  # "loss.std" stands beside "loss".
    return list(found.values())


def _look(line: Series | Band, run: int, name: str | None, before: int) -> dict[str, Any]:
    """How a line is drawn and called: alone, phases have their hues; where there are several runs, these have.

    Args:
        line: what is drawn.
        run: its number.
        name: its name, where there are several.
        before: how many lines the chart has already.
    """
    dash = {"step": "", "epoch": "often" if line.phase == "train" else "dashed" if name else ""}[line.kind]
    said = line.phase if line.kind == "step" or line.phase != "train" else "train, whole epochs"
    hue = {"train": 0, "eval": 1, "predict": 2}[line.phase] if name is None else run
    numbered = isinstance(line, Series) and line.chart != line.name
    if numbered:
        assert isinstance(line, Series)
        suffix = line.name.removeprefix(f"{line.chart}.")
        said = f"{said} {suffix}" if line.member is not None else suffix
        hue, dash = (before, "") if name is None and line.member is None else (hue, dash)
    legend, said = said, f"{said}, mean" if isinstance(line, Band) else said
    return {
        "run": run,
        "hue": f"h{hue % HUES}",
        "dash": dash,
        "dots": line.kind == "epoch",
        "legend": legend,
        "label": said if name is None else f"{name}, {said}",
    }


def _odd(series: Series, label: str) -> str:
    """How many values are not finite, and the first of them."""
    odd = [(step, value) for step, value in zip(series.steps, series.values, strict=True) if not math.isfinite(value)]
    if not odd:
        return ""
    step, value = odd[0]
    return f"{label}: {len(odd):,} of {len(series.values):,} not finite, first {value} at step {step:,}"


def _series(series: Series, points: int) -> dict[str, Any]:
    """A series for the script: points of it and, where there are more, means for its smoothed curve."""
    values = torch.tensor(series.values, dtype=torch.float64)
    kept = thinned([values], points)
    found: dict[str, Any] = {"phase": series.phase, "kind": series.kind, "name": series.name, "count": len(values)}
    found |= {"x": [series.steps[at] for at in kept], "y": _exact(series.values[at] for at in kept)}
    return found | ({"smooth": averaged(series.steps, values, points)} if len(kept) < len(values) else {})


def _band(band: Band, points: int) -> dict[str, Any]:
    columns = dict(zip(("mean", "low", "first", "third", "high"), (band.mean, *band.quantiles.T), strict=True))
    kept = thinned([band.mean, columns["low"], columns["high"]], points)
    found: dict[str, Any] = {"phase": band.phase, "kind": band.kind, "name": band.name, "members": band.members}
    found["x"] = [band.steps[at] for at in kept]
    return found | {name: _exact(column[kept].tolist()) for name, column in columns.items()}


def _exact(values: Any) -> list[float | str]:
    """Numbers as JSON has them; what is not finite as text."""
    return [value if math.isfinite(value) else repr(value) for value in values]

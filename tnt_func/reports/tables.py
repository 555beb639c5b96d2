"""The tables of a report, as HTML; whatever comes from a run is escaped."""

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from tnt_func.reports.comparing import Parting, last_shared
from tnt_func.reports.reading import Run
from tnt_func.reports.series import HYPERPARAMETERS, MEASURED, POINTS, Name, Series, bands

DIGESTS, CHECKPOINTS = 50, 50
"""How many of a run are listed."""


def _table(head: Iterable[Any], rows: Iterable[Sequence[Any]], *, numbers: bool = False, differ: bool = False) -> str:
    """A table in a box that scrolls by itself; where asked for, rows whose cells after the first differ are marked."""
    of_number = ' class="number"' if numbers else ""
    header = "".join(f"<th{of_number if at else ''}>{escape(str(cell))}</th>" for at, cell in enumerate(head))
    body = []
    for row in rows:
        marked = ' class="differs"' if differ and len(set(row[1:])) > 1 else ""
        cells = "".join(f"<td{of_number if at else ''}>{escape(str(cell))}</td>" for at, cell in enumerate(row))
        body.append(f"<tr{marked}>{cells}</tr>")
    return f'<div class="scroll"><table><thead><tr>{header}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{title}</h2>{''.join(parts)}</section>" if any(parts) else ""


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def overview(runs: Sequence[Run]) -> str:
    """What every metric came to."""
    found = [{one.key: one for one in _results(run)} for run in runs]
    keys = list(dict.fromkeys(key for series in found for key in series))
    named = [_said(key) for key in keys]
    if len(runs) > 1:
        head = ["last value of", *(run.name for run in runs)]
        lasts = [[_number(s[key].values[-1] if key in s else None) for s in found] for key in keys]
        rows = [[name, *last] for name, last in zip(named, lasts, strict=True)]
    else:
        head = ["", "last", "least", "at step", "greatest", "at step"]
        rows = [[name, *_extremes(found[0][key])] for name, key in zip(named, keys, strict=True)]
    return _section("Results", _table(head, rows, numbers=True) if rows else "")


def _results(run: Run) -> list[Series]:
    """What is neither measured nor set, of an ensemble the means."""
    shown = [one for one in run.series if one.group not in (*MEASURED, HYPERPARAMETERS)]
    alone = [one for one in shown if one.member is None]
    known = {one.key for one in alone}
    return alone + [
        Series(band.phase, band.kind, f"{band.name} (mean of {band.members})", band.steps, band.mean.tolist())
        for band in bands(shown)
        if Name(band.phase, band.kind, band.name) not in known
    ]


def _said(key: Name) -> str:
    return f"{key.metric}, {key.phase}{' step' if key.kind == 'step' else ''}"


def _extremes(series: Series) -> list[str]:
    finite = [
        (value, step) for value, step in zip(series.values, series.steps, strict=True) if abs(value) < float("inf")
    ]
    ends = [min(finite, default=None), max(finite, default=None, key=lambda pair: pair[0])]
    cells = [cell for end in ends for cell in (("", "") if end is None else (_number(end[0]), f"{end[1]:,}"))]
    return [_number(series.values[-1]), *cells]


def parting_of(runs: Sequence[Run], partings: Sequence[Parting | None]) -> str:
    """Where every run parts from the first."""
    if len(runs) == 1:
        return ""
    rows = [
        [run.name, f"{at.step:,}", at.said]
        if at is not None
        else [
            run.name,
            "none",
            f"the same as {runs[0].name} in all that both have, up to step {last_shared(runs[0], run):,}",
        ]
        for run, at in zip(runs[1:], partings, strict=True)
    ]
    return _section("First difference", _table(["run", f"first step unlike {runs[0].name}", "what differs"], rows))


def times(runs: Sequence[Run]) -> str:
    """Where the time of every run went: its points, or waiting for data, steps and the rest."""
    parts = []
    for run in runs:
        taken = _taken(run)
        total = sum(taken.values())
        if total <= 0:
            continue
        bar, left = [], 0.0
        for number, (name, seconds) in enumerate(taken.items()):
            width = 100 * seconds / total
            bar.append(
                f'<rect class="h{number % 8}" x="{left:.3f}%" width="{width:.3f}%" height="100%">'
                f"<title>{escape(name)}: {seconds:.4g} s, {width:.1f}%</title></rect>"
            )
            left += width
        rows = "".join(
            f'<tr><td><i class="swatch h{number % 8}"></i>{escape(name)}</td><td class="number">{seconds:.4g}</td>'
            f'<td class="number">{100 * seconds / total:.1f}%</td></tr>'
            for number, (name, seconds) in enumerate(taken.items())
        )
        title = f"<h3>{escape(run.name)}</h3>" if len(runs) > 1 else ""
        parts.append(
            f'<div class="card">{title}<svg class="bar" role="img" aria-label="shares of the time">{"".join(bar)}</svg>'
            f'<table><thead><tr><th></th><th class="number">seconds</th><th class="number">share</th></tr></thead>'
            f"<tbody>{rows}</tbody></table></div>"
        )
    return _section("Where the time goes", f'<div class="cards">{"".join(parts)}</div>' if parts else "")


def _taken(run: Run) -> dict[str, float]:
    """Seconds by what took them: numbers of a step times the steps since the row before."""
    found = {series.name: series for series in run.series if (series.phase, series.kind) == ("train", "step")}
    names = {name: _spent(*name.split(".")[1:]) for name in found if name.startswith(f"{POINTS}.")}
    names = names or {"time.data_wait": "waiting for data", "time.step": "steps", "time.overhead": "the rest"}
    return {
        said: sum(
            value * (step - before)
            for value, step, before in zip(
                found[name].values, found[name].steps, [0, *found[name].steps[:-1]], strict=True
            )
            if abs(value) < float("inf")
        )
        for name, said in names.items()
        if name in found
    }


def _spent(phase: str, point: str = "") -> str:
    """What the time before a point is spent on."""
    hook = f"on_{phase}_{point}"
    if point == "fetched":
        return f"{phase}: waiting for data"
    if point == "step_end":
        return f"{phase}: step and {hook}"
    return f"{phase}: until {point}" if point.endswith("done") else hook


def provenance(runs: Sequence[Run]) -> str:
    """Configuration, surroundings, digests and checkpoints."""
    several = len(runs) > 1
    names = [run.name for run in runs]
    config = _facts([_flat(run.config) for run in runs], names)
    facts = _facts([{name: fact for name, fact in run.facts.items() if fact is not None} for run in runs], names)
    digests = _digests(runs, names)
    saved = [
        [*([run.name] if several else []), name, f"{step:,}", f"{epoch:,}", f"{size:,}", said]
        for run in runs
        for name, step, epoch, size, metrics in _some(run.checkpoints, CHECKPOINTS)
        for said in [
            metrics if isinstance(metrics, str) else ", ".join(f"{n} {_number(v)}" for n, v in metrics.items())
        ]
    ]
    head = [*(["run"] if several else []), "checkpoint", "step", "epoch", "bytes", "metrics"]
    return "".join(
        [
            f'<div class="pairs">{_section("Configuration", config)}{_section("Origin", facts)}</div>',
            _section("Digests of the state", digests),
            _section("Checkpoints", _table(head, saved) if saved else ""),
        ]
    )


def _facts(found: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """Facts by name, a column a run; rows that differ are marked."""
    keys = dict.fromkeys(key for facts in found for key in facts)
    rows = [[key, *(_text(facts[key]) if key in facts else "" for facts in found)] for key in keys]
    head = ["", *names] if len(names) > 1 else ["", "value"]
    return _table(head, rows, differ=True) if rows else ""


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _flat(config: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        inner = _flat(value, f"{before}{name}.") if isinstance(value, Mapping) and value else {}
        found |= inner or {f"{before}{name}": value}
    return found


def _digests(runs: Sequence[Run], names: Sequence[str]) -> str:
    steps = sorted({step for run in runs for step in run.digests})
    if not steps:
        return ""
    shown = _some(steps, DIGESTS)
    several = len(runs) > 1
    rows = [[f"{s:,}", *((run.digests.get(s, "")[: 12 if several else 64]) for run in runs)] for s in shown]
    note = f'<p class="quiet">{len(shown)} of {len(steps):,}</p>' if len(shown) < len(steps) else ""
    table = _table(["step", *(names if several else ["SHA-256"])], rows, differ=True)
    return f"<details{' open' * (len(shown) <= 12)}><summary>{len(steps):,} digests</summary>{note}{table}</details>"


def _some(items: Sequence[Any], count: int) -> list[Any]:
    """The items, or as many of them at even distances, the first and the last included."""
    if len(items) <= count:
        return list(items)
    return [items[round(at * (len(items) - 1) / (count - 1))] for at in range(count)]

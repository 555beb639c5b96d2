"""Small charts for notebooks: static SVG, so that a notebook shows them wherever it is opened.

Example:
    >>> from tnt_func.observers import History, Row
    >>> history = History(Row(step, 0, "train", "step", {"loss": 1 / step}) for step in (1, 2, 3))
    >>> plot(history)
    Plot(loss)
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import torch

from tnt_func.errors import UsageError
from tnt_func.reports.reading import read
from tnt_func.reports.series import HYPERPARAMETERS, MEASURED, Series, bands, thinned
from tnt_func.types import typed

WIDTH, HEIGHT, POINTS = 300, 110, 400
HUES = {"train": "#3a86c8", "eval": "#d9661f", "predict": "#18936c"}
"""Seen on white and on black."""


@dataclass(frozen=True, repr=False)
class Plot:
    """What `plot` makes: a notebook shows it as charts.

    Args:
        metrics: that are drawn.
        html: of the charts.
    """

    metrics: tuple[str, ...]
    html: str = field(repr=False)

    def __repr__(self) -> str:
        return f"Plot({', '.join(self.metrics)})"

    def _repr_html_(self) -> str:
        return self.html


@typed
def plot(run: str | os.PathLike[str] | Sequence[Any], *metrics: str) -> Plot:
    """Small charts of a run for a notebook: the last expression of a cell is shown.

    Training is blue, evaluation orange; of an ensemble's members the band is drawn, and the mean. What is not finite
    leaves a gap. `tnt.report` has the rest.

    Args:
        run: a `History`, or what `report` takes.
        metrics: names to draw, "optim.lr" say; if not given, all but hyper-parameters and what is measured.

    Raises:
        UsageError: there is nothing of the run, or no such metric.

    Example:
        >>> from tnt_func.observers import History, Row
        >>> history = History([Row(1, 0, "train", "step", {"loss": 1.0, "optim.lr": 0.1})])
        >>> plot(history, "optim.lr").html.startswith("<div")
        True
    """
    series = read(run, "the run").series
    known = {one.chart: one.group for one in series}
    chosen = metrics or tuple(name for name, group in known.items() if group not in (*MEASURED, HYPERPARAMETERS))
    if missing := [name for name in chosen if name not in known]:
        raise UsageError(
            f"plot(..., {', '.join(map(repr, missing))}) was given; the run has {', '.join(known)}. Write one of these."
        )
    charts = [_chart(name, [one for one in series if one.chart == name]) for name in chosen]
    return Plot(chosen, f'<div style="display:flex;flex-wrap:wrap;gap:12px 20px">{"".join(charts)}</div>')


def _chart(name: str, series: Sequence[Series]) -> str:
    """One metric, of every phase."""
    lines = [(one.phase, one.kind, one.steps, one.values) for one in series if one.member is None]
    areas = list[tuple[str, list[int], list[float], list[float]]]()
    for band in bands(series):
        lines.append((band.phase, band.kind, band.steps, band.mean.tolist()))
        areas.append((band.phase, band.steps, band.quantiles[:, 0].tolist(), band.quantiles[:, -1].tolist()))
    lines = lines or [(one.phase, one.kind, one.steps, one.values) for one in series]
    drawn = [values for *_, values in lines] + [column for _, _, low, high in areas for column in (low, high)]
    finite = [value for values in drawn for value in values if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    ends = [step for _, _, steps, _ in lines for step in (steps[0], steps[-1])]
    first, last = min(ends), max(ends)

    def at(step: int, value: float) -> str:
        across = (step - first) / (last - first) if last > first else 0.5
        up = (value - low) / (high - low) if high > low else 0.5
        return f"{2 + across * (WIDTH - 4):.1f} {HEIGHT - 3 - up * (HEIGHT - 6):.1f}"

    shapes = [_area(HUES[phase], steps, lower, upper, at) for phase, steps, lower, upper in areas]
    often = {phase for phase, kind, *_ in lines if kind == "step"}
    for phase, kind, steps, values in lines:
        # Beside the mean of an epoch its steps are in the background.
        faint = kind == "step" and any(p == phase and k == "epoch" for p, k, *_ in lines)
        shapes.append(_line(HUES[phase], steps, values, at, faint, thick=kind == "epoch" or phase not in often))
    both = {phase for phase, *_ in lines if {kind for p, kind, *_ in lines if p == phase} == {"step", "epoch"}}
    names = [f"{phase} {kind}" if phase in both else phase for phase, kind, *_ in lines]
    lasts = {f"{said} {line[-1][-1]:.4g}": HUES[line[0]] for said, line in zip(names, lines, strict=True)}
    legend = " ".join(f'<span style="color:{hue}">{text}</span>' for text, hue in lasts.items())
    said = escape(f"{name} over train steps {first} to {last}: {', '.join(lasts)}; from {low:.4g} to {high:.4g}")
    return (
        f'<div style="font:12px sans-serif"><b>{escape(name)}</b> {legend}<br>'
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="{said}">'
        f'<title>{said}</title><rect width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#8886"/>'
        f'{"".join(shapes)}</svg><br><span style="color:#777">steps {first:,} to {last:,}, {low:.4g} to {high:.4g}'
        "</span></div>"
    )


def _line(hue: str, steps: Sequence[int], values: Sequence[float], at: Any, faint: bool, *, thick: bool) -> str:
    path, pen = list[str](), "M"
    for index in thinned([torch.tensor(values, dtype=torch.float64)], POINTS):
        if not math.isfinite(values[index]):
            pen = "M"
            continue
        path.append(f"{pen}{at(steps[index], values[index])}")
        pen = "L"
    # A path of no length is drawn by its round ends alone.
    dots = "h0" if len(path) == 1 else ""
    look = f'stroke="{hue}" stroke-width="{1.8 if thick else 1}"{" opacity=" + repr("0.4") if faint else ""}'
    return f'<path fill="none" stroke-linecap="round" stroke-linejoin="round" {look} d="{"".join(path)}{dots}"/>'


def _area(hue: str, steps: Sequence[int], low: Sequence[float], high: Sequence[float], at: Any) -> str:
    kept = thinned([torch.tensor(column, dtype=torch.float64) for column in (low, high)], POINTS)
    kept = [index for index in kept if math.isfinite(low[index])]
    edge = [at(steps[i], high[i]) for i in kept] + [at(steps[i], low[i]) for i in reversed(kept)]
    return f'<polygon fill="{hue}" opacity="0.2" points="{" ".join(edge)}"/>'

"""Tables and pictures as text and as one self-contained HTML file."""

from __future__ import annotations

import base64
import html as html_escape
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from bayesnn import metrics, plots
from bayesnn.predictive import Predictive

Rows = Sequence[Mapping[str, Any]]
Tables = Mapping[str, tuple[Rows, Sequence[str]]]

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: 0.3rem 1rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
.table { overflow-x: auto; }
img { max-width: 100%; }
"""


def format_value(value: Any) -> str:
    """Numbers with four significant digits, a dash for None."""
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def text_table(rows: Rows) -> str:
    """Rows with the same keys as aligned text."""
    header = list(rows[0])
    lines = [header, *([format_value(row[key]) for key in header] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def bands(grid: Tensor, predictions: Mapping[str, Predictive], x: Tensor, y: Tensor) -> Figure:
    """Each model's predictive band along one input, in a grid of three columns, on the scale of the data."""
    num_rows = -(-len(predictions) // 3)
    figure = Figure(figsize=(13, 3.4 * num_rows), layout="constrained")
    axes = figure.subplots(num_rows, 3, sharex=True, sharey=True, squeeze=False)
    for axis, (name, prediction) in zip(axes.flat, predictions.items(), strict=False):
        plots.predictive_band(grid, prediction, (x, y), ax=axis)
        axis.set_title(name)
    margin = 0.6 * float(y.max() - y.min())
    axes[0, 0].set_ylim(float(y.min()) - margin, float(y.max()) + margin)
    axes[0, 0].legend(frameon=False, fontsize=8, ncols=2, loc="lower left")
    return figure


def calibration(predictions: Mapping[str, Predictive], y: Tensor) -> Figure:
    """Every model's calibration curve in one picture."""
    figure = Figure(figsize=(6, 5.4), layout="constrained")
    axis = figure.subplots()
    for name, prediction in predictions.items():
        plots.calibration_curve(*metrics.calibration_curve(prediction, y), label=name, ax=axis)
    axis.legend(frameon=False)
    return figure


def regret(best_so_far: Mapping[str, Sequence[float]]) -> Figure:
    """Best value against the number of evaluations."""
    figure = Figure(figsize=(7, 4.4), layout="constrained")
    plots.regret_curve({name: np.asarray(values) for name, values in best_so_far.items()}, ax=figure.subplots())
    return figure


def html(title: str, tables: Tables, figures: Mapping[str, Figure], appendix: Tables | None = None) -> str:
    """One HTML page without any reference outside itself: headed tables with remarks, headed pictures, more tables."""
    parts = [f"<h1>{html_escape.escape(title)}</h1>", *_html_tables(tables)]
    for heading, figure in figures.items():
        picture = _png(figure)
        alternative = html_escape.escape(heading, quote=True)
        parts.append(f'<h2>{alternative}</h2><img alt="{alternative}" src="data:image/png;base64,{picture}">')
    parts += _html_tables(appendix or {})
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{html_escape.escape(title)}</title>'
        f"<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _html_tables(tables: Tables) -> list[str]:
    parts = []
    for heading, (rows, remarks) in tables.items():
        # A wide table scrolls by itself, so that the pictures keep their width.
        parts.append(f'<h2>{html_escape.escape(heading)}</h2><div class="table">{_html_table(rows)}</div>')
        parts += [f"<p>{html_escape.escape(remark)}</p>" for remark in remarks]
    return parts


def _html_table(rows: Rows) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html_escape.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    header = list(rows[0])
    body = "".join(line([format_value(row[key]) for key in header], "td") for row in rows)
    return f"<table>{line(header, 'th')}{body}</table>"


def _png(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return base64.b64encode(buffer.getvalue()).decode("ascii")

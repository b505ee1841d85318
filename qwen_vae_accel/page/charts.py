"""Charts as PNG, and as SVG that takes its ink from the page, in light and in dark."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from io import BytesIO, StringIO
from typing import Any

from qwen_vae_accel.page.extra import optional_package
from qwen_vae_accel.page.sheet import Chart, Panel

# Seen on white and on black alike.
COLOURS = ("#e07b39", "#2f8fd0", "#3a9d5d", "#a06cc8", "#d0525a", "#17a2b8")
GREY, GOLD = "#8c8c8c", "#d9a521"
# Of every panel, in inches: its words can be read on a phone, and it is not too small on a desk.
WIDTH = 4.7
_COLUMNS = 2
_MOST_PIXELS = 620
# Inches of a PNG's title.
_TITLE = 0.5
# A colour that no chart uses, replaced by the page's own.
_INK = "#010203"
_INKED = ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color")


def png(chart: Chart, of: str) -> bytes:
    """All panels in one PNG, two in a row, below the chart's title and what it is a chart ``of``."""
    columns = min(_COLUMNS, len(chart.panels))
    starts = range(0, len(chart.panels), columns)
    heights = [max(panel.height for panel in chart.panels[start : start + columns]) for start in starts]
    with _figure(WIDTH * columns, sum(heights) + _TITLE) as figure:
        figure.suptitle(f"{chart.title}\n{of}", fontsize=11)
        parts = figure.subfigures(len(heights), columns, squeeze=False, height_ratios=heights)
        for part, panel in zip(parts.flat, chart.panels, strict=False):
            _fill(part, panel)
        data = BytesIO()
        figure.savefig(data, format="png", dpi=130)
    return data.getvalue()


def svg(panel: Panel, of: str) -> str:
    """An ``<svg>`` element as wide as its place; its name is what it is a chart ``of``, and the panel's title."""
    label = f"{of}: {panel.title}"
    # Names within an SVG are the page's names: another salt for every panel.
    salt = hashlib.sha256(label.encode(errors="replace")).hexdigest()
    with _figure(WIDTH, panel.height, {"svg.fonttype": "none", "svg.hashsalt": salt, **dict.fromkeys(_INKED, _INK)}) as figure:
        _fill(figure, panel)
        text = StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    drawn = text.getvalue()
    drawn = drawn[drawn.index("<svg") :].replace(_INK, "currentColor")
    opening = f'<svg role="img" aria-label="{escape(label, quote=True)}" style="max-width: {_MOST_PIXELS}px"'
    return drawn.replace("<svg", opening, 1)


@contextmanager
def _figure(width: float, height: float, settings: dict[str, Any] | None = None) -> Iterator[Any]:
    optional_package("matplotlib")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # Labels are texts, not formulas.
    with rc_context({"text.parse_math": False, "font.family": "sans-serif", **(settings or {})}):
        yield Figure(figsize=(width, height), layout="constrained")


def _fill(figure: Any, panel: Panel) -> None:
    axis = figure.subplots()
    axis.tick_params(labelsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    panel.draw(axis)
    figure.suptitle(panel.title, x=0.01, ha="left", fontsize=10.5)
    handles, names = axis.get_legend_handles_labels()
    if handles:
        figure.legend(handles, names, loc="outside lower center", ncol=3, fontsize=9, frameon=False)

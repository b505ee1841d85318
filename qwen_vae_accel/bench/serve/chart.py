"""The chart of ``serve-bench``: a stacked bar per request, whole on the left, without the denoising on the right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qwen_vae_accel.bench.report import optional_package
from qwen_vae_accel.bench.serve.measure import ACCELERATED, PLAIN
from qwen_vae_accel.bench.serve.report import LABELS, TITLES, Document, machine_name, tasks

_COLOURS = {
    "preprocess": "#8e5ea2",
    "encode": "#3a9d5d",
    "denoising": "#b5b5b5",
    "decode": "#1b6ca8",
    "postprocess": "#e07b39",
    "other": "#dfd7c8",
}
_WITHOUT_DENOISING = tuple(part for part in _COLOURS if part not in ("denoising", "other"))
_BAR = 0.38


def draw(document: Document) -> Any | None:
    """The matplotlib figure; None if no request succeeded."""
    optional_package("matplotlib")
    from matplotlib.figure import Figure

    good = [row for row in document["requests"] if row["error"] is None]
    if not good:
        return None
    shown = [task for task in tasks(document) if any(row["task"] == task for row in good)]
    counts = [sum(row["task"] == task for row in good) for task in shown]
    figure = Figure(figsize=(13, 1.6 + sum(0.62 * count + 0.9 for count in counts)))
    axes = figure.subplots(len(shown), 2, squeeze=False, height_ratios=[count + 0.8 for count in counts])
    for (whole, part), task in zip(axes, shown, strict=True):
        rows = [row for row in good if row["task"] == task]
        _panel(whole, rows, tuple(_COLOURS), f"{TITLES[task]}: the whole request, ms")
        _panel(part, rows, _WITHOUT_DENOISING, f"{TITLES[task]}: without denoising, ms")
    figure.suptitle(f"Each pair of bars: plain pipeline above, accelerated below. {machine_name(document)}", fontsize=11)
    shown_bars = {label: bar for axis in axes.flat for bar, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    names = [label for label in LABELS.values() if label in shown_bars]
    handles = [shown_bars[name] for name in names]
    figure.legend(handles, names, loc="lower center", ncol=len(names), fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, 0.25 / figure.get_figheight(), 1, 1))
    return figure


def _panel(axis: Any, rows: Sequence[Mapping[str, Any]], parts: Sequence[str], title: str) -> None:
    for place, row in enumerate(rows):
        for side, y in ((PLAIN, place - _BAR / 2), (ACCELERATED, place + _BAR / 2)):
            left = 0.0
            for part in parts:
                ms = row[side]["median"].get(part)
                if ms is None:
                    continue
                label = LABELS[part] if place == 0 and side == PLAIN else None
                axis.barh(y, ms, _BAR * 0.92, left, color=_COLOURS[part], label=label)
                left += max(ms, 0.0)
            axis.annotate(f"{left:.0f}", (left, y), (3, 0), textcoords="offset points", va="center", fontsize=8)
    axis.set_yticks(range(len(rows)), [row["size"] for row in rows], fontsize=9)
    axis.invert_yaxis()
    axis.margins(x=0.1)
    axis.tick_params(axis="x", labelsize=8)
    axis.set_title(title, fontsize=10, loc="left")
    axis.spines[["top", "right"]].set_visible(False)

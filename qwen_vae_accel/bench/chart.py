"""The chart of a benchmark: times by size, one panel per task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qwen_vae_accel.bench.cases import BASELINE
from qwen_vae_accel.bench.harness import Row
from qwen_vae_accel.bench.published import LABEL, milliseconds

if TYPE_CHECKING:
    from qwen_vae_accel.bench.report import BenchReport

_GREYS = ("#8c8c8c", "#bdbdbd", "#d9d9d9")
_COLOURS = ("#1b6ca8", "#e07b39", "#3a9d5d", "#8e5ea2", "#c44e52", "#17a2b8")
_PUBLISHED = "#f2c14e"


def _colour(label: str, labels: Sequence[str]) -> str:
    """Grey for diffusers as it is, colours for the rest."""
    theirs = [other for other in labels if other.startswith(BASELINE)]
    if label in theirs:
        return _GREYS[theirs.index(label) % len(_GREYS)]
    return _COLOURS[[other for other in labels if other not in theirs].index(label) % len(_COLOURS)]


def draw(report: BenchReport) -> Any | None:
    """The matplotlib figure; None if no case succeeded."""
    good = [row for row in report.rows if row.median_ms is not None]
    if not good:
        return None
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(row.task for row in good))
    labels = list(dict.fromkeys(row.label for row in good))
    sizes = list(dict.fromkeys(row.size for row in good))
    bars = len(labels) + any(milliseconds(task, size) for task in tasks for size in sizes if report.on_cuda)
    width = min(24.0, max(6.0, 1.2 + 0.42 * bars * len(sizes)))
    figure = Figure(figsize=(width, 3.6 * len(tasks) + 0.9))
    axes = figure.subplots(len(tasks), 1, squeeze=False)
    for axis, task in zip(axes[:, 0], tasks, strict=True):
        _panel(axis, report, [row for row in good if row.task == task], labels)
    handles, names = axes[0, 0].get_legend_handles_labels()
    title = str(report.facts.get("device_name") if report.on_cuda else report.facts.get("cpu"))
    figure.suptitle(f"Qwen-Image VAE, {title}", fontsize=12)
    figure.legend(handles, names, loc="lower center", ncol=min(len(names), 4), fontsize=8, frameon=False)
    lines = -(-len(names) // 4)
    figure.tight_layout(rect=(0, 0.03 + 0.035 * lines, 1, 1))
    return figure


def _panel(axis: Any, report: BenchReport, rows: Sequence[Row], labels: Sequence[str]) -> None:
    from matplotlib import rcParams

    task = rows[0].task
    sizes = list(dict.fromkeys(row.size for row in rows))
    published = [milliseconds(task, size) if report.on_cuda else None for size in sizes]
    names = [*labels, *([LABEL] if any(published) else [])]
    thickness = 0.84 / len(names)
    for index, name in enumerate(names):
        for place, size in enumerate(sizes):
            row = next((row for row in rows if row.label == name and row.size == size), None)
            ms = published[place] if name == LABEL else row.median_ms if row else None
            if ms is None:
                continue
            x = place + (index - (len(names) - 1) / 2) * thickness
            colour = _PUBLISHED if name == LABEL else _colour(name, labels)
            hatch = "///" if name == LABEL else None
            axis.bar(x, ms, thickness * 0.92, color=colour, hatch=hatch, edgecolor="white", linewidth=0.5)
            if row is not None and row.p10_ms is not None and row.p90_ms is not None:
                axis.errorbar(
                    x,
                    ms,
                    [[max(0, ms - row.p10_ms)], [max(0, row.p90_ms - ms)]],
                    color=rcParams["text.color"],
                    lw=0.8,
                    capsize=1.5,
                )
            ratio = report.speedup(row) if row else None
            text = f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}"
            if ratio and row and not row.method.startswith(BASELINE):
                text += f"\n{ratio:.1f}x"
            top = max(ms, row.p90_ms or 0.0) if row and name != LABEL else ms
            axis.annotate(text, (x, top), (0, 3), textcoords="offset points", ha="center", va="bottom", fontsize=6.5)
        axis.bar(0, 0, color=_PUBLISHED if name == LABEL else _colour(name, labels), label=name)
    axis.set_title(f"{task}: milliseconds, and times faster than diffusers eager", fontsize=9, loc="left")
    axis.set_xticks(range(len(sizes)), [str(size) for size in sizes], fontsize=8)
    axis.tick_params(axis="y", labelsize=8)
    axis.margins(y=0.16)
    axis.spines[["top", "right"]].set_visible(False)

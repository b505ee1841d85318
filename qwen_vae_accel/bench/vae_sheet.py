"""What ``bench`` leaves behind: a JSON document of its rows, and the sheet that is made of the document alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from qwen_vae_accel.bench import kernel_sheet, result
from qwen_vae_accel.bench.guide import LABEL, milliseconds
from qwen_vae_accel.bench.harness import Row, geometric_mean
from qwen_vae_accel.bench.machine import device_name, on_gpu
from qwen_vae_accel.bench.methods import BASELINE, DIRECTIONS
from qwen_vae_accel.bench.result import Document, head_of, short_ms
from qwen_vae_accel.page.charts import COLOURS, GOLD, GREY
from qwen_vae_accel.page.sheet import Answer, Block, Chart, Panel, Sheet, Table

KIND = "bench"
_GUIDE = "published_tensorrt_h100_ms"
_MARKERS = "osD^vP"
_MEAN = "geometric mean"

Values = Mapping[str, Any]


def make_document(
    rows: Sequence[Row],
    facts: Values,
    settings: Values,
    overhead: Values | None,
    command: str,
    kernels: Values | None = None,
) -> Document:
    """The document of one run, JSON values only.

    Args:
        rows: one per trial.
        facts: see :func:`qwen_vae_accel.bench.machine.machine`.
        settings: what was asked for; ``dtype`` is that of the baseline.
        overhead: see :func:`qwen_vae_accel.bench.overhead.overhead`.
        command: the command line.
        kernels: see :func:`qwen_vae_accel.bench.kernels.measure_kernels`.
    """
    base = {(row.task, row.size): row.median_ms for row in rows if row.label == f"{BASELINE} {settings.get('dtype')}"}
    found = []
    for row in rows:
        plain = base.get((row.task, row.size))
        values = {**dataclasses.asdict(row), "size": str(row.size)}
        values["speedup"] = plain / row.median_ms if plain and row.median_ms else None
        if on_gpu(facts):
            values[_GUIDE] = milliseconds(row.task, row.size)
        found.append(values)
    found_all = {"rows": found, "summary": _summary(found), "overhead": overhead, "kernels": kernels}
    return result.make_document(KIND, command, facts, settings, **found_all)


def _summary(rows: Sequence[Values]) -> list[dict[str, Any]]:
    """Geometric means of the speed-ups over sizes, by method and task."""
    ratios: dict[tuple[str, str], list[float]] = {}
    for task in _unique(row["task"] for row in rows):
        for row in rows:
            if row["task"] == task and row["speedup"] is not None:
                ratios.setdefault((_label(row), task), []).append(row["speedup"])
    return [
        {"method": label, "task": task, "speedup": geometric_mean(values), "sizes": len(values)}
        for (label, task), values in ratios.items()
    ]


def make_sheet(document: Values) -> Sheet:
    """What is shown of a document.

    Raises:
        KeyError, TypeError, ValueError: if it is damaged.
    """
    rows, settings, name = document["rows"], document["settings"], device_name(document["machine"])
    base = f"{BASELINE} {settings.get('dtype')}"
    tasks = _unique(row["task"] for row in rows)
    if set(tasks) - set(DIRECTIONS):
        raise ValueError(f"a task of {tasks} is neither of {DIRECTIONS}")
    means = _Means(document["summary"], base, _unique(row["size"] for row in rows))
    of_task = {task: [row for row in rows if row["task"] == task] for task in tasks}
    blocks: list[Block] = [
        *means.blocks(of_task),
        f"Weights: {settings.get('weights')}. Latency is from an idle device to the result: the median, and the 10th to 90th "
        f"percentile. Error: relative L2 against diffusers in float32. Speed-up: against {base} in the same run.",
        *([f"{LABEL}: what its authors published for an H100, not measured by us."] if _guide(rows) else []),
        *_remarks(document),
        *(_by_size(task, of_task[task]) for task in tasks),
        *(_everything(task, of_task[task]) for task in tasks),
        *kernel_sheet.blocks(document.get("kernels")),  # older results have none
    ]
    return Sheet(f"Qwen-Image VAE, {settings.get('dtype')}, on {name}", means.answer(), blocks, **head_of(document))


def _label(row: Values) -> str:
    return f"{row['method']} {row['dtype']}"


def _unique(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(texts))


class _Means:
    """The geometric means, as the sheet says them.

    Args:
        summary: see :func:`_summary`.
        base: label of the baseline.
        sizes: all that were asked for.
    """

    def __init__(self, summary: Sequence[Values], base: str, sizes: Sequence[str]) -> None:
        self._base = base
        self._faster = [entry for entry in summary if entry["method"] != base]
        self._labels = _unique(str(entry["method"]) for entry in self._faster)
        self._tasks = _unique(entry["task"] for entry in summary)
        self._most = max((entry["sizes"] for entry in summary), default=0)
        self._of = f"geometric means over {self._most} sizes" if len(sizes) > 1 else f"at {', '.join(sizes)}"

    def answer(self) -> Answer:
        """The fastest method that has the baseline's dtype."""
        alike = [entry for entry in self._faster if entry["method"].split()[-1] == self._base.split()[-1]]
        if not alike:
            return Answer((), "")
        best = max(alike, key=lambda entry: float(entry["speedup"]))["method"]
        figures = [(f"{entry['speedup']:.2f}x", entry["task"]) for entry in alike if entry["method"] == best]
        return Answer(figures, f"{best} against {self._base}, {self._of}")

    def blocks(self, rows: Mapping[str, Sequence[Values]]) -> list[Block]:
        """The table of means, and the chart of the speed-ups by size of ``rows`` by task; nothing without a baseline."""
        if not self._faster:
            return []
        cells = [[task, *(self._cell(task, label) for label in self._labels)] for task in self._tasks]
        most = max(row["speedup"] or 0 for of_task in rows.values() for row in of_task)
        panels = []
        for task in self._tasks:
            means = {entry["method"]: entry["speedup"] for entry in self._faster if entry["task"] == task}
            found = [row for row in rows[task] if row["speedup"] is not None]
            lines = _unique(row["size"] for row in found)
            lines = [_MEAN, *lines] if len(lines) > 1 else lines
            draw = _speedups(found, lines, self._labels, self._base, means, most)
            panels.append(Panel(f"{task}: times faster than {self._base}", 1.3 + 0.3 * len(lines), draw))
        table = Table(f"Times faster than {self._base}, {self._of}", ["", *self._labels], cells)
        return [table, Chart("Speed-up by size", panels)]

    def _cell(self, task: str, label: str) -> str:
        for entry in self._faster:
            if (entry["task"], entry["method"]) == (task, label):
                some = f" ({entry['sizes']} of {self._most})" if entry["sizes"] < self._most else ""
                return f"{entry['speedup']:.2f}x{some}"
        return ""


def _speedups(
    rows: Sequence[Values], lines: Sequence[str], labels: Sequence[str], base: str, means: Values, most: float
) -> Callable[[Any], None]:
    """Draws ``lines``, each a size or the means, with a mark per method; the axis ends at ``most``."""

    def draw(axis: Any) -> None:
        axis.axvline(1, color=GREY, lw=1.2, label=base)
        for index, label in enumerate(labels):
            values = {_MEAN: means[label]} if label in means and _MEAN in lines else {}
            values |= {row["size"]: row["speedup"] for row in rows if _label(row) == label}
            if values:
                colour, marker = COLOURS[index % len(COLOURS)], _MARKERS[index % len(_MARKERS)]
                axis.plot([*values.values()], [*map(lines.index, values)], marker, color=colour, ms=6.5, alpha=0.9, label=label)
        guide = [(ratio, lines.index(size)) for size, (_, ratio) in _guide(rows).items() if ratio is not None]
        if guide:
            axis.plot(*zip(*guide, strict=True), "D", mec=GOLD, mfc="none", mew=1.6, ms=5.5, label=LABEL)
        axis.set_yticks(range(len(lines)), lines)
        axis.set_ylim(len(lines) - 0.4, -0.6)
        axis.set_xlim(0, 1.05 * max(most, 1))
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
        axis.grid(axis="y", lw=0.5, color=GREY, alpha=0.5)

    return draw


def _remarks(document: Values) -> list[str]:
    """What the tables do not say: failures, the plugin's cost."""
    lines = [
        f"Failed: {_label(row)}, {row['task']} {row['size']}: {row['error'].splitlines()[0]}"
        for row in document["rows"]
        if row["error"]
    ]
    overhead = document["overhead"]
    if overhead is not None:
        cold = overhead.get("overhead_cold_us")  # older results have none
        more = "" if cold is None else f"; {cold:.0f} us where the network has emptied the caches"
        lines.append(f"The plugin adds {overhead['overhead_us']:.0f} us to a call{more}.")
    return lines


def _by_size(task: str, rows: Sequence[Values]) -> Table:
    """Medians: a row per size, a column per method."""
    times = {(row["size"], _label(row)): "failed" if row["median_ms"] is None else short_ms(row["median_ms"]) for row in rows}
    times |= {(size, LABEL): short_ms(ms) for size, (ms, _) in _guide(rows).items()}
    labels = _unique(label for _, label in times)
    sizes = _unique(row["size"] for row in rows)
    cells = [[size, *(times.get((size, label), "") for label in labels)] for size in sizes]
    return Table(f"{task.capitalize()}, milliseconds", ["size", *labels], cells)


def _everything(task: str, rows: Sequence[Values]) -> Table:
    """Every measurement: a row per size and method, then one of the guide's."""
    memory = any(row["peak_mib"] is not None for row in rows)
    columns = ["size", "method", "ms", "p10-p90", "speed-up", "error", "PSNR dB", "first call s"]
    columns += ["peak MiB"] if memory else []
    guide, cells = _guide(rows), []
    for size in _unique(row["size"] for row in rows):
        cells += [[size, _label(row), *_measured(row, memory)] for row in rows if row["size"] == size]
        if size in guide:
            ms, ratio = guide[size]
            cells.append([size, LABEL, f"{ms:.2f}", "", "" if ratio is None else f"{ratio:.2f}x"])
    padded = [[*cell, *[""] * (len(columns) - len(cell))] for cell in cells]
    return Table(f"{task.capitalize()}, every measurement", columns, padded, words=2, folded=True)


def _guide(rows: Sequence[Values]) -> dict[str, tuple[float, float | None]]:
    """The guide's milliseconds by size, and how many times faster they are than the baseline, where that was measured."""
    base = {row["size"]: row["speedup"] * row["median_ms"] for row in rows if row["speedup"]}
    times = {row["size"]: row[_GUIDE] for row in rows if row.get(_GUIDE)}
    return {size: (ms, base[size] / ms if size in base else None) for size, ms in times.items()}


def _measured(row: Values, memory: bool) -> list[str]:
    if row["median_ms"] is None:
        return ["failed"]
    spread = f"{_digits(row['p10_ms'])}-{_digits(row['p90_ms'])}"
    ratio = f"{row['speedup']:.2f}x" if row["speedup"] else ""
    quality = [f"{row['relative_l2']:.1e}", f"{float(row['psnr_db']):.1f}", f"{row['prepare_s']:.1f}"]
    return [_digits(row["median_ms"]), spread, ratio, *quality, *([f"{row['peak_mib']:.0f}"] if memory else [])]


def _digits(milliseconds: float) -> str:
    return f"{milliseconds:.2f}" if milliseconds < 100 else f"{milliseconds:.0f}"

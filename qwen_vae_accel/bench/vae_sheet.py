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
from qwen_vae_accel.sizes import parse_size

KIND = "bench"
_GUIDE = "published_tensorrt_h100_ms"
_MARKERS = "osD^vPX"  # one more than colours: no pair comes twice before the 43rd method
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
    measured = {"rows": found, "summary": _summary(found), "overhead": overhead, "kernels": kernels}
    return result.make_document(KIND, command, facts, settings, **measured)


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
    rows = [{**row, "size": str(parse_size(row["size"]))} for row in rows]
    base = f"{BASELINE} {settings.get('dtype')}"
    of_task = {task: [row for row in rows if row["task"] == task] for task in _unique(row["task"] for row in rows)}
    if set(of_task) - set(DIRECTIONS):
        raise ValueError(f"a task of {list(of_task)} is neither of {DIRECTIONS}")
    means = _Means(document["summary"], base, _unique(row["size"] for row in rows))
    blocks: list[Block] = [
        *means.table(list(of_task)),
        *_chart(of_task, means),
        f"Weights: {settings.get('weights')}. Latency is from an idle device to the result: the median, and the 10th to 90th "
        f"percentile. Error: relative L2 against diffusers in float32. Speed-up: against {base} in the same run.",
        *([f"{LABEL}: what its authors published for an H100, not measured by us."] if _guide(rows) else []),
        *_remarks(document),
        *(_by_size(task, of_task[task]) for task in of_task),
        *(_everything(task, of_task[task]) for task in of_task),
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
        self.base = base
        self._entries = {(e["task"], e["method"]): e for e in summary if e["method"] != base}
        self._labels = _unique(label for _, label in self._entries)
        self._most = max((entry["sizes"] for entry in summary), default=0)
        self._of = f"geometric means over {self._most} sizes" if len(sizes) > 1 else f"at {', '.join(sizes)}"

    def of(self, task: str) -> dict[str, float]:
        """Times faster than the baseline, by method."""
        return {label: entry["speedup"] for (at, label), entry in self._entries.items() if at == task}

    def answer(self) -> Answer:
        """The fastest method that has the baseline's dtype."""
        alike = [key for key in self._entries if key[1].split()[-1] == self.base.split()[-1]]
        if not alike:
            return Answer((), "")
        best = max(alike, key=lambda key: float(self._entries[key]["speedup"]))[1]
        figures = [(f"{self._entries[task, label]['speedup']:.2f}x", task) for task, label in alike if label == best]
        return Answer(figures, f"{best} against {self.base}, {self._of}")

    def table(self, tasks: Sequence[str]) -> list[Table]:
        """A row per task, a column per method; none where no other method than the baseline was measured, or not that."""
        cells = [[task, *(self._cell(task, label) for label in self._labels)] for task in tasks]
        return [Table(f"Times faster than {self.base}, {self._of}", ["", *self._labels], cells)] if self._labels else []

    def _cell(self, task: str, label: str) -> str:
        entry = self._entries.get((task, label))
        if entry is None:
            return ""
        some = f" ({entry['sizes']} of {self._most})" if entry["sizes"] < self._most else ""
        return f"{entry['speedup']:.2f}x{some}"


def _chart(rows: Mapping[str, Sequence[Values]], means: _Means) -> list[Chart]:
    """Speed-ups by size, or milliseconds where there is no speed-up; a panel per task, all with one scale."""
    fast = any(means.of(task) for task in rows)
    what = "speedup" if fast else "median_ms"
    good = {task: [row for row in found if row[what] is not None] for task, found in rows.items()}
    labels = _unique(_label(row) for found in good.values() for row in found if not (fast and _label(row) == means.base))
    most = max((row[what] for found in good.values() for row in found), default=0)
    panels = []
    for task, found in good.items():
        lines = _unique(row["size"] for row in found)
        marks = {label: {row["size"]: row[what] for row in found if _label(row) == label} for label in labels}
        if fast and len(lines) > 1:
            lines = [_MEAN, *lines]
            marks = {label: {_MEAN: means.of(task)[label], **values} if values else {} for label, values in marks.items()}
        guide = {size: ratio if fast else ms for size, (ms, ratio) in _guide(found).items()}
        marks[LABEL] = {size: value for size, value in guide.items() if value is not None}
        title = f"{task}: times faster than {means.base}" if fast else f"{task}: milliseconds"
        if found:
            panels.append(Panel(title, 1.3 + 0.3 * len(lines), _dots(lines, marks, most, means.base if fast else None)))
    return [Chart("Speed-up by size" if fast else "Milliseconds by size", panels)] if panels else []


def _dots(
    lines: Sequence[str], marks: Mapping[str, Mapping[str, float]], most: float, base: str | None
) -> Callable[[Any], None]:
    """Draws ``lines`` with ``marks`` by label on an axis that ends at ``most``, and ``base`` as a line at 1."""

    def draw(axis: Any) -> None:
        if base is not None:
            axis.axvline(1, color=GREY, lw=1.2, label=base)
        for index, (label, values) in enumerate(marks.items()):
            look: dict[str, Any] = {
                "color": COLOURS[index % len(COLOURS)],
                "marker": _MARKERS[index % len(_MARKERS)],
                "ms": 6.5,
            }
            if label == LABEL:
                look = {"mec": GOLD, "mfc": "none", "mew": 1.6, "marker": "D", "ms": 5.5}
            if values:
                axis.plot([*values.values()], [*map(lines.index, values)], ls="", alpha=0.9, label=label, **look)
        axis.set_yticks(range(len(lines)), lines)
        axis.set_ylim(len(lines) - 0.4, -0.6)
        axis.set_xlim(0, 1.05 * max(most, *(value for values in marks.values() for value in values.values())))
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}x" if base else f"{value:g}")
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
        line = f"The plugin adds {overhead['overhead_us']:.0f} us to a call"
        if "overhead_cold_us" in overhead:  # older results have none
            line += f"; {overhead['overhead_cold_us']:.0f} us where the network has emptied the caches"
        if "overhead_latency_us" in overhead:
            line += f"; its output is there {overhead['overhead_latency_us']:.0f} us later"
        lines.append(line + ".")
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

"""What ``serve-bench`` leaves behind: a JSON document of its requests, and the sheet that is made of the document alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from qwen_vae_accel.bench import result
from qwen_vae_accel.bench.guide import REQUESTS, SUMMARY, GuideRequest
from qwen_vae_accel.bench.harness import geometric_mean
from qwen_vae_accel.bench.machine import device_name, on_gpu
from qwen_vae_accel.bench.result import Document, head_of, short_ms
from qwen_vae_accel.bench.serve.measurement import ACCELERATED, PLAIN
from qwen_vae_accel.page.sheet import Answer, Block, Chart, Panel, Sheet, Table
from qwen_vae_accel.sizes import parse_size

KIND = "serve-bench"
_TITLES = {"t2i": "Text-to-image", "i2i": "Editing"}
_LABELS = {
    "preprocess": "pre-processing",
    "encode": "encode",
    "denoising": "denoising",
    "decode": "decode",
    "postprocess": "post-processing",
    "other": "other",
}
_MEANS = {"decode_postprocess": "decode + post-processing", "encode": "encode", "total": "whole request"}
_COLOURS = {
    "preprocess": "#a06cc8",
    "encode": "#3a9d5d",
    "denoising": "#a3a3a3",
    "decode": "#2f8fd0",
    "postprocess": "#e07b39",
    "other": "#c9bfa8",
}
_WITHOUT_DENOISING = tuple(part for part in _COLOURS if part not in ("denoising", "other"))
_BAR = 0.38

Values = Mapping[str, Any]


def make_document(
    rows: Sequence[Values],
    memory: Sequence[Values],
    postprocess: Values | None,
    facts: Values,
    settings: Values,
    command: str,
) -> Document:
    """The document of one run, JSON values only.

    Args:
        rows: one per request, see :class:`qwen_vae_accel.bench.serve.measurement.Measurement`.
        memory: of the same.
        postprocess: see :func:`qwen_vae_accel.bench.serve.measurement.postprocessing`.
        facts: see :func:`qwen_vae_accel.bench.machine.machine`.
        settings: what was asked for.
        command: the command line.
    """
    found = {"requests": rows, "memory": memory, "postprocess": postprocess, "summary": _summary(rows, memory, postprocess)}
    return result.make_document(KIND, command, facts, settings, **found)


def _summary(rows: Sequence[Values], memory: Sequence[Values], postprocess: Values | None) -> dict[str, Any]:
    """Geometric means over the sizes, by task; the other figures by what they are."""
    found: dict[str, Any] = {}
    for task in dict.fromkeys(row["task"] for row in rows):
        good = [row for row in rows if row["task"] == task and row["error"] is None]
        if good:
            parts = ("decode_postprocess", *(("encode",) if task == "i2i" else ()), "vae", "total")
            found[task] = {part: geometric_mean([row["speedup"][part] for row in good]) for part in parts}
    extras = [row[ACCELERATED]["first_extra_ms"] for row in rows if row["error"] is None and row["new_size"]]
    if extras:
        found["first_request_extra_ms"] = {"least": min(extras), "most": max(extras)}
    extra = {entry["task"]: entry["extra_mib"] for entry in memory if "extra_mib" in entry}
    if extra:
        found["extra_memory_mib"] = extra
    if postprocess is not None:
        found["postprocess_ms"] = {name: postprocess[f"{name}_ms"] for name in (PLAIN, ACCELERATED)}
    return found


def make_sheet(document: Values) -> Sheet:
    """What is shown of a document.

    Raises:
        KeyError, TypeError, ValueError: if it is damaged.
    """
    rows, settings, name = document["requests"], document["settings"], device_name(document["machine"])
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    blocks: list[Block] = [
        _summary_table(document, tasks),
        *_charts([row for row in rows if row["error"] is None], tasks),
        *_remarks(document),
        *(_requests(document, task) for task in tasks),
        _memory(document),
    ]
    shown = [block for block in blocks if not isinstance(block, Table) or block.rows]
    means = [(task, part) for part in _MEANS for task in tasks if part in document["summary"].get(task, {})]
    figures = [(f"{document['summary'][task][part]:.2f}x", f"{task} {_MEANS[part]}") for task, part in means]
    answer = Answer(figures, f"accelerated against plain pipeline, backend {settings['backend']}, geometric means over sizes")
    return Sheet(f"Requests on {name}", answer, shown, **head_of(document))


def _summary_table(document: Values, tasks: Sequence[str]) -> Table:
    summary = document["summary"]
    rows = [
        [f"{task} {label}", f"{summary[task][part]:.2f}x"]
        for task in tasks
        for part, label in _MEANS.items()
        if part in summary.get(task, {})
    ]
    if "postprocess_ms" in summary:
        times = summary["postprocess_ms"]
        rows.append([f"post-processing alone, {document['postprocess']['size']}", f"{_pair(short_ms, times)} ms"])
    if "first_request_extra_ms" in summary:
        extra = summary["first_request_extra_ms"]
        rows.append(["first request of a new size, extra", f"{short_ms(extra['least'])} to {short_ms(extra['most'])} ms"])
    rows += [[f"{task} extra memory at rest", f"{mib:.0f} MiB"] for task, mib in summary.get("extra_memory_mib", {}).items()]
    if not on_gpu(document["machine"]):
        return Table("Summary", ["figure", "here"], rows)
    return Table("Summary", ["figure", "here", "guide (H100)"], [[*row, SUMMARY.get(row[0], "")] for row in rows])


def _requests(document: Values, task: str) -> Table:
    """The requests of a task: plain / accelerated, in milliseconds."""
    rows = [row for row in document["requests"] if row["task"] == task]
    editing = task == "i2i"
    parts = ["denoising", *(["encode"] if editing else []), "decode", "postprocess"]
    guide = {row["size"]: _guide(document, task, row["size"]) for row in rows}
    columns = ["size", *(_LABELS[part] for part in parts), "decode + post", "whole request", "first request, extra", "PSNR dB"]
    if any(guide.values()):
        columns += ["guide: decode + post", "guide: encode" if editing else "guide: first load"]
    cells = []
    for row in rows:
        if row["error"] is not None:
            cells.append([_size(row), "failed"])
            continue
        medians = {side: row[side]["median"] for side in (PLAIN, ACCELERATED)}
        both = {side: median["decode"] + median["postprocess"] for side, median in medians.items()}
        total = {side: median["total"] for side, median in medians.items()}
        cell = [_size(row), *(_pair(short_ms, {side: median[part] for side, median in medians.items()}) for part in parts)]
        for times, part in ((both, "decode_postprocess"), (total, "total")):
            cell.append(f"{_pair(short_ms, times)}, {row['speedup'][part]:.2f}x")
        extra = {side: row[side]["first_extra_ms"] for side in (PLAIN, ACCELERATED)}
        cell += [_pair(short_ms, extra) if row["new_size"] else "not a new size", f"{float(row['difference']['psnr_db']):.1f}"]
        theirs = guide[row["size"]]
        if theirs is not None:
            cell += [_times(theirs.decode), _times(theirs.encode) if editing else f"{theirs.first_load}"]
        cells.append(cell)
    return Table(_TITLES[task], columns, [[*cell, *[""] * (len(columns) - len(cell))] for cell in cells], folded=True)


def _memory(document: Values) -> Table:
    """What the GPU's memory holds; no rows on the CPU."""
    columns = ["task", "at rest, plain / accelerated MiB", "peak of a request, plain / accelerated MiB"]
    columns += [f"{part} above weights, plain / accelerated MiB" for part in ("encode", "decode")]
    cells = []
    for entry in document["memory"]:
        good = [row for row in document["requests"] if row["task"] == entry["task"] and row["error"] is None]
        if entry.get("extra_mib") is None or not good:
            continue
        peaks = {side: max(row[side]["peak_mib"] for row in good) for side in (PLAIN, ACCELERATED)}
        cell = [
            entry["task"],
            _pair(_whole, {side: entry[f"{side}_mib"] for side in (PLAIN, ACCELERATED)}),
            _pair(_whole, peaks),
        ]
        for part in ("encode", "decode"):
            rises = {side: [row[side]["activation_mib"].get(part) for row in good] for side in (PLAIN, ACCELERATED)}
            cell.append("" if None in rises[PLAIN] else _pair(_whole, {side: max(found) for side, found in rises.items()}))
        cells.append(cell)
    return Table("Memory", columns, cells, folded=True)


def _guide(document: Values, task: str, size: str) -> GuideRequest | None:
    """The guide's figures, which may stand beside those of a GPU only."""
    return REQUESTS[task].get(parse_size(size)) if on_gpu(document["machine"]) else None


def _pair(text: Callable[[float], str], sides: Mapping[str, float]) -> str:
    return f"{text(sides[PLAIN])} / {text(sides[ACCELERATED])}"


def _whole(number: float) -> str:
    return f"{number:.0f}"


def _size(row: Values) -> str:
    if row["encoded"] is None or row["encoded"] == row["decoded"] == row["size"]:
        return str(row["size"])
    return f"{row['size']} (as {row['encoded']})"


def _times(times: tuple[float, float] | None) -> str:
    return "" if times is None else f"{times[0]} / {times[1]}, {times[0] / times[1]:.2f}x"


def _remarks(document: Values) -> list[str]:
    """What the tables do not say."""
    settings = document["settings"]
    offloaded = ", reference weights on the CPU" if settings.get("offload_reference") else ""
    lines = [
        f"Plain / accelerated (backend {settings['backend']}{offloaded}), medians of {settings['repeats']} requests "
        f"in milliseconds, {settings['dtype']}; {settings['weights']}; transformer: {settings['transformer']}. Each part "
        "is timed from an idle device to its result. Means are geometric.",
        "First request, extra: what encode, decode and post-processing of the first request of a size take above their median.",
    ]
    if on_gpu(document["machine"]):
        lines.append("Guide: the TensorRT guide's figures, published for an H100, PyTorch / TensorRT; not measured by us.")
    failed = [row for row in document["requests"] if row["error"]]
    return [*lines, *(f"Failed: {row['task']} {row['size']}: {row['error'].splitlines()[0]}" for row in failed)]


def _charts(rows: Sequence[Values], tasks: Iterable[str]) -> list[Block]:
    """A stacked bar per side of each request: whole on the left, without the denoising on the right."""
    panels = []
    for task in tasks:
        of_task = [row for row in rows if row["task"] == task]
        for parts, what in ((tuple(_COLOURS), "whole request"), (_WITHOUT_DENOISING, "without denoising")):
            if of_task:
                panels.append(Panel(f"{_TITLES[task]}, {what}, ms", 1.3 + 0.5 * len(of_task), _bars(of_task, parts)))
    return [Chart("Each pair of bars: plain pipeline above, accelerated below", panels)] if panels else []


def _bars(rows: Sequence[Values], parts: Sequence[str]) -> Callable[[Any], None]:
    def draw(axis: Any) -> None:
        for place, row in enumerate(rows):
            for side, y in ((PLAIN, place - _BAR / 2), (ACCELERATED, place + _BAR / 2)):
                left = 0.0
                for part in parts:
                    ms = row[side]["median"].get(part)
                    if ms is None:
                        continue
                    label = _LABELS[part] if place == 0 and side == PLAIN else None
                    axis.barh(y, ms, _BAR * 0.92, left, color=_COLOURS[part], label=label)
                    left += max(ms, 0.0)
                axis.annotate(f"{left:.0f}", (left, y), (3, 0), textcoords="offset points", va="center", fontsize=8.5)
        axis.set_yticks(range(len(rows)), [row["size"] for row in rows])
        axis.invert_yaxis()
        axis.margins(x=0.12)

    return draw

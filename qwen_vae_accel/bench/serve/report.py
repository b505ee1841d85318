"""What ``serve-bench`` leaves behind: JSON with machine and versions, a Markdown table, a chart.

Tables and chart are made of the JSON document alone, so they can be made again from a stored one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from qwen_vae_accel.bench.harness import geometric_mean
from qwen_vae_accel.bench.published import SERVICE, SERVICE_SUMMARY, Service
from qwen_vae_accel.bench.report import optional_package, png
from qwen_vae_accel.bench.serve.measure import ACCELERATED, PLAIN
from qwen_vae_accel.documents import dump_json
from qwen_vae_accel.files import write_output
from qwen_vae_accel.plan import Size, parse_size
from qwen_vae_accel.terminal import plain

SCHEMA = 1
KIND = "serve-bench"
TITLES = {"t2i": "Text-to-image", "i2i": "Editing"}
LABELS = {
    "preprocess": "pre-processing",
    "encode": "encode",
    "denoising": "denoising",
    "decode": "decode",
    "postprocess": "post-processing",
    "other": "other",
}

Document = dict[str, Any]
Cells = tuple[list[str], list[list[str]]]


def make_document(
    rows: Sequence[Mapping[str, Any]],
    memory: Sequence[Mapping[str, Any]],
    postprocess: Mapping[str, Any] | None,
    facts: Mapping[str, Any],
    settings: Mapping[str, Any],
    command: str,
) -> Document:
    """The document of one run, JSON values only."""
    return {
        "schema": SCHEMA,
        "kind": KIND,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "machine": dict(facts),
        "settings": dict(settings),
        "requests": [dict(row) for row in rows],
        "memory": [dict(entry) for entry in memory],
        "postprocess": None if postprocess is None else dict(postprocess),
        "summary": _summary(rows, memory, postprocess),
    }


def _summary(
    rows: Sequence[Mapping[str, Any]], memory: Sequence[Mapping[str, Any]], postprocess: Mapping[str, Any] | None
) -> dict[str, Any]:
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


def tasks(document: Document) -> list[str]:
    """The tasks that were measured."""
    return list(dict.fromkeys(row["task"] for row in document["requests"]))


def machine_name(document: Document) -> str:
    """GPU or CPU."""
    facts = document["machine"]
    return str(facts.get("device_name") if _on_cuda(document) else facts.get("cpu"))


def _on_cuda(document: Document) -> bool:
    return bool(document["machine"].get("device") == "cuda")


def _published(document: Document, task: str, size: str) -> Service | None:
    """The guide's figures, which may stand beside those of a GPU only."""
    key: Size = parse_size(size)
    return SERVICE[task].get(key) if _on_cuda(document) else None


def request_cells(document: Document, task: str) -> Cells:
    """Headings and rows of a task's table: plain / accelerated, in milliseconds."""
    rows = [row for row in document["requests"] if row["task"] == task]
    parts = ["denoising", *(("encode",) if task == "i2i" else ()), "decode", "postprocess"]
    pair = any(_published(document, task, row["size"]) for row in rows)
    columns = ["size", *(LABELS[part] for part in parts), "decode + post", "whole request", "first request, extra"]
    columns += ["PSNR dB"] + (
        ["guide: decode + post", "guide: encode" if task == "i2i" else "guide: first load"] if pair else []
    )
    cells = []
    for row in rows:
        if row["error"] is not None:
            cells.append([_size(row), "failed", *[""] * (len(columns) - 2)])
            continue
        a, b, ratio = row[PLAIN]["median"], row[ACCELERATED]["median"], row["speedup"]
        cell = [_size(row), *(f"{_ms(a[part])} / {_ms(b[part])}" for part in parts)]
        both = [side["decode"] + side["postprocess"] for side in (a, b)]
        cell += [f"{_ms(both[0])} / {_ms(both[1])}, {ratio['decode_postprocess']:.2f}x"]
        cell += [f"{_ms(a['total'])} / {_ms(b['total'])}, {ratio['total']:.2f}x"]
        extra = [row[side]["first_extra_ms"] for side in (PLAIN, ACCELERATED)]
        cell += [f"{_ms(extra[0])} / {_ms(extra[1])}" if row["new_size"] else "not a new size"]
        cell += [f"{float(row['difference']['psnr_db']):.1f}"]
        if pair:
            theirs = _published(document, task, row["size"])
            cell += [_guide(theirs.decode if theirs else None)]
            if task == "i2i":
                cell += [_guide(theirs.encode if theirs else None)]
            else:
                cell += [f"{theirs.first_load}" if theirs else ""]
        cells.append(cell)
    return columns, cells


def summary_cells(document: Document) -> Cells:
    """Headings and rows of the summary."""
    summary = document["summary"]
    rows = []
    for task in tasks(document):
        for part, label in (
            ("decode_postprocess", "decode + post-processing"),
            ("encode", "encode"),
            ("total", "whole request"),
        ):
            if part in summary.get(task, {}):
                rows.append([f"{task} {label}", f"{summary[task][part]:.2f}x"])
    if "postprocess_ms" in summary:
        times = summary["postprocess_ms"]
        rows.append(
            [f"post-processing alone, {document['postprocess']['size']}", f"{_ms(times[PLAIN])} / {_ms(times[ACCELERATED])} ms"]
        )
    if "first_request_extra_ms" in summary:
        extra = summary["first_request_extra_ms"]
        rows.append(["first request of a new size, extra", f"{_ms(extra['least'])} to {_ms(extra['most'])} ms"])
    rows += [[f"{task} extra memory at rest", f"{mib:.0f} MiB"] for task, mib in summary.get("extra_memory_mib", {}).items()]
    if not _on_cuda(document):
        return ["figure", "here"], rows
    return ["figure", "here", "guide (H100)"], [[*row, SERVICE_SUMMARY.get(row[0], "")] for row in rows]


def memory_cells(document: Document) -> Cells:
    """Headings and rows of the memory table; no rows on the CPU."""
    columns = ["task", "at rest, plain / accelerated MiB", "peak of a request, plain / accelerated MiB"]
    columns += [f"{part} above weights, plain / accelerated MiB" for part in ("encode", "decode")]
    cells = []
    for entry in document["memory"]:
        good = [row for row in document["requests"] if row["task"] == entry["task"] and row["error"] is None]
        if entry.get("extra_mib") is None or not good:
            continue
        cell = [entry["task"], f"{entry['plain_mib']:.0f} / {entry['accelerated_mib']:.0f}"]
        cell += [_pair(max(row[side]["peak_mib"] for row in good) for side in (PLAIN, ACCELERATED))]
        for part in ("encode", "decode"):
            rises = [[row[side]["activation_mib"].get(part) for row in good] for side in (PLAIN, ACCELERATED)]
            cell.append("" if None in rises[0] else _pair(map(max, rises)))
        cells.append(cell)
    return columns, cells


def _pair(values: Iterable[float]) -> str:
    return " / ".join(f"{value:.0f}" for value in values)


def _size(row: Mapping[str, Any]) -> str:
    if row["encoded"] is None or row["encoded"] == row["decoded"] == row["size"]:
        return str(row["size"])
    return f"{row['size']} (as {row['encoded']})"


def _ms(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _guide(times: tuple[float, float] | None) -> str:
    return "" if times is None else f"{times[0]} / {times[1]}, {times[0] / times[1]:.2f}x"


def remarks(document: Document) -> list[str]:
    """What the tables do not say."""
    settings = document["settings"]
    offloaded = ", reference weights on the CPU" if settings.get("offload_reference") else ""
    lines = [
        f"Plain / accelerated (backend {settings['backend']}{offloaded}), medians of {settings['repeats']} requests "
        f"in milliseconds, {settings['dtype']}; {settings['weights']}; transformer: {settings['transformer']}. Each part "
        "from an idle device to its result. Means are geometric.",
        "First request, extra: what encode, decode and post-processing of the first request of a size take above their median.",
    ]
    if _on_cuda(document):
        lines.append("Guide: the TensorRT guide's figures, published for an H100, PyTorch / TensorRT; not measured by us.")
    lines += [
        f"Failed: {row['task']} {row['size']}: {row['error'].splitlines()[0]}" for row in document["requests"] if row["error"]
    ]
    return lines


def sections(document: Document) -> list[tuple[str, Cells]]:
    """Every table that has rows, with its title."""
    found = [("Summary", summary_cells(document))]
    found += [(TITLES[task], request_cells(document, task)) for task in tasks(document)]
    found.append(("Memory", memory_cells(document)))
    return [section for section in found if section[1][1]]


def markdown(document: Document) -> str:
    """A document with its tables."""
    tabulate = optional_package("tabulate").tabulate
    facts = document["machine"]
    versions = ", ".join(f"{key.removeprefix('package:')} {v}" for key, v in facts.items() if key.startswith("package:"))
    lines = [
        f"# Requests on {machine_name(document)}",
        "",
        f"{document['created']}, {versions}.",
        "",
        f"`{document['command']}`",
        "",
    ]
    for line in remarks(document):
        lines += [line, ""]
    for title, (columns, cells) in sections(document):
        alignment = ["left", *["right"] * (len(columns) - 1)]
        table = str(tabulate(cells, columns, tablefmt="github", colalign=alignment, disable_numparse=True))
        lines += [f"## {title}", "", table, ""]
    return "\n".join(lines)


def view(document: Document) -> RenderableType:
    """The same for a terminal."""
    parts: list[RenderableType] = []
    for title, (columns, cells) in sections(document):
        table = Table(title=title, title_justify="left")
        for index, column in enumerate(columns):
            table.add_column(column, justify="right" if index else "left", overflow="fold")
        for cell in cells:
            table.add_row(*cell)
        parts.append(table)
    return Group(*parts, *(plain(line) for line in remarks(document)))


def write(document: Document, folder: Path, name: str) -> list[Path]:
    """``name.json``, ``name.md`` and, if any request succeeded, ``name.png`` in ``folder``."""
    from qwen_vae_accel.bench.serve.chart import draw

    paths = [folder / f"{name}{suffix}" for suffix in (".json", ".md", ".png")]
    write_output(paths[0], dump_json(document))
    write_output(paths[1], markdown(document))
    figure = draw(document)
    if figure is None:
        return paths[:2]
    write_output(paths[2], png(figure))
    return paths

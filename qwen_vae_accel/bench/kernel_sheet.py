"""What is shown of :func:`~qwen_vae_accel.bench.kernels.measure_kernels`: tables, and a roofline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qwen_vae_accel.bench.kernels import PROGRAMS
from qwen_vae_accel.page.charts import COLOURS, GREY
from qwen_vae_accel.page.sheet import Block, Chart, Panel, Table

_COLUMNS = ["kernel", "batch x height x width", "launches", "ms", "TFLOP/s", "share of floor"]
# Of what the limits allow: kernels below it are named in the chart.
_SLOW = 0.55

Entry = Mapping[str, Any]


def blocks(document: Mapping[str, Any] | None) -> list[Block]:
    """The roofline and a table per network; nothing of None."""
    if document is None:
        return []
    what = f"{document['size']} {document['dtype']}"
    panel = Panel(f"Fused kernels, {what}; area: time", 4.2, lambda axis: _roofline(axis, document))
    tables = [
        Table(f"Kernels of fused {name}, {what}", _COLUMNS, grouped(document[name]), words=2, folded=True)
        for name in PROGRAMS
        if name in document
    ]
    return [Chart("Roofline", [panel], "_roofline"), *tables]


def grouped(entries: Sequence[Entry]) -> list[list[str]]:
    """Table rows: kernels that are alike (same name and shape) together, the costliest first, and their sum."""
    groups: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        groups.setdefault((entry["kernel"], entry["shape"]), []).append(entry)

    def row(name: str, shape: str, members: Sequence[Entry]) -> list[str]:
        ms = sum(e["ms"] for e in members)
        least = sum(e["ms"] * e["share_of_floor"] for e in members)
        tflops = sum(e["tflop"] for e in members) / ms * 1e3
        return [name, shape, str(len(members)), f"{ms:.3f}", f"{tflops:.0f}", f"{least / ms:.0%}"]

    costliest = sorted(groups.items(), key=lambda item: -sum(e["ms"] for e in item[1]))
    return [*(row(*kernel, members) for kernel, members in costliest), row("all", "", entries)]


def _roofline(axis: Any, document: Mapping[str, Any]) -> None:
    """Arithmetic rate over arithmetic intensity, one point per kernel."""
    bounds = document["limits"]
    ridge = bounds["matmul_tflops"] / bounds["copy_tbps"]
    if "matmul_float8_tflops" in bounds:
        axis.axhline(bounds["matmul_float8_tflops"], color=GREY, lw=0.9, ls="--", label="float8 matrix product")
    axis.plot([1, ridge, 1e5], [bounds["copy_tbps"], bounds["matmul_tflops"], bounds["matmul_tflops"]], color=GREY, lw=1.2)
    axis.annotate(
        f"{bounds['copy_tbps']:.1f} TB/s, {bounds['matmul_tflops']:.0f} TFLOP/s",
        (ridge, bounds["matmul_tflops"]), (-6, 5), textcoords="offset points", ha="right", fontsize=8.5,
    )  # fmt: skip
    named: set[str] = set()
    for task, colour in zip(PROGRAMS, COLOURS, strict=False):
        entries = [entry for entry in document.get(task, ()) if entry["gb"] > 0]
        sizes = [30 + 900 * entry["ms"] / sum(e["ms"] for e in entries) for entry in entries]
        intensity = [1e3 * entry["tflop"] / entry["gb"] for entry in entries]
        axis.scatter(intensity, [e["tflops"] for e in entries], sizes, color=colour, alpha=0.5, linewidths=0)
        axis.scatter([], [], 40, color=colour, alpha=0.7, linewidths=0, label=task)
        for entry, x in zip(entries, intensity, strict=True):
            if entry["share_of_floor"] < _SLOW and entry["kernel"] not in named:
                named.add(entry["kernel"])
                axis.annotate(entry["kernel"], (x, entry["tflops"]), (5, -3), textcoords="offset points", fontsize=7.5)
    axis.set_xscale("log")
    axis.set_yscale("log")
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_formatter(lambda value, _: f"{value:g}")  # powers would be formulas, which are not read
    axis.set_xlim(1, 1e5)
    axis.set_ylim(0.5, 1.6 * max(rate for name, rate in bounds.items() if name.startswith("matmul")))
    axis.set_xlabel("FLOP per byte of memory traffic", fontsize=9)
    axis.set_ylabel("TFLOP/s", fontsize=9)

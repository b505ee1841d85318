"""Where the fused backend's time goes: every kernel of one decode and encode against the limits of the GPU."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qwen_vae_accel.backends.base import Environment, Job
from qwen_vae_accel.backends.fused.backend import FusedBackend
from qwen_vae_accel.bench.cases import SHORT
from qwen_vae_accel.engines.selfcheck import sample_input
from qwen_vae_accel.errors import BackendUnavailableError
from qwen_vae_accel.kernels.timing import first_ms
from qwen_vae_accel.model import ModelSource
from qwen_vae_accel.plan import Size

PROGRAMS = ("decode", "encode", "decode float8")
_COLOURS = ("#1b6ca8", "#e07b39", "#3a9d5d")
_MATRIX = 8192


def _best_ms(call: Any, repeats: int = 10) -> float:
    return min(first_ms(call) for _ in range(repeats))


def limits(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What this GPU reaches: ``matmul_tflops`` of a square matrix product, ``matmul_float8_tflops`` of one of e4m3 (where it
    has that), ``copy_tbps`` (read plus write) of a large copy."""
    a, b = (torch.randn(_MATRIX, _MATRIX, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    found = {"matmul_tflops": 2 * _MATRIX**3 / _best_ms(lambda: torch.mm(a, b, out=out)) / 1e9}
    if torch.cuda.get_device_capability(device) >= (8, 9):
        one = torch.ones((), device=device)
        a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).T
        product = _best_ms(lambda: torch._scaled_mm(a8, b8, one, one, out_dtype=torch.bfloat16, use_fast_accum=True))
        found["matmul_float8_tflops"] = 2 * _MATRIX**3 / product / 1e9
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found["copy_tbps"] = 2 * source.nbytes / _best_ms(lambda: target.copy_(source)) / 1e9
    return found


def measure(template: nn.Module, device: torch.device, dtype: torch.dtype, size: Size) -> dict[str, Any]:
    """Every kernel of the fused decoder and encoder at ``size``, timed alone.

    Returns:
        JSON values: ``limits``, and for ``decode``, ``encode`` and, where the GPU has it, ``decode float8`` the kernels in
        their order with milliseconds, TFLOP, GB moved to and from memory (each matrix once), TFLOP/s, and the share of the
        time that the limits allow (the larger of arithmetic and traffic).

    Raises:
        BackendUnavailableError: if the fused kernels cannot run here.
    """
    vae = copy.deepcopy(template).to(device, dtype)
    source, backend = ModelSource(vae), FusedBackend()
    bounds = limits(device, dtype)
    environment = Environment.detect(device)
    found: dict[str, Any] = {"size": str(size), "dtype": SHORT[dtype], "limits": bounds}
    for name in PROGRAMS:
        method, _, float8 = name.partition(" ")
        job = Job(method, source.topology, dtype, device, bool(float8))
        reasons = backend.reasons(environment, job)
        if reasons and float8:
            continue
        if reasons:
            raise BackendUnavailableError(backend.name, reasons)
        x: Tensor = sample_input(job, size, source.config).to(device, dtype)
        found[name] = [_entry(row, bounds) for row in backend.program(source, job).network.kernel_times(x)]
    return found


def _entry(row: Any, bounds: dict[str, float]) -> dict[str, Any]:
    seconds = row.milliseconds / 1e3
    rate = bounds["matmul_float8_tflops" if "float8" in row.kernel else "matmul_tflops"]
    least = max(row.teraflop / rate, row.gigabyte / 1e3 / bounds["copy_tbps"])
    return {
        "kernel": row.kernel,
        "shape": row.shape,
        "ms": row.milliseconds,
        "tflop": row.teraflop,
        "gb": row.gigabyte,
        "tflops": row.teraflop / seconds,
        "share_of_floor": least / seconds,
    }


def grouped(entries: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Table rows: kernels that are alike (same name and shape) together, the costliest first, and their sum."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for entry in entries:
        groups.setdefault((entry["kernel"], entry["shape"]), []).append(entry)

    def row(name: str, shape: str, members: Sequence[dict[str, Any]]) -> list[str]:
        ms = sum(e["ms"] for e in members)
        least = sum(e["ms"] * e["share_of_floor"] for e in members)
        tflops = sum(e["tflop"] for e in members) / ms * 1e3
        return [name, shape, str(len(members)), f"{ms:.3f}", f"{tflops:.0f}", f"{least / ms:.0%}"]

    costliest = sorted(groups.items(), key=lambda item: -sum(e["ms"] for e in item[1]))
    return [*(row(*kernel, members) for kernel, members in costliest), row("all", "", entries)]


def sections(document: dict[str, Any] | None) -> list[tuple[str, tuple[list[str], list[list[str]]]]]:
    """Titles of the tables of ``measure``'s values, with their headings and rows."""
    if document is None:
        return []
    return [
        (f"Kernels of fused {name}, {document['size']} {document['dtype']}", (COLUMNS, grouped(document[name])))
        for name in PROGRAMS
        if name in document
    ]


COLUMNS = ["kernel", "batch x height x width", "launches", "ms", "TFLOP/s", "share of floor"]


def draw(document: dict[str, Any] | None) -> Any | None:
    """The roofline as a matplotlib figure: arithmetic rate over arithmetic intensity, one point per kernel; None of nothing."""
    if document is None:
        return None
    from matplotlib.figure import Figure

    bounds = document["limits"]
    figure = Figure(figsize=(9, 5.2))
    axis = figure.subplots()
    ridge = bounds["matmul_tflops"] / bounds["copy_tbps"]
    if "matmul_float8_tflops" in bounds:
        axis.axhline(bounds["matmul_float8_tflops"], color="#3a9d5d", lw=0.9, ls="--")
    axis.plot([1, ridge, 1e5], [bounds["copy_tbps"], bounds["matmul_tflops"], bounds["matmul_tflops"]], color="#555", lw=1.2)
    axis.annotate(
        f"matrix product {bounds['matmul_tflops']:.0f} TFLOP/s, copy {bounds['copy_tbps']:.1f} TB/s",
        (ridge, bounds["matmul_tflops"]), (-6, 5), textcoords="offset points", ha="right", fontsize=8, color="#555",
    )  # fmt: skip
    for task, colour in zip(PROGRAMS, _COLOURS, strict=True):
        entries = [entry for entry in document.get(task, ()) if entry["gb"] > 0]
        sizes = [30 + 900 * entry["ms"] / sum(e["ms"] for e in entries) for entry in entries]
        intensity = [1e3 * entry["tflop"] / entry["gb"] for entry in entries]
        axis.scatter(intensity, [e["tflops"] for e in entries], sizes, color=colour, alpha=0.45, label=task, linewidths=0)
        for entry, x in zip(entries, intensity, strict=True):
            if entry["share_of_floor"] < 0.55:
                axis.annotate(entry["kernel"], (x, entry["tflops"]), (5, -3), textcoords="offset points", fontsize=6.5)
    axis.set_xscale("log")
    axis.set_yscale("log")
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_formatter(lambda value, _: f"{value:g}")  # powers would be formulas, which the page does not read
    axis.set_xlim(1, 1e5)
    axis.set_ylim(0.5, 1.6 * max(rate for name, rate in bounds.items() if name.startswith("matmul")))
    axis.set_xlabel("FLOP per byte of memory traffic")
    axis.set_ylabel("TFLOP/s")
    axis.set_title(f"Fused kernels, {document['size']} {document['dtype']}; area: time", fontsize=10, loc="left")
    axis.legend(frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return figure

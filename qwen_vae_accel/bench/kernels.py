"""Where the fused backend's time goes: every kernel of one decode and encode against the limits of the GPU."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qwen_vae_accel.backends.base import Environment, Job
from qwen_vae_accel.backends.fused import FusedBackend
from qwen_vae_accel.bench.cases import SHORT
from qwen_vae_accel.engines.selfcheck import sample_input
from qwen_vae_accel.errors import BackendUnavailableError
from qwen_vae_accel.model import ModelSource
from qwen_vae_accel.plan import Size

_MATRIX = 8192


def _best_ms(call: Any, repeats: int = 10) -> float:
    spans = []
    for _ in range(repeats):
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        call()
        last.record()
        last.synchronize()
        spans.append(first.elapsed_time(last))
    return min(spans)


def limits(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What this GPU reaches: ``matmul_tflops`` of a square matrix product, ``copy_tbps`` (read plus write) of a large copy."""
    a, b = (torch.randn(_MATRIX, _MATRIX, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    product = _best_ms(lambda: torch.mm(a, b, out=out))
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    moved = _best_ms(lambda: target.copy_(source))
    return {"matmul_tflops": 2 * _MATRIX**3 / product / 1e9, "copy_tbps": 2 * source.nbytes / moved / 1e9}


def measure(template: nn.Module, device: torch.device, dtype: torch.dtype, size: Size) -> dict[str, Any]:
    """Every kernel of the fused decoder and encoder at ``size``, timed alone.

    Returns:
        JSON values: ``limits``, and per task the kernels in their order with milliseconds, TFLOP, GB moved to and from memory
        (each matrix once), TFLOP/s, and the share of the time that the limits allow (the larger of arithmetic and traffic).

    Raises:
        BackendUnavailableError: if the fused kernels cannot run here.
    """
    vae = copy.deepcopy(template).to(device, dtype)
    source, backend = ModelSource(vae), FusedBackend()
    bounds = limits(device, dtype)
    tasks = {}
    for task in ("decode", "encode"):
        job = Job(task, source.topology, dtype, device)
        reasons = backend.reasons(Environment.detect(device), job)
        if reasons:
            raise BackendUnavailableError(backend.name, reasons)
        x: Tensor = sample_input(job, size, source.config).to(device, dtype)
        tasks[task] = [_entry(row, bounds) for row in backend.program(source, job).network.kernel_times(x)]
    return {"size": str(size), "dtype": SHORT[dtype], "limits": bounds, **tasks}


def _entry(row: Any, bounds: dict[str, float]) -> dict[str, Any]:
    seconds = row.milliseconds / 1e3
    least = max(row.teraflop / bounds["matmul_tflops"], row.gigabyte / 1e3 / bounds["copy_tbps"])
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
    rows = []
    for (name, shape), members in sorted(groups.items(), key=lambda item: -sum(e["ms"] for e in item[1])):
        ms = sum(e["ms"] for e in members)
        least = sum(e["ms"] * e["share_of_floor"] for e in members)
        tflops = sum(e["tflop"] for e in members) / ms * 1e3
        rows.append([name, shape, str(len(members)), f"{ms:.3f}", f"{tflops:.0f}", f"{least / ms:.0%}"])
    total = sum(e["ms"] for e in entries)
    least = sum(e["ms"] * e["share_of_floor"] for e in entries)
    tflops = sum(e["tflop"] for e in entries) / total * 1e3
    rows.append(["all", "", str(len(entries)), f"{total:.3f}", f"{tflops:.0f}", f"{least / total:.0%}"])
    return rows


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
    axis.plot([1, ridge, 1e5], [bounds["copy_tbps"], bounds["matmul_tflops"], bounds["matmul_tflops"]], color="#555", lw=1.2)
    axis.annotate(
        f"matrix product {bounds['matmul_tflops']:.0f} TFLOP/s, copy {bounds['copy_tbps']:.1f} TB/s",
        (ridge, bounds["matmul_tflops"]), (-6, 5), textcoords="offset points", ha="right", fontsize=8, color="#555",
    )  # fmt: skip
    for task, colour in (("decode", "#1b6ca8"), ("encode", "#e07b39")):
        entries = [entry for entry in document[task] if entry["gb"] > 0]
        sizes = [30 + 900 * entry["ms"] / sum(e["ms"] for e in entries) for entry in entries]
        intensity = [1e3 * entry["tflop"] / entry["gb"] for entry in entries]
        axis.scatter(intensity, [e["tflops"] for e in entries], sizes, color=colour, alpha=0.45, label=task, linewidths=0)
        for entry, x in zip(entries, intensity, strict=True):
            if entry["share_of_floor"] < 0.55:
                axis.annotate(entry["kernel"], (x, entry["tflops"]), (5, -3), textcoords="offset points", fontsize=6.5)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(1, 1e5)
    axis.set_ylim(0.5, 1.6 * bounds["matmul_tflops"])
    axis.set_xlabel("FLOP per byte of memory traffic")
    axis.set_ylabel("TFLOP/s")
    axis.set_title(f"Fused kernels, {document['size']} {document['dtype']}; area: time", fontsize=10, loc="left")
    axis.legend(frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return figure

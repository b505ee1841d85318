"""Where the fused backend's time goes: every kernel of one decode and encode against the limits of the GPU."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from qwen_vae_accel.backends.base import Environment, Job
from qwen_vae_accel.backends.fused.backend import FusedBackend
from qwen_vae_accel.backends.samples import sample_input
from qwen_vae_accel.bench.methods import SHORT
from qwen_vae_accel.errors import BackendUnavailableError
from qwen_vae_accel.kernels.timing import first_ms
from qwen_vae_accel.model import ModelSource
from qwen_vae_accel.sizes import Size

PROGRAMS = ("decode", "encode", "decode float8")
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


def measure_kernels(template: nn.Module, device: torch.device, dtype: torch.dtype, size: Size) -> dict[str, Any]:
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

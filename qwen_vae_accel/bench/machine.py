"""What measurements are made on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qwen_vae_accel.backends.base import Environment


def machine(device: torch.device) -> dict[str, Any]:
    """Facts of ``device`` and of the CPU, and versions as ``package:NAME``; JSON values."""
    facts: dict[str, Any] = dict(Environment.detect(device).describe())
    facts["cpu"] = _cpu_name()
    facts["cpu_cores"] = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts["torch_threads"] = torch.get_num_threads()
    if hasattr(os, "getloadavg"):
        # Of the minute before: what else this machine was doing.
        facts["load_average"] = round(os.getloadavg()[0], 2)
    if device.type == "cuda":
        facts["gpu_memory_gib"] = round(torch.cuda.get_device_properties(device).total_memory / 2**30, 1)
        facts["cudnn"] = torch.backends.cudnn.version()
    return facts


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "unknown"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def on_gpu(facts: Mapping[str, Any]) -> bool:
    """Whether ``facts`` are of a GPU, beside whose figures the guide's may stand."""
    return bool(facts.get("device") == "cuda")


def device_name(facts: Mapping[str, Any]) -> str:
    """The name of the GPU or CPU of ``facts``."""
    return str(facts.get("device_name") if on_gpu(facts) else facts.get("cpu"))

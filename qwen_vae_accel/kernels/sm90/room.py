"""How many blocks of these kernels a GPU runs at once, in clusters of every size that they have."""

from __future__ import annotations

import functools

import torch

from qwen_vae_accel.kernels.sm90 import driver, nvrtc
from qwen_vae_accel.kernels.sm90.schedules import FLOAT8_SCHEDULES, SCHEDULES, SHARED_LIMIT, Room
from qwen_vae_accel.kernels.sm90.source import kernel_source

_THREADS = 384


@functools.cache
def room_of(device: int) -> Room:
    """Ask the driver about CUDA device number ``device``.

    Raises:
        CompileError: NVRTC is missing.
        DriverError: the driver does not answer.
    """
    sizes = {schedule.split for table in (SCHEDULES, FLOAT8_SCHEDULES) for choices in table.values() for schedule in choices}
    cubin = nvrtc.compile_cubin(kernel_source("cluster_probe"), {})
    with torch.cuda.device(device):
        counts = [
            (size, driver.clusters_at_once(cubin, "cluster_probe", size, _THREADS, SHARED_LIMIT, device))
            for size in sorted(sizes - {1})
        ]  # fmt: skip
        return Room(torch.cuda.get_device_properties(device).multi_processor_count, tuple(counts))

"""What choosing kernels needs to know of a GPU, as a value."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qwen_vae_accel.kernels.sm90 import nvrtc
from qwen_vae_accel.kernels.sm90.room import room_of


@dataclass(frozen=True, slots=True)
class Gpu:
    """Facts of one GPU; pass your own to look at another one's choices.

    Attributes:
        multiprocessors: how many it has.
        shared_memory: bytes that one block may use.
        bulk_copies: whether its copy engine loads tiles (TMA: compute capability 9.0 and later).
        clusters: sizes of clusters of blocks and how many of each run at once, where the kernels of ``sm90/`` do.
        sm90: whether the CUDA C++ kernels of ``sm90/`` run (compute capability 9.0 alone, where NVRTC is installed).
    """

    multiprocessors: int
    shared_memory: int
    bulk_copies: bool
    sm90: bool = False
    clusters: tuple[tuple[int, int], ...] = ()


def runs_sm90(capability: tuple[int, int] | None) -> bool:
    """Whether the kernels of ``sm90/`` run on a GPU of this compute capability; None: there is no GPU."""
    return capability == (9, 0) and nvrtc.library() is not None


def describe_gpu(device: torch.device) -> Gpu:
    """Ask PyTorch about ``device``, which must be a CUDA device."""
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", 99 << 10)
    sm90 = runs_sm90((properties.major, properties.minor))
    clusters = room_of(device.index if device.index is not None else torch.cuda.current_device()).clusters if sm90 else ()
    return Gpu(properties.multi_processor_count, shared, properties.major >= 9, sm90, clusters)

"""What networks are measured and checked on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen_vae_accel.backends.base import Job
from qwen_vae_accel.sizes import Size


def sample_input(job: Job, size: Size, config: Mapping[str, Any]) -> Tensor:
    """A deterministic input of a network, of the statistics it meets in use.

    Returns:
        ``[1, C, H, W]`` float32 on ``job.device``: latents of the config's mean and deviation, or a smooth image in [-1, 1]
        with noise.
    """
    height, width = job.input_hw(size)
    generator = torch.Generator().manual_seed(0)
    if job.method == "decode":
        x = torch.randn(1, job.in_channels, height, width, generator=generator, device="cpu")
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean and std and len(mean) == len(std) == job.in_channels:
            mean, std = (torch.tensor(values, device="cpu").view(1, -1, 1, 1) for values in (mean, std))
            x = x * std + mean
    else:
        coarse = torch.randn(1, job.in_channels, 8, 8, generator=generator, device="cpu")
        noise = torch.randn(1, job.in_channels, height, width, generator=generator, device="cpu")
        x = (F.interpolate(coarse, (height, width), mode="bilinear") * 0.6 + noise * 0.1).clamp(-1, 1)
    return x.to(job.device)

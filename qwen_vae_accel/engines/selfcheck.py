"""An engine against the exact model: is what it computes the Qwen-Image VAE, on this machine?"""

from __future__ import annotations

import hashlib
import math
import platform
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen_vae_accel.backends.base import Environment, Job, Program
from qwen_vae_accel.engines.manifest import Verification
from qwen_vae_accel.model import ModelSource
from qwen_vae_accel.model.tiling import run_banded
from qwen_vae_accel.plan import Size

# ||engine - exact|| / ||exact||, the exact model in float32. float32 leaves room for TF32, which PyTorch allows
# convolutions by default; bfloat16 for the 1.7e-2 of diffusers' own bfloat16 path on random weights.
TOLERANCE = {torch.float32: 2e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# Trained weights stay under 3e-2 (47 dB), but random ones of full size reach 1.4e-1: only garbage is refused.
FLOAT8_TOLERANCE = 2e-1
_BAND = 512


def machine_id(environment: Environment) -> str:
    """A short name of this machine and its software; a new driver or release is another machine."""
    facts = {"host": platform.node(), **environment.describe()}
    return hashlib.sha256(repr(sorted(facts.items())).encode()).hexdigest()[:16]


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


def exact_output(source: ModelSource, job: Job, x: Tensor) -> Tensor:
    """What the exact model computes in float32, in bands where the image is large."""
    network = source.model(job.method, torch.float32, job.device)
    return run_banded(network, x, _BAND)


def compare(output: Tensor, exact: Tensor, method: str) -> tuple[float, float]:
    """Relative L2 error and PSNR in dB of ``output`` against ``exact``; infinite error where it is not finite."""
    difference = output.float() - exact
    if not torch.isfinite(difference).all():
        return math.inf, -math.inf
    relative = (difference.norm() / exact.norm().clamp_min(1e-30)).item()
    mse = difference.square().mean().item()
    peak = 2.0 if method == "decode" else (exact.max() - exact.min()).item()
    return relative, math.inf if mse == 0 else 10 * math.log10(max(peak, 1e-30) ** 2 / mse)


def check(source: ModelSource, job: Job, program: Program, size: Size, profile: int, machine: str) -> Verification:
    """Run ``program`` once and compare; ``job``'s dtype picks the tolerance."""
    try:
        with torch.no_grad():
            x = sample_input(job, size, source.config).to(job.dtype)
            exact = exact_output(source, job, x.float())
            output = program(x, profile)
    finally:
        source.release()
    if output.shape == exact.shape:
        relative, psnr = compare(output, exact, job.method)
    else:
        relative, psnr = math.inf, -math.inf
    tolerance = FLOAT8_TOLERANCE if job.float8 else TOLERANCE[job.dtype]
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return Verification(relative <= tolerance, relative, tolerance, psnr, machine, now)

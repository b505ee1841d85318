"""An engine against the exact network: is what it computes the Qwen-Image VAE, on this machine?"""

from __future__ import annotations

import hashlib
import math
import platform
from datetime import datetime, timezone

import torch
from torch import Tensor

from qwen_vae_accel.accuracy import ROUNDING, Error, measure
from qwen_vae_accel.backends.base import Environment, Job, Program
from qwen_vae_accel.backends.samples import sample_input
from qwen_vae_accel.engines.manifest import Verification, check_name
from qwen_vae_accel.errors import UnsupportedVAEError
from qwen_vae_accel.model import ModelSource
from qwen_vae_accel.model.original import published_network
from qwen_vae_accel.model.tiling import run_banded
from qwen_vae_accel.sizes import Profile, Size

# e4m3 has no yardstick in diffusers. Trained weights stay under 3e-2 (47 dB), but random ones of full size reach 1.4e-1:
# only garbage is refused.
FLOAT8_LIMIT = Error(2e-1, math.inf)
# Image rows per band of the exact network: at a width of 1024 its float64 activations take 1.5 GB. A band is computed with
# up to 112 rows more on either side.
_BAND = 256
# Diffusers' own error is measured on an image of this size: it takes 20 MB, and is much the same on larger ones.
_YARDSTICK = Size(64, 64)
_yardsticks: dict[tuple[object, ...], Error] = {}


def machine_id(environment: Environment) -> str:
    """A short name of this machine and its software; a new driver or release is another machine."""
    facts = {"host": platform.node(), **environment.describe()}
    return hashlib.sha256(repr(sorted(facts.items())).encode()).hexdigest()[:16]


def name_of(environment: Environment, profile: Profile) -> str:
    """The name under which a record keeps the self-check of ``profile`` on the machine of ``environment``."""
    return check_name(machine_id(environment), profile)


def exact_output(source: ModelSource, job: Job, x: Tensor) -> Tensor:
    """Compute ``x [B, C, H, W]`` by the exact network in float64, in bands where the image is large."""
    network = source.model(job.method, torch.float64, job.device)
    return run_banded(network, x.double(), _BAND)


def published_error(source: ModelSource, job: Job) -> Error:
    """How far diffusers' own computation of this VAE in ``job``'s dtype on its device is from float64.

    Measured once a process for the same weights.

    Raises:
        UnsupportedVAEError: if they are too far apart to be the same computation.
    """
    stored = source.placement(job.method).dtype
    key = (type(source.vae), source.fingerprint(job.method, job.dtype), stored, job.dtype, job.device)
    if key not in _yardsticks:
        x = sample_input(job, _YARDSTICK, source.config).to(job.dtype)
        theirs = published_network(source.vae, job.method, job.dtype, job.device)
        found = measure(theirs(x), exact_output(source, job, x))
        if not found.relative <= ROUNDING[job.dtype]:
            reason = f"in {job.dtype} diffusers is {found.relative:.1e} away from the exact network: more than rounding"
            raise UnsupportedVAEError(type(source.vae).__name__, [reason])
        _yardsticks[key] = found
    return _yardsticks[key]


def error_limit(source: ModelSource, job: Job) -> Error:
    """The most that a program for ``job`` may be off: :data:`FACTOR` times diffusers' own error, or what float8 may."""
    return FLOAT8_LIMIT if job.float8 else published_error(source, job).allowed()


def psnr_db(output: Tensor, exact: Tensor, method: str) -> float:
    """PSNR of ``output [B, C, H, W]`` against ``exact``: peak to peak 2 for images, the reference's range for moments."""
    mse = (output.double() - exact.double()).square().mean().item()
    if not math.isfinite(mse):
        return -math.inf
    peak = 2.0 if method == "decode" else (exact.max() - exact.min()).item()
    return math.inf if mse == 0 else 10 * math.log10(max(peak, 1e-30) ** 2 / mse)


def check(source: ModelSource, job: Job, program: Program, size: Size, profile: int, machine: str) -> Verification:
    """Run ``program`` once and compare it with the exact network, see :mod:`qwen_vae_accel.accuracy`.

    Raises:
        UnsupportedVAEError: if diffusers itself computes something else than the exact network.
    """
    try:
        with torch.no_grad():
            limit = error_limit(source, job)
            x = sample_input(job, size, source.config).to(job.dtype)
            exact = exact_output(source, job, x)
            output = program(x, profile)
            found = measure(output, exact)
            psnr = psnr_db(output, exact, job.method) if output.shape == exact.shape else -math.inf
    finally:
        source.release()
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return Verification(found.within(limit), found.relative, limit.relative, found.line, limit.line, psnr, machine, now)

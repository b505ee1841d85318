"""What the kernel tests share: a pretend GPU, poisoned buffers, tolerances, a random model."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from qwen_vae_accel.kernels.layout import Grid, pixel_rows, to_flat
from qwen_vae_accel.kernels.tuning import AttentionConfig, ConvConfig, Device, Tuning

DTYPES = [torch.bfloat16, torch.float16]
# Largest error of one kernel, relative to the largest value of its fp32 reference. The interpreter truncates to
# bfloat16 where the hardware rounds, hence twice the unit in the last place.
TOLERANCE = {torch.bfloat16: 2**-6, torch.float16: 2**-9}

TMA = Device(multiprocessors=2, shared_memory=1 << 17, tma=True)
NO_TMA = Device(multiprocessors=2, shared_memory=1 << 17, tma=False)
DEVICES = [pytest.param(TMA, id="tma"), pytest.param(NO_TMA, id="pointers")]
CONFIG = ConvConfig(block_rows=32, block_k=32, warps=4, stages=2)
SMALL_TUNING = Tuning({}, AttentionConfig(32, 16, 4, 1))

# Odd sizes, batch 2, one pixel, and a row that a tile ends in the middle of.
GRIDS = [Grid(1, 1, 1), Grid(2, 5, 7), Grid(1, 4, 40)]


def poisoned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def random_flat(grid: Grid, channels: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(grid.batch, channels, grid.height, grid.width, generator=generator)
    return to_flat(image).to(dtype)


def random_layer(name: str, out: int, inp: int, side: int, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scale = (inp * side * side) ** -0.5
    return {
        f"{name}.weight": torch.randn(out, inp, side, side, generator=generator) * scale,
        f"{name}.bias": torch.randn(out, generator=generator) * 0.5,
    }


def random_gamma(channels: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return (1 + 0.2 * torch.randn(channels, generator=generator)) * channels**0.5


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    error = (actual.float() - expected).abs().max().item()
    limit = TOLERANCE[dtype] * max(1.0, expected.abs().max().item())
    assert error <= limit, f"error {error:.2e} over {limit:.2e}"  # NaN fails too


def assert_halo_zero(flat: torch.Tensor, grid: Grid) -> None:
    assert torch.count_nonzero(flat[~pixel_rows(grid)]) == 0


def image_state(vae, part: str) -> dict[str, torch.Tensor]:
    """2-D state of ``vae.encoder`` or ``vae.decoder`` with the 1x1 convolution that belongs to it."""
    pointwise = {"encoder": "quant_conv", "decoder": "post_quant_conv"}[part]
    named = dict(getattr(vae, part).named_parameters())
    named |= {f"{pointwise}.{name}": value for name, value in getattr(vae, pointwise).named_parameters()}
    state = {}
    for name, value in named.items():
        if "time_conv" in name:
            continue
        value = value.detach()
        state[name] = value[:, :, -1] if value.dim() == 5 else value.reshape(-1) if "gamma" in name else value
    return state


def random_vae(image_channels: int = 3):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLQwenImage(input_channels=image_channels).eval().requires_grad_(False)
    for name, value in vae.named_parameters():
        if "gamma" in name:
            value.copy_(1 + 0.1 * torch.randn_like(value))
    return vae

"""What the kernel tests share: a pretend GPU, poisoned buffers, tolerances, a random model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from qwen_vae_accel.kernels.float8 import FLOAT8, LARGEST
from qwen_vae_accel.kernels.gpu import Gpu
from qwen_vae_accel.kernels.layout import Grid, from_flat, pixel_rows, to_flat
from qwen_vae_accel.kernels.network import QWEN_IMAGE, QWEN_IMAGE_21, Network, describe
from qwen_vae_accel.kernels.shortcuts import stored_shortcut
from qwen_vae_accel.kernels.sm90.schedules import FLOAT8_SCHEDULES, SCHEDULES, SHARED_LIMIT, Mode, Variant
from qwen_vae_accel.kernels.triton.blocks import rms_norm_reference
from qwen_vae_accel.kernels.triton.wide_attention import TILE, chunk_of, tiles_of, wide_attention
from qwen_vae_accel.kernels.tuning.configs import AttentionConfig, ConvConfig
from qwen_vae_accel.kernels.tuning.selection import Tuning
from qwen_vae_accel.kernels.weights import ConvWeights, Norm

DTYPES = [torch.bfloat16, torch.float16]
# Largest error of one kernel, relative to the largest value of its fp32 reference. The interpreter truncates to
# bfloat16 where the hardware rounds, hence twice the unit in the last place.
TOLERANCE = {torch.bfloat16: 2**-6, torch.float16: 2**-9}

TMA = Gpu(multiprocessors=2, shared_memory=1 << 17, bulk_copies=True)
NO_TMA = Gpu(multiprocessors=2, shared_memory=1 << 17, bulk_copies=False)
DEVICES = [pytest.param(TMA, id="tma"), pytest.param(NO_TMA, id="pointers")]
CONFIG = ConvConfig(block_rows=32, block_k=32, warps=4, stages=2)
SMALL_TUNING = Tuning({}, AttentionConfig(32, 16, 4, 1))

METHODS = ("encode", "decode")
# Both published VAEs' networks, with three and with four image channels.
NETWORKS = [
    describe(dataclasses.replace(topology, image_channels=channels), method)
    for topology in (QWEN_IMAGE, QWEN_IMAGE_21)
    for method in METHODS
    for channels in (3, 4)
]

# Odd sizes, batch 2, one pixel, and a row that a tile ends in the middle of.
GRIDS = [Grid(1, 1, 1), Grid(2, 5, 7), Grid(1, 4, 40)]


def shortcuts_of(out: int) -> set[int]:
    """Channels of what is added, through a 1x1 convolution, to a 3x3 one of ``out`` channels; 0 for nothing."""
    layers = {layer for network in NETWORKS for layer in network.kernel_layers()}
    found = {layer.shortcut for layer in layers if layer.out_channels == layer.in_channels == out}
    return found | {0} | {out for network in NETWORKS if _adds(network, out)}


def _adds(network: Network, out: int) -> bool:
    """Whether the shortcut around a level that keeps its resolution adds ``out`` channels to its last block."""
    return any(
        level.shortcut is not None and level.resampling is None and level.shortcut.out_channels == out
        for level in network.levels
    )


def lowers_of(mode: Mode, out: int) -> set[int]:
    """Of a convolution behind which a shortcut around a level ends: what odd rows of the output skip of its channels."""
    return {
        stored_shortcut(level.shortcut, network.decodes).lower
        for network in NETWORKS
        for level in network.levels
        if level.shortcut is not None and level.resampling is not None and level.resampling.out_channels == out
        if mode == (Mode.UPSAMPLE if network.decodes else Mode.DOWNSAMPLE)
    }


def variants_of(mode: Mode, channels: int, out: int, float8: bool = False) -> Iterator[Variant]:
    """Every kernel that a layer of these widths may need, with the largest epilogue that it has, as the tables have it."""
    plain = mode == Mode.CONV and channels == out and not float8
    residuals = {(False, 0), (True, 0)}
    if mode in (Mode.UPSAMPLE, Mode.DOWNSAMPLE):
        residuals = {(False, 0), *((True, lower) for lower in lowers_of(mode, out))}
    for schedule in (FLOAT8_SCHEDULES if float8 else SCHEDULES)[mode, channels, out]:
        for shortcut in sorted(shortcuts_of(out) if plain else {0}):
            for residual, lower in sorted(residuals):
                eight = (float8, float8, float8)
                yield Variant(mode, channels, out, shortcut, residual, True, 2, schedule, *eight, lower)


def check_schedule(variant: Variant) -> None:
    """It fits, keeps the kernel's static assertions, and its second warpgroup is let go before the rings are empty."""
    schedule = variant.schedule
    assert variant.shared_bytes() <= SHARED_LIMIT
    assert variant.columns % 32 in (0, 16) and variant.columns in (32, 96, 144, 192) and variant.out % schedule.split == 0
    assert variant.pixel_bytes in (64, 128) and variant.channels % 16 == 0 and variant.shortcut % schedule.kc == 0
    if schedule.resident:
        return
    # What the first warpgroup needs for its signal, all of it at once: the second one has released nothing yet.
    taps = {Mode.CONV: 9, Mode.POINTWISE: 1}.get(variant.mode, 4)  # of the first pass
    assert schedule.stagger < schedule.b_stages and schedule.stagger // taps < schedule.a_stages
    assert schedule.stagger < taps * -(-variant.channels // schedule.kc)  # it is sent at all


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


def folded_upsample(
    a: torch.Tensor, grid: Grid, weights: ConvWeights, norm: Norm, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 ``(x, normed)`` of an upsampling by the weights as they are packed and rounded; ``residual`` is of the output."""
    matrix = weights.weight.float() * (1.0 if weights.rescale is None else weights.rescale[:, None])
    kernels = matrix.view(weights.out_channels, 2, 2, 2, 2, -1).permute(1, 2, 0, 5, 3, 4)  # parities first
    large, padded = grid.doubled(), F.pad(from_flat(a.float(), grid), (1, 1, 1, 1))
    image = padded.new_empty(grid.batch, weights.out_channels, large.height, large.width)
    for py in (0, 1):
        for px in (0, 1):
            part = F.conv2d(padded, kernels[py, px], weights.bias)
            image[:, :, py::2, px::2] = part[:, :, py : py + grid.height, px : px + grid.width]
    x = to_flat(image) + (0 if residual is None else residual)
    return x, rms_norm_reference(x, norm.gamma, norm.silu) * (norm.scale or 1.0)


def float8_norm(channels: int) -> Norm:
    """A norm whose output, whatever the input, stays within float8."""
    gamma = random_gamma(channels)
    return Norm(gamma, scale=LARGEST / (channels**0.5 * gamma.max().item()))


def assert_rounded(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """One rounding to float8 away, but for 1 % of the values, two: sums are added in another order."""
    assert actual.dtype == FLOAT8
    error = (actual.float() - expected).abs()
    allowed = expected.abs().clamp_min(2**-6) * 2**-3
    assert (error <= allowed).all(), f"{(error - allowed).max()}"  # NaN fails too
    assert (error > allowed / 2 * 1.001).sum() <= 0.01 * error.numel()


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


def run_wide_attention(tokens: torch.Tensor, grid: Grid, gpu: Gpu) -> torch.Tensor:
    """Attention of many channels with scratch memory that holds NaN; the halo, which it must leave, is zero before."""
    channels, device = tokens.shape[1] // 3, tokens.device
    rows, tiles = grid.batch * chunk_of(grid), tiles_of(grid)
    out = torch.zeros(grid.rows, channels, dtype=tokens.dtype, device=device)
    from_flat(out, grid).fill_(float("nan"))
    weights = poisoned(rows, tiles * TILE, dtype=tokens.dtype).to(device)
    tops, sums = (poisoned(rows, tiles, dtype=torch.float32).to(device) for _ in range(2))
    wide_attention(tokens, grid, out, weights=weights, tops=tops, sums=sums, gpu=gpu)
    assert_halo_zero(out.cpu(), grid)
    return out


def random_vae(image_channels: int = 3):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLQwenImage(input_channels=image_channels).eval().requires_grad_(False)
    for name, value in vae.named_parameters():
        if "gamma" in name:
            value.copy_(1 + 0.1 * torch.randn_like(value))
    return vae


def random_vae_21(image_channels: int = 4, device: str = "cuda"):
    """Qwen-Image 2.1's, of full size, made where it runs."""
    diffusers = pytest.importorskip("diffusers")
    if not hasattr(diffusers, "AutoencoderKLQwenImage21"):
        pytest.skip(f"diffusers {diffusers.__version__} has no AutoencoderKLQwenImage21")
    torch.manual_seed(0)
    with torch.device(device):
        vae = diffusers.AutoencoderKLQwenImage21(in_channels=image_channels, out_channels=image_channels)
    vae = vae.eval().requires_grad_(False)
    for name, value in vae.named_parameters():
        if "gamma" in name:
            value.copy_(1 + 0.1 * torch.randn_like(value))
    return vae

"""Pieces the kernels share: tile loads and stores, row arithmetic, the norm, and launch helpers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from qwen_vae_accel.kernels.gpu import Gpu

NO_NORM, NORM_ONLY, NORM_SILU = 0, 1, 2

# Accumulator widths must be powers of two: output channels are split in two so that none are padding.
SPLITS = {32: (32, 0), 96: (64, 32), 192: (128, 64), 384: (256, 128)}


def split_channels(channels: int) -> tuple[int, int]:
    """Divide ``channels`` into two powers of two, the second of which may be 0.

    Raises:
        ValueError: there is no kernel for so many.
    """
    if channels not in SPLITS:
        raise ValueError(f"no kernel for {channels} output channels; have {sorted(SPLITS)}")
    return SPLITS[channels]


def tile(tensor: Tensor, rows: int, columns: int, gpu: Gpu):
    """View a matrix in tiles of ``[rows, columns]``: a tensor descriptor where the GPU has bulk copies, else the tensor."""
    return TensorDescriptor.from_tensor(tensor, [rows, columns]) if gpu.bulk_copies else tensor


def check_flat(tensor: Tensor, rows: int, channels: int, dtype: torch.dtype, name: str) -> None:
    """Check that ``tensor`` is contiguous, ``[rows, channels]`` and of ``dtype``.

    Raises:
        ValueError: it is not; the message calls it ``name``.
    """
    if tuple(tensor.shape) != (rows, channels) or tensor.dtype != dtype or not tensor.is_contiguous():
        raise ValueError(f"{name}: expected contiguous {dtype} [{rows}, {channels}], got {tensor.dtype} {list(tensor.shape)}")


@triton.jit
def load_tile(src, row, column, rows, WIDTH: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr):
    """Rows ``row .. row + BM`` and columns ``column .. column + BK`` of a ``[rows, WIDTH]`` matrix, zero outside."""
    if TMA:
        value = src.load([row, column])
    else:
        r = row + tl.arange(0, BM)
        offsets = r.to(tl.int64)[:, None] * WIDTH + (column + tl.arange(0, BK))[None, :]
        value = tl.load(src + offsets, mask=((r >= 0) & (r < rows))[:, None], other=0.0)
    return value


@triton.jit
def store_tile(dst, row, column, rows, value, WIDTH: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
               TMA: tl.constexpr):  # fmt: skip
    """The opposite of ``load_tile``; rows outside the matrix are dropped."""
    if TMA:
        dst.store([row, column], round_to(value, dst.dtype))
    else:
        r = row + tl.arange(0, BM)
        offsets = r.to(tl.int64)[:, None] * WIDTH + (column + tl.arange(0, BK))[None, :]
        tl.store(dst + offsets, round_to(value, dst.dtype.element_ty), mask=(r < rows)[:, None])


@triton.jit
def round_to(value, dtype: tl.constexpr):
    """fp32 -> ``dtype``; float8 (e4m3) has no infinity: larger values become its largest."""
    if dtype == tl.float8e4nv:
        value = clamp(value, -448.0, 448.0)
    return value.to(dtype)


@triton.jit
def clamp(value, low, high):
    """As PyTorch does it: NaN stays NaN."""
    value = tl.maximum(value, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(value, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def scaled(value, scale):
    """``value * scale`` for float8, where infinity must not become a number: NaN, as value * 0 is NaN for it, else 0."""
    return value * scale + value * 0.0


@triton.jit
def is_pixel(rows, pitch, image_rows):
    """False in the halo; ``image_rows`` is H + 1."""
    return (rows % pitch != 0) & ((rows // pitch) % image_rows != 0)


@triton.jit
def inverse_norm(squares):
    """1 / norm of pixels from their sums of squares; NaN of NaN."""
    return tl.rsqrt(tl.maximum(squares, 1e-24, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def normalize(acc, inverse, gamma, column, BM: tl.constexpr, N: tl.constexpr, NORM: tl.constexpr, scale=None):
    """``acc * inverse * gamma``, then SiLU if NORM is 2, then times ``scale`` if given (float8)."""
    out = acc * inverse[:, None] * tl.load(gamma + column + tl.arange(0, N))[None, :]
    if NORM == 2:
        # Two neighbours share one reciprocal: 1/a = b * (1/ab). The special-function unit is this epilogue's bottleneck.
        # The clamp keeps the product finite; below it, SiLU is under 1e-16. It swallows NaN, so that a neighbour stays what it
        # is; the product with ``out`` has it again.
        e = 1.0 + tl.exp2(tl.minimum(out * -1.4426950408889634, 60.0))
        a, b = tl.split(tl.reshape(e, [BM, N // 2, 2]))
        both = 1.0 / (a * b)
        if scale is not None:
            both *= scale
        out = out * tl.reshape(tl.join(b * both, a * both), [BM, N])
    return out


def rms_norm_reference(x: Tensor, gamma: Tensor, silu: bool) -> Tensor:
    """``F.normalize(x, dim=1) * gamma`` in fp32 over the columns of ``[rows, C]``; gamma already holds sqrt(C)."""
    x = x.float()
    out = x * torch.rsqrt(x.square().sum(1, keepdim=True).clamp_min(1e-24)) * gamma
    return torch.nn.functional.silu(out) if silu else out

"""Nearest 2x upsample and 3x3 convolution as four 2x2 convolutions of the small image, one per output parity.

Output pixel (2y + py, 2x + px) sees input rows y + py - 1, y + py and columns x + px - 1, x + px; the kernel entries that
meet the same input pixel are summed beforehand (``Packer.upsample``): 4/9 of the arithmetic, and no upsampled image.
Both the convolution's output and its RMS norm + SiLU (the next block's first step) are written.

Input halo rows y = -1 and columns x = -1 take part as "pixels" whose output is zero: with the parities these map onto
exactly the halo of the large image, so it needs no clearing.
"""

from __future__ import annotations

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from qwen_vae_accel.kernels.compiling import TritonKernel
from qwen_vae_accel.kernels.float8 import FLOAT8
from qwen_vae_accel.kernels.gpu import Gpu
from qwen_vae_accel.kernels.layout import Grid, from_flat, to_flat
from qwen_vae_accel.kernels.triton.blocks import (
    check_flat,
    inverse_norm,
    load_tile,
    normalize,
    rms_norm_reference,
    round_to,
    split_channels,
    tile,
)
from qwen_vae_accel.kernels.tuning.configs import ConvConfig
from qwen_vae_accel.kernels.weights import ConvWeights, Norm


# One compiled kernel for every size: integers are not specialised.
@TritonKernel
@triton.jit(do_not_specialize=["rows", "image_rows", "pitch"])
def _upsample_kernel(
    a,  # [rows, C] small image
    w0, w1,  # [N, 16 * C]
    bias, gamma,  # [N] fp32
    rescale,  # [N] fp32 if a and w are float8, else None
    x, normed,  # [large rows, N]
    n_scale,  # of normed in float8, else None
    rows, image_rows, pitch,
    C: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = N0 + N1
    STEPS: tl.constexpr = C // BK
    index = tl.program_id(0)
    row = (index // 4) * BM
    py = index % 4 // 2
    px = index % 2
    acc0 = tl.zeros([BM, N0], tl.float32)
    acc1 = tl.zeros([BM, N1], tl.float32)
    start = row + (py - 1) * pitch + px - 1
    for k in tl.range(0, 4 * STEPS):
        tap = k // STEPS
        part = load_tile(a, start + tap // 2 * pitch + tap % 2, (k % STEPS) * BK, rows, C, BM, BK, TMA)
        column = (index % 4 * 4 * STEPS + k) * BK
        acc0 = tl.dot(part, load_tile(w0, 0, column, N, 16 * C, N0, BK, TMA).T, acc0)
        acc1 = tl.dot(part, load_tile(w1, N0, column, N, 16 * C, N1, BK, TMA).T, acc1)

    if rescale is not None:
        acc0 *= tl.load(rescale + tl.arange(0, N0))[None, :]
        acc1 *= tl.load(rescale + N0 + tl.arange(0, N1))[None, :]
    r = row + tl.arange(0, BM)
    line = r // pitch
    y = line % image_rows - 1
    column_in = r % pitch - 1
    pixel = ((y >= 0) & (column_in >= 0))[:, None]
    # Row of the large matrix: lines 2 * (small line) + py - 1 apart from one extra halo line per image.
    large_line = line // image_rows * (2 * image_rows - 1) + 2 * y + py + 1
    large_column = 2 * column_in + px + 1
    large = large_line.to(tl.int64) * (2 * pitch - 1) + large_column
    written = ((r < rows) & (2 * y + py + 1 >= 0) & (large_column >= 0))[:, None]
    n0 = tl.arange(0, N0)[None, :]
    n1 = N0 + tl.arange(0, N1)[None, :]
    acc0 = tl.where(pixel, acc0 + tl.load(bias + n0), 0.0)
    acc1 = tl.where(pixel, acc1 + tl.load(bias + n1), 0.0)
    to = large[:, None] * N
    tl.store(x + to + n0, acc0.to(x.dtype.element_ty), mask=written)
    tl.store(x + to + n1, acc1.to(x.dtype.element_ty), mask=written)
    inverse = inverse_norm(tl.sum(acc0 * acc0, 1) + tl.sum(acc1 * acc1, 1))
    acc0 = normalize(acc0, inverse, gamma, 0, BM, N0, 2, n_scale)
    acc1 = normalize(acc1, inverse, gamma, N0, BM, N1, 2, n_scale)
    tl.store(normed + to + n0, round_to(acc0, normed.dtype.element_ty), mask=written)
    tl.store(normed + to + n1, round_to(acc1, normed.dtype.element_ty), mask=written)


def upsample_conv(
    a: Tensor, grid: Grid, weights: ConvWeights, *, x: Tensor, normed: Tensor, norm: Norm, config: ConvConfig,
    gpu: Gpu,
) -> None:  # fmt: skip
    """``a`` [grid.rows, C] -> ``x`` and ``normed`` [grid.doubled().rows, N]; ``a`` and ``normed`` may be float8.

    Raises:
        ValueError: a buffer does not fit ``grid`` and ``weights``, or the norm is not followed by SiLU.
    """
    n0, n1 = split_channels(weights.out_channels)
    large = grid.doubled()
    check_flat(a, grid.rows, weights.in_channels, weights.weight.dtype, "input")
    check_flat(x, large.rows, weights.out_channels, x.dtype if a.dtype == FLOAT8 else a.dtype, "x")
    check_flat(normed, large.rows, weights.out_channels, norm.dtype(x.dtype), "normed")
    if not norm.silu:
        raise ValueError("the block after an upsample starts with RMS norm and SiLU")
    block, block_k = config.block_rows, config.block_k
    tiles = 4 * triton.cdiv(grid.rows, block)
    _upsample_kernel[(tiles,)](
        tile(a, block, block_k, gpu),
        tile(weights.weight, n0, block_k, gpu), tile(weights.weight, n1, block_k, gpu),
        weights.bias, norm.gamma, weights.rescale, x, normed, norm.scale,
        grid.rows, grid.height + 1, grid.pitch,
        C=weights.in_channels, N0=n0, N1=n1, BM=block, BK=block_k, TMA=gpu.bulk_copies,
        **config.launch_options(),
    )  # fmt: skip


def upsample_conv_reference(a: Tensor, grid: Grid, kernel: Tensor, bias: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """fp32 ``(x, normed)`` from the unfolded 3x3 ``kernel`` [N, C, 3, 3]: upsample, then convolve."""
    image = F.interpolate(from_flat(a, grid).float(), scale_factor=2, mode="nearest-exact")
    x = to_flat(F.conv2d(image, kernel.float(), bias.float(), padding=1))
    return x, rms_norm_reference(x, norm.gamma, norm.silu) * (norm.scale or 1.0)

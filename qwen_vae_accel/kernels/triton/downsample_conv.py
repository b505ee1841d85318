"""3x3 convolution with stride 2 and diffusers' padding (0, 1, 0, 1): zeros right and below only.

Output pixel (y, x) sees input rows 2y .. 2y + 2 and columns 2x .. 2x + 2. Rows of the flat matrix two apart are no
TMA tile, so the input is gathered by pointers; the zero column and row of the layout serve as the padding.
"""

from __future__ import annotations

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from qwen_vae_accel.kernels.compiling import TritonKernel
from qwen_vae_accel.kernels.gpu import Gpu
from qwen_vae_accel.kernels.layout import Grid, from_flat, to_flat
from qwen_vae_accel.kernels.triton.blocks import (
    check_flat,
    inverse_norm,
    is_pixel,
    load_tile,
    normalize,
    rms_norm_reference,
    split_channels,
    store_tile,
    tile,
)
from qwen_vae_accel.kernels.tuning.configs import ConvConfig
from qwen_vae_accel.kernels.weights import ConvWeights, Norm


# One compiled kernel for every size: integers are not specialised.
@TritonKernel
@triton.jit(do_not_specialize=["rows", "image_rows", "pitch", "large_rows", "large_image_rows", "large_pitch"])
def _downsample_kernel(
    a,  # [large rows, C]
    w0, w1,  # [N, 9 * C]
    bias, gamma,  # [N] fp32
    x0, x1, n0, n1,  # [rows, N]
    rows, image_rows, pitch, large_rows, large_image_rows, large_pitch,
    C: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = N0 + N1
    STEPS: tl.constexpr = C // BK
    index = tl.program_id(0)
    row = index * BM
    r = row + tl.arange(0, BM)
    line = r // pitch
    pixel = is_pixel(r, pitch, image_rows)
    first = (line // image_rows * large_image_rows + 2 * (line % image_rows) - 1) * large_pitch
    first = tl.where(pixel, first + 2 * (r % pitch) - 1, 0)
    source = a + first.to(tl.int64)[:, None] * C + tl.arange(0, BK)[None, :]
    acc0 = tl.zeros([BM, N0], tl.float32)
    acc1 = tl.zeros([BM, N1], tl.float32)
    for k in tl.range(0, 9 * STEPS):
        tap = k // STEPS
        shift = tap // 3 * large_pitch + tap % 3
        # Only the last pixel's lower right neighbour lies past the matrix.
        inside = (pixel & (first + shift < large_rows))[:, None]
        part = tl.load(source + (shift * C + (k % STEPS) * BK), mask=inside, other=0.0)
        acc0 = tl.dot(part, load_tile(w0, 0, k * BK, N, 9 * C, N0, BK, TMA).T, acc0)
        acc1 = tl.dot(part, load_tile(w1, N0, k * BK, N, 9 * C, N1, BK, TMA).T, acc1)

    acc0 = tl.where(pixel[:, None], acc0 + tl.load(bias + tl.arange(0, N0))[None, :], 0.0)
    acc1 = tl.where(pixel[:, None], acc1 + tl.load(bias + N0 + tl.arange(0, N1))[None, :], 0.0)
    store_tile(x0, row, 0, rows, acc0, N, BM, N0, TMA)
    store_tile(x1, row, N0, rows, acc1, N, BM, N1, TMA)
    inverse = inverse_norm(tl.sum(acc0 * acc0, 1) + tl.sum(acc1 * acc1, 1))
    store_tile(n0, row, 0, rows, normalize(acc0, inverse, gamma, 0, BM, N0, 2), N, BM, N0, TMA)
    store_tile(n1, row, N0, rows, normalize(acc1, inverse, gamma, N0, BM, N1, 2), N, BM, N1, TMA)


def downsample_conv(
    a: Tensor, grid: Grid, weights: ConvWeights, *, x: Tensor, normed: Tensor, norm: Norm, config: ConvConfig,
    gpu: Gpu,
) -> None:  # fmt: skip
    """``a`` [grid.rows, C] -> ``x`` and ``normed`` [grid.halved().rows, N].

    Raises:
        ValueError: a buffer does not fit ``grid`` and ``weights``, or the norm is not followed by SiLU.
    """
    out = weights.out_channels
    n0, n1 = split_channels(out)
    small = grid.halved()
    check_flat(a, grid.rows, weights.in_channels, weights.weight.dtype, "input")
    check_flat(x, small.rows, out, a.dtype, "x")
    check_flat(normed, small.rows, out, a.dtype, "normed")
    if not norm.silu:
        raise ValueError("the block after a downsample starts with RMS norm and SiLU")
    block, block_k = config.block_rows, config.block_k
    tiles = triton.cdiv(small.rows, block)
    _downsample_kernel[(tiles,)](
        a, tile(weights.weight, n0, block_k, gpu), tile(weights.weight, n1, block_k, gpu),
        weights.bias, norm.gamma,
        tile(x, block, n0, gpu), tile(x, block, n1, gpu),
        tile(normed, block, n0, gpu), tile(normed, block, n1, gpu),
        small.rows, small.height + 1, small.pitch, grid.rows, grid.height + 1, grid.pitch,
        C=weights.in_channels, N0=n0, N1=n1, BM=block, BK=block_k, TMA=gpu.bulk_copies,
        **config.launch_options(),
    )  # fmt: skip


def downsample_conv_reference(
    a: Tensor, grid: Grid, weights: ConvWeights, norm: Norm, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """fp32 ``(x, normed)``; ``residual`` [rows, N]."""
    kernel = weights.weight.float().reshape(-1, 3, 3, weights.in_channels).permute(0, 3, 1, 2)
    image = F.pad(from_flat(a, grid).float(), (0, 1, 0, 1))
    x = to_flat(F.conv2d(image, kernel, weights.bias, stride=2)) + (0 if residual is None else residual.float())
    return x, rms_norm_reference(x, norm.gamma, norm.silu)

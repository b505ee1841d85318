"""Means of 2x2 pixels: what the shortcut around a level of the residual encoder adds behind its halving."""

from __future__ import annotations

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from qwen_vae_accel.kernels.compiling import TritonKernel
from qwen_vae_accel.kernels.layout import Grid, from_flat, to_flat
from qwen_vae_accel.kernels.triton.blocks import check_flat, is_pixel


@TritonKernel
@triton.jit(do_not_specialize=["rows", "image_rows", "pitch", "large_image_rows", "large_pitch"])
def _pool_kernel(
    a,  # [large rows, C]
    pooled,  # [rows, C]
    rows, image_rows, pitch, large_image_rows, large_pitch,
    C: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * BM + tl.arange(0, BM)
    column = tl.program_id(1) * BC + tl.arange(0, BC)[None, :]
    line = r // pitch
    pixel = (is_pixel(r, pitch, image_rows) & (r < rows))[:, None]
    first = (line // image_rows * large_image_rows + 2 * (line % image_rows) - 1) * large_pitch + 2 * (r % pitch) - 1
    source = a + first.to(tl.int64)[:, None] * C + column
    total = tl.zeros([BM, BC], tl.float32)
    for i in tl.static_range(4):
        total += tl.load(source + (i // 2 * large_pitch + i % 2) * C, mask=pixel, other=0.0).to(tl.float32)
    to = pooled + r.to(tl.int64)[:, None] * C + column
    tl.store(to, (total * 0.25).to(pooled.dtype.element_ty), mask=(r < rows)[:, None])


def pool(a: Tensor, grid: Grid, pooled: Tensor) -> None:
    """``a`` [grid.rows, C] -> ``pooled`` [grid.halved().rows, C], zeros in its halo; C a multiple of 32.

    Raises:
        ValueError: a matrix does not fit ``grid``.
    """
    small, channels = grid.halved(), a.shape[1]
    check_flat(a, grid.rows, channels, a.dtype, "input")
    check_flat(pooled, small.rows, channels, a.dtype, "pooled")
    _pool_kernel[(triton.cdiv(small.rows, 64), channels // 32)](
        a, pooled, small.rows, small.height + 1, small.pitch, grid.height + 1, grid.pitch,
        C=channels, BM=64, BC=32, num_warps=4,
    )  # fmt: skip


def pool_reference(a: Tensor, grid: Grid) -> Tensor:
    """fp32 [grid.halved().rows, C]."""
    return to_flat(F.avg_pool2d(from_flat(a, grid).float(), 2))

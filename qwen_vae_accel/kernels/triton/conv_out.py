"""Last convolution: flat layout to a planar image.

Decoder (3 or 4 channels): each pixel is multiplied with every tap's weights first (``products`` [9 * C, rows] fp32, row
tap * C + c), by the last block's epilogue or by ``head_products``; ``sum_taps`` adds up nine neighbours and the bias, and
clamps. So the full-width activation is not read nine times.

Encoder (2 * z channels, quant_conv folded in): an ordinary convolution at 1/8 size with a planar epilogue.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from qwen_vae_accel.kernels.compiling import TritonKernel
from qwen_vae_accel.kernels.gpu import Gpu
from qwen_vae_accel.kernels.layout import Grid, from_flat
from qwen_vae_accel.kernels.triton.blocks import check_flat, clamp, is_pixel, load_tile, tile
from qwen_vae_accel.kernels.weights import ConvWeights


@TritonKernel
@triton.jit(do_not_specialize=["rows", "product_rows"])
def _head_kernel(
    a,  # [rows, C]
    head,  # [C, J]
    products,  # [product_rows, rows] fp32
    rows, product_rows,
    C: tl.constexpr, J: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BM
    j = tl.arange(0, J)
    acc = tl.zeros([BM, J], tl.float32)
    for k in tl.range(0, C, BK):
        rows_of_head = k + tl.arange(0, BK)[:, None]
        # Only bulk copies may reach past the last channel, where they read zeros.
        weights = tl.load(head + rows_of_head * J + j[None, :], mask=rows_of_head < C, other=0.0)
        acc = tl.dot(load_tile(a, row, k, rows, C, BM, BK, TMA), weights, acc)
    r = row + tl.arange(0, BM)
    to = j.to(tl.int64)[None, :] * rows + r[:, None]
    tl.store(products + to, acc, mask=(r < rows)[:, None] & (j < product_rows)[None, :])


def head_products(a: Tensor, head: Tensor, products: Tensor, *, gpu: Gpu, block_rows: int = 128) -> None:
    """``a`` [rows, C] @ ``head`` [C, J] -> ``products`` [<= J, rows] fp32, where no epilogue has done it."""
    rows, channels = a.shape
    check_flat(a, rows, head.shape[0], head.dtype, "input")
    depth = 32 if channels % 32 == 0 else 64 if gpu.bulk_copies else 16
    _head_kernel[(triton.cdiv(rows, block_rows),)](
        tile(a, block_rows, depth, gpu), head, products, rows, products.shape[0],
        C=channels, J=head.shape[1], BM=block_rows, BK=depth, TMA=gpu.bulk_copies, num_warps=4, num_stages=3,
    )  # fmt: skip


@TritonKernel
@triton.jit(do_not_specialize=["height", "width", "image_rows", "first", "rows", "pixels", "stride_b", "stride_c"])
def _sum_taps_kernel(
    products,  # [9 * C, rows] fp32
    bias,  # [C] fp32
    image,  # [B, C, H, W], rows and pixels dense
    height, width, image_rows, first, rows, pixels, stride_b, stride_c,
    C: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    x = i % width
    line = i // width
    b = line // height
    y = line % height
    row = (b * image_rows + y + first + 1) * (width + 1) + x + 1
    mask = i < pixels
    plane = tl.cast(rows, tl.int64)
    for c in tl.static_range(C):
        total = tl.zeros([BM], tl.float32) + tl.load(bias + c)
        for tap in tl.static_range(9):
            r = row + (tap // 3 - 1) * (width + 1) + tap % 3 - 1
            # Past the last row lies only the neighbour of the very last pixel.
            r = tl.where(r < rows, r, 0)
            total += tl.load(products + (tap * C + c) * plane + r, mask=mask, other=0.0)
        total = clamp(total, -1.0, 1.0)
        to = b.to(tl.int64) * stride_b + tl.cast(c, tl.int64) * stride_c + y * width + x
        tl.store(image + to, total.to(image.dtype.element_ty), mask=mask)


def sum_taps(products: Tensor, bias: Tensor, grid: Grid, image: Tensor, *, first: int = 0, block: int = 512) -> None:
    """``products`` [9 * C, rows] fp32 -> ``image`` [B, C, H, W] with dense rows, clamped to [-1, 1].

    ``image`` may have fewer rows than ``grid``: those from ``first`` on.
    """
    batch, channels, height, width = image.shape
    dense = image.stride(3) == 1 and image.stride(2) == width
    fits = batch == grid.batch and width == grid.width and 0 <= first <= grid.height - height
    if tuple(products.shape) != (9 * channels, grid.rows) or not (dense and fits):
        raise ValueError(f"products {list(products.shape)} or image {list(image.shape)} do not fit {grid}")
    pixels = batch * height * width
    _sum_taps_kernel[(triton.cdiv(pixels, block),)](
        products, bias, image, height, width, grid.height + 1, first, grid.rows, pixels, image.stride(0), image.stride(1),
        C=channels, BM=block, num_warps=4,
    )  # fmt: skip


def sum_taps_reference(products: Tensor, bias: Tensor, grid: Grid) -> Tensor:
    """fp32 [B, C, H, W]."""
    image = from_flat(products.T.contiguous(), grid).float()
    image = F.pad(image.unflatten(1, (9, -1)), (1, 1, 1, 1))
    height, width = grid.height, grid.width
    parts = [image[:, t, :, t // 3 : t // 3 + height, t % 3 : t % 3 + width] for t in range(9)]
    return (torch.stack(parts).sum(0) + bias[:, None, None]).clamp(-1, 1)


@TritonKernel
@triton.jit(do_not_specialize=["height", "width", "rows"])
def _conv_out_kernel(
    a,  # [rows, C]
    w,  # [N, 9 * C]
    bias,  # [N] fp32
    image,  # [B, N, H, W]
    height, width, rows,
    C: tl.constexpr, N: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    STEPS: tl.constexpr = C // BK
    pitch = width + 1
    row = tl.program_id(0) * BM
    acc = tl.zeros([BM, N], tl.float32)
    for k in tl.range(0, 9 * STEPS):
        tap = k // STEPS
        shift = (tap // 3 - 1) * pitch + tap % 3 - 1
        part = load_tile(a, row + shift, (k % STEPS) * BK, rows, C, BM, BK, TMA)
        acc = tl.dot(part, load_tile(w, 0, k * BK, N, 9 * C, N, BK, TMA).T, acc)
    n = tl.arange(0, N)
    acc += tl.load(bias + n)[None, :]
    r = row + tl.arange(0, BM)
    line = r // pitch
    b = line // (height + 1)
    inner = (line % (height + 1) - 1) * width + r % pitch - 1
    to = (b[:, None] * N + n[None, :]).to(tl.int64) * height * width + inner[:, None]
    mask = is_pixel(r, pitch, height + 1) & (r < rows)
    tl.store(image + to, acc.to(image.dtype.element_ty), mask=mask[:, None])


def conv_out(
    a: Tensor, grid: Grid, weights: ConvWeights, image: Tensor, *, gpu: Gpu, block_rows: int = 64,
    block_k: int = 64,
) -> None:  # fmt: skip
    """``a`` [rows, C] -> ``image`` [B, N, H, W] contiguous; N a power of two, at least 16."""
    check_flat(a, grid.rows, weights.in_channels, weights.weight.dtype, "input")
    if tuple(image.shape) != (grid.batch, weights.out_channels, grid.height, grid.width) or not image.is_contiguous():
        raise ValueError(f"image {list(image.shape)} does not fit {grid}")
    _conv_out_kernel[(triton.cdiv(grid.rows, block_rows),)](
        tile(a, block_rows, block_k, gpu), tile(weights.weight, weights.out_channels, block_k, gpu),
        weights.bias, image, grid.height, grid.width, grid.rows,
        C=weights.in_channels, N=weights.out_channels, BM=block_rows, BK=block_k, TMA=gpu.bulk_copies,
        num_warps=4, num_stages=4,
    )  # fmt: skip


def conv_out_reference(a: Tensor, grid: Grid, weights: ConvWeights) -> Tensor:
    """fp32 [B, N, H, W]."""
    kernel = weights.weight.float().reshape(-1, 3, 3, weights.in_channels).permute(0, 3, 1, 2)
    return F.conv2d(from_flat(a, grid).float(), kernel, weights.bias, padding=1)

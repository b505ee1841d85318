"""Single-head attention over all pixels of an image, head dim = channels = 384, at 1/8 size (wide_attention.py: of more).

Three steps: ``qkv`` (1x1 convolution of the normed input; tokens leave the haloed layout and lie densely), ``attention``
(online softmax, nothing of size tokens x tokens is stored; the result goes back to the flat layout), and the projection
with residual and the next block's norm, which is ``conv3x3.conv`` with one tap.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from qwen_vae_accel.kernels.compiling import TritonKernel
from qwen_vae_accel.kernels.gpu import Gpu
from qwen_vae_accel.kernels.layout import Grid, from_flat, to_flat
from qwen_vae_accel.kernels.sm90.attention import KEYS, attention_sm90
from qwen_vae_accel.kernels.triton.blocks import check_flat, is_pixel, load_tile, split_channels, tile
from qwen_vae_accel.kernels.tuning.configs import AttentionConfig, ConvConfig
from qwen_vae_accel.kernels.weights import ConvWeights


@TritonKernel
@triton.jit(do_not_specialize=["rows", "image_rows", "pitch"])
def _qkv_kernel(
    a,  # [rows, C]
    w0, w1,  # [3 * C, C]
    bias,  # [3 * C] fp32
    tokens,  # [B * H * W, 3 * C]
    rows, image_rows, pitch,
    C: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BM
    n = tl.program_id(1) * (N0 + N1)
    acc0 = tl.zeros([BM, N0], tl.float32)
    acc1 = tl.zeros([BM, N1], tl.float32)
    for k in tl.range(0, C, BK):
        part = load_tile(a, row, k, rows, C, BM, BK, TMA)
        acc0 = tl.dot(part, load_tile(w0, n, k, 3 * C, C, N0, BK, TMA).T, acc0)
        acc1 = tl.dot(part, load_tile(w1, n + N0, k, 3 * C, C, N1, BK, TMA).T, acc1)
    r = row + tl.arange(0, BM)
    line = r // pitch
    token = (line // image_rows * (image_rows - 1) + line % image_rows - 1) * (pitch - 1) + r % pitch - 1
    mask = (is_pixel(r, pitch, image_rows) & (r < rows))[:, None]
    to = token.to(tl.int64)[:, None] * (3 * C)
    n0 = n + tl.arange(0, N0)[None, :]
    n1 = n + N0 + tl.arange(0, N1)[None, :]
    tl.store(tokens + to + n0, (acc0 + tl.load(bias + n0)).to(tokens.dtype.element_ty), mask=mask)
    tl.store(tokens + to + n1, (acc1 + tl.load(bias + n1)).to(tokens.dtype.element_ty), mask=mask)


def qkv(
    a: Tensor, grid: Grid, weights: ConvWeights, tokens: Tensor, *, config: ConvConfig, gpu: Gpu
) -> None:  # fmt: skip
    """``a`` [rows, C] -> ``tokens`` [B * H * W, 3 * C]: queries, keys and values of the pixels, without halo."""
    channels = weights.in_channels
    check_flat(a, grid.rows, channels, weights.weight.dtype, "input")
    check_flat(tokens, grid.pixels, 3 * channels, a.dtype, "tokens")
    n0, n1 = split_channels(min(channels, 384))
    block, block_k = config.block_rows, config.block_k
    _qkv_kernel[(triton.cdiv(grid.rows, block), 3 * channels // (n0 + n1))](
        tile(a, block, block_k, gpu),
        tile(weights.weight, n0, block_k, gpu), tile(weights.weight, n1, block_k, gpu),
        weights.bias, tokens, grid.rows, grid.height + 1, grid.pitch,
        C=channels, N0=n0, N1=n1, BM=block, BK=block_k, TMA=gpu.bulk_copies, **config.launch_options(),
    )  # fmt: skip


def qkv_reference(a: Tensor, grid: Grid, weights: ConvWeights) -> Tensor:
    """fp32 [B * H * W, 3 * C]."""
    pixels = from_flat(a, grid).float().permute(0, 2, 3, 1).reshape(grid.pixels, -1)
    return pixels @ weights.weight.float().T + weights.bias


def token_tile(tokens: Tensor, batch: int, rows: int, columns: int, gpu: Gpu):
    """Like ``blocks.tile``, of ``rows`` tokens of one image: beyond its last token a bulk copy reads zeros."""
    if not gpu.bulk_copies:
        return tokens
    return TensorDescriptor.from_tensor(tokens.view(batch, -1, tokens.shape[1]), [1, rows, columns])


@triton.jit
def load_tokens(src, b, token, column, count, WIDTH: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr):
    """``BM`` tokens from ``token`` on of image ``b``, columns ``column .. column + BK``; zero outside the image.

    A probability of 0 times a NaN of the next image would be NaN.
    """
    if TMA:
        value = src.load([b, token, column]).reshape([BM, BK])
    else:
        value = load_tile(src, b * count + token, column, (b + 1) * count, WIDTH, BM, BK, TMA)
    return value


# Scores of -infinity alone, in the first keys that a program sees, may be followed by numbers: below all of those, yet finite.
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


@TritonKernel
@triton.jit(do_not_specialize=["count", "width", "all_tokens", "splits", "first_query", "scale"])
def _attention_kernel(
    q0, q1, k0, k1, v0, v1,  # [B, T, 3 * C] tokens, as tiles of N0 and N1 columns
    out,  # [rows, C]
    partial,  # [splits * B * T, C] fp32
    tops,  # [splits * B * T] fp32, log2 of the softmax denominators
    count, width, all_tokens, splits, first_query, scale,
    C: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr, SPLIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(1)
    b = tl.program_id(2)
    first = first_query + tl.program_id(0) * BM
    blocks = tl.cdiv(count, BN)
    begin = blocks * split // splits * BN
    end = blocks * (split + 1) // splits * BN
    qa = load_tokens(q0, b, first, 0, count, 3 * C, BM, N0, TMA)
    qb = load_tokens(q1, b, first, N0, count, 3 * C, BM, N1, TMA)
    top = tl.full([BM], _LOWEST, tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc0 = tl.zeros([BM, N0], tl.float32)
    acc1 = tl.zeros([BM, N1], tl.float32)
    for n in tl.range(begin, end, BN):
        s = tl.dot(qa, load_tokens(k0, b, n, C, count, 3 * C, BN, N0, TMA).T)
        s = tl.dot(qb, load_tokens(k1, b, n, C + N0, count, 3 * C, BN, N1, TMA).T, s)
        # One fused multiply-add scales and masks: the last tile may reach beyond the image.
        s = s * scale + tl.where(n + tl.arange(0, BN) < count, 0.0, -float("inf"))[None, :]
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        top = new_top
        va = load_tokens(v0, b, n, 2 * C, count, 3 * C, BN, N0, TMA)
        vb = load_tokens(v1, b, n, 2 * C + N0, count, 3 * C, BN, N1, TMA)
        p = p.to(va.dtype)
        acc0 = tl.dot(p, va, acc0 * shrink[:, None])
        acc1 = tl.dot(p, vb, acc1 * shrink[:, None])

    token = first + tl.arange(0, BM)
    mask = (token < count)[:, None]
    # Of scores of -infinity alone: NaN, but for splits, where sums of 0 count for nothing when they are merged.
    divisor = tl.where(total == 0.0, 1.0, total) if SPLIT else total
    acc0 = acc0 / divisor[:, None]
    acc1 = acc1 / divisor[:, None]
    n0 = tl.arange(0, N0)[None, :]
    n1 = N0 + tl.arange(0, N1)[None, :]
    if SPLIT:
        row = split * all_tokens + b * count + token
        to = row.to(tl.int64)[:, None] * C
        tl.store(partial + to + n0, acc0, mask=mask)
        tl.store(partial + to + n1, acc1, mask=mask)
        tl.store(tops + row, top + tl.log2(total), mask=token < count)
    else:
        to = flat_row(token, b, count, width).to(tl.int64)[:, None] * C
        tl.store(out + to + n0, acc0.to(out.dtype.element_ty), mask=mask)
        tl.store(out + to + n1, acc1.to(out.dtype.element_ty), mask=mask)


@triton.jit
def flat_row(token, b, count, width):
    """Row of the flat layout where pixel ``token`` of image ``b`` lies."""
    return (b * (count // width + 1) + token // width + 1) * (width + 1) + token % width + 1


@TritonKernel
@triton.jit(do_not_specialize=["count", "width", "all_tokens", "splits"])
def _merge_kernel(
    partial,  # [splits * B * T, C] fp32
    tops,  # [splits * B * T] fp32
    out,  # [rows, C]
    count, width, all_tokens, splits,
    C: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * BM + tl.arange(0, BM)
    column = tl.program_id(1) * BC + tl.arange(0, BC)[None, :]
    mask = token < all_tokens
    top = tl.full([BM], -float("inf"), tl.float32)
    for split in range(splits):
        top = tl.maximum(top, tl.load(tops + split * all_tokens + token, mask=mask, other=0.0))
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BC], tl.float32)
    for split in range(splits):
        row = split * all_tokens + token
        weight = tl.exp2(tl.load(tops + row, mask=mask, other=0.0) - top)
        total += weight
        part = tl.load(partial + row.to(tl.int64)[:, None] * C + column, mask=mask[:, None], other=0.0)
        acc += weight[:, None] * part
    to = flat_row(token % count, token // count, count, width).to(tl.int64)[:, None] * C
    tl.store(out + to + column, (acc / total[:, None]).to(out.dtype.element_ty), mask=mask[:, None])


def attention(
    tokens: Tensor, grid: Grid, out: Tensor, *, config: AttentionConfig, gpu: Gpu, splits: int = 1,
    partial: Tensor | None = None, tops: Tensor | None = None, queries: range | None = None,
) -> None:  # fmt: skip
    """``tokens`` [B * H * W, 3 * C] -> ``out`` [rows, C], pixels only: its halo keeps what it held.

    ``queries``: of every image, whose results are wanted; the others may come out as anything. None: all.

    ``splits`` programs share a tile of queries, each taking a range of keys; then ``partial`` [splits * B * H * W, C]
    and ``tops`` [splits * B * H * W], both fp32, hold their results until they are merged.
    """
    channels = tokens.shape[1] // 3
    check_flat(tokens, grid.pixels, 3 * channels, out.dtype, "tokens")
    check_flat(out, grid.rows, channels, out.dtype, "out")
    if splits > 1:
        if partial is None or tops is None:
            raise ValueError("splits need memory for partial results")
        check_flat(partial, splits * grid.pixels, channels, torch.float32, "partial")
    n0, n1 = split_channels(channels)
    count, bm, bn = grid.height * grid.width, config.block_queries, KEYS if config.sm90 else config.block_keys
    if splits > -(-count // bn):  # one without keys waits for them forever
        raise ValueError(f"{splits} splits of {count} keys, {bn} at a time, leave some empty")
    queries = range(count) if queries is None else queries
    if config.sm90:
        attention_sm90(tokens, grid, out, partial, tops, splits, queries)
    else:
        parts = [token_tile(tokens, grid.batch, rows, columns, gpu) for rows in (bm, bn, bn) for columns in (n0, n1)]
        _attention_kernel[(triton.cdiv(len(queries), bm), splits, grid.batch)](
            *parts, out, out if partial is None else partial, out if tops is None else tops,
            count, grid.width, grid.pixels, splits, queries.start, channels**-0.5 * math.log2(math.e),
            C=channels, N0=n0, N1=n1, SPLIT=splits > 1, BM=bm, BN=bn, TMA=gpu.bulk_copies,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    if splits > 1:
        _merge_kernel[(triton.cdiv(grid.pixels, 16), channels // 128)](
            partial, tops, out, count, grid.width, grid.pixels, splits, C=channels, BM=16, BC=128, num_warps=4
        )


def attention_reference(tokens: Tensor, grid: Grid) -> Tensor:
    """fp32 [rows, C], halo zero."""
    q, k, v = tokens.float().view(grid.batch, 1, grid.height * grid.width, -1).chunk(3, -1)
    out = F.scaled_dot_product_attention(q, k, v)
    return to_flat(out.reshape(grid.batch, grid.height, grid.width, -1).permute(0, 3, 1, 2))

"""Single-head attention of more channels than a tile can sum up: 768 or 1152, at 1/16 size.

The scores of a chunk of queries are stored, as what the softmax makes of them but for its denominators:

    weights[q, k] = exp2(scores[q, k] - top[q, tile of k])     16 bits, a tile of keys at a time
    out[q] = sum over tiles of exp2(top[q, tile] - max of top[q]) * (weights[q, tile] @ values[tile]), divided by
             the same sum over ``sums``

So the numbers that are rounded lie in [0, 1], as in an attention that stores nothing. Chunks keep the memory small.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen_vae_accel.kernels.compiling import TritonKernel
from qwen_vae_accel.kernels.gpu import Gpu
from qwen_vae_accel.kernels.layout import Grid
from qwen_vae_accel.kernels.triton.attention import flat_row, load_tokens, token_tile
from qwen_vae_accel.kernels.triton.blocks import check_flat

TILE = 128  # queries and keys of a tile
_DEPTH = 64  # channels, or keys, that a step multiplies
_CHUNK_BYTES = 64 << 20  # of weights, if that is more than a tile of queries

_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # below all scores that are numbers, yet finite


@TritonKernel
@triton.jit(do_not_specialize=["count", "chunk", "first", "tiles", "scale"])
def _scores_kernel(
    q, k,  # [B, T, 3 * C] tokens, as tiles of TILE tokens
    weights,  # [B * chunk, tiles * TILE]
    tops, sums,  # [B * chunk, tiles] fp32
    count, chunk, first, tiles, scale,
    C: tl.constexpr, TILE: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    keys = tl.program_id(0)
    queries = tl.program_id(1) * TILE
    b = tl.program_id(2)
    acc = tl.zeros([TILE, TILE], tl.float32)
    for c in tl.range(0, C, BK):
        part = load_tokens(q, b, first + queries, c, count, 3 * C, TILE, BK, TMA)
        acc = tl.dot(part, load_tokens(k, b, keys * TILE, C + c, count, 3 * C, TILE, BK, TMA).T, acc)
    j = keys * TILE + tl.arange(0, TILE)
    acc = acc * scale + tl.where(j < count, 0.0, -float("inf"))[None, :]
    top = tl.maximum(tl.max(acc, 1), _LOWEST)
    p = tl.exp2(acc - top[:, None])
    i = queries + tl.arange(0, TILE)
    row = b * chunk + i
    mask = i < chunk
    tl.store(tops + row * tiles + keys, top, mask=mask)
    tl.store(sums + row * tiles + keys, tl.sum(p, 1), mask=mask)
    to = row.to(tl.int64)[:, None] * (tiles * TILE) + j[None, :]
    tl.store(weights + to, p.to(weights.dtype.element_ty), mask=mask[:, None])


@TritonKernel
@triton.jit(do_not_specialize=["count", "width", "chunk", "first", "tiles"])
def _values_kernel(
    weights,  # [B * chunk, tiles * TILE], as tiles
    v,  # [B, T, 3 * C] tokens, as tiles
    tops, sums,  # [B * chunk, tiles] fp32
    out,  # [rows, C]
    count, width, chunk, first, tiles,
    C: tl.constexpr, TILE: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    STEPS: tl.constexpr = TILE // BK
    column = tl.program_id(0) * BN
    queries = tl.program_id(1) * TILE
    b = tl.program_id(2)
    i = queries + tl.arange(0, TILE)
    row = b * chunk + tl.minimum(i, chunk - 1)
    top = tl.full([TILE], _LOWEST, tl.float32)
    for t in range(tiles):
        top = tl.maximum(top, tl.load(tops + row * tiles + t))
    total = tl.zeros([TILE], tl.float32)
    for t in range(tiles):
        total += tl.exp2(tl.load(tops + row * tiles + t) - top) * tl.load(sums + row * tiles + t)
    acc = tl.zeros([TILE, BN], tl.float32)
    for step in tl.range(0, tiles * STEPS):
        factor = tl.exp2(tl.load(tops + row * tiles + step // STEPS) - top)
        if TMA:
            p = weights.load([b, queries, step * BK]).reshape([TILE, BK])
        else:
            p = tl.load(weights + row.to(tl.int64)[:, None] * (tiles * TILE) + (step * BK + tl.arange(0, BK))[None, :])
        value = load_tokens(v, b, step * BK, 2 * C + column, count, 3 * C, BK, BN, TMA)
        acc = tl.dot((p.to(tl.float32) * factor[:, None]).to(value.dtype), value, acc)
    token = first + i
    channel = (column + tl.arange(0, BN))[None, :]
    to = flat_row(token, b, count, width).to(tl.int64)[:, None] * C + channel
    written = ((i < chunk) & (token < count))[:, None] & (channel < C)
    tl.store(out + to, (acc / total[:, None]).to(out.dtype.element_ty), mask=written)


def tiles_of(grid: Grid) -> int:
    """Tiles of keys of an image."""
    return triton.cdiv(grid.height * grid.width, TILE)


def chunk_of(grid: Grid) -> int:
    """Queries of an image whose weights are stored at a time."""
    tiles = tiles_of(grid)
    fitting = _CHUNK_BYTES // (2 * grid.batch * tiles * TILE * TILE)
    return TILE * max(1, min(tiles, fitting))


def wide_attention(
    tokens: Tensor, grid: Grid, out: Tensor, *, weights: Tensor, tops: Tensor, sums: Tensor, gpu: Gpu,
    queries: range | None = None,
) -> None:  # fmt: skip
    """``tokens`` [B * H * W, 3 * C] -> ``out`` [rows, C], pixels only: its halo keeps what it held. C a multiple of 128.

    Args:
        weights: room for ``[B * chunk_of(grid), tiles_of(grid) * TILE]`` in the dtype of the tokens.
        tops, sums: room for ``[B * chunk_of(grid), tiles_of(grid)]`` fp32.
        gpu: decides about bulk copies and buffers.
        queries: of every image, whose results are wanted; the others may come out as anything. None: all.

    Raises:
        ValueError: a matrix does not fit ``grid``.
    """
    channels = tokens.shape[1] // 3
    count, chunk, tiles = grid.height * grid.width, chunk_of(grid), tiles_of(grid)
    check_flat(tokens, grid.pixels, 3 * channels, out.dtype, "tokens")
    check_flat(out, grid.rows, channels, out.dtype, "out")
    check_flat(weights, grid.batch * chunk, tiles * TILE, out.dtype, "weights")
    for name, matrix in (("tops", tops), ("sums", sums)):
        check_flat(matrix, grid.batch * chunk, tiles, torch.float32, name)
    part = token_tile(tokens, grid.batch, TILE, _DEPTH, gpu)
    stages = 3 if gpu.shared_memory >= 150 << 10 else 2
    columns = 256 if gpu.bulk_copies else 128  # of a tile of values; only bulk copies may reach past the last one
    queries = range(count) if queries is None else queries
    for first in range(queries.start, queries.stop, chunk):
        blocks = triton.cdiv(min(chunk, queries.stop - first), TILE)
        _scores_kernel[(tiles, blocks, grid.batch)](
            part, part, weights, tops, sums, count, chunk, first, tiles, channels**-0.5 * math.log2(math.e),
            C=channels, TILE=TILE, BK=_DEPTH, TMA=gpu.bulk_copies, num_warps=8, num_stages=stages,
        )  # fmt: skip
        _values_kernel[(triton.cdiv(channels, columns), blocks, grid.batch)](
            token_tile(weights, grid.batch, TILE, _DEPTH, gpu), token_tile(tokens, grid.batch, _DEPTH, columns, gpu),
            tops, sums, out, count, grid.width, chunk, first, tiles,
            C=channels, TILE=TILE, BK=_DEPTH, BN=columns, TMA=gpu.bulk_copies, num_warps=8, num_stages=stages,
        )  # fmt: skip

"""3x3 (and 1x1) convolution over the flat layout with everything that follows it in the epilogue.

    value  = taps(a) [+ shortcut 1x1 over a second input] + bias [+ residual]
    x      = value                                   if asked for
    normed = silu(rms_norm(value))                   if asked for
    products = normed @ head (one column per tap and output channel of conv_out, see conv_out.py)

``a`` and the taps' weights may be float8 (float8.py): then the taps' sums are rescaled per output channel first. ``normed`` is
written in float8 where the norm has a scale, and ``x`` where ``x_scale`` is given.

A tile holds every output channel of its pixels, so the norm is local to it. The nine taps are nine shifted loads of
the same matrix (layout.py). ``residual`` and ``x`` may be the same buffer: a tile reads only the rows it then writes.
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
    NO_NORM,
    NORM_ONLY,
    NORM_SILU,
    check_flat,
    inverse_norm,
    is_pixel,
    load_tile,
    normalize,
    rms_norm_reference,
    scaled,
    split_channels,
    store_tile,
    tile,
)
from qwen_vae_accel.kernels.tuning.configs import ConvConfig
from qwen_vae_accel.kernels.weights import ConvWeights, Norm


@triton.jit
def _conv_tile(
    index, a, s, w0, w1, u0, u1, bias, gamma, rescale, r0, r1, x0, x1, n0, n1, head, products, x_scale, n_scale,
    rows, image_rows, pitch, product_rows,
    C: tl.constexpr, CS: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr, TAPS: tl.constexpr,
    RESIDUAL: tl.constexpr, WRITE_X: tl.constexpr, NORM: tl.constexpr, WRITE_N: tl.constexpr, J: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = N0 + N1
    # In float8 the shortcut's weights are a matrix of their own.
    OWN: tl.constexpr = rescale is not None
    K: tl.constexpr = TAPS * C if OWN else TAPS * C + CS
    KS: tl.constexpr = CS if OWN else K
    S_COLUMN: tl.constexpr = 0 if OWN else TAPS * C
    STEPS: tl.constexpr = C // BK
    row = index * BM
    acc0 = tl.zeros([BM, N0], tl.float32)
    if N1 > 0:
        acc1 = tl.zeros([BM, N1], tl.float32)
    for k in tl.range(0, TAPS * STEPS):
        if TAPS == 9:
            tap = k // STEPS
            shift = (tap // 3 - 1) * pitch + tap % 3 - 1
        else:
            shift = 0
        part = load_tile(a, row + shift, (k % STEPS) * BK, rows, C, BM, BK, TMA)
        acc0 = tl.dot(part, load_tile(w0, 0, k * BK, N, K, N0, BK, TMA).T, acc0)
        if N1 > 0:
            acc1 = tl.dot(part, load_tile(w1, N0, k * BK, N, K, N1, BK, TMA).T, acc1)
    if rescale is not None:
        acc0 *= tl.load(rescale + tl.arange(0, N0))[None, :]
        if N1 > 0:
            acc1 *= tl.load(rescale + N0 + tl.arange(0, N1))[None, :]
    if CS > 0:
        for k in tl.range(0, CS // BS):
            part = load_tile(s, row, k * BS, rows, CS, BM, BS, TMA)
            column = S_COLUMN + k * BS
            acc0 = tl.dot(part, load_tile(u0, 0, column, N, KS, N0, BS, TMA).T, acc0)
            if N1 > 0:
                acc1 = tl.dot(part, load_tile(u1, N0, column, N, KS, N1, BS, TMA).T, acc1)

    pixel = is_pixel(row + tl.arange(0, BM), pitch, image_rows)[:, None]
    acc0 += tl.load(bias + tl.arange(0, N0))[None, :]
    if RESIDUAL:
        acc0 += load_tile(r0, row, 0, rows, N, BM, N0, TMA).to(tl.float32)
    acc0 = tl.where(pixel, acc0, 0.0)
    if WRITE_X:
        store_tile(x0, row, 0, rows, acc0 if x_scale is None else scaled(acc0, x_scale), N, BM, N0, TMA)
    if N1 > 0:
        acc1 += tl.load(bias + N0 + tl.arange(0, N1))[None, :]
        if RESIDUAL:
            acc1 += load_tile(r1, row, N0, rows, N, BM, N1, TMA).to(tl.float32)
        acc1 = tl.where(pixel, acc1, 0.0)
        if WRITE_X:
            store_tile(x1, row, N0, rows, acc1 if x_scale is None else scaled(acc1, x_scale), N, BM, N1, TMA)
    if NORM > 0:
        squares = tl.sum(acc0 * acc0, 1)
        if N1 > 0:
            squares += tl.sum(acc1 * acc1, 1)
        inverse = inverse_norm(squares)
        acc0 = normalize(acc0, inverse, gamma, 0, BM, N0, NORM, n_scale)
        if N1 > 0:
            acc1 = normalize(acc1, inverse, gamma, N0, BM, N1, NORM, n_scale)
        if WRITE_N:
            store_tile(n0, row, 0, rows, acc0, N, BM, N0, TMA)
            if N1 > 0:
                store_tile(n1, row, N0, rows, acc1, N, BM, N1, TMA)
        if J > 0:
            j = tl.arange(0, J)
            h0 = tl.load(head + tl.arange(0, N0)[:, None] * J + j[None, :])
            sums = tl.dot(acc0.to(h0.dtype), h0)
            if N1 > 0:
                h1 = tl.load(head + (N0 + tl.arange(0, N1))[:, None] * J + j[None, :])
                sums = tl.dot(acc1.to(h1.dtype), h1, sums)
            r = row + tl.arange(0, BM)
            to = j.to(tl.int64)[None, :] * rows + r[:, None]
            tl.store(products + to, sums, mask=(r < rows)[:, None] & (j < product_rows)[None, :])


# One compiled kernel for every size: integers are not specialised.
@TritonKernel
@triton.jit(do_not_specialize=["rows", "image_rows", "pitch", "product_rows", "tiles"])
def _conv_kernel(
    a,  # [rows, C] input
    s,  # [rows, CS] input of the shortcut (unused if CS is 0)
    w0, w1, u0, u1,  # [N, TAPS * C + CS] weights: N0 and N1 rows by BK columns, and by BS for the shortcut
    bias, gamma,  # [N] fp32
    rescale,  # [N] fp32 if a and w are float8, else None; then u is [N, CS]
    r0, r1,  # [rows, N] residual
    x0, x1,  # [rows, N] sum before the norm
    n0, n1,  # [rows, N] normed
    head,  # [N, J] weights of conv_out
    products,  # [J, rows] fp32
    x_scale, n_scale,  # of outputs in float8, else None
    rows, image_rows, pitch, product_rows, tiles,
    C: tl.constexpr, CS: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr, TAPS: tl.constexpr,
    RESIDUAL: tl.constexpr, WRITE_X: tl.constexpr, NORM: tl.constexpr, WRITE_N: tl.constexpr, J: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BS: tl.constexpr, TMA: tl.constexpr, PERSISTENT: tl.constexpr,
):  # fmt: skip
    # Not one loop for both: inside a loop the epilogue's stores get shared memory of their own.
    if PERSISTENT:
        for index in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            _conv_tile(
                index, a, s, w0, w1, u0, u1, bias, gamma, rescale, r0, r1, x0, x1, n0, n1, head, products,
                x_scale, n_scale, rows, image_rows, pitch, product_rows,
                C, CS, N0, N1, TAPS, RESIDUAL, WRITE_X, NORM, WRITE_N, J, BM, BK, BS, TMA,
            )  # fmt: skip
    else:
        _conv_tile(
            tl.program_id(0), a, s, w0, w1, u0, u1, bias, gamma, rescale, r0, r1, x0, x1, n0, n1, head, products,
            x_scale, n_scale, rows, image_rows, pitch, product_rows,
            C, CS, N0, N1, TAPS, RESIDUAL, WRITE_X, NORM, WRITE_N, J, BM, BK, BS, TMA,
        )  # fmt: skip


def conv(
    a: Tensor,
    grid: Grid,
    weights: ConvWeights,
    *,
    config: ConvConfig,
    gpu: Gpu,
    x: Tensor | None = None,
    normed: Tensor | None = None,
    norm: Norm | None = None,
    residual: Tensor | None = None,
    shortcut: Tensor | None = None,
    head: Tensor | None = None,
    products: Tensor | None = None,
    x_scale: float | None = None,
) -> None:
    """Write ``x`` and / or ``normed`` (``[rows, N]``) and / or ``products`` (``[<= J, rows]`` fp32); see the module.

    Raises:
        ValueError: a buffer does not fit ``grid`` and ``weights``, or the width has no kernel.
    """
    channels, out = weights.in_channels, weights.out_channels
    n0, n1 = split_channels(out)
    rows = grid.rows
    check_flat(a, rows, channels, weights.weight.dtype, "input")
    plain = a.dtype
    if plain == FLOAT8:  # then the 16-bit dtype is that of any other buffer
        plain = next((t.dtype for t in (residual, shortcut, x, normed) if t is not None and t.dtype != FLOAT8), plain)
    dtypes = {
        "x": plain if x_scale is None else FLOAT8, "normed": plain if norm is None else norm.dtype(plain), "residual": plain,
    }  # fmt: skip
    for name, buffer in (("x", x), ("normed", normed), ("residual", residual)):
        if buffer is not None:
            check_flat(buffer, rows, out, dtypes[name], name)
    if (shortcut is not None) != (weights.shortcut > 0) or (norm is None and (normed is not None or head is not None)):
        raise ValueError("a shortcut needs weights packed with one, and normed or head need a norm")
    if shortcut is not None:
        check_flat(shortcut, rows, weights.shortcut, plain, "shortcut")
    block, block_k = config.block_rows, config.block_k
    block_s = block_k if weights.shortcut % block_k == 0 else 32
    if channels % block_k or weights.shortcut % block_s:
        raise ValueError(f"{channels} + {weights.shortcut} channels are not a multiple of block_k {block_k}")
    pair = lambda t: (tile(t, block, n0, gpu), tile(t, block, n1 or n0, gpu))  # noqa: E731
    some = next(t for t in (x, normed, a) if t is not None)  # stands in for absent tensors, never touched
    stand_in = pair(some)
    beside = weights.weight if weights.shortcut_weight is None else weights.shortcut_weight
    tiles = triton.cdiv(rows, block)
    _conv_kernel[(config.blocks(tiles, gpu),)](
        tile(a, block, block_k, gpu),
        tile(a if shortcut is None else shortcut, block, block_s, gpu),
        *(tile(weights.weight, n, block_k, gpu) for n in (n0, n1 or n0)),
        *(tile(beside, n, block_s, gpu) for n in (n0, n1 or n0)),
        weights.bias, weights.bias if norm is None else norm.gamma, weights.rescale,
        *(stand_in if residual is None else pair(residual)),
        *(stand_in if x is None else pair(x)),
        *(stand_in if normed is None else pair(normed)),
        weights.bias if head is None else head,
        weights.bias if products is None else products,
        x_scale, None if norm is None else norm.scale,
        rows, grid.height + 1, grid.pitch, 0 if products is None else products.shape[0], tiles,
        C=channels, CS=weights.shortcut, N0=n0, N1=n1, TAPS=weights.taps,
        RESIDUAL=residual is not None, WRITE_X=x is not None,
        NORM=NO_NORM if norm is None else NORM_SILU if norm.silu else NORM_ONLY,
        WRITE_N=normed is not None, J=0 if head is None else head.shape[1],
        BM=block, BK=block_k, BS=block_s, TMA=gpu.bulk_copies, PERSISTENT=config.per_sm > 0,
        **config.launch_options(),
    )  # fmt: skip


def conv_reference(
    a: Tensor,
    grid: Grid,
    weights: ConvWeights,
    *,
    norm: Norm | None = None,
    residual: Tensor | None = None,
    shortcut: Tensor | None = None,
    head: Tensor | None = None,
    x_scale: float | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """fp32 ``(x, normed, products)`` of ``conv`` by plain PyTorch before their rounding, halo rows zero."""
    side = 3 if weights.taps == 9 else 1
    channels = weights.in_channels
    matrix = weights.weight.float() * (1.0 if weights.rescale is None else weights.rescale[:, None])
    kernel = matrix[:, : weights.taps * channels].reshape(-1, side, side, channels).permute(0, 3, 1, 2)
    image = F.conv2d(from_flat(a, grid).float(), kernel, weights.bias, padding=side // 2)
    if shortcut is not None:
        own = weights.shortcut_weight
        extra = matrix[:, weights.taps * channels :] if own is None else own.float()
        image = image + F.conv2d(from_flat(shortcut, grid).float(), extra[:, :, None, None])
    if residual is not None:
        image = image + from_flat(residual, grid).float()
    x = to_flat(image)
    written = x if x_scale is None else x * x_scale
    if norm is None:
        return written, None, None
    normed = rms_norm_reference(x, norm.gamma, norm.silu) * (norm.scale or 1.0)
    products = None if head is None else (normed.to(head.dtype).float() @ head.float()).T.contiguous()
    return written, normed, products

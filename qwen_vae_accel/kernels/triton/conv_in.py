"""First convolution: a planar image of few channels (3, 4 or 16) to the flat layout, with the first block's norm.

All nine taps of all channels are one short K (27 to 153 columns), gathered straight from NCHW. A 1x1 convolution before
it (post_quant_conv) is folded into the weights; its bias then weighs a constant-one channel, which like every channel
is zero outside the image (``Packer.conv_after_pointwise``).
"""

from __future__ import annotations

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from qwen_vae_accel.kernels.compiling import TritonKernel
from qwen_vae_accel.kernels.gpu import Gpu
from qwen_vae_accel.kernels.layout import Grid, to_flat
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
from qwen_vae_accel.kernels.weights import Norm, SmallConvWeights


# One compiled kernel for every size: integers are not specialised.
@TritonKernel
@triton.jit(do_not_specialize=["stride_b", "stride_c", "stride_y", "stride_x", "height", "width", "rows"])
def _conv_in_kernel(
    image,  # [B, CIN, H, W], any strides
    w0, w1,  # [N, K]
    bias, gamma,  # [N] fp32
    x0, x1, n0, n1,  # [rows, N]
    stride_b, stride_c, stride_y, stride_x, height, width, rows,
    CIN: tl.constexpr, ONES: tl.constexpr, K: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = N0 + N1
    row = tl.program_id(0) * BM
    r = row + tl.arange(0, BM)
    line = r // (width + 1)
    b = line // (height + 1)
    y = line % (height + 1) - 1
    x = r % (width + 1) - 1
    pixel = is_pixel(r, width + 1, height + 1) & (r < rows)
    acc0 = tl.zeros([BM, N0], tl.float32)
    acc1 = tl.zeros([BM, N1], tl.float32)
    for start in tl.static_range(0, K, BK):
        k = start + tl.arange(0, BK)
        tap = tl.where(k < 9 * CIN, k // CIN, k - 9 * CIN)
        ys = y[:, None] + (tap // 3 - 1)[None, :]
        xs = x[:, None] + (tap % 3 - 1)[None, :]
        inside = pixel[:, None] & (ys >= 0) & (ys < height) & (xs >= 0) & (xs < width)
        where = b.to(tl.int64)[:, None] * stride_b + (k % CIN)[None, :] * stride_c
        where += ys.to(tl.int64) * stride_y + xs * stride_x
        part = tl.load(image + where, mask=inside & (k < 9 * CIN)[None, :], other=0.0)
        if ONES:
            one = inside & ((k >= 9 * CIN) & (k < 9 * CIN + 9))[None, :]
            part = tl.where(one, 1.0, part.to(tl.float32)).to(image.dtype.element_ty)
        acc0 = tl.dot(part, load_tile(w0, 0, start, N, K, N0, BK, TMA).T, acc0)
        acc1 = tl.dot(part, load_tile(w1, N0, start, N, K, N1, BK, TMA).T, acc1)

    acc0 = tl.where(pixel[:, None], acc0 + tl.load(bias + tl.arange(0, N0))[None, :], 0.0)
    acc1 = tl.where(pixel[:, None], acc1 + tl.load(bias + N0 + tl.arange(0, N1))[None, :], 0.0)
    store_tile(x0, row, 0, rows, acc0, N, BM, N0, TMA)
    store_tile(x1, row, N0, rows, acc1, N, BM, N1, TMA)
    inverse = inverse_norm(tl.sum(acc0 * acc0, 1) + tl.sum(acc1 * acc1, 1))
    store_tile(n0, row, 0, rows, normalize(acc0, inverse, gamma, 0, BM, N0, 2), N, BM, N0, TMA)
    store_tile(n1, row, N0, rows, normalize(acc1, inverse, gamma, N0, BM, N1, 2), N, BM, N1, TMA)


def conv_in(
    image: Tensor, weights: SmallConvWeights, *, x: Tensor, normed: Tensor, norm: Norm, config: ConvConfig,
    gpu: Gpu,
) -> None:  # fmt: skip
    """``image`` [B, C, H, W] of any strides -> ``x`` and ``normed`` [rows, N].

    Raises:
        ValueError: channels or dtype differ from the weights', or a buffer does not fit.
    """
    batch, channels, height, width = image.shape
    if channels != weights.in_channels or image.dtype != weights.weight.dtype:
        raise ValueError(
            f"image: expected {weights.in_channels} channels of {weights.weight.dtype}, got {channels} of {image.dtype}"
        )
    out, k = weights.weight.shape
    rows = Grid(batch, height, width).rows
    check_flat(x, rows, out, image.dtype, "x")
    check_flat(normed, rows, out, image.dtype, "normed")
    n0, n1 = split_channels(out)
    block_rows, block_k = config.block_rows, config.block_k
    _conv_in_kernel[(triton.cdiv(rows, block_rows),)](
        image, tile(weights.weight, n0, block_k, gpu), tile(weights.weight, n1, block_k, gpu),
        weights.bias, norm.gamma,
        tile(x, block_rows, n0, gpu), tile(x, block_rows, n1, gpu),
        tile(normed, block_rows, n0, gpu), tile(normed, block_rows, n1, gpu),
        *image.stride(), height, width, rows,
        CIN=channels, ONES=weights.ones, K=k, N0=n0, N1=n1, BM=block_rows, BK=block_k,
        TMA=gpu.bulk_copies, **config.launch_options(),
    )  # fmt: skip


def conv_in_reference(
    image: Tensor, kernel: Tensor, bias: Tensor, norm: Norm, pointwise: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """fp32 ``(x, normed)`` from the unfolded ``kernel`` [N, C, 3, 3] and 1x1 ``pointwise`` (weight, bias)."""
    image = image.float()
    if pointwise is not None:
        image = F.conv2d(image, pointwise[0].float(), pointwise[1].float())
    x = to_flat(F.conv2d(image, kernel.float(), bias.float(), padding=1))
    return x, rms_norm_reference(x, norm.gamma, norm.silu)

"""A planar latent of many channels to the flat layout, for the convolution that is its first.

Behind its channels come one of ones, zero outside the image like every other (it weighs the bias of the 1x1 convolution that is
folded in, ``Packer.conv_of_latent``), and zeros.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from qwen_vae_accel.kernels.compiling import TritonKernel
from qwen_vae_accel.kernels.layout import Grid, to_flat
from qwen_vae_accel.kernels.network import stored_channels
from qwen_vae_accel.kernels.triton.blocks import check_flat, is_pixel


@TritonKernel
@triton.jit(do_not_specialize=["stride_b", "stride_c", "stride_y", "stride_x", "height", "width", "rows"])
def _flatten_kernel(
    image,  # [B, C, H, W], any strides
    flat,  # [rows, N]
    stride_b, stride_c, stride_y, stride_x, height, width, rows,
    C: tl.constexpr, N: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * BM + tl.arange(0, BM)
    c = tl.program_id(1) * 16 + tl.arange(0, 16)[None, :]
    line = r // (width + 1)
    y = line % (height + 1) - 1
    x = r % (width + 1) - 1
    pixel = (is_pixel(r, width + 1, height + 1) & (r < rows))[:, None]
    where = (line // (height + 1)).to(tl.int64) * stride_b + y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x
    value = tl.load(image + where[:, None] + c.to(tl.int64) * stride_c, mask=pixel & (c < C), other=0.0)
    value = tl.where(pixel & (c == C), 1.0, value.to(tl.float32))
    tl.store(flat + r.to(tl.int64)[:, None] * N + c, value.to(flat.dtype.element_ty), mask=(r < rows)[:, None])


def flatten(image: Tensor, flat: Tensor) -> None:
    """``image`` [B, C, H, W] of any strides -> ``flat`` [rows, stored_channels(C)].

    Raises:
        ValueError: ``flat`` does not fit.
    """
    batch, channels, height, width = image.shape
    rows, stored = Grid(batch, height, width).rows, stored_channels(channels)
    check_flat(flat, rows, stored, image.dtype, "flat")
    _flatten_kernel[(triton.cdiv(rows, 64), stored // 16)](
        image, flat, *image.stride(), height, width, rows, C=channels, N=stored, BM=64, num_warps=4
    )


def flatten_reference(image: Tensor) -> Tensor:
    """[rows, stored_channels(C)] in the image's dtype."""
    batch, channels, height, width = image.shape
    wide = image.new_zeros(batch, stored_channels(channels), height, width)
    wide[:, :channels], wide[:, channels] = image, 1
    return to_flat(wide)

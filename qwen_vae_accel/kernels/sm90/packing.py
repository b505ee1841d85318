"""Weights in the order and swizzle in which the kernel's shared memory holds them.

Input: the matrices of ``kernels.weights``, ``[N, K]`` with K counting taps in reading order (upsample: output parities,
then 2x2 taps), then input channels; the columns of a 1x1 shortcut last. Channels that a chunk lacks are zeros.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen_vae_accel.kernels.float8 import FLOAT8
from qwen_vae_accel.kernels.sm90.schedules import Mode


def channel_order(columns: int) -> Tensor:
    """Output channel that each matrix column of a block computes.

    A thread holds columns 8 j + 2 q + {0, 1} (q: its place in a group of four). Permuted so, they are the eight
    consecutive channels 8 q .. 8 q + 7 of every 32: its loads and stores are 16 bytes wide with no exchange. A block's share of
    a number that 144 divides is 144.
    """
    n = torch.arange(columns, device="cpu")
    if columns % 144 == 0:  # blocks of 144: four groups of 32, and one of 16, of which a thread holds four channels
        block, n = n // 144 * 144, n % 144
        return block + torch.where(n < 128, _in_groups(n, 32), 128 + _in_groups(n - 128, 16))
    return _in_groups(n, 32)


def _in_groups(n: Tensor, channels: int) -> Tensor:
    width = channels // 4  # neighbouring channels of a thread
    return n // channels * channels + n % 8 // 2 * width + n // 8 % (channels // 8) * 2 + n % 2


def _steps(matrix: Tensor, mode: Mode, channels: int, kc: int) -> Tensor:
    """``[N, parities, steps, kc]`` in the order in which the kernel consumes weight blocks."""
    out, chunks = matrix.shape[0], -(-channels // kc)
    count = {Mode.UPSAMPLE: 16, Mode.POINTWISE: 1}.get(mode, 9)
    taps = F.pad(matrix[:, : count * channels].reshape(out, count, channels), (0, chunks * kc - channels))
    if mode == Mode.UPSAMPLE:
        return taps.reshape(out, 4, 4, chunks, kc).transpose(2, 3).reshape(out, 4, -1, kc)
    taps = taps.reshape(out, count, chunks, kc)
    planes = [taps]
    if mode == Mode.DOWNSAMPLE:  # tap (ty, tx) reads the plane of rows = ty, columns = tx modulo 2
        square = taps.unflatten(1, (3, 3))
        planes = [square[:, py::2, px::2].reshape(out, -1, chunks, kc) for py in (0, 1) for px in (0, 1)]
    blocks = torch.cat([plane.transpose(1, 2).reshape(out, -1, kc) for plane in planes], 1)
    shortcut = matrix[:, count * channels :]
    if shortcut.shape[1]:
        shortcut = F.pad(shortcut, (0, -shortcut.shape[1] % kc)).reshape(out, -1, kc)
        blocks = torch.cat([blocks, shortcut], 1)
    return blocks[:, None]


def pack(matrix: Tensor, mode: Mode, channels: int, kc: int) -> Tensor:
    """Flat ``[parities][steps][N][kc]``: rows in ``channel_order``, 16-byte units swizzled in a row.

    Float8 comes back as bytes. A block of a cluster takes its share of the rows, so one packing serves every split.
    """
    width = 8  # numbers of a unit
    if matrix.dtype == FLOAT8:
        matrix, width = matrix.view(torch.uint8), 16
    columns = matrix.shape[0]
    w = _steps(matrix, mode, channels, kc).permute(1, 2, 0, 3)
    w = w[..., channel_order(columns).to(w.device), :]
    units = kc // width  # 8 (128-byte swizzle: XOR with the row) or 4 (64-byte swizzle: XOR with half the row)
    row = torch.arange(columns, device=w.device)
    flip = row % 8 if units == 8 else row // 2 % 4
    source = torch.arange(units, device=w.device)[None, :] ^ flip[:, None]
    w = w.reshape(*w.shape[:-1], units, width)
    return w.gather(-2, source[:, :, None].expand(*w.shape[:2], columns, units, width)).contiguous().flatten()

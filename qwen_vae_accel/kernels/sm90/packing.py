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
    consecutive channels 8 q .. 8 q + 7 of every 32: its loads and stores are 16 bytes wide with no exchange.
    """
    n = torch.arange(columns, device="cpu")
    return n // 32 * 32 + n % 8 // 2 * 8 + n // 8 % 4 * 2 + n % 2


def _steps(matrix: Tensor, mode: Mode, channels: int, kc: int) -> Tensor:
    """``[N, parities, steps, kc]`` in the order in which the kernel consumes weight blocks."""
    out, chunks = matrix.shape[0], -(-channels // kc)
    count = 16 if mode == Mode.UPSAMPLE else 9
    taps = F.pad(matrix[:, : count * channels].reshape(out, count, channels), (0, chunks * kc - channels))
    if mode == Mode.UPSAMPLE:
        return taps.reshape(out, 4, 4, chunks, kc).transpose(2, 3).reshape(out, 4, -1, kc)
    taps = taps.reshape(out, 3, 3, chunks, kc)
    if mode == Mode.DOWNSAMPLE:  # tap (ty, tx) reads the plane of rows = ty, columns = tx modulo 2
        planes = [taps[:, py::2, px::2].reshape(out, -1, chunks, kc) for py in (0, 1) for px in (0, 1)]
    else:
        planes = [taps.reshape(out, 9, chunks, kc)]
    blocks = torch.cat([plane.transpose(1, 2).reshape(out, -1, kc) for plane in planes], 1)
    shortcut = matrix[:, 9 * channels :]
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

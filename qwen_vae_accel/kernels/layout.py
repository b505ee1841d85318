"""The flat haloed layout every kernel reads and writes.

A batch of B images of H x W pixels with C channels is one row-major matrix ``[rows, C]``::

    pitch = W + 1                       one zero column in front of every image row
    rows  = (B * (H + 1) + 1) * pitch   one zero row above every image, one below the last
    pixel (b, y, x)  ->  row (b * (H + 1) + y + 1) * pitch + x + 1

The tap (dy, dx) of a 3x3 convolution is then the same matrix shifted by ``dy * pitch + dx`` rows: a plain 2-D tile
load with no mask, because every neighbour outside the image is a stored zero (the right neighbour of the last column
is the zero column of the next row). Rows before the first or past the last read as zero (TMA out of bounds, or a mask).

Invariant: a kernel that writes a flat matrix writes *all* of its rows, zeros in the halo, so buffers may come
uninitialised. Rows are 2 * C bytes; buffers start at multiples of 256 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Grid:
    """Pixels of one level: B images of H x W."""

    batch: int
    height: int
    width: int

    @property
    def pitch(self) -> int:
        """Rows of the matrix from one image row to the next."""
        return self.width + 1

    @property
    def rows(self) -> int:
        """Rows of the matrix, the halo included."""
        return (self.batch * (self.height + 1) + 1) * (self.width + 1)

    @property
    def pixels(self) -> int:
        """Pixels of all images."""
        return self.batch * self.height * self.width

    def doubled(self) -> Grid:
        """The grid after a 2x upsampling."""
        return Grid(self.batch, 2 * self.height, 2 * self.width)

    def halved(self) -> Grid:
        """Size after a stride-2 convolution with padding (0, 1, 0, 1): odd sizes round down."""
        return Grid(self.batch, self.height // 2, self.width // 2)


def to_flat(image: Tensor) -> Tensor:
    """Copy an image ``[B, C, H, W]`` into a flat matrix ``[rows, C]``, zeros in the halo."""
    batch, channels, height, width = image.shape
    grid = Grid(batch, height, width)
    padded = F.pad(image.permute(0, 2, 3, 1), (0, 0, 1, 0, 1, 0)).reshape(-1, channels)
    return torch.cat([padded, padded.new_zeros(grid.pitch, channels)])


def from_flat(flat: Tensor, grid: Grid) -> Tensor:
    """View a flat matrix ``[rows, C]`` as the image ``[B, C, H, W]`` that it holds; the view is strided."""
    body = flat[: grid.rows - grid.pitch].view(grid.batch, grid.height + 1, grid.pitch, flat.shape[1])
    return body[:, 1:, 1:].permute(0, 3, 1, 2)


def pixel_rows(grid: Grid, device: torch.device | str = "cpu") -> Tensor:
    """Mask the rows that are pixels: a boolean ``[rows]``, False in the halo."""
    rows = torch.arange(grid.rows, device=device)
    return (rows % grid.pitch != 0) & ((rows // grid.pitch) % (grid.height + 1) != 0)

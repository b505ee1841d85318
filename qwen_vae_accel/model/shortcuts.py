"""The shortcuts around every resolution of the residual network (``AutoencoderKLQwenImage21``): averages and copies.

They have no weights. They are those of a video network: where time is halved or doubled too, a block of pixels has
``frames = 2`` frames. One image is the later of them; the earlier one is zeros on the way down, and not wanted on the way up.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AverageDown(nn.Module):
    """``[B, I, H, W]`` -> ``[B, O, H / side, W / side]``: means over runs of the channels that a block of pixels unfolds to.

    Every block of ``frames x side x side`` pixels becomes as many channels, frames first; ``I * frames * side**2 / O``
    neighbouring ones make one output channel. ``H`` and ``W`` must be multiples of ``side``.
    """

    def __init__(self, in_channels: int, out_channels: int, frames: int, side: int) -> None:
        super().__init__()
        self.frames = frames
        self.side = side
        self.group = in_channels * frames * side**2 // out_channels

    def forward(self, x: Tensor) -> Tensor:
        """Average ``x [B, I, H, W]`` to ``[B, O, H / side, W / side]``."""
        blocks = F.pixel_unshuffle(x, self.side) if self.side > 1 else x  # [B, I * side**2, H / side, W / side]
        if self.frames > 1:
            pixels = self.side**2
            frames = blocks.unflatten(1, (-1, pixels))  # [B, I, side**2, H / side, W / side]
            blocks = F.pad(frames, (0, 0, 0, 0, (self.frames - 1) * pixels, 0)).flatten(1, 2)
        return blocks.unflatten(1, (-1, self.group)).mean(2) if self.group > 1 else blocks


class DuplicateUp(nn.Module):
    """``[B, I, h, w]`` -> ``[B, O, 2h, 2w]``: channels copied, then folded into blocks of ``frames x 2 x 2`` pixels.

    Every input channel is repeated ``O * frames * 4 / I`` times; of the frames in a block the last is the image.
    """

    channels: Tensor

    def __init__(self, in_channels: int, out_channels: int, frames: int, device: torch.device) -> None:
        super().__init__()
        copies = out_channels * frames * 4 // in_channels
        # Output channel o takes the folded channels o * frames * 4 + (frames - 1) * 4 + 0..3.
        folded = torch.arange(out_channels * frames * 4, device=device).view(out_channels, frames, 4)[:, -1].flatten()
        self.register_buffer("channels", folded // copies, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Copy ``x [B, I, h, w]`` to ``[B, O, 2h, 2w]``."""
        return F.pixel_shuffle(x.index_select(1, self.channels), 2)

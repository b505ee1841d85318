"""The image encoder and decoder: the Qwen-Image VAEs for one frame, exactly, as 2-D networks.

With one frame every causal 3-D convolution sees zeros in its older temporal taps, so only ``weight[:, :, -1]`` acts,
and the temporal resampling convolutions never run. What is left is a third of the arithmetic and of the weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qwen_vae_accel.model.layers import Conv, Downsample, MidBlock, ResidualBlock, RMSNorm, State, Upsample, under
from qwen_vae_accel.model.shortcuts import AverageDown, DuplicateUp


def _indices(state: State, prefix: str) -> list[int]:
    return sorted({int(key.split(".")[0]) for key in under(state, prefix)})


def _resnets(state: State) -> nn.ModuleList:
    return nn.ModuleList(ResidualBlock(under(state, f"resnets.{i}")) for i in _indices(state, "resnets"))


def _ends(resnets: nn.ModuleList) -> tuple[int, int]:
    """Input and output channels of a chain of residual blocks."""
    first, last = resnets[0], resnets[-1]
    assert isinstance(first, ResidualBlock) and isinstance(last, ResidualBlock)
    return first.conv1.weight.shape[1], last.conv2.weight.shape[0]


class DownBlock(nn.Module):
    """One resolution of a residual encoder: residual blocks and, but for the last, the halving, with a shortcut around both."""

    def __init__(self, state: State) -> None:
        super().__init__()
        self.resnets = _resnets(state)
        downsampler = under(state, "downsampler")
        self.downsamplers = nn.ModuleList([Downsample(downsampler)] if downsampler else [])
        frames = 2 if "time_conv" in downsampler else 1
        self.shortcut = AverageDown(*_ends(self.resnets), frames, side=2 if downsampler else 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x [B, I, H, W]`` to ``[B, O, H, W]``, or to half of the sides."""
        y = x
        for block in (*self.resnets, *self.downsamplers):
            y = block(y)
        return y.add_(self.shortcut(x))


class ImageEncoder(nn.Module):
    """``[B, C, H, W]`` images in [-1, 1] -> ``[B, 2 * z_dim, H // s, W // s]``: mean and log-variance, concatenated.

    ``s`` is 8, or 16 in the residual network, whose images must have sides that are multiples of 16.

    Args:
        state: 2-D weights in diffusers' names, ``encoder.`` dropped, plus ``quant_conv.*``
            (see :func:`qwen_vae_accel.model.source.image_state`).
    """

    def __init__(self, state: State) -> None:
        super().__init__()
        self.conv_in = Conv(under(state, "conv_in"))
        self.down_blocks = nn.ModuleList()
        for index in _indices(state, "down_blocks"):
            block = under(state, f"down_blocks.{index}")
            kind = Downsample if "resample.1.weight" in block else ResidualBlock if "conv1.weight" in block else DownBlock
            self.down_blocks.append(kind(block))
        self.mid_block = MidBlock(under(state, "mid_block"))
        self.norm_out = RMSNorm(under(state, "norm_out"), silu=True)
        self.conv_out = Conv(under(state, "conv_out"))
        self.quant_conv = Conv(under(state, "quant_conv"))

    def steps(self) -> list[ResidualBlock | Downsample]:
        """The convolving parts of :meth:`local` after the first convolution, in their order."""
        return [step for step in self.down_blocks.modules() if isinstance(step, (ResidualBlock, Downsample))]

    def local(self, x: Tensor) -> Tensor:
        """Run the part in which a pixel depends on its neighbourhood only: ``[B, C, H, W]`` -> ``[B, D, H // s, W // s]``."""
        x = self.conv_in(x.contiguous(memory_format=torch.channels_last))
        for block in self.down_blocks:
            x = block(x)
        return x

    def mixing(self, x: Tensor) -> Tensor:
        """Run the part around the attention, where every pixel depends on all: ``[B, D, h, w]`` -> ``[B, 2 * z_dim, h, w]``."""
        return self.quant_conv(self.conv_out(self.norm_out(self.mid_block(x)))).contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """Encode images ``x [B, C, H, W]`` to moments ``[B, 2 * z_dim, H // s, W // s]``."""
        return self.mixing(self.local(x))


class UpBlock(nn.Module):
    """Residual blocks of one resolution and, but for the last, the step to the next; if residual a shortcut around both."""

    resnets: nn.ModuleList
    upsamplers: nn.ModuleList

    def __init__(self, state: State) -> None:
        super().__init__()
        self.resnets = _resnets(state)
        residual = under(state, "upsampler")
        upsampler = residual or under(state, "upsamplers.0")
        self.upsamplers = nn.ModuleList([Upsample(upsampler)] if upsampler else [])
        frames = 2 if "time_conv" in residual else 1
        self.shortcut = DuplicateUp(*_ends(self.resnets), frames, upsampler["resample.1.weight"].device) if residual else None

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x [B, I, h, w]`` to ``[B, O, h, w]``, or to twice the sides."""
        y = x
        for block in (*self.resnets, *self.upsamplers):
            y = block(y)
        return y if self.shortcut is None else y.add_(self.shortcut(x))


class ImageDecoder(nn.Module):
    """``[B, z_dim, h, w]`` latents -> ``[B, C, s * h, s * w]`` images, clamped to [-1, 1]; ``s`` is 8, or 16 if residual.

    Args:
        state: 2-D weights in diffusers' names, ``decoder.`` dropped, plus ``post_quant_conv.*``.
    """

    def __init__(self, state: State) -> None:
        super().__init__()
        self.post_quant_conv = Conv(under(state, "post_quant_conv"))
        self.conv_in = Conv(under(state, "conv_in"))
        self.mid_block = MidBlock(under(state, "mid_block"))
        self.up_blocks = nn.ModuleList(UpBlock(under(state, f"up_blocks.{i}")) for i in _indices(state, "up_blocks"))
        self.norm_out = RMSNorm(under(state, "norm_out"), silu=True)
        self.conv_out = Conv(under(state, "conv_out"))

    def blocks(self) -> list[UpBlock]:
        """The resolutions, from the latent's to the image's."""
        return [block for block in self.up_blocks if isinstance(block, UpBlock)]

    def mixing(self, z: Tensor) -> Tensor:
        """Run the part around the attention, where every pixel depends on all: ``[B, z_dim, h, w]`` -> ``[B, D, h, w]``."""
        z = z.contiguous(memory_format=torch.channels_last)
        return self.mid_block(self.conv_in(self.post_quant_conv(z)))

    def local(self, x: Tensor) -> Tensor:
        """Run the part in which a pixel depends on its neighbourhood only: ``[B, D, h, w]`` -> ``[B, C, s * h, s * w]``."""
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(self.norm_out(x)).clamp(-1.0, 1.0).contiguous()

    def forward(self, z: Tensor) -> Tensor:
        """Decode latents ``z [B, z_dim, h, w]`` to images ``[B, C, s * h, s * w]``."""
        return self.local(self.mixing(z))

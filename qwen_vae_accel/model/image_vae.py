"""The image encoder and decoder: the Qwen-Image VAE for one frame, exactly, as 2-D networks.

With one frame every causal 3-D convolution sees zeros in its older temporal taps, so only ``weight[:, :, -1]`` acts,
and the temporal resampling convolutions never run. What is left is a third of the arithmetic and of the weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qwen_vae_accel.model.layers import Conv, Downsample, MidBlock, ResidualBlock, RMSNorm, State, Upsample, under


def _indices(state: State, prefix: str) -> list[int]:
    return sorted({int(key.split(".")[0]) for key in under(state, prefix)})


class ImageEncoder(nn.Module):
    """``[B, C, H, W]`` images in [-1, 1] -> ``[B, 2 * z_dim, H // 8, W // 8]``: mean and log-variance, concatenated.

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
            self.down_blocks.append(Downsample(block) if "resample.1.weight" in block else ResidualBlock(block))
        self.mid_block = MidBlock(under(state, "mid_block"))
        self.norm_out = RMSNorm(under(state, "norm_out"), silu=True)
        self.conv_out = Conv(under(state, "conv_out"))
        self.quant_conv = Conv(under(state, "quant_conv"))

    def local(self, x: Tensor) -> Tensor:
        """The part in which a pixel depends on its neighbourhood only: image -> features at 1/8 size."""
        x = self.conv_in(x.contiguous(memory_format=torch.channels_last))
        for block in self.down_blocks:
            x = block(x)
        return x

    def mixing(self, x: Tensor) -> Tensor:
        """The part around the attention, where every pixel depends on all: features at 1/8 size -> moments."""
        return self.quant_conv(self.conv_out(self.norm_out(self.mid_block(x)))).contiguous()

    def forward(self, x: Tensor) -> Tensor:
        return self.mixing(self.local(x))


class UpBlock(nn.Module):
    """Residual blocks of one resolution and, but for the last, the step to the next."""

    resnets: nn.ModuleList
    upsamplers: nn.ModuleList

    def __init__(self, state: State) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResidualBlock(under(state, f"resnets.{i}")) for i in _indices(state, "resnets"))
        upsampler = under(state, "upsamplers.0")
        self.upsamplers = nn.ModuleList([Upsample(upsampler)] if upsampler else [])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resnets:
            x = block(x)
        for block in self.upsamplers:
            x = block(x)
        return x


class ImageDecoder(nn.Module):
    """``[B, z_dim, h, w]`` latents -> ``[B, C, 8h, 8w]`` images, clamped to [-1, 1].

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
        """The part around the attention, where every pixel depends on all: latents -> features at 1/8 size."""
        z = z.contiguous(memory_format=torch.channels_last)
        return self.mid_block(self.conv_in(self.post_quant_conv(z)))

    def local(self, x: Tensor) -> Tensor:
        """The part in which a pixel depends on its neighbourhood only: features at 1/8 size -> image."""
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(self.norm_out(x)).clamp(-1.0, 1.0).contiguous()

    def forward(self, z: Tensor) -> Tensor:
        return self.local(self.mixing(z))

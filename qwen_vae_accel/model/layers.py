"""The five layers of the image VAE, over weights that somebody else owns.

Activations are ``[B, C, H, W]`` in channels_last memory: then "channels of one pixel", over which the RMS norm runs,
are neighbours. Weights are given, never initialised; modules hold them as they come, views included.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

State = Mapping[str, Tensor]

# F.normalize clamps the norm at 1e-12; under the square root of a mean over C channels that is 1e-24 / C.
NORM_FLOOR = 1e-12
# oneDNN's channels_last kernel adds all taps of all input channels in one fp32 chain; its blocked kernel, which a
# contiguous input selects, adds short ones. From this width on the chain costs more accuracy (4x) than the copies time (7 %).
_CPU_WIDE = 256
# Scores of the attention that are held at once in float64, for which there is no fused kernel: 256 MB.
_SCORES = 2**25
# Pixels per block of the CPU's norm: 2048 pixels x 384 channels in fp32 is 3 MB, about one L2 cache.
_CPU_BLOCK = 2048


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)


def _eager_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def under(state: State, prefix: str) -> dict[str, Tensor]:
    """The entries of ``state`` below ``prefix.``, named from there."""
    head = prefix + "."
    return {key[len(head) :]: value for key, value in state.items() if key.startswith(head)}


class Conv(nn.Module):
    """A 2-D convolution of ``weight [O, I, k, k]`` and ``bias [O]`` that keeps the image's size."""

    def __init__(self, state: State) -> None:
        super().__init__()
        self.weight = _frozen(state["weight"])
        self.bias = _frozen(state["bias"])

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``x [B, I, H, W]`` to ``[B, O, H, W]``."""
        padding = self.weight.shape[-1] // 2
        if padding and x.dtype == torch.float32 and x.shape[1] >= _CPU_WIDE and _eager_cpu(x):
            y = F.conv2d(x.contiguous(), self.weight, self.bias, padding=padding)
            return y.contiguous(memory_format=torch.channels_last)
        return F.conv2d(x, self.weight, self.bias, padding=padding)


class Downsample(nn.Module):
    """Halve the image: 3x3 convolution of stride 2 over an image padded by one zero row below and column at the right."""

    def __init__(self, state: State) -> None:
        super().__init__()
        self.weight = _frozen(state["resample.1.weight"])
        self.bias = _frozen(state["resample.1.bias"])

    def forward(self, x: Tensor) -> Tensor:
        """Halve ``x [B, C, H, W]`` to ``[B, C, H // 2, W // 2]``."""
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, stride=2)


def fold_upsample(weight: Tensor) -> Tensor:
    """Fold nearest 2x upsampling into the 3x3 convolution ``weight [O, I, 3, 3]`` that follows it.

    Returns the kernel ``[I, O, 4, 4]`` of a transposed convolution with stride 2 and padding 1. An output pixel sees
    2x2 pixels of the small image, each through the sum of the taps that fell on its copies: 4/9 of the arithmetic, and
    the upsampled image is never written. Along one axis (small image ``s``, taps ``w0 w1 w2``):
    ``out[2i] = w0 s[i-1] + (w1+w2) s[i]`` and ``out[2i+1] = (w0+w1) s[i] + w2 s[i+1]``; a transposed convolution
    reads its kernel ``k`` as ``out[2i] = k3 s[i-1] + k1 s[i]`` and ``out[2i+1] = k2 s[i] + k0 s[i+1]``.
    Sums are taken in at least float32 and rounded once.
    """
    wide = weight if weight.dtype == torch.float64 else weight.float()
    rows = torch.stack((wide[:, :, 2], wide[:, :, 1] + wide[:, :, 2], wide[:, :, 0] + wide[:, :, 1], wide[:, :, 0]), 2)
    taps = torch.stack((rows[..., 2], rows[..., 1] + rows[..., 2], rows[..., 0] + rows[..., 1], rows[..., 0]), -1)
    return taps.transpose(0, 1).to(weight.dtype).contiguous(memory_format=torch.channels_last)


class Upsample(nn.Module):
    """Double the image (nearest) and convolve it 3x3, as one transposed convolution but in float16.

    Folding rounds sums of weights. In bfloat16 that drowns in the activations' own rounding; in float16 it would raise
    the decoder's error by a tenth over diffusers' (measured on the trained tiny VAE), so there the two steps stay.
    """

    def __init__(self, state: State) -> None:
        super().__init__()
        weight = state["resample.1.weight"].detach()
        self.folded = weight.dtype != torch.float16
        self.weight = _frozen(fold_upsample(weight) if self.folded else weight)
        self.bias = _frozen(state["resample.1.bias"])

    def forward(self, x: Tensor) -> Tensor:
        """Double ``x [B, I, h, w]`` to ``[B, O, 2h, 2w]``."""
        if self.folded:
            return F.conv_transpose2d(x, self.weight, self.bias, stride=2, padding=1)
        return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), self.weight, self.bias, padding=1)


class RMSNorm(nn.Module):
    """``x / ||x|| * sqrt(C) * gamma`` over the channels of a pixel, in at least float32, rounded once; optionally then SiLU."""

    def __init__(self, state: State, silu: bool) -> None:
        super().__init__()
        self.gamma = _frozen(state["gamma"].reshape(-1))
        self.silu = silu

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x [B, C, H, W]``; shape and dtype stay."""
        pixels = x.permute(0, 2, 3, 1)
        if _eager_cpu(x):
            return self._blocked(pixels).permute(0, 3, 1, 2)
        channels = x.shape[1]
        y = F.rms_norm(pixels, (channels,), self.gamma, eps=NORM_FLOOR**2 / channels).permute(0, 3, 1, 2)
        return F.silu(y) if self.silu else y

    def _blocked(self, pixels: Tensor) -> Tensor:
        # Eager PyTorch walks memory once per operation; block by block those walks stay inside the CPU's cache.
        flat = pixels.reshape(-1, pixels.shape[-1])
        out = torch.empty_like(flat)
        wide_dtype = torch.promote_types(flat.dtype, torch.float32)
        gamma = self.gamma.to(wide_dtype) * flat.shape[1] ** 0.5
        for source, target in zip(flat.split(_CPU_BLOCK), out.split(_CPU_BLOCK), strict=True):
            wide = source.to(wide_dtype)
            norm = torch.linalg.vector_norm(wide, dim=1, keepdim=True).clamp_min_(NORM_FLOOR)
            y = (wide / norm).mul_(gamma)
            target.copy_(F.silu(y, inplace=True) if self.silu else y)
        return out.view(pixels.shape)


class ResidualBlock(nn.Module):
    """norm, SiLU, conv, norm, SiLU, conv, plus the input (through a 1x1 convolution where the widths differ)."""

    def __init__(self, state: State) -> None:
        super().__init__()
        self.norm1 = RMSNorm(under(state, "norm1"), silu=True)
        self.conv1 = Conv(under(state, "conv1"))
        self.norm2 = RMSNorm(under(state, "norm2"), silu=True)
        self.conv2 = Conv(under(state, "conv2"))
        self.conv_shortcut = Conv(under(state, "conv_shortcut")) if "conv_shortcut.weight" in state else None

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x [B, I, H, W]`` to ``[B, O, H, W]``."""
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return self.conv2(self.norm2(self.conv1(self.norm1(x)))).add_(shortcut)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if q.dtype != torch.float64:
        return F.scaled_dot_product_attention(q, k, v)
    rows = max(1, _SCORES // (k.shape[0] * k.shape[2]))
    return torch.cat([F.scaled_dot_product_attention(some, k, v) for some in q.split(rows, dim=2)], dim=2)


class Attention(nn.Module):
    """Single-head self-attention over all pixels of one image, plus the input."""

    def __init__(self, state: State) -> None:
        super().__init__()
        self.norm = RMSNorm(under(state, "norm"), silu=False)
        self.to_qkv = Conv(under(state, "to_qkv"))
        self.proj = Conv(under(state, "proj"))

    def forward(self, x: Tensor) -> Tensor:
        """Mix the pixels of ``x [B, C, h, w]``; the shape stays."""
        # [B, 3C, h, w] -> [B, 1, N, 3C]; flatten and unflatten, unlike reshape, put no guard on dynamic sizes.
        qkv = self.to_qkv(self.norm(x)).flatten(2).transpose(1, 2).unsqueeze(1)
        q, k, v = qkv.chunk(3, dim=-1)
        mixed = _attend(q, k, v).squeeze(1)
        return self.proj(mixed.transpose(1, 2).unflatten(2, x.shape[2:])).add_(x)


class MidBlock(nn.Module):
    """Residual block, attention, residual block, at the latent's size."""

    def __init__(self, state: State) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResidualBlock(under(state, f"resnets.{i}")) for i in (0, 1))
        self.attentions = nn.ModuleList([Attention(under(state, "attentions.0"))])

    def forward(self, x: Tensor) -> Tensor:
        """Mix the pixels of ``x [B, C, h, w]``; the shape stays."""
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))

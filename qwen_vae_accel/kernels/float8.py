"""Float8 (e4m3) in the decoder: which convolutions, with which scales, and what that costs, in plain PyTorch.

Only *operands* are float8: the input of a convolution, written so by the epilogue before it, and its weights. Sums are
fp32; x, residuals and every other layer stay in 16 bits. A product of quantised values is turned back per output channel:

    conv(a, w)[n] = sum(quantize(a * input_scale) * quantize(w[n] * s[n])) / (input_scale * s[n])

The input of a residual block's convolution is silu(y), y = rms_norm(.) * gamma, and
``|silu(y)| <= |y| <= sqrt(C) * max|gamma|`` whatever the image: its scale follows from the weights, and it can never
saturate. An upsampling reads the residual stream itself, which has no bound: its scale comes from calibration, with a
margin, beyond which values are clamped.
Scales per input channel, folded into the weights, would change nothing: e4m3 has 15 powers of two at one relative error.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen_vae_accel.kernels.network import Network, network_of
from qwen_vae_accel.model.image_vae import ImageDecoder
from qwen_vae_accel.model.layers import Upsample, fold_upsample

FLOAT8 = torch.float8_e4m3fn
LARGEST = 448.0  # the largest e4m3 number

_MARGIN = 4.0  # calibration sees one input of many
_CANDIDATES = 16  # weight scales tried per output channel
_BESIDE_SHORTCUTS = (96, 192, 384)  # channels of Triton's products of float8 to which a shortcut in 16 bits is added


def block_layers(network: Network) -> dict[str, str]:
    """Convolutions of residual blocks that compute in float8 -> the gain of the norm in front, whose bound is their scale.

    All residual blocks but the middle's: docs/notes/kernels.md has the measurements. Of those with a 1x1 shortcut the second
    convolution only where its width is one of Triton's: the kernels of ``sm90/`` do not add it to products of float8.
    """
    blocks = [block for level in network.levels for block in level.blocks]
    layers = ((block, which, conv) for block in blocks for which, conv in ((1, block.conv1), (2, block.conv2)))
    return {
        conv.name: f"{block.name}.norm{which}.gamma"
        for block, which, conv in layers
        if which == 1 or block.shortcut is None or block.out_channels in _BESIDE_SHORTCUTS
    }


def calibrated_layers(network: Network) -> dict[str, str]:
    """Convolutions whose input scale is measured -> the module whose output that input is.

    All upsamplings but the smallest.
    """
    levels = [level for level in network.levels if level.resampling is not None][1:]
    return {level.resampling.name: level.blocks[-1].name for level in levels if level.resampling is not None}


def quantize(value: Tensor, scale: Tensor | float) -> Tensor:
    """``value * scale`` in e4m3. Too large numbers become the largest; infinity, which e4m3 lacks, becomes NaN."""
    scaled = value.float() * scale
    return (scaled.clamp(-LARGEST, LARGEST) + scaled * 0.0).to(FLOAT8)


def quantize_weight(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """``[N, K]`` -> e4m3 ``[N, K]`` and fp32 ``[N]``, what a row is to be multiplied by to give the weights back.

    The row's largest value decides the scale up to a factor of two; in that octave the one of least squared error is taken.
    """
    matrix = matrix.float()
    full = LARGEST / matrix.abs().amax(1, keepdim=True).clamp_min(1e-30)
    best = torch.full_like(full, torch.inf)
    scale = full
    for step in range(_CANDIDATES):
        trial = full / (1 + step / _CANDIDATES)
        error = (quantize(matrix, trial).float() / trial - matrix).square().sum(1, keepdim=True)
        scale = torch.where(error < best, trial, scale)
        best = torch.minimum(error, best)
    return quantize(matrix, scale), scale.reciprocal().flatten()


def input_scales(state: Mapping[str, Tensor], peaks: Mapping[str, float]) -> dict[str, float]:
    """The float8 convolutions of a decoder by diffusers name -> what their input is multiplied by before rounding.

    Args:
        state: 2-D weights of the decoder.
        peaks: largest ``|output|`` by module name (``model.ranges.activation_peaks``).

    Raises:
        ValueError: a peak is missing, zero or not finite.
    """
    network, scales = network_of(state), {}
    for name, norm in block_layers(network).items():
        gamma = state[norm].float()
        bound = gamma.numel() ** 0.5 * gamma.abs().max().item()
        scales[name] = LARGEST / max(bound, 1e-30)
    for name, module in calibrated_layers(network).items():
        peak = peaks.get(module, 0.0)
        if not 0.0 < peak < float("inf"):
            raise ValueError(f"calibration of {name}: the largest |input| is {peak}, which gives no scale")
        scales[name] = LARGEST / (_MARGIN * peak)
    return scales


class _SimulatedConv(nn.Module):
    """A convolution (or folded upsampling) of quantised operands, in fp32."""

    def __init__(self, conv: nn.Module, scale: float) -> None:
        super().__init__()
        weight = conv.get_parameter("weight").detach()
        self.upsample = isinstance(conv, Upsample)
        kernel = weight
        if isinstance(conv, Upsample):
            kernel = (weight if conv.folded else fold_upsample(weight)).transpose(0, 1)  # [O, I, 4, 4]
        rounded, factor = quantize_weight(kernel.flatten(1))
        kernel = (rounded.float() * factor[:, None]).view_as(kernel)
        self.kernel = kernel.transpose(0, 1).contiguous() if self.upsample else kernel
        self.bias = conv.get_parameter("bias").detach().float()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        rounded = quantize(x, self.scale).float() / self.scale
        if self.upsample:
            return F.conv_transpose2d(rounded, self.kernel, self.bias, stride=2, padding=1).to(x.dtype)
        return F.conv2d(rounded, self.kernel, self.bias, padding=1).to(x.dtype)


def simulate(decoder: ImageDecoder, scales: Mapping[str, float]) -> ImageDecoder:
    """A copy of ``decoder`` whose layers named in ``scales`` compute with e4m3 operands; the others as they are."""
    result = copy.deepcopy(decoder)
    for name, scale in scales.items():
        name = name.removesuffix(".resample.1")
        name = f"{name}s.0" if name.endswith(".upsampler") else name  # both kinds of levels have a list
        parent, _, child = name.rpartition(".")
        owner = result.get_submodule(parent)
        owner._modules[child] = _SimulatedConv(owner.get_submodule(child), scale)
    return result

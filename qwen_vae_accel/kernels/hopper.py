"""The CUDA C++ convolutions of compute capability 9.0 (sm90/) as replacements for the Triton ones, layer by layer."""

from __future__ import annotations

from collections.abc import Callable

import torch

from qwen_vae_accel.kernels.float8 import FLOAT8
from qwen_vae_accel.kernels.sm90.conv3x3 import Conv3x3, unsupported
from qwen_vae_accel.kernels.sm90.schedules import Mode
from qwen_vae_accel.kernels.weights import ConvWeights

MODES = {"conv": Mode.CONV, "up": Mode.UPSAMPLE, "down": Mode.DOWNSAMPLE}


class HopperConvs:
    """Makes a layer the first time it is planned, and keeps it: it holds its weights packed another way."""

    def __init__(self, make: Callable[[ConvWeights, Mode], Conv3x3] = Conv3x3):
        self._make = make
        self._layers: dict[int, tuple[ConvWeights, Conv3x3]] = {}

    def layer(self, weights: ConvWeights, kind: str) -> Conv3x3 | None:
        """The layer, or None where the Triton kernel must do: 1x1, other widths, a shortcut beside float8, another GPU, no
        NVRTC."""
        if kind not in MODES or (kind == "conv" and weights.taps != 9):
            return None
        if weights.shortcut and weights.weight.dtype == FLOAT8:
            return None
        if id(weights) not in self._layers:
            matrix = weights.weight
            if self._make is Conv3x3:
                capability = torch.cuda.get_device_capability(matrix.device) if matrix.is_cuda else None
                if unsupported(capability, MODES[kind], weights.in_channels, weights.out_channels, matrix.dtype):
                    return None
            self._layers[id(weights)] = (weights, self._make(weights, MODES[kind]))
        return self._layers[id(weights)][1]

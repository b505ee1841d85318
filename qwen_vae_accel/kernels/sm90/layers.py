"""The CUDA C++ convolutions of compute capability 9.0 (sm90/) as replacements for the Triton ones, layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from qwen_vae_accel.kernels.float8 import FLOAT8
from qwen_vae_accel.kernels.segments import OwnSegments
from qwen_vae_accel.kernels.sm90.conv3x3 import Conv3x3, unsupported
from qwen_vae_accel.kernels.sm90.schedules import Mode
from qwen_vae_accel.kernels.tuning.selection import Tuning
from qwen_vae_accel.kernels.weights import ConvWeights, with_each

MODES = {"conv": Mode.CONV, "up": Mode.UPSAMPLE, "down": Mode.DOWNSAMPLE}


class HopperConvs:
    """Makes a layer the first time it is planned, and keeps it: it holds its weights packed another way."""

    def __init__(self, device: torch.device, tuning: Tuning, make: Callable[..., Conv3x3] = Conv3x3) -> None:
        self._device, self._tuning, self._make = device, tuning, make
        self._segments = OwnSegments(device)
        self._layers: dict[int, tuple[ConvWeights, Conv3x3]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of GPU memory of the layers' packed weights."""
        return sum(layer.nbytes for _, layer in self._layers.values())

    def takes(self, weights: ConvWeights, kind: str) -> bool:
        """False where the Triton kernel must do: 1x1, other widths, a shortcut beside float8, another GPU, no NVRTC."""
        if kind not in MODES or (kind == "conv" and weights.taps != 9):
            return False
        if weights.shortcut and weights.weight.dtype == FLOAT8:
            return False
        if self._make is not Conv3x3:
            return True
        capability = torch.cuda.get_device_capability(self._device) if self._device.type == "cuda" else None
        widths = weights.in_channels, weights.out_channels
        return not unsupported(capability, MODES[kind], *widths, weights.weight.dtype)

    def to_host(self, weights: Any) -> Any:
        """``weights``, dataclasses and tuples of them, with the matrices of the layers that :meth:`takes` in CPU memory.

        A layer packs from there when it first runs, so the GPU holds only what kernels read.
        """

        def host(conv: ConvWeights) -> ConvWeights:
            taken = self.takes(conv, "up" if conv.taps == 16 else "conv")
            return replace(conv, weight=conv.weight.cpu()) if taken else conv

        return with_each(ConvWeights, host, weights)

    def layer(self, weights: ConvWeights, kind: str) -> Conv3x3 | None:
        """The layer, or None where it is not one that :meth:`takes`."""
        if id(weights) not in self._layers:
            if not self.takes(weights, kind):
                return None
            schedules = self._tuning.schedules(kind, weights)
            layer = self._make(weights, MODES[kind], device=self._device, schedules=schedules, keep=self._segments.keep)
            self._layers[id(weights)] = (weights, layer)
        return self._layers[id(weights)][1]

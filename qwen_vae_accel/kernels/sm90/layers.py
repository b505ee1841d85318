"""The convolutions of sm90/ in place of the Triton ones, layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from qwen_vae_accel.kernels.float8 import FLOAT8
from qwen_vae_accel.kernels.network import Kind
from qwen_vae_accel.kernels.segments import OwnSegments
from qwen_vae_accel.kernels.sm90.conv3x3 import Conv3x3, unsupported
from qwen_vae_accel.kernels.sm90.schedules import MODES, Mode
from qwen_vae_accel.kernels.tuning.keys import KernelKey
from qwen_vae_accel.kernels.tuning.selection import Tuning
from qwen_vae_accel.kernels.weights import ConvWeights, with_each


class Sm90Layers:
    """Makes a layer the first time it is listed, and keeps it: it holds its weights packed another way."""

    def __init__(self, device: torch.device, tuning: Tuning, make: Callable[..., Conv3x3] = Conv3x3) -> None:
        self._device, self._tuning, self._make = device, tuning, make
        self._segments = OwnSegments(device)
        self._layers: dict[int, tuple[ConvWeights, Conv3x3]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of GPU memory of the layers' packed weights."""
        return sum(layer.nbytes for _, layer in self._layers.values())

    def takes(self, weights: ConvWeights, kind: Kind) -> bool:
        """False where the Triton kernel must do: 1x1, other widths, a shortcut beside float8, another GPU, no NVRTC."""
        if kind not in MODES or (kind is Kind.CONV and weights.taps != 9):
            return False
        if weights.shortcut and weights.weight.dtype == FLOAT8:
            return False
        return not self._reasons(MODES[kind], weights.in_channels, weights.out_channels, weights.weight.dtype)

    def _reasons(self, mode: Mode, channels: int, out: int, dtype: torch.dtype) -> list[str]:
        capability = torch.cuda.get_device_capability(self._device) if self._device.type == "cuda" else None
        return unsupported(capability, mode, channels, out, dtype)

    def to_host(self, weights: Any) -> Any:
        """``weights``, dataclasses and tuples of them, with the matrices of the layers that :meth:`takes` in CPU memory.

        A layer packs from there when it first runs, so the GPU holds only what kernels read.
        """

        def host(conv: ConvWeights) -> ConvWeights:
            taken = self.takes(conv, {16: Kind.UP, 1: Kind.PROJ}.get(conv.taps, Kind.CONV))
            return replace(conv, weight=conv.weight.cpu()) if taken else conv

        return with_each(ConvWeights, host, weights)

    def layer(self, weights: ConvWeights, kind: Kind) -> Conv3x3 | None:
        """The layer, or None where it is not one that :meth:`takes`."""
        if id(weights) not in self._layers:
            if not self.takes(weights, kind):
                return None
            schedules = self._tuning.schedules(KernelKey.of(kind, weights, sm90=True))
            layer = self._make(weights, MODES[kind], device=self._device, schedules=schedules, keep=self._segments.keep)
            self._layers[id(weights)] = (weights, layer)
        return self._layers[id(weights)][1]

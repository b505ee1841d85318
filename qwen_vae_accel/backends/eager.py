"""Backend ``eager``: the exact image networks as PyTorch runs them. Serves everything, on every device."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from qwen_vae_accel.backends.base import DirectBackend, Environment, Job
from qwen_vae_accel.model import ImageDecoder, ImageEncoder, ModelSource
from qwen_vae_accel.model.tiling import run_banded
from qwen_vae_accel.share import Share


class EagerProgram:
    """The network itself; its weights are the VAE's, so it holds no memory of its own but the folded kernels."""

    def __init__(self, network: ImageEncoder | ImageDecoder, share: Share | None = None) -> None:
        self._network, self._share = network, share
        self.nbytes = 0

    def __call__(self, x: Tensor, profile: int = 0) -> Tensor:
        if self._share is not None:
            return run_banded(self._network, x, None, self._share)
        output: Tensor = self._network(x)
        return output

    def tiled(self, x: Tensor, tile_pixels: int) -> Tensor:
        """Run ``x [B, C, H, W]`` in bands of about ``tile_pixels`` image rows; the result is that of one piece."""
        return run_banded(self._network, x, tile_pixels, self._share)


class EagerBackend(DirectBackend):
    """The exact model, and the oracle of every other backend."""

    name: ClassVar[str] = "eager"
    can_tile: ClassVar[bool] = True

    def reasons(self, environment: Environment, job: Job) -> list[str]:
        return []

    def program(self, source: ModelSource, job: Job) -> EagerProgram:
        return EagerProgram(source.model(job.method, job.dtype, job.device), job.share)

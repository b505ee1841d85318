"""What a pipeline's results would be if its VAE computed in float64, and how far the plain pipeline's are from that."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qwen_vae_accel.accuracy import FACTOR, measure
from qwen_vae_accel.plugin.methods import pack
from tests.helpers import decoded, exact_vae, moments


@contextmanager
def computed_by(vae: nn.Module, other: nn.Module) -> Iterator[None]:
    """Have ``other`` compute what ``vae`` is asked for, in the dtype of ``other``; results come in that of ``vae``."""

    def encode(x: Tensor, return_dict: bool = True) -> Any:
        return pack("encode", moments(other, x.to(other.dtype)).to(vae.dtype), return_dict)

    def decode(z: Tensor, return_dict: bool = True) -> Any:
        return pack("decode", decoded(other, z.to(other.dtype)).to(vae.dtype), return_dict)

    vae.encode, vae.decode = encode, decode
    try:
        yield
    finally:
        del vae.encode, vae.decode


def as_tensor(images: Any) -> Tensor:
    """Images or latents as ``[B, C, H, W]`` or ``[B, 1, N, C]``."""
    if isinstance(images, Tensor):
        return images if images.dim() == 4 else images.flatten(1, -3).unsqueeze(1) if images.dim() > 4 else images.unsqueeze(1)
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]).astype(np.float64))
    return pixels.permute(0, 3, 1, 2)


class RequestReference:
    """One request of a plain pipeline with its own VAE, and with it in float64.

    Args:
        pipeline: a pipeline that is not accelerated.
        request: makes the request; called twice.
        dtype: compute dtype of the VAE whose error is the yardstick, if not its own.
    """

    def __init__(self, pipeline: Any, request: Callable[[], Any], dtype: torch.dtype | None = None) -> None:
        vae = pipeline.vae
        with computed_by(vae, copy.deepcopy(vae).to(dtype or vae.dtype)):
            theirs = as_tensor(request())
        with computed_by(vae, exact_vae(vae)):
            self._exact = as_tensor(request())
        self._yardstick = measure(theirs, self._exact)

    def check(self, images: Any) -> None:
        """Assert that ``images`` meet the criterion of :mod:`qwen_vae_accel.accuracy`."""
        error = measure(as_tensor(images), self._exact)
        assert error.within(self._yardstick.allowed()), f"{error} against {self._yardstick}; {FACTOR} times it is allowed"

"""What the tests of the plugin's contract share: one input of each network, and what the report counted."""

from __future__ import annotations

import torch
from diffusers import QwenImagePipeline
from torch import nn

from qwen_vae_accel import Handle
from tests.helpers import EXACT, decoded, distance, moments, picture, randn

X = picture(1, 3, 1, 48, 64)
Z = randn(1, 4, 1, 6, 8)


def calls(handle: Handle) -> dict[str, dict[str, int]]:
    """Calls by method and by who served them."""
    served = handle.report().as_dict()["calls"]
    return {method: served[method] for method in ("encode", "decode")}


def fast(encode: int = 0, decode: int = 0) -> dict[str, dict[str, int]]:
    """The report of so many calls that the image model served."""
    return {"encode": {"eager": encode} if encode else {}, "decode": {"eager": decode} if decode else {}}


def exact(vae: nn.Module, x: torch.Tensor = X, z: torch.Tensor = Z) -> tuple[torch.Tensor, torch.Tensor]:
    """Moments and image."""
    return moments(vae, x), decoded(vae, z)


def assert_same(vae: nn.Module, before: tuple[torch.Tensor, torch.Tensor], tolerance: float = EXACT) -> None:
    """The VAE gives what :func:`exact` gave before."""
    assert distance(moments(vae, X), before[0], "encode") <= tolerance
    assert distance(decoded(vae, Z), before[1], "decode") <= tolerance


def generate(pipe: QwenImagePipeline, count: int = 1) -> torch.Tensor:
    """Images of the same noise, ``[count, 3, 48, 64]`` in [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    shape = {"height": 48, "width": 64, "num_images_per_prompt": count}
    return pipe("a cup", **shape, num_inference_steps=2, generator=generator, output_type="pt").images

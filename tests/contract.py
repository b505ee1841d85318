"""What the tests of the plugin's contract share: one input of each network, and what the report counted."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import QwenImagePipeline
from torch import nn

from qwen_vae_accel import Handle
from tests.helpers import Reference, decoded, moments, picture, randn

X = picture(1, 3, 1, 48, 64)
Z = randn(1, 4, 1, 6, 8)


def calls(handle: Handle) -> dict[str, dict[str, int]]:
    """Calls by method and by who served them."""
    served = handle.report().as_dict()["calls"]
    return {method: served[method] for method in ("encode", "decode")}


def fast(encode: int = 0, decode: int = 0) -> dict[str, dict[str, int]]:
    """The report of so many calls that the image model served."""
    return {"encode": {"eager": encode} if encode else {}, "decode": {"eager": decode} if decode else {}}


def outputs(vae: nn.Module, x: torch.Tensor = X, z: torch.Tensor = Z) -> tuple[torch.Tensor, torch.Tensor]:
    """Moments and image."""
    return moments(vae, x), decoded(vae, z)


def references(
    vae: nn.Module, x: torch.Tensor = X, z: torch.Tensor = Z, dtype: torch.dtype | None = None
) -> tuple[Reference, Reference]:
    """What the outputs of both networks must be."""
    return Reference(vae, "encode", x, dtype), Reference(vae, "decode", z, dtype)


def assert_same(vae: nn.Module, before: tuple[Reference, Reference], x: torch.Tensor = X, z: torch.Tensor = Z) -> None:
    """The VAE computes what :func:`references` say."""
    for reference, output in zip(before, outputs(vae, x, z), strict=True):
        reference.check(output)


def decoder_input(pipe: QwenImagePipeline, request: Callable[[], object]) -> torch.Tensor:
    """The latents that ``request`` has the plain VAE of ``pipe`` decode, ``[B, C, 1, h, w]``."""
    seen = []
    decode = pipe.vae.decode
    pipe.vae.decode = lambda z, **options: seen.append(z.clone()) or decode(z, **options)
    try:
        request()
    finally:
        del pipe.vae.decode
    return torch.cat(seen)


def generate(pipe: QwenImagePipeline, count: int = 1) -> torch.Tensor:
    """Images of the same noise, ``[count, 3, 48, 64]`` in [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    shape = {"height": 48, "width": 64, "num_images_per_prompt": count}
    return pipe("a cup", **shape, num_inference_steps=2, generator=generator, output_type="pt").images

"""Where a host keeps its VAE: pipelines of diffusers, and objects of other programs that hold one."""

from __future__ import annotations

from typing import Any

from torch import nn

from qwen_vae_accel.errors import UnsupportedVAEError

# The attribute with the VAE of diffusers, and whose it is. A host of the same kind is one more line.
HOLDERS = {
    "vae": "a diffusers pipeline",
    "model": "LightX2V's AutoencoderKLQwenImageVAE",
}


def is_vae(candidate: Any) -> bool:
    """Whether it looks like a VAE of diffusers; recognition says later which one it is."""
    return isinstance(candidate, nn.Module) and hasattr(candidate, "encode") and hasattr(candidate, "decode")


def held_vae(target: Any) -> nn.Module | None:
    """The VAE that ``target`` is or holds now; None if there is none."""
    for candidate in (target, *(getattr(target, name, None) for name in HOLDERS)):
        if is_vae(candidate):
            vae: nn.Module = candidate
            return vae
    return None


def find_vae(target: Any) -> nn.Module:
    """The VAE that ``target`` is or holds.

    Raises:
        UnsupportedVAEError: if there is none, with what was found in its places.
    """
    vae = held_vae(target)
    if vae is not None:
        return vae
    found = [
        f"its {name} is None: load the VAE first" if value is None else f"its {name} is no VAE, but a {type(value).__name__}"
        for name in HOLDERS
        if (value := getattr(target, name, target)) is not target
    ]
    holders = ", ".join(f"{holder} (.{name})" for name, holder in HOLDERS.items())
    what = f"it is neither a VAE of diffusers (an nn.Module with encode and decode) nor an object that holds one: {holders}"
    raise UnsupportedVAEError(type(target).__name__, found or [what])

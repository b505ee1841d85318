"""Where a host keeps its VAE: pipelines of diffusers, and objects of other programs that hold one."""

from __future__ import annotations

from typing import Any

from torch import nn

from qwen_vae_accel.checkpoints import knows_names
from qwen_vae_accel.errors import UnsupportedVAEError
from qwen_vae_accel.model.published import known_class

# The attribute with the VAE, and whose it is. A host of the same kind is one more line.
HOLDERS = {
    "vae": "a diffusers pipeline",
    "model": "LightX2V's AutoencoderKLQwenImageVAE and WanVAE, DiffSynth's WanVideoVAE",
    "first_stage_model": "ComfyUI's VAE",
}


def is_vae(candidate: Any) -> bool:
    """Whether it looks like a VAE; recognition says later which one it is."""
    return isinstance(candidate, nn.Module) and hasattr(candidate, "encode") and hasattr(candidate, "decode")


def is_hosted(vae: nn.Module) -> bool:
    """Whether it is another program's module with the weights of one of the family."""
    return known_class(vae) is None and knows_names(name for name, _ in vae.named_parameters())


def held_vae(target: Any) -> nn.Module | None:
    """The VAE that ``target`` is or holds now; None if there is none.

    A module that encodes and decodes may itself be a holder of what does the work: the first one that is known counts.
    """
    found = [vae for vae in (target, *(getattr(target, name, None) for name in HOLDERS)) if is_vae(vae)]
    known = (vae for vae in found if known_class(vae) is not None or is_hosted(vae))
    return next(known, next(iter(found), None))


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
    what = f"it is neither a VAE (an nn.Module with encode and decode) nor an object that holds one: {holders}"
    raise UnsupportedVAEError(type(target).__name__, found or [what])

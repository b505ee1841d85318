"""The methods that stand in for a VAE's own, and what they give back."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

HANDLE = "_qwen_vae_accel"
PATCHED = ("encode", "decode", "_apply")


def handle_of(vae: nn.Module) -> Any:
    """The ``Handle`` that accelerates ``vae``; None for a plain VAE and for a copy of an accelerated one."""
    handle = vae.__dict__.get(HANDLE)
    return handle if handle is not None and handle.vae is vae else None


def remove_leftovers(vae: nn.Module) -> None:
    """Take out the patches that a copy of an accelerated VAE carries; they have no handle of their own."""
    vae.__dict__.pop(HANDLE, None)
    for name in PATCHED:
        if getattr(vae.__dict__.get(name), "__qwen_vae_accel__", False):
            del vae.__dict__[name]


def wrapped(method: str, x: Tensor, return_dict: bool) -> Any:
    decoder_output, encoder_output, distribution = _output_types()
    if method == "decode":
        return decoder_output(sample=x) if return_dict else (x,)
    posterior = distribution(x)
    return encoder_output(latent_dist=posterior) if return_dict else (posterior,)


@functools.cache
def _output_types() -> tuple[Any, Any, Any]:
    from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
    from diffusers.models.modeling_outputs import AutoencoderKLOutput

    return DecoderOutput, AutoencoderKLOutput, DiagonalGaussianDistribution


def replacements(cls: type) -> dict[str, Callable[..., Any]]:
    """The methods that stand in for those of ``cls``: same names, same signatures, same documentation."""

    @functools.wraps(cls.encode)  # type: ignore[attr-defined]
    def encode(self: nn.Module, x: Tensor, return_dict: bool = True) -> Any:
        handle = handle_of(self)
        return handle._call("encode", x, return_dict) if handle else cls.encode(self, x, return_dict)  # type: ignore[attr-defined]

    @functools.wraps(cls.decode)  # type: ignore[attr-defined]
    def decode(self: nn.Module, z: Tensor, return_dict: bool = True) -> Any:
        handle = handle_of(self)
        return handle._call("decode", z, return_dict) if handle else cls.decode(self, z, return_dict)  # type: ignore[attr-defined]

    @functools.wraps(cls._apply)  # type: ignore[attr-defined]
    def _apply(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        handle = handle_of(self)
        original = handle._original["_apply"] if handle else functools.partial(cls._apply, self)  # type: ignore[attr-defined]
        return handle._moved(original, args, kwargs) if handle else original(*args, **kwargs)

    functions: dict[str, Callable[..., Any]] = {"encode": encode, "decode": decode, "_apply": _apply}
    for function in functions.values():
        function.__qwen_vae_accel__ = True  # type: ignore[attr-defined]
    return functions

"""The methods of a VAE that a handle serves, and those that the VAE has without one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qwen_vae_accel.model.custom import plain_class
from qwen_vae_accel.plugin import compiled
from qwen_vae_accel.plugin.patch import Patch, owner_of


class OwnMethods:
    """The methods of a VAE as they are without a handle, looked up at each use: classes may be patched at any time.

    Args:
        vae: the VAE.
        before: what others had put in place of some of them into the VAE itself.
    """

    def __init__(self, vae: nn.Module, before: Mapping[str, Callable[..., Any]]) -> None:
        self._vae = vae
        self._before = before

    def __getitem__(self, name: str) -> Callable[..., Any]:
        before = self._before.get(name)
        method: Callable[..., Any] = before or getattr(plain_class(self._vae), name).__get__(self._vae)
        return method


def handle_of(vae: nn.Module) -> Any:
    """The ``Handle`` that accelerates ``vae``; None for a plain VAE and for a copy of an accelerated one."""
    return owner_of(vae, "decode")


def pack(method: str, x: Tensor, return_dict: bool) -> Any:
    """``x`` as diffusers returns it from ``method``.

    Args:
        method: ``"encode"`` or ``"decode"``.
        x: moments ``[B, 2 * z_dim, 1, h, w]`` or images ``[B, C, 1, H, W]``.
        return_dict: whether to return diffusers' output class, or a tuple of one.
    """
    return _packed(method, x, return_dict, compiled.output_types())


def _packed(method: str, x: Tensor, return_dict: bool, types: tuple[Any, Any, Any]) -> Any:
    decoder_output, encoder_output, distribution = types
    if method == "decode":
        return decoder_output(sample=x) if return_dict else (x,)
    posterior = distribution(x)
    return encoder_output(latent_dist=posterior) if return_dict else (posterior,)


def _call(handle: Any, vae: nn.Module, method: str, x: Tensor, return_dict: bool) -> Any:
    if not torch.compiler.is_dynamo_compiling():
        return handle._call(method, x, return_dict)
    reason = compiled.not_opaque(vae, method, x)
    if not reason:
        return _packed(method, compiled.output(vae, handle._traced, method, x), return_dict, handle._traced.types)
    compiled.note(handle._traced.number, method, reason)
    before = handle._before.get(method)
    return before(x, return_dict=return_dict) if before else getattr(plain_class(vae), method)(vae, x, return_dict=return_dict)


def _encode(handle: Any, vae: nn.Module, x: Tensor, return_dict: bool = True) -> Any:
    return _call(handle, vae, "encode", x, return_dict)


def _decode(handle: Any, vae: nn.Module, z: Tensor, return_dict: bool = True) -> Any:
    return _call(handle, vae, "decode", z, return_dict)


def _apply(handle: Any, vae: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return handle._moved(handle._original["_apply"], args, kwargs)


VAE = Patch("vae", {"encode": _encode, "decode": _decode, "_apply": _apply})
PATCHED = tuple(VAE.served)

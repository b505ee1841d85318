"""The published VAEs: which classes they are, and what one is that nobody has changed.

The *twin* of a VAE is made from its class and configuration, without memory. What the VAE is beside its weights must be
what its twin is.
"""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qwen_vae_accel.errors import UnsupportedVAEError
from qwen_vae_accel.model.own_code import foreign_constructor
from qwen_vae_accel.model.topology import Topology, topology_of
from qwen_vae_accel.visits import fork_safe_lock

CLASSES = {
    "AutoencoderKLQwenImage": "diffusers.models.autoencoders.autoencoder_kl_qwenimage",
    "AutoencoderKLQwenImage21": "diffusers.models.autoencoders.autoencoder_kl_qwenimage21",
    "AutoencoderKLWan": "diffusers.models.autoencoders.autoencoder_kl_wan",
}
# Layers of torch that the networks are made of; all others are their modules' own classes.
_LAYERS = (nn.Conv2d, nn.Dropout, nn.Identity, nn.ModuleList, nn.Sequential, nn.SiLU, nn.ZeroPad2d)
_KEPT = 16
# A weight that the VAE of the original programs has (Wan 2.1's, which Qwen-Image's is too), and none in diffusers' names.
ORIGINAL_NAME = "decoder.middle.0.residual.0.gamma"


@dataclass(frozen=True, slots=True)
class Twin:
    """A VAE as its class and configuration make it, with all parameters on ``meta``; shared, so it must not be changed.

    Attributes:
        vae: the twin.
        arguments: what it was made with.
        doubt: why it may not be the published one, because a constructor was patched; empty if it is.
    """

    vae: nn.Module
    arguments: dict[str, Any]
    doubt: str


_twins: dict[tuple[type, str], Twin] = {}
_lock = fork_safe_lock()


def known_class(vae: object) -> type | None:
    """The diffusers class that ``vae`` is an instance of, or of a subclass of it; None for all others."""
    for cls in type(vae).__mro__:
        module = sys.modules.get(CLASSES.get(cls.__name__, ""))
        if module is not None and vars(module).get(cls.__name__) is cls:
            return cls
    return None


def arguments(vae: nn.Module) -> dict[str, Any]:
    """Read what the VAE's configuration says of its networks, by the names of its class's arguments."""
    cls = known_class(vae)
    config = vae.__dict__.get("_internal_dict") or {}
    names = () if cls is None else inspect.signature(cls).parameters
    return {name: config[name] for name in names if name in config and name not in ("latents_mean", "latents_std")}


def published_twin(vae: nn.Module) -> Twin:
    """The twin of ``vae``.

    Raises:
        UnsupportedVAEError: if ``vae`` is of another class, or its configuration makes none.
    """
    cls = known_class(vae)
    if cls is None:
        raise UnsupportedVAEError(type(vae).__name__, [_another_class(vae)])
    config = arguments(vae)
    key = cls, repr(config)
    with _lock:
        if key not in _twins:
            twin = _make(cls, config)
            if twin.doubt:
                return twin
            if len(_twins) >= _KEPT:
                _twins.clear()
            _twins[key] = twin
        return _twins[key]


def inspect_vae(vae: nn.Module) -> Topology:
    """The topology of the VAE that ``vae`` is by its class and configuration, whatever it was made into since.

    Raises:
        UnsupportedVAEError: if it is none of Qwen-Image, Qwen-Image 2.1 or Wan 2.1; with one reason per kind of difference.
    """
    return topology_of(published_twin(vae).vae)


def _make(cls: type, config: dict[str, Any]) -> Twin:
    try:
        with torch.inference_mode(False), torch.device("meta"):
            vae: nn.Module = cls(**config).eval()
    except Exception as error:  # whatever diffusers makes of a configuration that anybody may have written
        reason = f"its configuration makes no {cls.__name__}: {type(error).__name__}: {error}"
        raise UnsupportedVAEError(cls.__name__, [reason]) from error
    return Twin(vae, config, foreign_constructor(map(type, vae.modules())) or _foreign_layer(vae))


def _foreign_layer(twin: nn.Module) -> str:
    home = type(twin).__module__
    for name, module in twin.named_modules():
        kind = type(module)
        if kind not in _LAYERS and kind.__module__ != home:
            return f"every new {type(twin).__name__} has a {kind.__name__} of {kind.__module__} as its {name}"
    return ""


def _another_class(vae: object) -> str:
    kind = type(vae)
    text = f"it is a {kind.__module__}.{kind.__qualname__}, not one of diffusers' {', '.join(CLASSES)}"
    if hasattr(vae, "_orig_mod"):
        text += "; torch.compile has wrapped it: accelerate the VAE inside, vae._orig_mod"
    return text

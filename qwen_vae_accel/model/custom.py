"""What somebody has changed about how a VAE computes, of which the image networks know nothing: hooks, patches, subclasses."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from qwen_vae_accel.model.offload import is_hooked

# Names, in the class that accelerate() gives a VAE, the class that the VAE had.
PLAIN_CLASS = "__qwen_vae_accel_plain_class__"


def plain_class(vae: nn.Module) -> type:
    """The class of ``vae``, accelerated or not."""
    return getattr(type(vae), PLAIN_CLASS, type(vae))


def custom_method(vae: nn.Module, method: str) -> str:
    """Why ``encode`` or ``decode`` of ``vae`` is not the one of its diffusers class; empty if it is."""
    cls = plain_class(vae)
    for name in (method, f"_{method}", f"tiled_{method}"):
        if not _is_own(vae, name):
            return f"vae.{name} was patched before accelerate()"
        owners = [owner for owner in cls.__mro__ if name in vars(owner)]
        if len(owners) > 1 and not owners[0].__module__.startswith("diffusers."):
            return f"{owners[0].__name__} overrides {name}"
    return ""


def custom_module(vae: nn.Module, modules: Iterable[nn.Module]) -> str:
    """Which of ``modules``, parts of ``vae``, does more than its class says; empty if none does.

    Offloading and storage in another dtype, by accelerate's and diffusers' hooks, change no result.
    """
    for module in modules:
        if module._forward_hooks or module._forward_pre_hooks:
            what = "hooks"
        elif not _is_own(module, "forward") and not is_hooked(module):
            what = "a forward() of its own"
        else:
            continue
        path = next((name for name, part in vae.named_modules() if part is module), type(module).__name__)
        return f"{path} has {what}, which only diffusers' path runs"
    return ""


def _is_own(module: nn.Module, name: str) -> bool:
    """Whether ``module.name`` is the method of its class, compiled or not."""
    value: Any = module.__dict__.get(name)
    if value is None:
        return True
    method = getattr(value, "_torchdynamo_orig_callable", value)
    return getattr(method, "__func__", None) is getattr(type(module), name, None)

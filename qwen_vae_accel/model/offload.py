"""Where a VAE's weights are and where it computes, under accelerate's and diffusers' offloading hooks.

Model offload moves the whole VAE before each call. Sequential offload leaves parameters on the ``meta`` device and
keeps their values in a map held by the hook of the module that owns them. Group offload keeps them on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn


def _hooks(module: nn.Module) -> Iterator[object]:
    hook = getattr(module, "_hf_hook", None)
    while hook is not None:
        yield hook
        for inner in getattr(hook, "hooks", ()):
            yield inner
        hook = None


def run_pre_forward(vae: nn.Module) -> None:
    """Do what diffusers' ``apply_forward_hook`` does before ``encode`` and ``decode``: bring the VAE to its device."""
    hook = getattr(vae, "_hf_hook", None)
    if hook is not None and hasattr(hook, "pre_forward"):
        hook.pre_forward(vae)


def execution_device(vae: nn.Module) -> torch.device:
    """The device ``vae`` computes on: its hooks' execution device, else that of its parameters."""
    parameter = next(vae.parameters())
    group = getattr(vae, "_diffusers_hook", None)
    if group is None and not parameter.is_meta:
        return parameter.device
    if group is not None:
        for hook in group.hooks.values():
            for candidate in (hook, getattr(hook, "group", None), getattr(hook, "config", None)):
                device = getattr(candidate, "onload_device", None)
                if device is not None:
                    return torch.device(device)
    for module in vae.modules():
        for hook in _hooks(module):
            device = getattr(hook, "execution_device", None)
            if device is not None:
                return torch.device(f"cuda:{device}" if isinstance(device, int) else device)
    return parameter.device


def values(module: nn.Module) -> dict[str, Tensor]:
    """All parameters of ``module`` by name, with those that sequential offload left on ``meta`` read from its maps."""
    found: dict[str, Tensor] = {}
    for prefix, owner in module.named_modules():
        maps = [m for hook in _hooks(owner) if (m := getattr(hook, "weights_map", None)) is not None]
        for name, parameter in owner.named_parameters(prefix=prefix, recurse=False):
            local = name.rpartition(".")[2]
            found[name] = maps[0][local] if parameter.is_meta and maps else parameter
    return found

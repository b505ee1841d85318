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
    if hook is not None:
        yield hook
        yield from getattr(hook, "hooks", ())  # accelerate's SequentialHook


def is_hooked(module: nn.Module) -> bool:
    """Whether ``module`` itself carries offloading hooks; those of its children leave it with ``meta`` parameters."""
    return "_hf_hook" in module.__dict__ or "_diffusers_hook" in module.__dict__


def run_pre_forward(vae: nn.Module) -> None:
    """Do what diffusers' ``apply_forward_hook`` does before ``encode`` and ``decode``: bring the VAE to its device."""
    hook = vae.__dict__.get("_hf_hook")
    if hook is not None and hasattr(hook, "pre_forward"):
        hook.pre_forward(vae)


def execution_device(vae: nn.Module) -> torch.device:
    """The device ``vae`` computes on: the execution device of its offloading hooks, else that of its parameters."""
    own = _hook_device(vae)
    if own is not None:
        return own
    parameter = next(vae.parameters())
    if parameter.is_meta:
        # Sequential offload: each module that owns parameters has a hook of its own.
        return next(filter(None, map(_hook_device, vae.modules())), parameter.device)
    return parameter.device


def _hook_device(module: nn.Module) -> torch.device | None:
    for hook in _hooks(module):
        device = getattr(hook, "execution_device", None)
        if device is not None:
            return torch.device("cuda", device) if isinstance(device, int) else _indexed(torch.device(device))
    group = getattr(module, "_diffusers_hook", None)
    for hook in group.hooks.values() if group is not None else ():
        for candidate in (hook, getattr(hook, "group", None), getattr(hook, "config", None)):
            device = getattr(candidate, "onload_device", None)
            if device is not None:
                return _indexed(torch.device(device))
    return None


def _indexed(device: torch.device) -> torch.device:
    """``device`` as tensors name it: ``cuda`` with its number, ``cpu`` without."""
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def values(module: nn.Module) -> dict[str, Tensor]:
    """All parameters of ``module`` by name, with those that sequential offload left on ``meta`` read from its maps."""
    found: dict[str, Tensor] = {}
    for prefix, owner in module.named_modules():
        maps = [m for hook in _hooks(owner) if (m := getattr(hook, "weights_map", None)) is not None]
        for name, parameter in owner.named_parameters(prefix=prefix, recurse=False):
            local = name.rpartition(".")[2]
            found[name] = maps[0][local] if parameter.is_meta and maps else parameter
    return found

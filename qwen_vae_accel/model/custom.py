"""What somebody has changed about how a VAE computes, of which the image networks know nothing.

Beside its weights, a network must be its published twin: the same layers with the same settings, running the methods of
their classes. Offloading, storage in another dtype and ``torch.compile`` change no result, and are known by their code.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Mapping
from types import MethodType
from typing import Any

import torch
from torch import nn

from qwen_vae_accel.model.offload import is_plain
from qwen_vae_accel.model.topology import METHODS, PARTS

# Names, in the class that accelerate() gives an object, the class that the object had.
PLAIN_CLASS = "__qwen_vae_accel_plain_class__"
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# How Python enters a layer, and what it looks up in a class without a name in the code.
ENTRIES = frozenset(
    ("__call__", "forward", "__getattr__", "__getattribute__", "__iter__", "__getitem__", "__len__", "__bool__")
)
# Attributes of a VAE that are for its user to set, and that we heed.
SETTINGS = frozenset(
    ("use_slicing", "use_tiling", "tile_sample_min_height", "tile_sample_min_width",
     "tile_sample_stride_height", "tile_sample_stride_width")
)  # fmt: skip
OF_EVERY_MODULE = frozenset(vars(nn.Module()))
# Wrappers of a method around one another.
_DEEPEST = 32
_STORAGE_HOOKS = {"diffusers.hooks.layerwise_casting": ("LayerwiseCastingHook",)}
# Hooks that move weights, inputs and outputs, or store weights in another dtype, and do nothing else.
_HARMLESS_HOOKS = {
    "accelerate.hooks": ("AlignDevicesHook", "CpuOffload", "SequentialHook"),
    "diffusers.hooks.group_offloading": (
        "GroupOffloadingHook", "LayerExecutionTrackerHook", "LazyPrefetchGroupOffloadingHook",
    ),
    **_STORAGE_HOOKS,
}  # fmt: skip


def plain_class(patched: Any) -> type:
    """The class of a VAE or an image processor, accelerated or not."""
    return getattr(type(patched), PLAIN_CLASS, type(patched))


def custom_method(vae: nn.Module, method: str) -> str:
    """Whether ``encode`` or ``decode`` was patched in ``vae`` itself; empty if not."""
    value = vae.__dict__.get(method)
    return "" if value is None or _is_own(vae, method, value) else f"vae.{method} was patched before accelerate()"


def custom_vae(vae: nn.Module, twin: nn.Module, names: frozenset[str], method: str) -> str:
    """Name what ``vae`` itself does otherwise than its diffusers class when it is asked to ``method``; empty if nothing.

    Args:
        vae: the VAE.
        twin: its published twin.
        names: those that the code of the class's ``method`` uses.
        method: ``"encode"`` or ``"decode"``.
    """
    cls = plain_class(vae)
    for base in type(vae).__mro__[: type(vae).__mro__.index(type(twin))]:
        if PLAIN_CLASS in vars(base):
            continue
        for name in sorted((names | {method, "__getattr__", "__getattribute__"}) & vars(base).keys()):
            return f"{base.__name__} overrides {name}"
    for name in sorted((names - set(METHODS)) & vae.__dict__.keys()):
        if hasattr(cls, name) and not _is_own(vae, name, vae.__dict__[name]):
            return f"vae.{name} was patched"
    read = names & twin.__dict__.keys() - OF_EVERY_MODULE - SETTINGS - {"_internal_dict"}
    return _another_setting("vae", vae, twin, read)


def custom_network(vae: nn.Module, twin: nn.Module, names: frozenset[str], method: str) -> str:
    """Name where the network of ``method`` differs from that of ``twin``, or does more than its classes say; empty if nowhere.

    Args:
        vae: the VAE.
        twin: its published twin.
        names: those that the code of the network's classes uses.
        method: ``"encode"`` or ``"decode"``.
    """
    pairs: list[tuple[str, Any, Any]] = [(part, vae._modules.get(part), twin._modules[part]) for part in PARTS[method]]
    for path, module, expected in pairs:
        reason = _custom_module(path, module, expected, names)
        if reason:
            return reason
        # The list grows while it is walked: children of children, to the leaves.
        children = {} if expected is None else expected._modules
        pairs += [(f"{path}.{name}", module._modules.get(name), child) for name, child in children.items()]
    return ""


def _custom_module(path: str, module: Any, expected: nn.Module | None, names: frozenset[str]) -> str:
    if expected is None or module is None:
        return "" if module is expected else f"{path} is {'not there' if module is None else 'an added layer'}"
    if type(module) is not type(expected):
        return f"{path} is of class {type(module).__name__}, in diffusers of {type(expected).__name__}"
    if isinstance(expected, (nn.ModuleList, nn.Sequential)) and list(module._modules) != list(expected._modules):
        return f"{path} holds layers {_listed(module._modules)}, in diffusers {_listed(expected._modules)}"
    if module._forward_hooks or module._forward_pre_hooks:
        return f"{path} has hooks, which only diffusers' path runs"
    for name in names & module.__dict__.keys() - expected.__dict__.keys():
        if not _is_own(module, name, module.__dict__[name]):
            return f"{path} has a {name}() of its own or hooks that are not known, which only diffusers' path runs"
    if getattr(module, "p", 0) and module.training and isinstance(module, nn.modules.dropout._DropoutNd):
        return f"{path} drops values at random, since the VAE is in training mode: call vae.eval()"
    read = names & expected.__dict__.keys() - OF_EVERY_MODULE
    return _another_setting(path, module, expected, read) or _other_parameters(path, module, expected)


def _another_setting(path: str, module: nn.Module, expected: nn.Module, names: Iterable[str]) -> str:
    ours, theirs = module.__dict__, expected.__dict__
    for name in sorted(names):
        if name not in ours:
            return f"{path}.{name} is not there"
        if type(ours[name]) is not type(theirs[name]) or ours[name] != theirs[name]:
            return f"{path}.{name} is {_short(ours[name])}, in diffusers {_short(theirs[name])}"
    return ""


def _other_parameters(path: str, module: nn.Module, expected: nn.Module) -> str:
    for name, theirs in expected._parameters.items():
        ours: Any = module._parameters.get(name)
        if ours is None or theirs is None:
            if ours is not theirs:
                return f"{path}.{name} is {'not there' if ours is None else 'an added parameter'}"
        elif not is_plain(ours):
            return f"{path}.{name} is not a plain tensor ({type(ours).__name__}, {ours.layout})"
        elif ours.shape != theirs.shape:
            return f"{path}.{name} has shape {tuple(ours.shape)}, in diffusers {tuple(theirs.shape)}"
        elif ours.dtype not in FLOAT_DTYPES and not any(map(_stores, _hooks(module))):
            return f"{path}.{name} is stored as {_name(ours.dtype)}; float32, bfloat16 and float16 are known"
    return ""


# Methods that stand in an object itself.


def _is_own(module: nn.Module, name: str, value: Any) -> bool:
    """Whether ``value``, found in ``module`` itself, comes down to the method of its class: compiled, or under known hooks."""
    for _ in range(_DEEPEST):
        space = getattr(getattr(value, "func", value), "__globals__", {}).get("__name__", "")
        if isinstance(value, MethodType):
            expected = getattr(type(module), "_call_impl" if name == "_compiled_call_impl" else name, None)
            return value.__self__ is module and value.__func__ is expected
        if space.startswith("torch._dynamo."):
            value = getattr(value, "_torchdynamo_orig_callable", None)
        elif isinstance(value, functools.partial) and value.args == (module,) and space == "accelerate.hooks":
            if not _is_harmless(module.__dict__.get("_hf_hook")):
                return False
            value = module.__dict__.get("_old_forward")
        elif isinstance(value, functools.partial) and value.args == (module,) and space == "diffusers.hooks.hooks":
            reference: Any = next((cell.cell_contents for cell in value.func.__closure__ or ()), None)
            steps = [getattr(reference, step, None) for step in ("pre_forward", "post_forward")]
            if not all(_is_harmless(getattr(step, "__self__", None)) for step in steps):
                return False
            value = reference.forward
        else:
            return False
    return False


def _is_harmless(hook: Any, kinds: Mapping[str, tuple[str, ...]] = _HARMLESS_HOOKS) -> bool:
    kind = type(hook)
    return (
        kind.__name__ in kinds.get(kind.__module__, ())
        and getattr(sys.modules[kind.__module__], kind.__name__) is kind
        and not any(callable(value) for name, value in vars(hook).items() if hasattr(kind, name))
        and all(map(_is_harmless, getattr(hook, "hooks", ())))
    )


def _hooks(module: nn.Module) -> Iterable[Any]:
    registry = module.__dict__.get("_diffusers_hook")
    return () if registry is None else registry.hooks.values()


def _stores(hook: Any) -> bool:
    return _is_harmless(hook, _STORAGE_HOOKS)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _short(value: Any) -> str:
    text = repr(value) if isinstance(value, (bool, int, float, str, tuple, list, dict, type(None))) else type(value).__name__
    return text if len(text) <= 60 else text[:57] + "..."


def _listed(names: Iterable[str]) -> str:
    return ", ".join(list(names)[:6]) or "none"

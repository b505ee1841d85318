"""Where a VAE's weights are and where it computes, under accelerate's and diffusers' offloading hooks.

A hook looks after the parameters of the module that carries it, and often of the modules below. Between calls the
parameters may be elsewhere or be no values at all:

=============================================  =====================================================  ==================
hook                                           parameters between calls                               their values
=============================================  =====================================================  ==================
model offload (accelerate's ``CpuOffload``)    on the CPU; the hook moves all of them before a call   the parameters
sequential offload, ``device_map`` with disk   on ``meta``                                            ``weights_map``
group offload                                  on the CPU                                             the parameters
group offload with streams                     on the CPU, or on their way to the GPU                 ``cpu_param_dict``
group offload to disk                          memory without content                                 the group's file
=============================================  =====================================================  ==================
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qwen_vae_accel.model.topology import PARTS

# The modules that see a method's input first.
_ENTRIES = {"encode": ("encoder", "encoder.conv_in"), "decode": ("post_quant_conv",)}


@dataclass(frozen=True, slots=True)
class Placement:
    """Where and in which dtype diffusers would compute one network.

    Attributes:
        device: of its output; ``meta`` where it has no values.
        dtype: of its output.
        hooked: whether hooks may have it compute elsewhere.
        moves_input: whether its hooks bring an input from another device, and leave the output on ``device``.
        reason: why an image network cannot stand in for it; empty if one can.
    """

    device: torch.device
    dtype: torch.dtype
    hooked: bool = False
    moves_input: bool = False
    reason: str = ""

    @classmethod
    def of(cls, vae: nn.Module, method: str, parked_from: torch.device | None = None) -> Placement:
        """The placement of the network of ``method``.

        Args:
            vae: the VAE.
            method: ``"encode"`` or ``"decode"``.
            parked_from: where the parameters compute that were moved to the CPU for the time being.
        """
        devices: dict[torch.device, None] = {}
        dtypes: dict[torch.dtype, None] = {}
        reasons = []
        for owned in _owned(vae, PARTS[method]):
            parameter, device = owned.parameter, owned.device
            if not is_plain(parameter):
                reasons.append(f"its weights are not plain tensors ({type(parameter).__name__}, {parameter.layout})")
            elif parameter.is_meta and not owned.is_mapped:
                device = parameter.device
                reasons.append("its weights are on the meta device, without values")
            elif parked_from is not None and parameter.device.type == "cpu":
                device = parked_from
            devices[device] = dtypes[owned.dtype] = None
        if len(devices) > 1:
            reasons.append(f"its weights are spread over {_listed(devices)}")
        if len(dtypes) > 1:
            reasons.append(f"its weights are in {_listed(dtypes)}")
        hooks = [hook for part in PARTS[method] for hook in _hooks_in(getattr(vae, part, None))]
        # The VAE's own group loads at forward only: encode and decode then compute where the weights rest.
        resting = [hook for hook in _hooks(vae) if hasattr(hook, "group")]
        first = [hook for name in _ENTRIES[method] for hook in _hooks(_submodule(vae, name))]
        return cls(
            device=next(iter(devices), torch.device("meta")),
            dtype=next(iter(dtypes), torch.float32),
            hooked=bool(hooks or resting),
            moves_input=any(_moves_arguments(hook) for hook in first) and not any(_returns_output(hook) for hook in hooks),
            reason=next(iter(reasons), ""),
        )


def is_plain(tensor: Any) -> bool:
    """Whether ``tensor`` is memory that can be read: no subclass other than a parameter, no layout but strides."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and not tensor.is_nested


def is_hooked(module: nn.Module) -> bool:
    """Whether ``module`` itself carries offloading hooks."""
    return "_hf_hook" in module.__dict__ or "_diffusers_hook" in module.__dict__


def run_pre_forward(vae: nn.Module) -> None:
    """Do what diffusers' ``apply_forward_hook`` does before ``encode`` and ``decode``: bring the VAE to its device."""
    hook = vae.__dict__.get("_hf_hook")
    if hook is not None and hasattr(hook, "pre_forward"):
        hook.pre_forward(vae)


def execution_device(vae: nn.Module) -> torch.device:
    """The device that ``vae`` begins to compute on: that of the hooks of its first parameter with values, else its own."""
    devices = (owned.device for owned in _owned_below(vae, "", []))
    return next((device for device in devices if device.type != "meta"), torch.device("meta"))


def values(vae: nn.Module, method: str) -> dict[str, Tensor]:
    """The parameters of the network of ``method`` by name, with their values from wherever hooks hold them.

    Raises:
        OSError, SafetensorError: if the file of a group that was offloaded to disk cannot be read.
    """
    return {owned.name: owned.value() for owned in _owned(vae, PARTS[method])}


def hold_values(vae: nn.Module, method: str) -> bool:
    """Whether hooks hold values of the network of ``method``, or may be moving them, so that parameters are not the values."""
    hooks = [*_hooks(vae), *(hook for part in PARTS[method] for hook in _hooks_in(getattr(vae, part, None)))]
    return any(hasattr(hook, "group") or getattr(hook, "weights_map", None) is not None for hook in hooks)


@dataclass(frozen=True, slots=True)
class _Owned:
    """A parameter, and the hooks of the modules from its owner up to the VAE, each with the parameter's name from there."""

    name: str
    parameter: Tensor
    hooks: tuple[tuple[str, object], ...]

    @property
    def device(self) -> torch.device:
        found = (device for _, hook in self.hooks if (device := _hook_device(hook)) is not None)
        return next(found, self.parameter.device)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype it computes in; hooks of layerwise casting store it in another."""
        found = (dtype for _, hook in self.hooks if isinstance(dtype := getattr(hook, "compute_dtype", None), torch.dtype))
        return next(found, self.parameter.dtype)

    @property
    def is_mapped(self) -> bool:
        """Whether a hook of sequential offload fills it from a map."""
        return any(getattr(hook, "weights_map", None) is not None for _, hook in self.hooks)

    def value(self) -> Tensor:
        for name, hook in self.hooks:
            held = getattr(hook, "weights_map", None)
            if self.parameter.is_meta and held is not None and name in held:
                # The hook gives it the dtype of the parameter that it fills.
                mapped: Tensor = held[name]
                return mapped.to(self.parameter.dtype).resolve_neg()
            stored = _held_by(hook, self.parameter)
            if stored is not None:
                return stored
        return self.parameter.resolve_neg()


def _held_by(hook: Any, parameter: Tensor) -> Tensor | None:
    """The value of ``parameter`` where a hook of diffusers' group offloading holds it itself."""
    group: Any = getattr(hook, "group", None)
    if getattr(group, "_is_offloaded_to_disk", False):
        # The group fills its parameters from this file at every use, and never writes it again.
        key = group.tensor_to_key.get(parameter)
        if key is not None:
            from safetensors import safe_open

            with safe_open(group.safetensors_file_path, framework="pt", device="cpu") as file:
                stored: Tensor = file.get_tensor(key)
            return stored
        return None
    # With a stream the parameter may be under way to the GPU; this copy is what the group fills it from.
    held: Mapping[Tensor, Tensor] = getattr(group, "cpu_param_dict", None) or {}
    return held.get(parameter)


def _owned(vae: nn.Module, parts: tuple[str, ...]) -> Iterator[_Owned]:
    for part in parts:
        module = getattr(vae, part, None)
        if isinstance(module, nn.Module):
            above = [(f"{part}.", hook) for hook in _hooks(vae)]
            yield from _owned_below(module, f"{part}.", above)


def _owned_below(module: nn.Module, path: str, above: list[tuple[str, object]]) -> Iterator[_Owned]:
    hooks = [("", hook) for hook in _hooks(module)] + above
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield _Owned(path + name, parameter, tuple((prefix + name, hook) for prefix, hook in hooks))
    for name, child in module._modules.items():
        if child is not None:
            yield from _owned_below(child, f"{path}{name}.", [(f"{prefix}{name}.", hook) for prefix, hook in hooks])


def _hooks(module: nn.Module | None) -> Iterator[object]:
    """The hooks that ``module`` itself carries, accelerate's first."""
    attributes = {} if module is None else module.__dict__
    hook = attributes.get("_hf_hook")
    if hook is not None:
        yield hook
        yield from getattr(hook, "hooks", ())  # accelerate's SequentialHook
    registry = attributes.get("_diffusers_hook")
    if registry is not None:
        yield from registry.hooks.values()


def _hooks_in(module: nn.Module | None) -> Iterator[object]:
    for part in () if module is None else module.modules():
        yield from _hooks(part)


def _submodule(vae: nn.Module, path: str) -> nn.Module | None:
    module: Any = vae
    for name in path.split("."):
        module = getattr(module, name, None)
    return module if isinstance(module, nn.Module) else None


def _moves_arguments(hook: object) -> bool:
    """Whether ``hook`` sends the arguments of a forward to its device: accelerate's ``AlignDevicesHook``, group offload."""
    return _hook_device(hook) is not None and (hasattr(hook, "io_same_device") or hasattr(hook, "group"))


def _returns_output(hook: object) -> bool:
    """Whether ``hook`` sends the output back to where the arguments came from."""
    return bool(getattr(hook, "io_same_device", False))


def _hook_device(hook: object) -> torch.device | None:
    device = getattr(hook, "execution_device", None)
    if device is None:
        group = getattr(hook, "group", None) or getattr(hook, "config", None)
        device = getattr(group, "onload_device", None)
    return None if device is None else as_tensors_name_it(device)


def as_tensors_name_it(device: torch.device | str | int) -> torch.device:
    """``device`` as tensors on it name it: the CPU without a number, every other device with one.

    Args:
        device: a device or its name; accelerate also counts the devices of the machine's accelerator.
    """
    if isinstance(device, int):
        accelerator = torch.accelerator.current_accelerator()
        return torch.device("cuda" if accelerator is None else accelerator.type, device)
    device = torch.device(device)
    if device.type in ("cpu", "meta"):
        return torch.device(device.type)
    return device if device.index is not None else torch.device(device.type, _current_index(device.type))


def _current_index(kind: str) -> int:
    try:
        return int(torch.get_device_module(kind).current_device())
    except (RuntimeError, AssertionError, AttributeError):  # not in this build of torch, or a device that is the only one
        return 0


def _listed(names: Mapping[Any, None]) -> str:
    return " and ".join(str(name).removeprefix("torch.") for name in names)

"""Why a network or a GPU is not served by these kernels, as lists of sentences; an empty list: it is."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from itertools import groupby

import torch
from torch import Tensor

from qwen_vae_accel.kernels.network import KernelLayer, Network, network_of
from qwen_vae_accel.kernels.shortcuts import level_orders
from qwen_vae_accel.kernels.tuning.tables import has_kernel

MIN_CAPABILITY = (8, 0)
FLOAT8_CAPABILITY = (8, 9)
DTYPES = (torch.bfloat16, torch.float16)


def network_reasons(network: Network, *, sm90: bool) -> list[str]:
    """Name what of ``network`` has no kernel: layers that have none anywhere, widths that only ``sm90/`` has, shortcuts.

    Args:
        network: an encoder or decoder.
        sm90: whether the kernels of ``sm90/`` run.
    """
    layers = list(dict.fromkeys(network.kernel_layers()))
    nowhere = [layer for layer in layers if not has_kernel(layer, True)]
    reasons = []
    if nowhere:
        reasons.append(f"it has no kernels for these layers of the {network.method}r: {_by_kind(nowhere)}")
    widths = [layer.out_channels for layer in layers if layer not in nowhere and not has_kernel(layer, sm90)]
    if widths:
        *others, last = map(str, dict.fromkeys(widths))
        listed = f"{', '.join(others)} and {last}" if others else last
        layers_of = f"the {network.method}r's layers of {listed} channels"
        reasons.append(f"its kernels for {layers_of} need compute capability 9.0 (Hopper) and NVRTC")
    try:
        level_orders(network)
    except ValueError as error:
        reasons.append(f"it has no kernels for the shortcuts around levels of the {network.method}r: {error}")
    return reasons


def _by_kind(layers: Iterable[KernelLayer]) -> str:
    """Such as ``"conv3x3 96->100, 100->100; proj 96->96"``."""
    kinds = groupby(sorted(layers, key=lambda layer: layer.kind.value), lambda layer: f"{str(layer).split()[0]} ")
    return "; ".join(f"{kind}{', '.join(str(layer).removeprefix(kind) for layer in found)}" for kind, found in kinds)


def state_reasons(state: Mapping[str, Tensor], *, sm90: bool) -> list[str]:
    """Say why the kernels cannot run this encoder or decoder.

    Args:
        state: 2-D weights in diffusers' names without ``encoder.`` or ``decoder.`` (``model.source.image_state``).
        sm90: whether the kernels of ``sm90/`` run.
    """
    try:
        network = network_of(state)
    except ValueError as error:
        return [str(error)]
    expected = network.parameters()
    reasons = [f"{name} is missing" for name in expected if name not in state]
    reasons += [f"{name} is not part of the published network" for name in state if name not in expected]
    for name, shape in expected.items():
        if name not in state:
            continue
        found = tuple(state[name].shape)
        if found != shape and not (name.endswith("gamma") and state[name].numel() == shape[0]):
            reasons.append(f"{name} has shape {list(found)}, the published network has {list(shape)}")
    if len(reasons) > 3:
        reasons[3:] = [f"and {len(reasons) - 3} more differences from the published network"]
    return reasons or network_reasons(network, sm90=sm90)


def device_reasons(
    device: torch.device, dtype: torch.dtype, capability: tuple[int, int] | None, *, float8: bool = False
) -> list[str]:
    """Say why the kernels cannot run on this device.

    Args:
        device: where they would run.
        dtype: what they would compute in, but for float8.
        capability: compute capability of the GPU, None where there is none.
        float8: whether a decoder's costly convolutions would compute in float8.
    """
    reasons = []
    if importlib.util.find_spec("triton") is None:
        reasons.append("triton is not installed")
    if device.type != "cuda" or capability is None:
        reasons.append(f"needs an NVIDIA GPU, not {device}")
    elif capability < MIN_CAPABILITY:
        found, needed = (".".join(map(str, version)) for version in (capability, MIN_CAPABILITY))
        reasons.append(f"needs compute capability >= {needed}, not {found}")
    elif float8 and capability < FLOAT8_CAPABILITY:
        found, needed = (".".join(map(str, version)) for version in (capability, FLOAT8_CAPABILITY))
        reasons.append(f"float8 needs compute capability >= {needed}, not {found}: set decode_dtype to bfloat16 or float16")
    if dtype not in DTYPES:
        reasons.append(f"computes in bfloat16 or float16, not {dtype}")
    return reasons

"""Why a network or a GPU is not served by these kernels, as lists of sentences; an empty list: it is."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from itertools import groupby

import torch
from torch import Tensor

from qwen_vae_accel.kernels.network import Network, network_of
from qwen_vae_accel.kernels.tuning.tables import has_kernel

MIN_CAPABILITY = (8, 0)
FLOAT8_CAPABILITY = (8, 9)
DTYPES = (torch.bfloat16, torch.float16)


def network_reasons(network: Network) -> list[str]:
    """Name the layers of ``network`` that have no kernel, kind by kind."""
    missing = dict.fromkeys(layer for layer in network.kernel_layers() if not has_kernel(layer))
    by_kind = [
        f"{kind}{', '.join(str(layer).removeprefix(kind) for layer in layers)}"
        for kind, layers in groupby(
            sorted(missing, key=lambda layer: layer.kind.value), lambda layer: f"{str(layer).split()[0]} "
        )
    ]
    reasons = [f"it has no kernels for these layers of the {network.method}r: {'; '.join(by_kind)}"] if by_kind else []
    around = [level.shortcut for level in network.levels if level.shortcut is not None]
    if around:
        what = "copies" if network.decodes else "averages"
        widths = ", ".join(f"{shortcut.in_channels}->{shortcut.out_channels}" for shortcut in around)
        reasons.append(f"it has no kernels for the residual shortcuts of {what} around levels: {widths}")
    return reasons


def state_reasons(state: Mapping[str, Tensor]) -> list[str]:
    """Say why the kernels cannot run this encoder or decoder.

    Args:
        state: 2-D weights in diffusers' names without ``encoder.`` or ``decoder.`` (``model.source.image_state``).
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
    return reasons or network_reasons(network)


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

"""A VAE from a folder or a file, or a full-size one with random weights.

For the command line; ``accelerate`` takes loaded models.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qwen_vae_accel.checkpoints import read_weights, vae_from_weights
from qwen_vae_accel.documents import read_json
from qwen_vae_accel.errors import UnsupportedVAEError, shown
from qwen_vae_accel.model.published import CLASSES

logger = logging.getLogger(__name__)

# The published VAEs, as commands name them.
VAE_TYPES = {"qwen-image": "AutoencoderKLQwenImage", "qwen-image-2.1": "AutoencoderKLQwenImage21"}
_STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def vae_folder(path: str | Path) -> Path:
    """The folder that holds a VAE's ``config.json``: ``path`` itself, or its ``vae`` subfolder for a pipeline.

    Raises:
        UnsupportedVAEError: if neither is there.
    """
    folder = Path(os.path.expanduser(path))  # as it is where nobody knows such a home
    for candidate in (folder / "vae", folder):
        if os.path.isfile(candidate / "config.json"):
            return candidate
    if not os.path.exists(folder):
        raise UnsupportedVAEError(str(path), ["there is no such folder"])
    raise UnsupportedVAEError(
        str(path), ["it has neither config.json nor vae/config.json: name a VAE's or a pipeline's folder"]
    )


def _class_name(folder: Path) -> str:
    try:
        name = read_json(folder / "config.json").get("_class_name")
    except (OSError, ValueError, AttributeError) as error:
        raise UnsupportedVAEError(str(folder), [f"its config.json cannot be read: {error}"]) from error
    if name not in CLASSES:
        raise UnsupportedVAEError(str(folder), [f"its config.json says it is {shown(name)}, not one of {', '.join(CLASSES)}"])
    return str(name)


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype that the weights of ``folder`` are stored in; float32 where the file does not tell."""
    from safetensors import SafetensorError, safe_open

    for file in filter(os.path.isfile, sorted(folder.glob("*.safetensors"))):
        try:
            with safe_open(file, framework="pt") as tensors:
                name = next(iter(tensors.keys()))
                return _STORED.get(tensors.get_slice(name).get_dtype(), torch.float32)
        except (OSError, ValueError, SafetensorError, StopIteration):
            continue
    return torch.float32


def load_vae(path: str | Path, device: torch.device, dtype: torch.dtype | None = None) -> nn.Module:
    """The VAE of a VAE's or pipeline's folder, or of one safetensors file, ready for inference.

    Args:
        path: the folder; or a file of weights in diffusers' names or the original ones (:mod:`qwen_vae_accel.checkpoints`).
        device: where to.
        dtype: of its parameters; None: the one they are stored in.

    Raises:
        UnsupportedVAEError: if the folder or file holds none of the family, or it cannot be loaded.
    """
    file = Path(os.path.expanduser(path))
    if os.path.exists(file) and not os.path.isdir(file):
        weights = read_weights(file)
        stored = next((value.dtype for value in weights.values()), torch.float32)
        return vae_from_weights(weights, str(path)).to(device, dtype or stored)
    folder = vae_folder(path)
    cls = _diffusers_class(_class_name(folder), str(path))
    return load_model(cls, folder, device, dtype or stored_dtype(folder))


def _diffusers_class(name: str, what: str) -> Any:
    import diffusers

    if not hasattr(diffusers, name):
        raise UnsupportedVAEError(what, [f"diffusers {diffusers.__version__} has no {name}: install a newer release"])
    return getattr(diffusers, name)


def load_model(cls: Any, folder: Path, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The model of class ``cls`` that ``folder`` holds, ready for inference: with all its weights.

    Raises:
        UnsupportedVAEError: if diffusers cannot load it, or the weights there are not those of ``cls``.
    """
    try:
        model, found = cls.from_pretrained(str(folder), torch_dtype=dtype, output_loading_info=True)
    except Exception as error:  # whatever diffusers makes of files that anybody may have written
        raise UnsupportedVAEError(str(folder), [f"diffusers cannot load it: {type(error).__name__}: {error}"]) from error
    if missing := found["missing_keys"]:
        reasons = [f"its weights file lacks {_few(missing)} of {cls.__name__}"]
        if other := found["unexpected_keys"]:
            reasons.append(f"it has {_few(other)}, which {cls.__name__} does not know: weights of another program's naming?")
        raise UnsupportedVAEError(str(folder), reasons)
    made: nn.Module = model.eval().requires_grad_(False).to(device)
    return made


def _few(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:4]) + (f" and {len(listed) - 4} more" if len(listed) > 4 else "")


def random_vae(seed: int = 0, kind: str = "qwen-image", **config: Any) -> nn.Module:
    """A VAE with random weights, on the CPU in float32; full size unless ``config`` says otherwise.

    The gammas of its norms are drawn around 1, since a dropped gamma would not show where all are 1. Weights are
    rounded to bfloat16, as published checkpoints are, so every dtype computes with the same ones.

    Args:
        seed: of the weights.
        kind: which VAE, one of ``VAE_TYPES``.
        config: arguments of its class.

    Raises:
        UnsupportedVAEError: the installed diffusers does not have it.
    """
    cls = _diffusers_class(VAE_TYPES[kind], kind)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        vae: nn.Module = cls(**config)
        with torch.no_grad():
            for name, parameter in vae.named_parameters():
                if name.endswith("gamma"):
                    parameter.copy_(1 + 0.1 * torch.randn(parameter.shape))
                parameter.copy_(parameter.to(torch.bfloat16))
    return vae.eval().requires_grad_(False)


def published_vae() -> nn.Module:
    """The published topology without memory: parameters on the ``meta`` device, in bfloat16."""
    import diffusers

    with torch.device("meta"):
        vae: nn.Module = diffusers.AutoencoderKLQwenImage()
    return vae.to(torch.bfloat16)

"""A VAE from one file of weights without a configuration: its names and shapes say what it is.

The names are diffusers', or those of the original programs (Wan 2.1's VAE, which Qwen-Image's is too); diffusers' own
conversion for single files translates these. Only safetensors files are read: loading any other kind would run code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qwen_vae_accel.errors import UnsupportedVAEError, shown
from qwen_vae_accel.files import open_regular
from qwen_vae_accel.model.published import ORIGINAL_NAME

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class _Naming:
    """One way to name the weights of a published VAE.

    Attributes:
        mark: a name that only it has.
        cls: the class of diffusers that computes with them.
        shapes: arguments of the class, each from a weight (in diffusers' names) and the axis that tells it.
        converted: whether diffusers must translate the names.
    """

    mark: str
    cls: str
    shapes: Mapping[str, tuple[str, int]]
    converted: bool = False


_QWEN_IMAGE = {
    "base_dim": ("encoder.conv_in.weight", 0),
    "input_channels": ("encoder.conv_in.weight", 1),
    "z_dim": ("post_quant_conv.weight", 0),
}
_QWEN_IMAGE_21 = {
    "base_dim": ("encoder.conv_in.weight", 0),
    "in_channels": ("encoder.conv_in.weight", 1),
    "decoder_base_dim": ("decoder.conv_out.weight", 1),
    "out_channels": ("decoder.conv_out.weight", 0),
    "z_dim": ("post_quant_conv.weight", 0),
}
_NAMINGS = (
    _Naming(ORIGINAL_NAME, "AutoencoderKLQwenImage", _QWEN_IMAGE, converted=True),
    _Naming("decoder.up_blocks.0.upsamplers.0.resample.1.weight", "AutoencoderKLQwenImage", _QWEN_IMAGE),
    _Naming("decoder.up_blocks.0.upsampler.resample.1.weight", "AutoencoderKLQwenImage21", _QWEN_IMAGE_21),
)


def read_weights(file: str | Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU.

    Raises:
        UnsupportedVAEError: if it cannot be read, or is a file of another kind, or damaged. It is never unpickled.
    """
    from safetensors import SafetensorError, safe_open

    try:
        open_regular(file).close()
        with safe_open(str(file), framework="pt") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 (it is no mapping)
    except OSError as error:
        raise UnsupportedVAEError(str(file), [f"it cannot be read: {error.strerror or error}"]) from error
    except (SafetensorError, ValueError, TypeError, AttributeError, KeyError) as error:
        reason = (
            f"it is no safetensors file, or a damaged one ({error}); checkpoints of other kinds, such as pickles, are not read"
        )
        raise UnsupportedVAEError(str(file), [reason]) from error


def knows_names(names: Iterable[str]) -> bool:
    """Whether ``names`` are those of the weights of one of the family."""
    return not {naming.mark for naming in _NAMINGS}.isdisjoint(names)


def diffusers_names(weights: Mapping[str, Tensor], what: str) -> dict[str, str]:
    """The names of ``weights`` by those that diffusers has for them.

    Raises:
        UnsupportedVAEError: see :func:`vae_from_weights`, which takes the same arguments.
    """
    names = {id(value): name for name, value in weights.items()}
    return {name: names[id(value)] for name, value in _renamed(weights, _naming_of(weights, what), what).items()}


def vae_from_weights(weights: Mapping[str, Tensor], what: str) -> nn.Module:
    """A VAE of diffusers over ``weights``, whose memory it shares; ready for inference.

    Args:
        weights: of a published topology, in diffusers' names or the original ones.
        what: where they are from, for messages.

    Raises:
        UnsupportedVAEError: if they are not all the weights of one of the family, and nothing else; with the first names
            that are not known or not there.
    """
    import diffusers

    naming = _naming_of(weights, what)
    cls: Any = getattr(diffusers, naming.cls, None)
    if cls is None:
        raise UnsupportedVAEError(what, [f"diffusers {diffusers.__version__} has no {naming.cls}: install a newer release"])
    if strange := sorted({str(value.dtype).removeprefix("torch.") for value in weights.values() if value.dtype not in DTYPES}):
        raise UnsupportedVAEError(what, [f"it holds {', '.join(strange)}, none of float32, bfloat16 and float16"])
    state = _renamed(weights, naming, what)
    vae = _made(
        lambda: cls(**{name: state[weight].shape[axis] for name, (weight, axis) in naming.shapes.items()}), naming, what
    )
    wanted = vae.state_dict()
    reasons = [
        f"{text}: {_first(names)}"
        for text, names in (
            (f"{naming.cls} does not know", [name for name in state if name not in wanted]),
            ("it lacks", [name for name in wanted if name not in state]),
            (
                "of other shapes than the published VAE's",
                [f"{n} {tuple(v.shape)}" for n, v in state.items() if n in wanted and v.shape != wanted[n].shape],
            ),
        )
        if names
    ]
    if reasons:
        raise UnsupportedVAEError(what, reasons)
    vae.load_state_dict(state, assign=True)
    return vae.eval().requires_grad_(False)


def _naming_of(weights: Mapping[str, Tensor], what: str) -> _Naming:
    for naming in _NAMINGS:
        if naming.mark in weights:
            return naming
    raise UnsupportedVAEError(what, [f"its weights have other names than a VAE of the family: {_first(weights)}"])


def _renamed(weights: Mapping[str, Tensor], naming: _Naming, what: str) -> dict[str, Tensor]:
    if not naming.converted:
        return dict(weights)
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    try:
        state: dict[str, Tensor] = convert_wan_vae_to_diffusers(dict(weights))
    except (ValueError, IndexError) as error:  # a number that is none in a name
        raise UnsupportedVAEError(what, [f"diffusers cannot convert its names: {error}"]) from error
    if len(state) < len(weights):
        raise UnsupportedVAEError(what, ["diffusers takes several of its names for one: it is another VAE, such as Wan 2.2's"])
    return state


def _made(make: Callable[[], nn.Module], naming: _Naming, what: str) -> nn.Module:
    try:
        with torch.device("meta"):
            return make()
    except Exception as error:  # whatever diffusers makes of shapes that anybody may have written
        reason = f"its shapes make no {naming.cls}: {type(error).__name__}: {error}"
        raise UnsupportedVAEError(what, [reason]) from error


def _first(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return (", ".join(map(shown, listed[:_SHOWN])) + more) if listed else "it has none"

"""A call of an accelerated VAE inside code that ``torch.compile`` compiles: one operator, opaque to the compiler.

Everything here but the operator's body runs while Dynamo traces, and is written for it: what it reads becomes a guard of
the compiled code.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qwen_vae_accel.errors import HandleError
from qwen_vae_accel.journal import ORIGINAL
from qwen_vae_accel.model.topology import PARTS, Topology
from qwen_vae_accel.plugin.plain import not_image

_numbers = itertools.count()
_handles: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


@functools.cache
def output_types() -> tuple[Any, Any, Any]:
    """Diffusers' classes of what ``decode`` and ``encode`` return, and of the distribution in the latter."""
    from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
    from diffusers.models.modeling_outputs import AutoencoderKLOutput

    return DecoderOutput, AutoencoderKLOutput, DiagonalGaussianDistribution


@dataclass(frozen=True, slots=True)
class Traced:
    """What a trace needs of a handle: its number, how the sizes of output and input depend on each other, diffusers' classes.

    Attributes:
        number: under which the operator finds the handle.
        moments: channels of what the encoder gives.
        image_channels: channels of what the decoder gives.
        scale: pixels per latent pixel and side.
        types: see :func:`output_types`.
    """

    number: int
    moments: int
    image_channels: int
    scale: int
    types: tuple[Any, Any, Any]

    @classmethod
    def of(cls, handle: Any, topology: Topology) -> Traced:
        """Enter ``handle`` where the operator finds it for as long as it lives."""
        number = next(_numbers)
        _handles[number] = handle
        return cls(number, 2 * topology.z_dim, topology.image_channels, topology.scale, output_types())


@torch.library.custom_op("qwen_vae_accel::run", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def run(x: Tensor, number: int, method: str, channels: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """``encode`` or ``decode`` by handle ``number``: ``x [B, C, 1, h, w]`` to ``[B, channels, 1, height, width]``."""
    handle = _handles.get(number)
    if handle is None:
        raise HandleError("the compiled code belongs to an accelerated VAE that is gone; compile it again")
    output: Tensor = handle._call(method, x, False)[0]
    if method == "encode":
        output = output.parameters  # type: ignore[attr-defined]
    return output.to(x.device, dtype).contiguous()


@run.register_fake
def _(x: Tensor, number: int, method: str, channels: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    return x.new_empty((x.shape[0], channels, 1, height, width), dtype=dtype)


def not_opaque(vae: nn.Module, method: str, x: Tensor) -> str:
    """Why the trace of ``x [B, C, T, h, w]`` goes through diffusers' own code; empty where the operator stands for the call."""
    if _is_exporting():
        return "torch.export traces the call"
    if type(x) is not Tensor and type(x) is not nn.Parameter:
        return "its input is not a plain tensor"
    if x.dim() != 5:
        return f"its input has {x.dim()} dimensions, not 5"
    if _weight(vae, method).dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return "its weights are stored in another dtype than they compute in"
    return not_image(x, x.device, lambda: _requires_grad(vae, method))


def _is_exporting() -> bool:
    return torch.compiler.is_exporting()


# Called while Dynamo traces, and not traced: before PyTorch 2.12 (pull request 176499) Dynamo takes it for true in any trace.
_is_exporting._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _weight(vae: nn.Module, method: str) -> Tensor:
    part: Any = getattr(vae, PARTS[method][0])
    weight: Tensor = part.conv_in.weight
    return weight


def _requires_grad(vae: nn.Module, method: str) -> bool:
    for name in PARTS[method]:  # loops, since Dynamo does not follow a generator expression here
        for parameter in getattr(vae, name).parameters():
            if parameter.requires_grad:
                return True
    return False


def note(number: int, method: str, reason: str) -> None:
    """Count a call that became part of a trace; compiled code does not tell how often it runs it."""
    handle = _handles.get(number)
    if handle is not None:
        handle._journal.served(method, ORIGINAL, f"{reason} (compiled into the code around it)")


note._dynamo_marked_constant = True  # type: ignore[attr-defined]  # Dynamo calls it once, while it traces


def output(vae: nn.Module, traced: Traced, method: str, x: Tensor) -> Tensor:
    """The operator's output ``[B, C', 1, h', w']`` for ``x [B, C, 1, h, w]``."""
    batch, _, _, height, width = x.shape
    if method == "decode":
        size = (traced.image_channels, height * traced.scale, width * traced.scale)
    else:
        size = (traced.moments, height // traced.scale, width // traced.scale)
    return run(x, traced.number, method, *size, _weight(vae, method).dtype)

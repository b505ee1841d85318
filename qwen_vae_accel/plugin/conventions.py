"""How other programs call the modules that hold their VAE: what they hand over, and what they want back.

They have the weights of a published VAE, in diffusers' names or the original ones, and methods of their own. Which
convention a module follows is read from the parameters of these methods. A new one is one more line of data.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from qwen_vae_accel.errors import UnsupportedVAEError, shown
from qwen_vae_accel.model.custom import plain_class
from qwen_vae_accel.model.topology import METHODS


@dataclass(frozen=True, slots=True)
class Scale:
    """Statistics of the latents, which some modules apply themselves: ``(mu - mean) * inverse`` after encoding."""

    mean: Any
    inverse: Any

    def like(self, x: Tensor) -> Scale:
        """Make the same for tensors ``[B, z_dim, T, h, w]`` of the dtype and device of ``x``."""
        return Scale(*(v.to(x).view(1, -1, 1, 1, 1) if isinstance(v, Tensor) else v for v in (self.mean, self.inverse)))


@dataclass(frozen=True, slots=True)
class Convention:
    """One way of calling ``encode`` and ``decode``.

    Attributes:
        parameters: of each method; the first one is the image or the latents.
        free: those of them that may have any value: they do not ask for something else than one image in one piece.
        optional: those that only some modules have.
        frames: whether tensors have a frame axis, ``[B, C, T, H, W]``.
        scale: where the statistics of the latents are that the module applies: ``"argument"``, ``"module"``; empty: nowhere.
    """

    parameters: Mapping[str, tuple[str, ...]]
    free: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    frames: bool = True
    scale: str = ""

    def fits(self, method: str, signature: inspect.Signature) -> bool:
        """Whether a method of ``signature``, without ``self``, is called like this."""
        given = [p.name for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD and p.name not in self.optional]
        return tuple(given) == self.parameters[method]

    def arguments(self, signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The image or latents, and all other arguments by name; or why such a call is the module's own to serve."""
        try:
            (_, x), *rest = signature.bind(*args, **kwargs).arguments.items()
        except (TypeError, ValueError) as error:
            return f"its arguments are not those of the method: {error}"
        for name, value in rest:
            parameter = signature.parameters[name]
            if name not in self.free and parameter.kind is not parameter.VAR_KEYWORD and value is not parameter.default:
                return f"it is called with {name}={shown(value)}"
        if self.scale == "argument" and not (isinstance(scale := dict(rest)["scale"], (list, tuple)) and len(scale) == 2):
            return f"it is called with scale={shown(scale)}, no pair of mean and one over the deviation"
        axes = 5 if self.frames else 4
        if not isinstance(x, Tensor) or x.dim() != axes:
            return f"it is not called with a tensor of {axes} dimensions"
        return x, dict(rest)

    def taken(self, method: str, module: nn.Module, x: Tensor, named: Mapping[str, Any]) -> Tensor:
        """Turn what the module is called with into what diffusers' VAE takes: ``[B, C, T, H, W]``, latents not normalised."""
        x = x if self.frames else x.unsqueeze(2)
        scale = self._scale(module, named)
        if method == "encode" or scale is None:
            return x
        scale = scale.like(x)
        return x / scale.inverse + scale.mean

    def given(self, method: str, module: nn.Module, y: Tensor, named: Mapping[str, Any]) -> Tensor:
        """Make what the module gives back from moments ``[B, 2 * z_dim, h, w]`` or images ``[B, C, H, W]``."""
        y = y.unsqueeze(2)
        if method == "encode":
            y = y.chunk(2, dim=1)[0]
            if (scale := self._scale(module, named)) is not None:
                scale = scale.like(y)
                y = (y - scale.mean) * scale.inverse
        return y if self.frames else y.squeeze(2)

    def _scale(self, module: nn.Module, named: Mapping[str, Any]) -> Scale | None:
        if self.scale == "argument":
            return Scale(*named["scale"])
        return Scale(module.mean, module.std) if self.scale == "module" else None


def _of_both(*names: str) -> dict[str, tuple[str, ...]]:
    return dict.fromkeys(METHODS, names)


CONVENTIONS: Mapping[str, Convention] = {
    "ComfyUI's WanVAE": Convention({"encode": ("x",), "decode": ("z",)}),
    "Wan's own WanVAE_, as LightX2V and DiffSynth have it": Convention(
        {"encode": ("x", "scale"), "decode": ("z", "scale")}, free=("scale",), optional=("return_mu",), scale="argument"
    ),
    # It keeps one over the deviation under the deviation's name. Sizes of tiles mean nothing where none are made.
    "DiffSynth's QwenImageVAE": Convention(
        _of_both("x", "tiled", "tile_size", "tile_stride"), free=("tile_size", "tile_stride"), frames=False, scale="module"
    ),
}


def signatures(vae: nn.Module) -> dict[str, inspect.Signature]:
    """The parameters of the methods of the class of ``vae``, without ``self``."""
    found = {}
    for method in METHODS:
        signature = inspect.signature(getattr(plain_class(vae), method))
        found[method] = signature.replace(parameters=list(signature.parameters.values())[1:])
    return found


def convention_of(vae: nn.Module) -> Convention:
    """The convention that ``vae`` follows.

    Raises:
        UnsupportedVAEError: if it is none that is known.
    """
    try:
        given = signatures(vae)
    except (TypeError, ValueError, AttributeError) as error:  # methods of the object alone, or not of Python
        raise UnsupportedVAEError(type(vae).__name__, [f"the parameters of its methods cannot be read: {error}"]) from error
    for convention in CONVENTIONS.values():
        has_scale = convention.scale != "module" or (hasattr(vae, "mean") and hasattr(vae, "std"))
        if has_scale and all(convention.fits(method, signature) for method, signature in given.items()):
            return convention
    kind = type(vae)
    known = "; ".join(f"{whose}: {_listed(convention.parameters)}" for whose, convention in CONVENTIONS.items())
    reason = (
        f"it is a {kind.__module__}.{kind.__qualname__}, no class of diffusers, and called in a way that is not known: "
        f"{_listed({method: tuple(signature.parameters) for method, signature in given.items()})} (known: {known}). "
        "qwen_vae_accel.checkpoints.vae_from_weights(vae.state_dict(), 'vae') makes a VAE of diffusers over the same memory"
    )
    raise UnsupportedVAEError(kind.__name__, [reason])


def _listed(parameters: Mapping[str, tuple[str, ...]]) -> str:
    return ", ".join(f"{method}({', '.join(names)})" for method, names in parameters.items())

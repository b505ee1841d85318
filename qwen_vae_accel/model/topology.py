"""What the state dict of a published VAE says it is, and the reasons when its networks are none that we know.

Keys of the state dict are stable across diffusers releases while class internals are not, so nothing here looks at
classes. Two topologies are known: that of the Wan 2.1 VAE, which ``AutoencoderKLQwenImage`` shares, and the residual one of
``AutoencoderKLQwenImage21``, where a shortcut without weights goes around every resolution. Convolutions may be the video
VAE's 3-D ones or the 2-D ones that are left of them for an image.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from qwen_vae_accel.errors import UnsupportedVAEError

# The parts of a VAE that each method runs, in the order of their parameters.
PARTS = {"encode": ("encoder", "quant_conv"), "decode": ("decoder", "post_quant_conv")}
METHODS = tuple(PARTS)

# Everything the two networks may hold, in diffusers' names. A key that matches nothing here is a reason to refuse.
_RESNET = r"(norm1\.gamma|norm2\.gamma|conv1\.(weight|bias)|conv2\.(weight|bias)|conv_shortcut\.(weight|bias))"
_MID = rf"mid_block\.(resnets\.[01]\.{_RESNET}|attentions\.0\.(norm\.gamma|to_qkv\.(weight|bias)|proj\.(weight|bias)))"
_ENDS = r"(conv_in\.(weight|bias)|norm_out\.gamma|conv_out\.(weight|bias))"
_SCALE = r"(resample\.1\.(weight|bias)|time_conv\.(weight|bias))"
# One resolution of the encoder is several down_blocks, or in the residual topology a single one.
_DOWN = rf"({_RESNET}|{_SCALE}|resnets\.\d+\.{_RESNET}|downsampler\.{_SCALE})"
_UP = rf"(resnets\.\d+\.{_RESNET}|(upsamplers\.0|upsampler)\.{_SCALE})"
_KNOWN_KEY = re.compile(
    rf"(quant_conv|post_quant_conv)\.(weight|bias)"
    rf"|encoder\.({_ENDS}|{_MID}|down_blocks\.\d+\.{_DOWN})"
    rf"|decoder\.({_ENDS}|{_MID}|up_blocks\.\d+\.{_UP})"
)
_HALVING = r"encoder\.down_blocks\.\d+\.(downsampler\.)?resample\.1\.weight"
_DOUBLING = r"decoder\.up_blocks\.\d+\.(upsamplers\.0|upsampler)\.resample\.1\.weight"
_RESIDUAL = re.compile(r"encoder\.down_blocks\.\d+\.resnets\.|decoder\.up_blocks\.\d+\.upsampler\.")


@dataclass(frozen=True, slots=True)
class Topology:
    """Shape facts of one VAE, read from its weights.

    Attributes:
        image_channels: channels of the images it takes and gives (3: RGB, 4: RGBA).
        z_dim: channels of the latent.
        encoder_widths: output channels of the encoder's first convolution and of each of its residual blocks.
        decoder_widths: the same for the decoder.
        scale: pixels per latent pixel and side, ``2 ** (number of downsampling steps)``.
        residual: whether a shortcut of averages and copies goes around every resolution (``AutoencoderKLQwenImage21``).
    """

    image_channels: int
    z_dim: int
    encoder_widths: tuple[int, ...]
    decoder_widths: tuple[int, ...]
    scale: int
    residual: bool = False

    @property
    def multiple(self) -> int:
        """Sides of an image that is encoded must be multiples of this: shortcuts average whole blocks of pixels."""
        return self.scale if self.residual else 1


def _count(keys: Mapping[str, Any], pattern: str) -> int:
    regex = re.compile(pattern)
    return len({match.group(0) for key in keys if (match := regex.match(key))})


def _is_residual(shapes: Mapping[str, Any]) -> bool:
    return any(map(_RESIDUAL.match, shapes))


def _first(texts: Sequence[str], shown: int = 3) -> str:
    return ", ".join(texts[:shown]) + (f" and {len(texts) - shown} more" if len(texts) > shown else "")


def _widths(shapes: Mapping[str, tuple[int, ...]], part: str) -> tuple[int, ...]:
    first = shapes[f"{part}.conv_in.weight"][0]
    order = [key for key in shapes if key.startswith(f"{part}.") and key.endswith("conv2.weight")]
    return (first, *(shapes[key][0] for key in order))


def _config_reasons(config: Mapping[str, Any]) -> list[str]:
    reasons = []
    if config.get("patch_size") is not None:
        reasons.append(f"config.patch_size is {config['patch_size']}: patchified images (Wan 2.2) are another network")
    if config.get("attn_scales"):
        reasons.append(f"config.attn_scales is {list(config['attn_scales'])}: attention is known in the middle block only")
    return reasons


def topology_of(vae: nn.Module) -> Topology:
    """Read the topology of a VAE that nobody has changed from its parameters and config.

    Raises:
        UnsupportedVAEError: with one reason per kind of difference from the VAEs that are known.
    """
    shapes = {name: tuple(p.shape) for name, p in vae.named_parameters()}
    unknown = [key for key in shapes if not _KNOWN_KEY.fullmatch(key)]
    reasons = [f"it has parameters that this network does not know: {_first(unknown)}"] if unknown else []
    reasons += _config_reasons(dict(getattr(vae, "config", {}) or {}))
    reasons = reasons or _shape_reasons(shapes)
    if reasons:
        raise UnsupportedVAEError(type(vae).__name__, reasons)
    return Topology(
        image_channels=shapes["encoder.conv_in.weight"][1],
        z_dim=shapes["post_quant_conv.weight"][0],
        encoder_widths=_widths(shapes, "encoder"),
        decoder_widths=_widths(shapes, "decoder"),
        scale=2 ** _count(shapes, _DOUBLING),
        residual=_is_residual(shapes),
    )


def _shape_reasons(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    reasons = []
    z_dim = shapes["post_quant_conv.weight"][0]
    if shapes["quant_conv.weight"][0] != 2 * z_dim:
        reasons.append(f"quant_conv has {shapes['quant_conv.weight'][0]} outputs, expected twice z_dim = {2 * z_dim}")
    taken, given = shapes["encoder.conv_in.weight"][1], shapes["decoder.conv_out.weight"][0]
    if taken != given:
        reasons.append(f"it encodes {taken} channels but decodes {given}")
    down, up = _count(shapes, _HALVING), _count(shapes, _DOUBLING)
    if down != up:
        reasons.append(f"the encoder halves the image {down} times but the decoder doubles it {up} times")
    return reasons

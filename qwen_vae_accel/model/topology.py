"""What a VAE's state dict says it is, and the reasons when it is not the one we know.

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

import torch
from torch import nn

from qwen_vae_accel.errors import UnsupportedVAEError

# The parts of a VAE that each method runs.
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
# Ranks of a convolution of the video VAE, which for one frame may be stored as what is left of it.
_CONV = (5, 4)
_REQUIRED: tuple[tuple[str, tuple[int, ...] | None], ...] = (
    ("quant_conv.weight", _CONV),
    ("post_quant_conv.weight", _CONV),
    *((f"{part}.{name}", ranks) for part in ("encoder", "decoder") for name, ranks in (
        ("conv_in.weight", _CONV),
        ("conv_out.weight", _CONV),
        ("norm_out.gamma", None),
        ("mid_block.resnets.0.conv1.weight", _CONV),
        ("mid_block.resnets.1.conv1.weight", _CONV),
        ("mid_block.attentions.0.to_qkv.weight", (4,)),
    )),
)  # fmt: skip
_FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
        """What the sides of an image that is encoded must be multiples of: shortcuts average whole blocks of pixels."""
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


def _missing_companions(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Parameters that are not there although others of the same layer or block are."""
    expected = set()
    for key in shapes:
        layer, _, leaf = key.rpartition(".")
        block, _, name = layer.rpartition(".")
        if layer and leaf in ("weight", "bias"):
            expected |= {f"{layer}.weight", f"{layer}.bias"}
        if name == "conv1":
            expected |= {f"{block}.{other}" for other in ("norm1.gamma", "norm2.gamma", "conv2.weight")}
        if name == "to_qkv":
            expected |= {f"{block}.{other}" for other in ("norm.gamma", "proj.weight")}
    return sorted(expected - set(shapes) - {key for key, _ in _REQUIRED})


def _config_reasons(config: Mapping[str, Any]) -> list[str]:
    reasons = []
    if config.get("patch_size") is not None:
        reasons.append(f"config.patch_size is {config['patch_size']}: patchified images (Wan 2.2) are another network")
    if config.get("attn_scales"):
        reasons.append(f"config.attn_scales is {list(config['attn_scales'])}: only attention in the middle block is known")
    return reasons


def inspect_vae(vae: nn.Module) -> Topology:
    """Read the topology of ``vae`` from its parameters and config.

    Raises:
        UnsupportedVAEError: with one reason per kind of difference from the VAEs that are known.
    """
    parameters = dict(vae.named_parameters()) if isinstance(vae, nn.Module) else {}
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    missing = [key for key, _ in _REQUIRED if key not in shapes]
    reasons = []
    if len(missing) == len(_REQUIRED):
        reasons.append(
            "none of the parameters of a Qwen-Image VAE (encoder.conv_in, decoder.conv_in, quant_conv, ...) is there"
        )
    else:
        missing += _missing_companions(shapes)
        unknown = [key for key in shapes if not _KNOWN_KEY.fullmatch(key)]
        ranks = [
            f"{key} ({len(shapes[key])} dimensions, expected {' or '.join(map(str, expected))})"
            for key, expected in _REQUIRED
            if expected is not None and key in shapes and len(shapes[key]) not in expected
        ]
        for what, found in (
            ("it lacks parameters", missing),
            ("it has parameters that this network does not know", unknown),
            ("it has parameters of another shape", ranks),
        ):
            if found:
                reasons.append(f"{what}: {_first(found)}")
    reasons += _config_reasons(dict(getattr(vae, "config", {}) or {}))
    dtypes = {p.dtype for p in parameters.values()} - set(_FLOAT_DTYPES)
    if dtypes:
        stored = ", ".join(sorted(map(str, dtypes)))
        reasons.append(f"parameters are stored as {stored}; float32, bfloat16 and float16 are known")
    if not reasons:
        reasons = _shape_reasons(shapes)
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

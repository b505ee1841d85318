"""The published topology, as names and shapes; and the reasons why a model or a GPU is not served by these kernels."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

WIDTHS = (96, 192, 384, 384)
LATENT_CHANNELS = 16
IMAGE_CHANNELS = (3, 4)
MIN_CAPABILITY = (8, 0)
FLOAT8_CAPABILITY = (8, 9)
DTYPES = (torch.bfloat16, torch.float16)

Shape = tuple[int, ...]


def _conv(name: str, out: int, inp: int, side: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (out, inp, side, side)
    yield f"{name}.bias", (out,)


def _block(name: str, inp: int, out: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.norm1.gamma", (inp,)
    yield from _conv(f"{name}.conv1", out, inp, 3)
    yield f"{name}.norm2.gamma", (out,)
    yield from _conv(f"{name}.conv2", out, out, 3)
    if inp != out:
        yield from _conv(f"{name}.conv_shortcut", out, inp, 1)


def _middle(width: int) -> Iterator[tuple[str, Shape]]:
    yield from _block("mid_block.resnets.0", width, width)
    yield "mid_block.attentions.0.norm.gamma", (width,)
    yield from _conv("mid_block.attentions.0.to_qkv", 3 * width, width, 1)
    yield from _conv("mid_block.attentions.0.proj", width, width, 1)
    yield from _block("mid_block.resnets.1", width, width)


def decoder_shapes(image_channels: int) -> dict[str, Shape]:
    def walk() -> Iterator[tuple[str, Shape]]:
        z = LATENT_CHANNELS
        yield from _conv("post_quant_conv", z, z, 1)
        yield from _conv("conv_in", WIDTHS[-1], z, 3)
        yield from _middle(WIDTHS[-1])
        width = WIDTHS[-1]
        for level, out in enumerate(reversed(WIDTHS)):
            for i in range(3):
                yield from _block(f"up_blocks.{level}.resnets.{i}", width, out)
                width = out
            if level < 3:
                width = out // 2
                yield from _conv(f"up_blocks.{level}.upsamplers.0.resample.1", width, out, 3)
        yield "norm_out.gamma", (width,)
        yield from _conv("conv_out", image_channels, width, 3)

    return dict(walk())


def encoder_shapes(image_channels: int) -> dict[str, Shape]:
    def walk() -> Iterator[tuple[str, Shape]]:
        z = 2 * LATENT_CHANNELS
        yield from _conv("conv_in", WIDTHS[0], image_channels, 3)
        width, index = WIDTHS[0], 0
        for level, out in enumerate(WIDTHS):
            for _ in range(2):
                yield from _block(f"down_blocks.{index}", width, out)
                width, index = out, index + 1
            if level < 3:
                yield from _conv(f"down_blocks.{index}.resample.1", out, out, 3)
                index += 1
        yield from _middle(width)
        yield "norm_out.gamma", (width,)
        yield from _conv("conv_out", z, width, 3)
        yield from _conv("quant_conv", z, z, 1)

    return dict(walk())


def state_reasons(state: Mapping[str, Tensor]) -> list[str]:
    """Why the kernels cannot run this 2-D encoder or decoder; empty if they can. ``state``: see ``network``."""
    decoder = "post_quant_conv.weight" in state
    width = "conv_out.weight" if decoder else "conv_in.weight"
    if width not in state or state[width].dim() != 4:
        return [f"{width} is missing or not a 2-D convolution"]
    channels = state[width].shape[0 if decoder else 1]
    if channels not in IMAGE_CHANNELS:
        return [f"{channels} image channels; kernels exist for {IMAGE_CHANNELS}"]
    expected = decoder_shapes(channels) if decoder else encoder_shapes(channels)
    reasons = [f"{name} is missing" for name in expected if name not in state]
    reasons += [f"{name} is not part of the published topology" for name in state if name not in expected]
    for name, shape in expected.items():
        if name not in state:
            continue
        found = tuple(state[name].shape)
        if found != shape and not (name.endswith("gamma") and state[name].numel() == shape[0]):
            reasons.append(f"{name} has shape {list(found)}, kernels exist for {list(shape)}")
    if len(reasons) > 3:
        reasons[3:] = [f"and {len(reasons) - 3} more differences from the published widths {WIDTHS}"]
    return reasons


def device_reasons(
    device: torch.device, dtype: torch.dtype, capability: tuple[int, int] | None, *, float8: bool = False
) -> list[str]:
    """Why the kernels cannot run on this device; ``capability`` is the GPU's, None where there is none."""
    reasons = []
    if importlib.util.find_spec("triton") is None:
        reasons.append("triton is not installed")
    if device.type != "cuda" or capability is None:
        reasons.append(f"needs an NVIDIA GPU, not {device}")
    elif capability < MIN_CAPABILITY:
        reasons.append(f"needs compute capability >= {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}, not {capability}")
    elif float8 and capability < FLOAT8_CAPABILITY:
        found, needed = (".".join(map(str, version)) for version in (capability, FLOAT8_CAPABILITY))
        reasons.append(f"float8 needs compute capability >= {needed}, not {found}: set decode_dtype to bfloat16 or float16")
    if dtype not in DTYPES:
        reasons.append(f"computes in bfloat16 or float16, not {dtype}")
    return reasons

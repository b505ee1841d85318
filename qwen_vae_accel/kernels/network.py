"""The networks as data: every layer with its name in diffusers and its channels, and where resolutions change.

This is the only place that says what a network looks like. Weights are packed, launches listed, layers chosen for float8,
keys of the tuning made and reasons given from it. A network of other widths or other depth is another value.

    encoder    conv_in, levels, middle, conv_out, quant_conv
    decoder    post_quant_conv, conv_in, middle, levels, conv_out
    level      residual blocks and, in all but the last, a resampling; in residual networks with a shortcut around both
    middle     residual block, attention, residual block
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, NamedTuple

from qwen_vae_accel.model.topology import Topology

Shape = tuple[int, ...]


def stored_channels(channels: int) -> int:
    """Channels of an image or latent in the flat layout: its own, one of ones, and zeros up to a multiple of 16."""
    return channels // 16 * 16 + 16


class Kind(str, Enum):
    """What a layer computes; each has kernels of its own."""

    IN = "in"  # first convolution, of an image or a latent in its own layout
    CONV = "conv"  # 3x3
    PROJ = "proj"  # 1x1, behind the attention
    QKV = "qkv"  # 1x1, in front of it
    ATTENTION = "attention"
    UP = "up"  # nearest 2x upsampling, then 3x3
    DOWN = "down"  # 3x3 of stride 2
    OUT = "out"  # last convolution, to an image or a latent in its own layout

    __str__ = str.__str__


@dataclass(frozen=True, slots=True)
class ConvLayer:
    """A convolution with bias: weight ``[out_channels, in_channels, side, side]``."""

    name: str
    in_channels: int
    out_channels: int
    side: int = 3

    def parameters(self) -> Iterator[tuple[str, Shape]]:
        """Names and shapes of its weights."""
        yield f"{self.name}.weight", (self.out_channels, self.in_channels, self.side, self.side)
        yield f"{self.name}.bias", (self.out_channels,)


@dataclass(frozen=True, slots=True)
class ResidualLayer:
    """norm1, SiLU, conv1, norm2, SiLU, conv2, plus the input, through a 1x1 convolution where the widths differ."""

    name: str
    in_channels: int
    out_channels: int

    @property
    def conv1(self) -> ConvLayer:
        """``in_channels`` -> ``out_channels``."""
        return ConvLayer(f"{self.name}.conv1", self.in_channels, self.out_channels)

    @property
    def conv2(self) -> ConvLayer:
        """``out_channels`` -> ``out_channels``."""
        return ConvLayer(f"{self.name}.conv2", self.out_channels, self.out_channels)

    @property
    def shortcut(self) -> ConvLayer | None:
        """``in_channels`` -> ``out_channels``, 1x1; None where the input is added as it is."""
        if self.in_channels == self.out_channels:
            return None
        return ConvLayer(f"{self.name}.conv_shortcut", self.in_channels, self.out_channels, 1)

    def parameters(self) -> Iterator[tuple[str, Shape]]:
        """Names and shapes of its weights."""
        yield f"{self.name}.norm1.gamma", (self.in_channels,)
        yield from self.conv1.parameters()
        yield f"{self.name}.norm2.gamma", (self.out_channels,)
        yield from self.conv2.parameters()
        if self.shortcut is not None:
            yield from self.shortcut.parameters()


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """Single-head attention over all pixels of an image, plus the input; the head has ``channels``."""

    name: str
    channels: int

    @property
    def qkv(self) -> ConvLayer:
        """Queries, keys and values in one 1x1 convolution."""
        return ConvLayer(f"{self.name}.to_qkv", self.channels, 3 * self.channels, 1)

    @property
    def proj(self) -> ConvLayer:
        """The 1x1 convolution behind the attention."""
        return ConvLayer(f"{self.name}.proj", self.channels, self.channels, 1)

    def parameters(self) -> Iterator[tuple[str, Shape]]:
        """Names and shapes of its weights."""
        yield f"{self.name}.norm.gamma", (self.channels,)
        yield from self.qkv.parameters()
        yield from self.proj.parameters()


@dataclass(frozen=True, slots=True)
class LevelShortcut:
    """The shortcut without weights around a level of the residual networks (``model/shortcuts.py``).

    Averages of channels on the way down, copies on the way up. ``frames``: 2 where the video network resamples time as well.
    ``side``: pixels of a block, 1 where the level keeps its resolution.
    """

    in_channels: int
    out_channels: int
    frames: int
    side: int


@dataclass(frozen=True, slots=True)
class Level:
    """Residual blocks of one resolution, and the step to the next one."""

    blocks: tuple[ResidualLayer, ...]
    resampling: ConvLayer | None
    shortcut: LevelShortcut | None = None


class Middle(NamedTuple):
    """What lies at the latent's resolution, between the levels and the latent."""

    first: ResidualLayer
    attention: AttentionLayer
    last: ResidualLayer


class KernelLayer(NamedTuple):
    """A layer as the kernels see it: post_quant_conv and quant_conv are folded into their neighbours."""

    kind: Kind
    in_channels: int
    out_channels: int
    shortcut: int = 0  # input channels of the 1x1 shortcut that is part of it

    def __str__(self) -> str:
        name = {Kind.IN: "conv_in", Kind.OUT: "conv_out", Kind.CONV: "conv3x3", Kind.UP: "upsample", Kind.DOWN: "downsample"}
        widths = str(self.in_channels) if self.kind is Kind.ATTENTION else f"{self.in_channels}->{self.out_channels}"
        return f"{name.get(self.kind, self.kind.value)} {widths}" + (f" + shortcut of {self.shortcut}" if self.shortcut else "")


@dataclass(frozen=True, slots=True)
class Network:
    """An encoder ``[B, image_channels, H, W]`` -> ``[B, 2 * latent_channels, H / scale, W / scale]``, or a decoder
    ``[B, latent_channels, h, w]`` -> ``[B, image_channels, scale * h, scale * w]``."""

    method: str  # "encode" or "decode"
    image_channels: int
    latent_channels: int
    pointwise: ConvLayer  # quant_conv or post_quant_conv
    conv_in: ConvLayer
    levels: tuple[Level, ...]  # in the order in which they run
    middle: Middle
    conv_out: ConvLayer

    @property
    def decodes(self) -> bool:
        """Whether it is a decoder."""
        return self.method == "decode"

    @property
    def in_channels(self) -> int:
        """Channels of its input."""
        return self.latent_channels if self.decodes else self.image_channels

    @property
    def scale(self) -> int:
        """Pixels of the image per pixel of the latent and side."""
        return 2 ** sum(level.resampling is not None for level in self.levels)

    def input_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of its input for an image of ``height`` x ``width`` pixels."""
        return (height // self.scale, width // self.scale) if self.decodes else (height, width)

    def parameters(self) -> dict[str, Shape]:
        """Names and shapes of its 2-D weights, as ``model.source.image_state`` gives them."""
        return dict(self._walk())

    def _walk(self) -> Iterator[tuple[str, Shape]]:
        if self.decodes:
            yield from self.pointwise.parameters()
        yield from self.conv_in.parameters()
        if self.decodes:
            yield from self._middle()
        for level in self.levels:
            for block in level.blocks:
                yield from block.parameters()
            if level.resampling is not None:
                yield from level.resampling.parameters()
                if level.shortcut is not None and level.shortcut.frames > 1:
                    yield f"{level.resampling.name.removesuffix('.resample.1')}.time_conv", (0,)
        if not self.decodes:
            yield from self._middle()
        yield "norm_out.gamma", (self.conv_out.in_channels,)
        yield from self.conv_out.parameters()
        if not self.decodes:
            yield from self.pointwise.parameters()

    def _middle(self) -> Iterator[tuple[str, Shape]]:
        for layer in self.middle:
            yield from layer.parameters()

    def kernel_layers(self) -> Iterator[KernelLayer]:
        """Yield every layer in the order in which it runs."""
        yield KernelLayer(Kind.IN, self.conv_in.in_channels, self.conv_in.out_channels)
        if self.decodes:
            yield from self._middle_layers()
        for level in self.levels:
            for block in level.blocks:
                yield from _block_layers(block)
            if level.resampling is not None:
                kind = Kind.UP if self.decodes else Kind.DOWN
                yield KernelLayer(kind, level.resampling.in_channels, level.resampling.out_channels)
        if not self.decodes:
            yield from self._middle_layers()
        yield KernelLayer(Kind.OUT, self.conv_out.in_channels, self.conv_out.out_channels)

    def _middle_layers(self) -> Iterator[KernelLayer]:
        attention = self.middle.attention
        yield from _block_layers(self.middle.first)
        yield KernelLayer(Kind.QKV, attention.channels, 3 * attention.channels)
        yield KernelLayer(Kind.ATTENTION, attention.channels, attention.channels)
        yield KernelLayer(Kind.PROJ, attention.channels, attention.channels)
        yield from _block_layers(self.middle.last)


def _block_layers(block: ResidualLayer) -> Iterator[KernelLayer]:
    yield KernelLayer(Kind.CONV, block.in_channels, block.out_channels)
    shortcut = 0 if block.shortcut is None else block.in_channels
    yield KernelLayer(Kind.CONV, block.out_channels, block.out_channels, shortcut)


def describe(topology: Topology, method: str, temporal: Sequence[bool] | None = None) -> Network:
    """Describe the encoder or decoder of a VAE.

    Args:
        topology: what the VAE's weights say.
        method: ``"encode"`` or ``"decode"``.
        temporal: of every resampling in the encoder's order, whether the video network resamples time there as well; it
            matters to the shortcuts of residual networks alone. Default: as published, all but the first.

    Raises:
        ValueError: the residual blocks do not spread evenly over the resolutions.
    """
    decodes = method == "decode"
    widths = topology.decoder_widths if decodes else topology.encoder_widths
    steps = topology.scale.bit_length() - 1
    count, rest = divmod(len(widths) - 3, steps + 1)
    if rest or count < 1:
        raise ValueError(f"{len(widths) - 1} residual blocks, two of them in the middle, over {steps + 1} resolutions")
    if temporal is None:
        temporal = [index > 0 for index in range(steps)]
    if decodes:
        first, middle, rest_of = widths[0], widths[1:3], widths[3:]
        temporal = temporal[::-1]
    else:
        first, rest_of, middle = widths[0], widths[1:-2], widths[-2:]
    channels = middle[-1] if decodes else first
    levels = []
    for level in range(steps + 1):
        outs = rest_of[level * count : (level + 1) * count]
        last = level == steps
        levels.append(_level(topology, decodes, level, channels, outs, None if last else temporal[level]))
        resampling = levels[-1].resampling
        channels = outs[-1] if resampling is None else resampling.out_channels
    before = first if decodes else channels
    attention = AttentionLayer("mid_block.attentions.0", middle[0])
    around = Middle(
        ResidualLayer("mid_block.resnets.0", before, middle[0]), attention,
        ResidualLayer("mid_block.resnets.1", middle[0], middle[1]),
    )  # fmt: skip
    latent, image = topology.z_dim, topology.image_channels
    if decodes:
        pointwise = ConvLayer("post_quant_conv", latent, latent, 1)
        conv_in, conv_out = ConvLayer("conv_in", latent, first), ConvLayer("conv_out", channels, image)
    else:
        pointwise = ConvLayer("quant_conv", 2 * latent, 2 * latent, 1)
        conv_in, conv_out = ConvLayer("conv_in", image, first), ConvLayer("conv_out", middle[1], 2 * latent)
    return Network(method, image, latent, pointwise, conv_in, tuple(levels), around, conv_out)


def _level(
    topology: Topology, decodes: bool, level: int, channels: int, outs: Sequence[int], temporal: bool | None
) -> Level:  # fmt: skip
    """``temporal``: of the resampling behind the blocks, None where there is none."""
    residual, count = topology.residual, len(outs)
    if decodes:
        names = [f"up_blocks.{level}.resnets.{i}" for i in range(count)]
        name = f"up_blocks.{level}.upsampler.resample.1" if residual else f"up_blocks.{level}.upsamplers.0.resample.1"
        out = outs[-1] if residual else outs[-1] // 2
    elif residual:
        names = [f"down_blocks.{level}.resnets.{i}" for i in range(count)]
        name, out = f"down_blocks.{level}.downsampler.resample.1", outs[-1]
    else:  # here every block and every resampling is a down_block
        start = level * (count + 1)
        names = [f"down_blocks.{start + i}" for i in range(count)]
        name, out = f"down_blocks.{start + count}.resample.1", outs[-1]
    ins = (channels, *outs[:-1])
    blocks = tuple(ResidualLayer(*layer) for layer in zip(names, ins, outs, strict=True))
    resampling = None if temporal is None else ConvLayer(name, outs[-1], out)
    shortcut = None
    if residual and not (decodes and resampling is None):
        shortcut = LevelShortcut(channels, out, 2 if temporal else 1, 1 if resampling is None else 2)
    return Level(blocks, resampling, shortcut)


def _widths(levels: Sequence[int], blocks: int) -> tuple[int, ...]:
    return tuple(width for width in levels for _ in range(blocks))


# What is published: Qwen-Image (and Wan 2.1, Qwen-Image-Layered with four image channels), and Qwen-Image 2.1.
QWEN_IMAGE = Topology(
    image_channels=3, z_dim=16, scale=8,
    encoder_widths=(96, *_widths((96, 192, 384, 384), 2), 384, 384),
    decoder_widths=(384, 384, 384, *_widths((384, 384, 192, 96), 3)),
)  # fmt: skip
QWEN_IMAGE_21 = Topology(
    image_channels=4, z_dim=64, scale=16, residual=True,
    encoder_widths=(96, *_widths((96, 192, 384, 768, 768), 2), 768, 768),
    decoder_widths=(1152, 1152, 1152, *_widths((1152, 1152, 576, 288, 144), 3)),
)  # fmt: skip

PUBLISHED = {"qwen-image": QWEN_IMAGE, "qwen-image-2.1": QWEN_IMAGE_21}  # as commands name them


def published(method: str, image_channels: int = 3) -> Network:
    """Describe Qwen-Image's network of ``method``, for images of 3 or 4 channels."""
    return describe(replace(QWEN_IMAGE, image_channels=image_channels), method)


def network_of(state: Mapping[str, Any]) -> Network:
    """Find the published network that 2-D weights look like by their names; their shapes are not checked.

    Args:
        state: weights in diffusers' names without ``encoder.`` or ``decoder.``.

    Raises:
        ValueError: its first or last convolution is not there, or is not 2-D.
    """
    decodes = "post_quant_conv.weight" in state
    name = "conv_out.weight" if decodes else "conv_in.weight"
    if name not in state or state[name].dim() != 4:
        raise ValueError(f"{name} is missing or not a 2-D convolution")
    residual = any(".upsampler." in key or ".downsampler." in key for key in state)
    topology = QWEN_IMAGE_21 if residual else QWEN_IMAGE
    channels = state[name].shape[0 if decodes else 1]
    return describe(replace(topology, image_channels=channels), "decode" if decodes else "encode")

"""The whole decoder and encoder of the published topology as a fixed order of kernels.

Between kernels two flat matrices travel (layout.py): ``x``, what residuals and resampling read, and ``normed``, which is
silu(rms_norm(x)) for the next convolution, written by whichever kernel produced x. A residual block is two kernels:

    conv1: normed -> hidden = silu(norm2(.))        conv2: hidden + residual x -> x in place, normed in place

With float8 (float8.py) ``normed``, ``hidden`` and the x that an upsampling reads are e4m3 where their convolution is.

Liveness: x, normed and hidden of one level, three matrices, are the peak (0.60 GB at 1024x1024); an upsample holds the
small x and the large x and normed. The last block writes neither, only conv_out's products over the dead ``normed``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qwen_vae_accel.kernels.float8 import FLOAT8
from qwen_vae_accel.kernels.layout import Grid
from qwen_vae_accel.kernels.memory import Arena, Memory, Program, Slot, Step
from qwen_vae_accel.kernels.overlap import Matrix, Overlap, link
from qwen_vae_accel.kernels.triton import attention as att
from qwen_vae_accel.kernels.triton.conv3x3 import Norm, conv
from qwen_vae_accel.kernels.triton.conv_in import conv_in
from qwen_vae_accel.kernels.triton.conv_out import conv_out, head_products, sum_taps
from qwen_vae_accel.kernels.triton.downsample_conv import downsample_conv
from qwen_vae_accel.kernels.triton.upsample_conv import upsample_conv
from qwen_vae_accel.kernels.tuning.selection import ATTENTION_KEY, Device, Key, Tuning, conv_key, schedule_key
from qwen_vae_accel.kernels.weights import ConvWeights, Packer, SmallConvWeights

if TYPE_CHECKING:
    from qwen_vae_accel.kernels.sm90.conv3x3 import Conv3x3
    from qwen_vae_accel.kernels.sm90.layers import HopperConvs


@dataclass(frozen=True, slots=True)
class ResidualBlock:
    norm1: Norm
    conv1: ConvWeights
    norm2: Norm
    conv2: ConvWeights  # with the shortcut, where there is one


@dataclass(frozen=True, slots=True)
class Attention:
    norm: Norm
    qkv: ConvWeights
    proj: ConvWeights


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    conv_in: SmallConvWeights
    middle: tuple[ResidualBlock, Attention, ResidualBlock]
    levels: tuple[tuple[tuple[ResidualBlock, ...], ConvWeights | None], ...]
    norm_out: Norm
    head: Tensor
    head_bias: Tensor


@dataclass(frozen=True, slots=True)
class EncoderWeights:
    conv_in: SmallConvWeights
    levels: tuple[tuple[tuple[ResidualBlock, ...], ConvWeights | None], ...]
    middle: tuple[ResidualBlock, Attention, ResidualBlock]
    norm_out: Norm
    conv_out: ConvWeights


def _block(pack: Packer, name: str) -> ResidualBlock:
    shortcut = f"{name}.conv_shortcut"
    return ResidualBlock(
        Norm(pack.gamma(f"{name}.norm1"), scale=pack.float8.get(f"{name}.conv1")),
        pack.conv(f"{name}.conv1"),
        Norm(pack.gamma(f"{name}.norm2"), scale=pack.float8.get(f"{name}.conv2")),
        pack.conv(f"{name}.conv2", shortcut if f"{shortcut}.weight" in pack.state else None),
    )


def _middle(pack: Packer) -> tuple[ResidualBlock, Attention, ResidualBlock]:
    name = "mid_block.attentions.0"
    attention = Attention(Norm(pack.gamma(f"{name}.norm"), silu=False), pack.conv(f"{name}.to_qkv"), pack.conv(f"{name}.proj"))
    return _block(pack, "mid_block.resnets.0"), attention, _block(pack, "mid_block.resnets.1")


def pack_decoder(pack: Packer) -> DecoderWeights:
    levels = []
    for level in range(4):
        blocks = tuple(_block(pack, f"up_blocks.{level}.resnets.{i}") for i in range(3))
        levels.append((blocks, pack.upsample(f"up_blocks.{level}.upsamplers.0.resample.1") if level < 3 else None))
    head, head_bias = pack.head("conv_out")
    return DecoderWeights(
        pack.conv_after_pointwise("conv_in", "post_quant_conv"),
        _middle(pack), tuple(levels), Norm(pack.gamma("norm_out")), head, head_bias,
    )  # fmt: skip


def pack_encoder(pack: Packer) -> EncoderWeights:
    levels = []
    for level in range(4):
        blocks = tuple(_block(pack, f"down_blocks.{3 * level + i}") for i in range(2))
        levels.append((blocks, pack.conv(f"down_blocks.{3 * level + 2}.resample.1") if level < 3 else None))
    return EncoderWeights(
        pack.conv_after_pointwise("conv_in", None), tuple(levels), _middle(pack), Norm(pack.gamma("norm_out")),
        pack.conv_before_pointwise("conv_out", "quant_conv"),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Level:
    """The two matrices between kernels; either may be absent once nothing reads it."""

    grid: Grid
    x: Slot | None
    normed: Slot | None


def _widths(weights: ConvWeights) -> str:
    kind = " float8" if weights.weight.dtype == FLOAT8 else ""
    return f"{weights.in_channels}->{weights.out_channels}{kind}"


@dataclass(frozen=True, slots=True)
class Tuned:
    """What decides the configuration of a step: the key of ``Tuning``, and the grid that tiles divide."""

    key: Key
    grid: Grid


class Planner:
    """Lists the launches of one input size and plans their buffers. ``tuned`` says what each step is tuned by, if at all."""

    def __init__(self, dtype: torch.dtype, device: Device, tuning: Tuning, hopper: HopperConvs | None = None):
        self.dtype, self.device, self.tuning, self.hopper = dtype, device, tuning, hopper
        self.arena = Arena()
        self.steps: list[Step] = []
        self.tuned: list[Tuned | None] = []
        self.overlaps: list[Overlap | None] = []

    def program(self, output_shape: tuple[int, ...]) -> Program:
        offsets, scratch_bytes = self.arena.place()
        return Program(tuple(self.steps), offsets, scratch_bytes, output_shape).counting(link(self.overlaps, offsets))

    def add(
        self, kernel: str, grid: Grid, flops: int, launch: Callable[[Memory], None], tuned: Tuned | None = None,
        overlap: Overlap | None = None,
    ) -> None:  # fmt: skip
        self.tuned.append(tuned)
        self.overlaps.append(overlap)
        self.arena.step()
        self.steps.append(Step(kernel, f"{grid.batch}x{grid.height}x{grid.width}", flops, launch))

    def layer(self, weights: ConvWeights, kind: str) -> Conv3x3 | None:
        return None if self.hopper is None else self.hopper.layer(weights, kind)

    def convolution(
        self, kind: str, weights: ConvWeights | SmallConvWeights, grid: Grid, epilogue: str = "", layer: Conv3x3 | None = None
    ) -> Tuned:
        if layer is None or isinstance(weights, SmallConvWeights):
            return Tuned(conv_key(kind, weights, epilogue), grid)
        return Tuned(schedule_key(kind, weights), grid)

    def take(self, grid: Grid, channels: int, scale: float | None = None) -> Slot:
        """A flat matrix; with the scale of a float8 input, in float8."""
        return self.arena.take(grid.rows, channels, self.dtype if scale is None else FLOAT8)

    def conv(
        self, level: Level, a: Slot | None, weights: ConvWeights, *, x: Slot | None = None, normed: Slot | None = None,
        norm: Norm | None = None, residual: Slot | None = None, shortcut: Slot | None = None,
        head: Tensor | None = None, products: Slot | None = None, x_scale: float | None = None,
    ) -> None:  # fmt: skip
        grid, device = level.grid, self.device
        present = {"residual": residual, "shortcut": shortcut, "x": x, "norm": norm, "head": products}
        epilogue = " ".join(name for name, value in present.items() if value is not None)
        kind = "conv" if weights.taps == 9 else "proj"
        config = self.tuning.conv(kind, weights, grid, device, epilogue)
        layer = self.layer(weights, kind) if head is None else None
        overlap = None if layer is None else self.overlap(layer, grid, grid, a, (residual, shortcut), (x, normed))
        flops = weights.flops(grid.pixels)
        if head is not None and products is not None:
            flops += 2 * grid.pixels * head.shape[0] * products.rows

        def launch(m: Memory) -> None:
            if overlap is not None:
                overlap.layer(
                    m[a], grid, x=m.get(x), normed=m.get(normed), gamma=None if norm is None else norm.gamma,
                    silu=norm is None or norm.silu, residual=m.get(residual), shortcut=m.get(shortcut),
                    x_scale=x_scale, n_scale=None if norm is None else norm.scale, **overlap.arguments(m),
                )  # fmt: skip
                return
            conv(
                m[a], grid, weights, config=config, device=device, x=m.get(x), normed=m.get(normed), norm=norm,
                residual=m.get(residual), shortcut=m.get(shortcut), head=head, products=m.get(products), x_scale=x_scale,
            )  # fmt: skip

        side = 3 if weights.taps == 9 else 1
        name = f"conv{side}x{side} {_widths(weights)} {epilogue}"
        self.add(name, grid, flops, launch, self.convolution(kind, weights, grid, epilogue, layer), overlap)

    def overlap(
        self, layer: Conv3x3, grid: Grid, after: Grid, a: Slot | None, others: Iterable[Slot | None],
        outputs: Iterable[Slot | None],
    ) -> Overlap:  # fmt: skip
        """Of a convolution of ``a`` and ``others`` on ``grid`` to ``outputs`` on ``after``."""
        if a is None:
            raise ValueError("the plan reads a matrix that nothing wrote")

        def on(grid: Grid, slots: Iterable[Slot | None]) -> tuple[Matrix, ...]:
            return tuple(Matrix(slot, grid) for slot in slots if slot is not None)

        return Overlap(layer, Matrix(a, grid), on(grid, others), on(after, outputs))

    def conv_in(self, weights: SmallConvWeights, grid: Grid, norm: Norm) -> Level:
        out = weights.out_channels
        x, normed = self.take(grid, out), self.take(grid, out, norm.scale)
        device = self.device
        config = self.tuning.conv("in", weights, grid, device, "")

        def launch(m: Memory) -> None:
            conv_in(m.image, weights, x=m[x], normed=m[normed], norm=norm, config=config, device=device)

        flops = 2 * grid.pixels * out * 9 * weights.in_channels
        self.add(f"conv_in {weights.in_channels}->{out}", grid, flops, launch, self.convolution("in", weights, grid))
        return Level(grid, x, normed)

    def residual_block(
        self, level: Level, block: ResidualBlock, norm: Norm | None, *, keep_x: bool = True, x_scale: float | None = None
    ) -> Level:
        """``norm`` is the one after the block; without it no normed matrix is written. With ``x_scale``, x is float8."""
        out = block.conv1.out_channels
        hidden = self.take(level.grid, out, block.norm2.scale)
        self.conv(level, level.normed, block.conv1, normed=hidden, norm=block.norm2)
        same_width = block.conv2.shortcut == 0
        in_place = same_width and x_scale is None
        x = (level.x if in_place else self.take(level.grid, out, x_scale)) if keep_x else None
        normed = None
        if same_width and norm is not None and level.normed is not None and level.normed.dtype == norm.dtype(self.dtype):
            normed = level.normed
        else:
            self.arena.give(level.normed)
            normed = None if norm is None else self.take(level.grid, out, norm.scale)
        self.conv(
            level, hidden, block.conv2, x=x, norm=norm, normed=normed, x_scale=x_scale,
            residual=level.x if same_width else None, shortcut=None if same_width else level.x,
        )  # fmt: skip
        self.arena.give(hidden)
        if x is not level.x:
            self.arena.give(level.x)
        return replace(level, x=x, normed=normed)

    def last_block(self, level: Level, block: ResidualBlock, norm: Norm, head: Tensor, count: int) -> Slot:
        """The decoder's last block, norm_out and the products of conv_out: ``[count, rows]`` fp32."""
        if self.layer(block.conv2, "conv") is not None:
            level = self.residual_block(level, block, norm, keep_x=False)
            products, device = self.arena.take(count, level.grid.rows, torch.float32), self.device
            self.add(
                f"head {head.shape[0]}->{count}", level.grid, 2 * level.grid.pixels * head.shape[0] * count,
                lambda m: head_products(m[level.normed], head, m[products], device=device),
            )  # fmt: skip
            self.arena.give(level.normed)
            return products
        hidden = self.take(level.grid, block.conv1.out_channels, block.norm2.scale)
        self.conv(level, level.normed, block.conv1, normed=hidden, norm=block.norm2)
        self.arena.give(level.normed)
        products = self.arena.take(count, level.grid.rows, torch.float32)
        self.conv(level, hidden, block.conv2, norm=norm, residual=level.x, head=head, products=products)
        self.arena.give(hidden)
        self.arena.give(level.x)
        return products

    def attention(self, level: Level, block: Attention, norm: Norm) -> Level:
        """``level.normed`` holds the attention's own norm of x; afterwards ``norm`` of the sum."""
        grid, device, tuning = level.grid, self.device, self.tuning
        channels = block.proj.in_channels
        tokens = self.arena.take(grid.pixels, 3 * channels, self.dtype)
        qkv_config = tuning.conv("qkv", block.qkv, grid, device, "")
        config = tuning.attention_on(device)
        count = grid.height * grid.width
        splits = tuning.attention_splits(grid, device)
        partial = tops = None
        if splits > 1:
            partial = self.arena.take(splits * grid.pixels, channels, torch.float32)
            tops = self.arena.take(splits * grid.pixels, 1, torch.float32)

        def launch_qkv(m: Memory) -> None:
            att.qkv(m[level.normed], grid, block.qkv, m[tokens], config=qkv_config, device=device)

        def launch_attention(m: Memory) -> None:
            att.attention(
                m[tokens], grid, m[level.normed], config=config, device=device, splits=splits,
                partial=m.get(partial), tops=m.get(tops),
            )  # fmt: skip

        tuned = self.convolution("qkv", block.qkv, grid)
        self.add(f"qkv {channels}->{3 * channels}", grid, block.qkv.flops(grid.pixels), launch_qkv, tuned)
        flops = 4 * grid.batch * count * count * channels
        self.add(f"attention {channels}", grid, flops, launch_attention, Tuned(ATTENTION_KEY, grid))
        self.arena.give(tokens, partial, tops)
        normed = self.take(grid, channels)
        self.conv(level, level.normed, block.proj, x=level.x, normed=normed, norm=norm, residual=level.x)
        self.arena.give(level.normed)
        return replace(level, normed=normed)

    def resample(self, level: Level, weights: ConvWeights, norm: Norm, kind: str) -> Level:
        grid, device = level.grid, self.device
        large = grid.doubled() if kind == "up" else grid.halved()
        x, normed = self.take(large, weights.out_channels), self.take(large, weights.out_channels, norm.scale)
        tiled = grid if kind == "up" else large
        config = self.tuning.conv(kind, weights, tiled, device, "")
        function = upsample_conv if kind == "up" else downsample_conv
        layer = self.layer(weights, kind)
        overlap = None if layer is None else self.overlap(layer, grid, large, level.x, (), (x, normed))

        def launch(m: Memory) -> None:
            if overlap is not None:
                overlap.layer(
                    m[level.x], grid, x=m[x], normed=m[normed], gamma=norm.gamma, silu=norm.silu, n_scale=norm.scale,
                    **overlap.arguments(m),
                )  # fmt: skip
                return
            function(
                m[level.x], grid, weights, x=m[x], normed=m[normed], norm=norm, config=config, device=device
            )  # fmt: skip

        pixels = grid.pixels if kind == "up" else large.pixels
        name = f"{kind}sample {_widths(weights)}"
        self.add(name, large, weights.flops(pixels), launch, self.convolution(kind, weights, tiled, layer=layer), overlap)
        self.arena.give(level.x)
        return Level(large, x, normed)

    def middle(self, level: Level, blocks: tuple, norm: Norm, *, keep_x: bool) -> Level:
        first, attention, last = blocks
        level = self.residual_block(level, first, attention.norm)
        level = self.attention(level, attention, last.norm1)
        return self.residual_block(level, last, norm, keep_x=keep_x)


def plan_decoder(weights: DecoderWeights, latent: tuple[int, ...], planner: Planner) -> Program:
    batch, _, height, width = latent
    level = planner.conv_in(weights.conv_in, Grid(batch, height, width), weights.middle[0].norm1)
    level = planner.middle(level, weights.middle, weights.levels[0][0][0].norm1, keep_x=True)
    channels = weights.head_bias.numel()
    for index, (blocks, up) in enumerate(weights.levels):
        for block, following in zip(blocks[:-1], blocks[1:], strict=True):
            level = planner.residual_block(level, block, following.norm1)
        if up is not None:
            level = planner.residual_block(level, blocks[-1], None, x_scale=up.input_scale)
            level = planner.resample(level, up, weights.levels[index + 1][0][0].norm1, "up")
        else:
            products = planner.last_block(level, blocks[-1], weights.norm_out, weights.head, 9 * channels)
    grid, bias = level.grid, weights.head_bias
    planner.add(
        f"conv_out sum {channels}", grid, 9 * channels * grid.pixels,
        lambda m: sum_taps(m[products], bias, grid, m.output),
    )  # fmt: skip
    return planner.program((batch, channels, grid.height, grid.width))


def plan_encoder(weights: EncoderWeights, image: tuple[int, ...], planner: Planner) -> Program:
    batch, _, height, width = image
    level = planner.conv_in(weights.conv_in, Grid(batch, height, width), weights.levels[0][0][0].norm1)
    for index, (blocks, down) in enumerate(weights.levels):
        for block, following in zip(blocks[:-1], blocks[1:], strict=True):
            level = planner.residual_block(level, block, following.norm1)
        if down is not None:
            level = planner.residual_block(level, blocks[-1], None)
            level = planner.resample(level, down, weights.levels[index + 1][0][0].norm1, "down")
        else:
            level = planner.residual_block(level, blocks[-1], weights.middle[0].norm1)
    level = planner.middle(level, weights.middle, weights.norm_out, keep_x=False)
    normed, grid, out, device = level.normed, level.grid, weights.conv_out, planner.device
    planner.add(
        f"conv_out {out.in_channels}->{out.out_channels}", grid, out.flops(grid.pixels),
        lambda m: conv_out(m[normed], grid, out, m.output, device=device),
    )  # fmt: skip
    return planner.program((batch, out.out_channels, grid.height, grid.width))

"""The order of kernels of a decoder and an encoder, for one input shape.

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

from qwen_vae_accel.kernels.compiling import listed
from qwen_vae_accel.kernels.float8 import FLOAT8
from qwen_vae_accel.kernels.gpu import Gpu
from qwen_vae_accel.kernels.launches import LaunchList, Step
from qwen_vae_accel.kernels.layout import Grid
from qwen_vae_accel.kernels.memory import Arena, Memory, Slot
from qwen_vae_accel.kernels.network import Kind
from qwen_vae_accel.kernels.overlap import Matrix, Overlap, link
from qwen_vae_accel.kernels.triton.attention import attention, qkv
from qwen_vae_accel.kernels.triton.conv3x3 import conv
from qwen_vae_accel.kernels.triton.conv_in import conv_in
from qwen_vae_accel.kernels.triton.conv_out import head_products, sum_taps
from qwen_vae_accel.kernels.triton.downsample_conv import downsample_conv
from qwen_vae_accel.kernels.triton.flatten import flatten
from qwen_vae_accel.kernels.triton.pool import pool
from qwen_vae_accel.kernels.triton.upsample_conv import upsample_conv
from qwen_vae_accel.kernels.triton.wide_attention import TILE, chunk_of, tiles_of, wide_attention
from qwen_vae_accel.kernels.tuning.keys import KernelKey
from qwen_vae_accel.kernels.tuning.selection import Tuning
from qwen_vae_accel.kernels.weights import (
    AttentionWeights,
    ConvWeights,
    Norm,
    ResidualWeights,
    SmallConvWeights,
)

if TYPE_CHECKING:
    from qwen_vae_accel.kernels.sm90.conv3x3 import Conv3x3
    from qwen_vae_accel.kernels.sm90.layers import Sm90Layers
    from qwen_vae_accel.share import Share


@dataclass(frozen=True, slots=True)
class Activations:
    """The two matrices between kernels; either may be absent once nothing reads it."""

    grid: Grid
    x: Slot | None
    normed: Slot | None


def _unlisted(launch: Callable[[Memory], None]) -> Callable[[Memory], None]:
    """Not made where launches are collected to be compiled."""
    return lambda m: None if listed() is not None else launch(m)


def _widths(weights: ConvWeights) -> str:
    kind = " float8" if weights.weight.dtype == FLOAT8 else ""
    return f"{weights.in_channels}->{weights.out_channels}{kind}"


class LaunchBuilder:
    """Lists the launches for one input shape and places their matrices: a method for each part of a network.

    Args:
        dtype: of what is not float8: bfloat16 or float16.
        gpu: decides tiles and splits, with ``tuning``.
        sm90: makes the convolutions of ``sm90/``; None for Triton's everywhere.
        share: of several processes that compute one image; None for all of it.
    """

    def __init__(
        self, dtype: torch.dtype, gpu: Gpu, tuning: Tuning, sm90: Sm90Layers | None = None, share: Share | None = None
    ) -> None:
        self.dtype, self.gpu, self.tuning, self.sm90, self.share = dtype, gpu, tuning, sm90, share
        self.arena = Arena()
        self.steps: list[Step] = []
        self.overlaps: list[Overlap | None] = []
        self.exchanged: list[int] = []

    def launches(self, output_shape: tuple[int, ...]) -> LaunchList:
        """Return what was listed, with a place for every matrix; ``output_shape`` is ``[B, C, H, W]``."""
        offsets, scratch_bytes = self.arena.place()
        found = LaunchList(tuple(self.steps), offsets, scratch_bytes, output_shape, exchanged=tuple(self.exchanged))
        return found.counting(link(self.overlaps, offsets))

    def add(
        self, kernel: str, grid: Grid, flops: int, launch: Callable[[Memory], None], key: KernelKey | None = None,
        tiled: Grid | None = None, overlap: Overlap | None = None,
    ) -> None:  # fmt: skip
        """List a launch that writes the pixels of ``grid``; the other arguments are those of :class:`Step`."""
        self.overlaps.append(overlap)
        self.arena.step()
        self.steps.append(Step(kernel, f"{grid.batch}x{grid.height}x{grid.width}", flops, launch, key, tiled))

    def layer(self, weights: ConvWeights, kind: Kind) -> Conv3x3 | None:
        """The layer of ``sm90/``, or None where the Triton kernel runs."""
        return None if self.sm90 is None else self.sm90.layer(weights, kind)

    def mine(self, rows: int) -> range:
        """The rows that this process computes."""
        return range(rows) if self.share is None else self.share.rows(rows)

    def exchange(self, grid: Grid, *slots: Slot | None) -> None:
        """List the exchange of rows of flat matrices between the processes of an image."""
        share = self.share
        if share is None:
            return

        def launch(m: Memory) -> None:
            for slot in slots:
                for image in range(grid.batch if slot is not None else 0):
                    lines = m[slot][(image * (grid.height + 1) + 1) * grid.pitch :].view(-1, grid.pitch, m[slot].shape[1])
                    share.exchange(grid.height, lines)

        self.exchanged.append(sum(slot.nbytes for slot in slots if slot is not None))
        self.add("exchange", grid, 0, _unlisted(launch))

    def exchange_image(self, grid: Grid, channels: int) -> None:
        """List the exchange of rows of the output, ``channels`` of the pixels of ``grid``."""
        share = self.share
        if share is not None:
            self.exchanged.append(grid.pixels * channels * self.dtype.itemsize)
            self.add("exchange", grid, 0, _unlisted(lambda m: share.exchange_image(m.output)))

    def take(self, grid: Grid, channels: int, scale: float | None = None) -> Slot:
        """Take a flat matrix ``[grid.rows, channels]``, in float8 if it has the ``scale`` of a float8 input."""
        return self.arena.take(grid.rows, channels, self.dtype if scale is None else FLOAT8)

    def conv(
        self, level: Activations, a: Slot | None, weights: ConvWeights, *, x: Slot | None = None, normed: Slot | None = None,
        norm: Norm | None = None, residual: Slot | None = None, shortcut: Slot | None = None,
        head: Tensor | None = None, products: Slot | None = None, x_scale: float | None = None,
    ) -> None:  # fmt: skip
        """List a 3x3 or 1x1 convolution of ``a`` over the grid of ``level``.

        Args:
            x, normed: what it writes; with ``normed`` goes ``norm``.
            residual: what is added to its sum, ``[rows, N]``; may be ``x``.
            shortcut: input of the 1x1 shortcut that is part of ``weights``.
            head, products: a decoder's last convolution as ``[N, J]``, and its products, fp32.
            x_scale: ``x`` is float8, times this.
        """
        grid, gpu = level.grid, self.gpu
        present = {"residual": residual, "shortcut": shortcut, "x": x, "norm": norm, "head": products}
        epilogue = " ".join(name for name, value in present.items() if value is not None)
        kind = Kind.CONV if weights.taps == 9 else Kind.PROJ
        config = self.tuning.conv(KernelKey.of(kind, weights, epilogue), grid, gpu)
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
                m[a], grid, weights, config=config, gpu=gpu, x=m.get(x), normed=m.get(normed), norm=norm,
                residual=m.get(residual), shortcut=m.get(shortcut), head=head, products=m.get(products), x_scale=x_scale,
            )  # fmt: skip

        side = 3 if weights.taps == 9 else 1
        name = f"conv{side}x{side} {_widths(weights)} {epilogue}"
        key = KernelKey.of(kind, weights, epilogue, sm90=layer is not None)
        self.add(name, grid, flops, launch, key, grid, overlap)

    def overlap(
        self, layer: Conv3x3, grid: Grid, after: Grid, a: Slot | None, others: Iterable[Slot | None],
        outputs: Iterable[Slot | None], beside: Grid | None = None,
    ) -> Overlap:  # fmt: skip
        """Describe what a convolution reads, ``a`` on ``grid`` and ``others`` there or on ``beside``, and what it writes:
        ``outputs`` on ``after``."""
        if a is None:
            raise ValueError("a launch reads a matrix that nothing wrote")

        def on(grid: Grid, slots: Iterable[Slot | None]) -> tuple[Matrix, ...]:
            return tuple(Matrix(slot, grid) for slot in slots if slot is not None)

        return Overlap(layer, Matrix(a, grid), on(beside or grid, others), on(after, outputs))

    @property
    def flops(self) -> int:
        """Operations of what is listed so far."""
        return sum(step.flops for step in self.steps)

    def sum_taps(self, products: Slot, bias: Tensor, grid: Grid, image: int | None, rows: range, start: int) -> None:
        """List the end of conv_out: ``rows`` of one image, or of all, from the products of the pixels of ``grid``.

        ``start``: the row of the image with which ``grid`` begins.
        """
        batch, channels = 1 if image is not None else grid.batch, bias.numel()

        def launch(m: Memory) -> None:
            output = m.output if image is None else m.output[image : image + 1, :, rows.start : rows.stop]
            sum_taps(m[products], bias, grid, output, first=rows.start - start)

        part = Grid(batch, len(rows), grid.width)
        self.add(f"conv_out sum {channels}", part, 9 * channels * part.pixels, launch)
        self.arena.give(products)

    def copy_rows(self, level: Activations, rows: range, whole: Activations, image: int, first: int) -> None:
        """List the copy of ``rows`` of a band to one image of ``whole``, from its row ``first`` on, with the zeros around."""
        pairs = [(level.x, whole.x), (level.normed, whole.normed)]
        large = whole.grid
        onto = range(first, first + len(rows))

        def launch(m: Memory) -> None:
            for part, all_of_it in pairs:
                assert part is not None and all_of_it is not None
                matrix, lines = m[all_of_it], (large.height + 1) * large.pitch
                at = image * lines + (first + 1) * large.pitch
                source = m[part][(rows.start + 1) * large.pitch : (rows.stop + 1) * large.pitch]
                matrix[at : at + len(rows) * large.pitch].copy_(source)
                if first == 0:
                    matrix[image * lines : image * lines + large.pitch].zero_()
                if onto.stop == large.height:
                    end = at + len(rows) * large.pitch
                    matrix[end : end + large.pitch].zero_()

        self.add("copy rows", Grid(1, len(rows), large.width), 0, launch)

    def conv_in(
        self, weights: SmallConvWeights | ConvWeights, grid: Grid, norm: Norm, part: tuple[int, range] | None = None
    ) -> Activations:
        """List the first convolution, of the input image or latent; ``norm`` is the first one behind it.

        ``part``: an image of the batch and the rows of it that ``grid`` is of; None: all.
        """
        out = weights.out_channels
        x, normed = self.take(grid, out), self.take(grid, out, norm.scale)
        gpu = self.gpu
        if isinstance(weights, ConvWeights):
            flat = self.take(grid, weights.in_channels)
            self.add(f"flatten {weights.in_channels}", grid, 0, lambda m: flatten(m.image, m[flat]))
            self.conv(Activations(grid, None, flat), flat, weights, x=x, normed=normed, norm=norm)
            self.arena.give(flat)
            return Activations(grid, x, normed)
        key = KernelKey.of(Kind.IN, weights)
        config = self.tuning.conv(key, grid, gpu)

        def launch(m: Memory) -> None:
            image = m.image if part is None else m.image[part[0] : part[0] + 1, :, part[1].start : part[1].stop]
            conv_in(image, weights, x=m[x], normed=m[normed], norm=norm, config=config, gpu=gpu)

        flops = 2 * grid.pixels * out * 9 * weights.in_channels
        self.add(f"conv_in {weights.in_channels}->{out}", grid, flops, launch, key, grid)
        return Activations(grid, x, normed)

    def residual_block(
        self,
        level: Activations,
        block: ResidualWeights,
        norm: Norm | None,
        *,
        keep_x: bool = True,
        keep_input: bool = False,
        adds: Slot | None = None,
        x_scale: float | None = None,
    ) -> Activations:
        """List a residual block as two convolutions.

        Args:
            norm: the one behind the block; without it no normed matrix is written.
            keep_x: whether anything will read the sum itself.
            keep_input: whether anything will read what the block was given; it is the caller's to give back.
            adds: what is added to the sum beside the block's input, through the identity in ``block.conv2``.
            x_scale: x is float8, times this.
        """
        out = block.conv1.out_channels
        hidden = self.take(level.grid, out, block.norm2.scale)
        self.conv(level, level.normed, block.conv1, normed=hidden, norm=block.norm2)
        same_width = block.conv1.in_channels == out
        in_place = same_width and x_scale is None and not keep_input
        x = (level.x if in_place else self.take(level.grid, out, x_scale)) if keep_x else None
        normed = None
        if same_width and norm is not None and level.normed is not None and level.normed.dtype == norm.dtype(self.dtype):
            normed = level.normed
        else:
            self.arena.give(level.normed)
            normed = None if norm is None else self.take(level.grid, out, norm.scale)
        self.conv(
            level, hidden, block.conv2, x=x, norm=norm, normed=normed, x_scale=x_scale,
            residual=level.x if same_width else None, shortcut=adds if same_width else level.x,
        )  # fmt: skip
        self.arena.give(hidden)
        if x is not level.x and not keep_input:
            self.arena.give(level.x)
        return replace(level, x=x, normed=normed)

    def last_block(self, level: Activations, block: ResidualWeights, norm: Norm, head: Tensor, count: int) -> Slot:
        """List a decoder's last block with norm_out; returns the products of conv_out, ``[count, rows]`` fp32."""
        if self.layer(block.conv2, Kind.CONV) is not None:
            level = self.residual_block(level, block, norm, keep_x=False)
            products, gpu = self.arena.take(count, level.grid.rows, torch.float32), self.gpu
            self.add(
                f"head {head.shape[0]}->{count}", level.grid, 2 * level.grid.pixels * head.shape[0] * count,
                lambda m: head_products(m[level.normed], head, m[products], gpu=gpu),
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

    def attention(self, level: Activations, block: AttentionWeights, norm: Norm) -> Activations:
        """List the attention: ``level.normed`` holds its own norm of x, and afterwards ``norm`` of the sum."""
        grid, gpu, weights = level.grid, self.gpu, block.qkv
        channels = block.proj.in_channels
        tokens = self.arena.take(grid.pixels, 3 * channels, self.dtype)
        key = KernelKey.of(Kind.QKV, weights)
        config = self.tuning.conv(key, grid, gpu)

        def launch(m: Memory) -> None:
            qkv(m[level.normed], grid, weights, m[tokens], config=config, gpu=gpu)

        self.add(f"qkv {channels}->{3 * channels}", grid, weights.flops(grid.pixels), launch, key, grid)
        mine = self.mine(grid.height)
        queries = range(mine.start * grid.width, mine.stop * grid.width)
        attend = self._wide_attention if channels > 384 else self._attention
        attend(level, tokens, queries)
        self.exchange(grid, level.normed)
        self.arena.give(tokens)
        normed = self.take(grid, block.proj.out_channels)
        self.conv(level, level.normed, block.proj, x=level.x, normed=normed, norm=norm, residual=level.x)
        self.arena.give(level.normed)
        return replace(level, normed=normed)

    def _attention(self, level: Activations, tokens: Slot, queries: range) -> None:
        """List the attention of ``tokens`` onto ``level.normed``, for the ``queries`` of every image."""
        grid, gpu, tuning = level.grid, self.gpu, self.tuning
        channels, count = tokens.columns // 3, grid.height * grid.width
        key = KernelKey(Kind.ATTENTION, channels, channels)
        config = tuning.attention_on(key, gpu)
        splits = tuning.attention_splits(key, grid, gpu)
        partial = tops = None
        if splits > 1:
            partial = self.arena.take(splits * grid.pixels, channels, torch.float32)
            tops = self.arena.take(splits * grid.pixels, 1, torch.float32)

        def launch(m: Memory) -> None:
            attention(
                m[tokens], grid, m[level.normed], config=config, gpu=gpu, splits=splits,
                partial=m.get(partial), tops=m.get(tops), queries=queries,
            )  # fmt: skip

        self.add(f"attention {channels}", grid, 4 * grid.batch * len(queries) * count * channels, launch, key, grid)
        self.arena.give(partial, tops)

    def _wide_attention(self, level: Activations, tokens: Slot, queries: range) -> None:
        """The same where a tile cannot hold the channels."""
        grid, gpu = level.grid, self.gpu
        channels, count = tokens.columns // 3, grid.height * grid.width
        chunk, tiles = chunk_of(grid), tiles_of(grid)
        weights = self.arena.take(grid.batch * chunk, tiles * TILE, self.dtype)
        tops, sums = (self.arena.take(grid.batch * chunk, tiles, torch.float32) for _ in range(2))

        def launch(m: Memory) -> None:
            wide_attention(
                m[tokens], grid, m[level.normed], weights=m[weights], tops=m[tops], sums=m[sums], gpu=gpu, queries=queries
            )

        self.add(f"attention {channels}", grid, 4 * grid.batch * len(queries) * count * channels, launch)
        self.arena.give(weights, tops, sums)

    def pool(self, level: Activations) -> Slot:
        """List the means of 2x2 pixels of ``level.x``."""
        assert level.x is not None
        after = level.grid.halved()
        pooled = self.arena.take(after.rows, level.x.columns, self.dtype)
        self.add(f"pool {level.x.columns}", after, 0, lambda m: pool(m[level.x], level.grid, m[pooled]))
        return pooled

    def resample(
        self, level: Activations, weights: ConvWeights, norm: Norm, kind: Kind, residual: Slot | None = None, lower: int = 0
    ) -> Activations:  # fmt: skip
        """List a step to another resolution: ``kind`` is UP or DOWN, ``norm`` the first one of the next level.

        ``residual`` and ``lower``: a shortcut around the level, as ``kernels/shortcuts.py`` describes it. ``level.x`` and
        ``residual`` are the caller's to give back.
        """
        up, grid, gpu = kind is Kind.UP, level.grid, self.gpu
        after = grid.doubled() if up else grid.halved()
        x, normed = self.take(after, weights.out_channels), self.take(after, weights.out_channels, norm.scale)
        tiled = grid if up else after
        config = self.tuning.conv(KernelKey.of(kind, weights), tiled, gpu)
        function = upsample_conv if up else downsample_conv
        layer = self.layer(weights, kind)
        overlap = None
        if layer is not None:
            overlap = self.overlap(layer, grid, after, level.x, (residual,), (x, normed), tiled)

        def launch(m: Memory) -> None:
            if overlap is not None:
                overlap.layer(
                    m[level.x], grid, x=m[x], normed=m[normed], gamma=norm.gamma, silu=norm.silu, n_scale=norm.scale,
                    residual=m.get(residual), lower=lower, **overlap.arguments(m),
                )  # fmt: skip
                return
            function(m[level.x], grid, weights, x=m[x], normed=m[normed], norm=norm, config=config, gpu=gpu)

        name = f"{kind}sample {_widths(weights)}" + (" residual" if residual is not None else "")
        key = KernelKey.of(kind, weights, sm90=layer is not None)
        self.add(name, after, weights.flops(tiled.pixels), launch, key, tiled, overlap)
        return Activations(after, x, normed)

    def middle(
        self, level: Activations, blocks: tuple[ResidualWeights, AttentionWeights, ResidualWeights], norm: Norm, *,
        keep_x: bool,
    ) -> Activations:  # fmt: skip
        """List residual block, attention and residual block; ``norm`` is the one behind them."""
        first, between, last = blocks
        level = self.residual_block(level, first, between.norm)
        level = self.attention(level, between, last.norm1)
        return self.residual_block(level, last, norm, keep_x=keep_x)

"""The order of launches of a whole decoder and encoder, in one piece or in bands of rows (bands.py)."""

from __future__ import annotations

from qwen_vae_accel.kernels.bands import Bands, Listed, decoder_rows, encoder_rows, largest, rows_of_levels
from qwen_vae_accel.kernels.builder import Activations, LaunchBuilder
from qwen_vae_accel.kernels.layout import Grid
from qwen_vae_accel.kernels.memory import Slot
from qwen_vae_accel.kernels.network import Kind
from qwen_vae_accel.kernels.triton.conv_out import conv_out
from qwen_vae_accel.kernels.weights import ConvWeights, HeadWeights, NetworkWeights


def _is(slot: Slot | None, entry: Slot | None) -> bool:
    """Whether a block's input is what the shortcut around its level reads."""
    return entry is not None and slot is entry


def _part(slot: Slot | None, grid: Grid, image: int, rows: range) -> Slot | None:
    """View ``rows`` of one image of a flat matrix as a matrix of their own; around them lies what lies there."""
    if slot is None:
        return None
    line = image * (grid.height + 1) + rows.start
    return slot.part(line * grid.pitch, Grid(1, len(rows), grid.width).rows)


class _Decoder:
    def __init__(self, weights: NetworkWeights, builder: LaunchBuilder) -> None:
        assert isinstance(weights.conv_out, HeadWeights)
        self.levels, self.norm_out, self.builder = weights.levels, weights.norm_out, builder
        self.head, self.bias = weights.conv_out.columns, weights.conv_out.bias

    def blocks(self, index: int, level: Activations) -> tuple[Activations, Slot | None]:
        """List the residual blocks of a level before an upsampling; with them comes its input, if its shortcut reads that."""
        this, builder = self.levels[index], self.builder
        assert this.resampling is not None
        entry = level.x if this.shortcut is not None else None
        for block, following in zip(this.blocks[:-1], this.blocks[1:], strict=True):
            level = builder.residual_block(level, block, following.norm1, keep_input=_is(level.x, entry))
        scale = this.resampling.input_scale
        return builder.residual_block(level, this.blocks[-1], None, x_scale=scale, keep_input=_is(level.x, entry)), entry

    def up(self, index: int, level: Activations, entry: Slot | None) -> Activations:
        """List the upsampling of a level."""
        this, norm = self.levels[index], self.levels[index + 1].blocks[0].norm1
        assert this.resampling is not None
        lower = 0 if this.shortcut is None else this.shortcut.lower
        return self.builder.resample(level, this.resampling, norm, Kind.UP, entry, lower)

    def image(self, level: Activations, image: int | None, rows: range, start: int) -> None:
        """List the last level and the output: ``rows`` of an image, or of all. ``start``: where ``level`` begins in it."""
        for block, following in zip(self.levels[-1].blocks[:-1], self.levels[-1].blocks[1:], strict=True):
            level = self.builder.residual_block(level, block, following.norm1)
        products = self.builder.last_block(level, self.levels[-1].blocks[-1], self.norm_out, self.head, 9 * self.bias.numel())
        self.builder.sum_taps(products, self.bias, level.grid, image, rows, start)

    def bands(self, whole: Activations, entry: Slot | None, bands: Bands, sample: bool) -> int:
        """List the levels behind ``whole`` band by band; returns the operations. ``sample``: one band of one image alone."""
        builder, grid, last = self.builder, whole.grid, len(self.levels) - 1
        heights = rows_of_levels(grid.height // 2**bands.level, last + 1, decodes=True)
        blocks = [len(level.blocks) for level in self.levels]
        before = builder.flops
        for image in range(1 if sample else grid.batch):
            mine = builder.mine(heights[-1])
            for rows in (largest(bands, mine),) if sample else bands.of(mine):
                level, around, start = whole, entry, 0
                for index, need in enumerate(decoder_rows(rows, bands.level, heights, blocks), bands.level):
                    if level is not whole:
                        level, around = self.blocks(index, level)
                    which, lines = (image, need) if level is whole else (0, range(need.start - start, need.stop - start))
                    part = Grid(1, len(need), level.grid.width)
                    x, beside = (_part(slot, level.grid, which, lines) for slot in (level.x, around))
                    after = self.up(index, Activations(part, x, None), beside)
                    if level is not whole:
                        builder.arena.give(level.x, around)
                    level, start = after, 2 * need.start
                self.image(level, image, rows, start)
        builder.arena.give(whole.x, entry)
        builder.exchange_image(Grid(grid.batch, heights[-1], grid.width * 2 ** (last - bands.level)), self.bias.numel())
        return builder.flops - before


def decoder_launches(
    weights: NetworkWeights,
    latent: tuple[int, ...],
    builder: LaunchBuilder,
    bands: Bands | None = None,
    *,
    sample: bool = False,
) -> Listed:
    """List the launches of a decoder for latents of shape ``[B, C, h, w]``.

    Args:
        weights: the decoder's.
        latent: the input's shape.
        builder: lists the launches; used once.
        bands: how the last levels are divided; None: in one piece.
        sample: list the largest band alone, for what it takes.
    """
    decoder = _Decoder(weights, builder)
    batch, _, height, width = latent
    level = builder.conv_in(weights.conv_in, Grid(batch, height, width), weights.middle[0].norm1)
    level = builder.middle(level, weights.middle, weights.levels[0].blocks[0].norm1, keep_x=True)
    last, in_bands = len(weights.levels) - 1, 0
    if bands is None and builder.share is not None:
        bands = Bands(0, 1)
    scale = 2**last
    for index in range(last):
        level, entry = decoder.blocks(index, level)
        if bands is not None and bands.level == index:
            in_bands = decoder.bands(level, entry, bands, sample)
            break
        after = decoder.up(index, level, entry)
        builder.arena.give(level.x, entry)
        level = after
    else:
        decoder.image(level, None, range(height * scale), 0)
    return Listed(builder.launches((batch, decoder.bias.numel(), height * scale, width * scale)), in_bands)


class _Encoder:
    def __init__(self, weights: NetworkWeights, builder: LaunchBuilder) -> None:
        self.levels, self.weights, self.builder = weights.levels, weights, builder

    def down(self, index: int, level: Activations) -> Activations:
        """List a level that a downsampling ends."""
        this, builder = self.levels[index], self.builder
        assert this.resampling is not None
        pooled = builder.pool(level) if this.shortcut is not None else None
        for block, following in zip(this.blocks[:-1], this.blocks[1:], strict=True):
            level = builder.residual_block(level, block, following.norm1)
        level = builder.residual_block(level, this.blocks[-1], None)
        norm = self.levels[index + 1].blocks[0].norm1
        after = builder.resample(level, this.resampling, norm, Kind.DOWN, pooled)
        builder.arena.give(level.x, pooled)
        return after

    def last(self, level: Activations) -> Activations:
        """List the level that no downsampling ends."""
        this, builder = self.levels[-1], self.builder
        entry = level.x if this.shortcut is not None else None
        for block, following in zip(this.blocks[:-1], this.blocks[1:], strict=True):
            level = builder.residual_block(level, block, following.norm1, keep_input=_is(level.x, entry))
        norm = self.weights.middle[0].norm1
        level = builder.residual_block(level, this.blocks[-1], norm, keep_input=_is(level.x, entry), adds=entry)
        builder.arena.give(entry)
        return level

    def bands(self, grid: Grid, bands: Bands, sample: bool) -> tuple[Activations, int]:
        """List the levels up to that of ``bands`` band by band; returns what is behind them, and the operations."""
        builder = self.builder
        heights = rows_of_levels(grid.height, len(self.levels), decodes=False)
        blocks = [len(level.blocks) for level in self.levels]
        after = grid
        for _ in range(bands.level + 1):
            after = after.halved()
        norm = self.levels[bands.level + 1].blocks[0].norm1
        resampling = self.levels[bands.level].resampling
        assert resampling is not None
        x, normed = builder.take(after, resampling.out_channels), builder.take(after, resampling.out_channels, norm.scale)
        before = builder.flops
        for image in range(1 if sample else grid.batch):
            mine = builder.mine(after.height)
            for rows in (largest(bands, mine),) if sample else bands.of(mine):
                need = encoder_rows(rows, bands.level, heights, blocks)
                level = builder.conv_in(
                    self.weights.conv_in, Grid(1, len(need), grid.width), self.levels[0].blocks[0].norm1, (image, need)
                )
                for index in range(bands.level + 1):
                    level = self.down(index, level)
                first = rows.start - need.start // 2 ** (bands.level + 1)
                part = range(first, first + len(rows))
                builder.copy_rows(level, part, Activations(after, x, normed), image, rows.start)
                builder.arena.give(level.x, level.normed)
        builder.exchange(after, x, normed)
        return Activations(after, x, normed), builder.flops - before


def encoder_launches(
    weights: NetworkWeights, image: tuple[int, ...], builder: LaunchBuilder, bands: Bands | None = None, *, sample: bool = False
) -> Listed:
    """List the launches of an encoder for images of shape ``[B, C, H, W]``; arguments as for :func:`decoder_launches`."""
    assert isinstance(weights.conv_out, ConvWeights)
    encoder = _Encoder(weights, builder)
    batch, _, height, width = image
    grid, first, in_bands = Grid(batch, height, width), 0, 0
    if bands is None and builder.share is not None:
        bands = Bands(len(weights.levels) - 2, 1)
    if bands is None:
        level = builder.conv_in(weights.conv_in, grid, weights.levels[0].blocks[0].norm1)
    else:
        level, in_bands = encoder.bands(grid, bands, sample)
        first = bands.level + 1
    for index in range(first, len(weights.levels) - 1):
        level = encoder.down(index, level)
    level = builder.middle(encoder.last(level), weights.middle, weights.norm_out, keep_x=False)
    normed, grid, out, gpu = level.normed, level.grid, weights.conv_out, builder.gpu
    builder.add(
        f"conv_out {out.in_channels}->{out.out_channels}", grid, out.flops(grid.pixels),
        lambda m: conv_out(m[normed], grid, out, m.output, gpu=gpu),
    )  # fmt: skip
    return Listed(builder.launches((batch, out.out_channels, grid.height, grid.width)), in_bands)

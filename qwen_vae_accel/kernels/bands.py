"""Bands of rows: which part of a network runs a band at a time, and which rows that takes.

A decoder's first levels run whole, since the attention sees every pixel, then everything from one upsampling on runs band by
band; an encoder's first levels run band by band up to one downsampling. So the large activations exist for one band at a time.
A band takes as many more rows as its convolutions reach: every row that is kept has seen its true neighbours, and what was
computed for the others is dropped. A pixel's sums are the same numbers in the same order as in one piece, but for the norm's
where a band is served by another schedule of kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from qwen_vae_accel.kernels.launches import LaunchList

_COUNTS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)  # of bands tried
_FEWEST_ROWS = 32  # of the image in a band


@dataclass(frozen=True, slots=True)
class Bands:
    """A division of one network.

    Attributes:
        level: the resampling with which bands begin (decoder) or end (encoder), counted in the order in which they run.
        count: bands of an image.
    """

    level: int
    count: int

    def of(self, rows: range) -> Iterator[range]:
        """Divide ``rows``."""
        edges = [rows.start + len(rows) * i // self.count for i in range(self.count + 1)]
        return (range(start, stop) for start, stop in zip(edges[:-1], edges[1:], strict=True) if stop > start)


def _widened(rows: range, by: int, height: int) -> range:
    return range(max(0, rows.start - by), min(height, rows.stop + by))


def decoder_rows(rows: range, level: int, heights: Sequence[int], blocks: Sequence[int]) -> list[range]:
    """Rows of every level from ``level`` to the last but one that its upsampling reads for ``rows`` of the image.

    Args:
        rows: of the image.
        level: the first one whose upsampling runs in bands.
        heights: rows of all levels.
        blocks: residual blocks of all levels.
    """
    found: list[range] = []
    wanted = _widened(rows, 1 + 2 * blocks[-1], heights[-1])  # conv_out, and two convolutions a block
    for index in reversed(range(level, len(heights) - 1)):
        small = range(max(0, (wanted.start - 1) // 2), min(heights[index], wanted.stop // 2 + 1))
        found.insert(0, small)
        wanted = _widened(small, 2 * blocks[index], heights[index])
    return found


def encoder_rows(rows: range, level: int, heights: Sequence[int], blocks: Sequence[int]) -> range:
    """Rows of the image that ``rows`` behind the downsampling of ``level`` take, beginning where all halvings agree.

    Args:
        rows: of the level behind.
        level: the last one whose downsampling runs in bands.
        heights: rows of all levels, the image's first.
        blocks: residual blocks of all levels.
    """
    for index in reversed(range(level + 1)):
        rows = range(2 * rows.start, min(2 * rows.stop + 1, heights[index]))
        rows = _widened(rows, 2 * blocks[index], heights[index])
    rows, step = _widened(rows, 1, heights[0]), 2 ** (level + 1)
    return range(rows.start // step * step, min(heights[0], -(-rows.stop // step) * step))


@dataclass(frozen=True, slots=True)
class Listed:
    """A list of launches, complete or with one band of an image in place of all.

    Attributes:
        launches: the list.
        band_flops: operations of the bands in it.
    """

    launches: LaunchList
    band_flops: int


def choose_bands(limit: int, levels: int, height: int, listed: Callable[[Bands | None], Listed]) -> Bands | None:
    """Choose the division that costs least and whose scratch memory fits, or takes least; None: one piece fits.

    Args:
        limit: bytes of scratch memory.
        levels: resamplings of the network.
        height: rows of the image.
        listed: lists the launches of a division with its largest band alone, or of the whole.
    """
    whole = listed(None)
    if whole.launches.scratch_bytes <= limit:
        return None
    best: tuple[float, Bands] | None = None
    smallest: tuple[int, Bands] | None = None
    for level in range(levels):
        for count in (count for count in _COUNTS if height // count >= _FEWEST_ROWS or count == 2):
            bands = Bands(level, count)
            one = listed(bands)
            need = one.launches.scratch_bytes
            if smallest is None or need < smallest[0]:
                smallest = need, bands
            if need <= limit:
                cost = one.launches.flops + (count - 1) * one.band_flops
                if best is None or cost < best[0]:
                    best = cost, bands
                break  # more bands cost more
    assert smallest is not None
    return best[1] if best is not None else smallest[1] if smallest[0] < whole.launches.scratch_bytes else None


def rows_of_levels(height: int, count: int, *, decodes: bool) -> list[int]:
    """Rows of ``count`` levels in the order in which they run, the first of which has ``height``."""
    return [height * 2**i if decodes else height // 2**i for i in range(count)]


def largest(bands: Bands, rows: range) -> range:
    """One of the largest bands, away from the edges if there are so many."""
    return max(bands.of(rows), key=lambda band: (len(band), -abs(band.start + band.stop - rows.start - rows.stop)))

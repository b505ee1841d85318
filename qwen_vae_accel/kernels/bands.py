"""Bands of rows: which part of a network runs a band at a time, and which rows that takes.

A decoder's first levels run whole, since the attention sees every pixel, then everything from one upsampling on runs band by
band; an encoder's first levels run band by band up to one downsampling. So the large activations exist for one band at a time.
A band takes as many more rows as its convolutions reach: every row that is kept has seen its true neighbours, and what was
computed for the others is dropped. A pixel's sums are the same numbers in the same order as in one piece, but for the norm's
where a band is served by another schedule of kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from qwen_vae_accel.kernels.launches import LaunchList

_COUNTS = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 256)  # of bands tried
_FEWEST_ROWS = 32  # of the image in a band
_NEARLY = 1.02  # of the least memory: fewer bands that take this much are as good


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
    """A list of launches, complete or with one band of one image in place of all.

    Attributes:
        launches: the list.
        band_flops: operations of the bands in it.
    """

    launches: LaunchList
    band_flops: int


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen for a limit.

    Attributes:
        bands: the division; None for one piece.
        fits: whether the scratch memory is within the limit.
    """

    bands: Bands | None
    fits: bool


@dataclass(slots=True)
class _Search:
    """The divisions of one network at one size, each listed once at most. More bands cost more and take no more memory."""

    listed: Callable[[Bands], Listed]
    images: int
    counts: Sequence[int]
    most_flops: float
    known: dict[Bands, tuple[int, int]] = field(default_factory=dict)

    def look(self, bands: Bands) -> tuple[int, int]:
        """Bytes of scratch memory and operations of a division; the latter are those of inner bands, a little too many."""
        if bands not in self.known:
            one = self.listed(bands)
            flops = one.launches.flops + (bands.count * self.images - 1) * one.band_flops
            self.known[bands] = one.launches.scratch_bytes, flops
        return self.known[bands]

    def first(self, level: int, counts: Sequence[int], wanted: Callable[[int, int], bool]) -> int:
        """Index of the first of ``counts`` that is ``wanted``, as are all behind it; their number if none is."""
        low, high = 0, len(counts)
        while low < high:
            middle = (low + high) // 2
            if wanted(*self.look(Bands(level, counts[middle]))):
                high = middle
            else:
                low = middle + 1
        return low

    def worth(self, level: int) -> Sequence[int]:
        """The counts whose cost is worth it."""
        if self.counts and self.look(Bands(level, self.counts[-1]))[1] <= self.most_flops:
            return self.counts
        return self.counts[: self.first(level, self.counts, lambda _, flops: flops > self.most_flops)]

    def cheapest(self, levels: int, limit: float) -> Bands | None:
        """The division within ``limit`` that costs least."""
        best: Bands | None = None
        for level in range(levels):
            counts = self.worth(level)
            if counts and self.look(Bands(level, counts[-1]))[0] <= limit:
                found = Bands(level, counts[self.first(level, counts, lambda need, _: need <= limit)])
                if best is None or self.look(found)[1] < self.look(best)[1]:
                    best = found
        return best

    def least(self, levels: int) -> int | None:
        """The fewest bytes that a division worth its cost takes."""
        ends = (Bands(level, counts[-1]) for level in range(levels) if (counts := self.worth(level)))
        return min((self.look(end)[0] for end in ends), default=None)


def choose_bands(
    limit: int, most_cost: float, levels: int, images: int, height: int, whole: Listed, listed: Callable[[Bands], Listed]
) -> Choice:  # fmt: skip
    """Choose the division that costs least and whose scratch memory fits.

    Where none does whose cost is sensible, the one of these that takes least is chosen.

    Args:
        limit: bytes of scratch memory.
        most_cost: times the operations of one piece that the limit is worth.
        levels: resamplings of the network.
        images: of the batch.
        height: rows of an image.
        whole: the launches of one piece.
        listed: lists the launches of a division with its largest band alone.
    """
    scratch_bytes = whole.launches.scratch_bytes
    if scratch_bytes <= limit:
        return Choice(None, True)
    counts = [count for count in _COUNTS if height // count >= _FEWEST_ROWS or count == 2]
    search = _Search(listed, images, counts, most_cost * whole.launches.flops)
    found = search.cheapest(levels, limit)
    if found is not None:
        return Choice(found, True)
    least = search.least(levels)
    if least is None or least >= scratch_bytes:
        return Choice(None, False)
    return Choice(search.cheapest(levels, _NEARLY * least), False)


def rows_of_levels(height: int, count: int, *, decodes: bool) -> list[int]:
    """Rows of ``count`` levels in the order in which they run, the first of which has ``height``."""
    return [height * 2**i if decodes else height // 2**i for i in range(count)]


def largest(bands: Bands, rows: range) -> range:
    """One of the largest bands, away from the edges if there are so many."""
    return max(bands.of(rows), key=lambda band: (len(band), -abs(band.start + band.stop - rows.start - rows.stop)))

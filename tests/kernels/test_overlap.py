"""Which convolutions overlap with the one before: the rule, the counters, and the plans of the published networks."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from qwen_vae_accel.kernels import FusedConfig, FusedDecoder, FusedEncoder
from qwen_vae_accel.kernels import builder as builder_module
from qwen_vae_accel.kernels.gpu import Gpu
from qwen_vae_accel.kernels.layout import Grid
from qwen_vae_accel.kernels.memory import Slot
from qwen_vae_accel.kernels.overlap import Matrix, Overlap, link, overlaps
from qwen_vae_accel.kernels.sm90.layers import Sm90Layers
from qwen_vae_accel.kernels.sm90.schedules import SCHEDULES, Lines, Mode, lines_of
from tests.kernels.test_network import StandIn, StandInLayers, meta

GRID, OTHER = Grid(1, 8, 8), Grid(1, 16, 4)  # as many pixels, not as many rows
BYTES = GRID.rows * 96 * 2


class Layer:
    def lines(self, grid):
        return Lines(3, 4, 5)

    def ends_early(self, grid):
        return grid != OTHER


def matrix(index: int, grid: Grid = GRID, rows: int = GRID.rows) -> Matrix:
    return Matrix(Slot(index, rows, 96, torch.bfloat16), grid)


def convolution(a: Matrix, *outputs: Matrix, others: tuple[Matrix, ...] = ()) -> Overlap:
    return Overlap(Layer(), a, others, outputs)


def at(*places: int) -> tuple[int, ...]:
    """Offsets of slots 0, 1, ... in halves of a matrix."""
    return tuple(place * BYTES // 2 for place in places)


FIRST = convolution(matrix(0), matrix(1))


@pytest.mark.parametrize(
    ("second", "offsets", "allowed"),
    [
        (convolution(matrix(1), matrix(2)), at(0, 2, 4), True),  # elsewhere
        (convolution(matrix(1), matrix(0)), at(0, 2), True),  # over what the first read
        (convolution(matrix(1), matrix(2)), at(0, 2, 0), True),  # the same place by another name
        (convolution(matrix(1), matrix(2)), at(0, 2, 1), False),  # half over both
        (convolution(matrix(1), matrix(2)), at(1, 3, 0), False),  # half over the first's input
        (convolution(matrix(1), matrix(2, OTHER)), at(0, 2, 0), False),  # the same place, rows of another length
        (convolution(matrix(1), matrix(2, rows=GRID.rows - 1)), at(0, 2, 0), False),
        (convolution(matrix(1), matrix(2), matrix(0)), at(0, 2, 4), True),
        (convolution(matrix(1), matrix(2), matrix(3)), at(0, 2, 4, 1), False),  # one of two
        (convolution(matrix(0), matrix(2)), at(0, 2, 4), False),  # the first's input: nobody counts its rows
        (convolution(matrix(1), matrix(2), others=(matrix(3),)), at(0, 2, 4, 6), True),  # a residual from before
        (convolution(matrix(1), matrix(2), others=(matrix(1),)), at(0, 2, 4), False),  # a residual the first writes
    ],
)
def test_what_may_overlap(second, offsets, allowed):
    assert overlaps(FIRST, second, offsets) is allowed


def test_a_residual_of_the_first_is_not_overwritten():
    first = convolution(matrix(0), matrix(1), others=(matrix(2),))
    assert not overlaps(first, convolution(matrix(1), matrix(3)), at(0, 2, 4, 5))
    assert overlaps(first, convolution(matrix(1), matrix(2)), at(0, 2, 4))


def test_nothing_waits_for_tiles_that_end_together():
    first = Overlap(Layer(), matrix(0, OTHER), (), (matrix(1, OTHER),))
    second = Overlap(Layer(), matrix(1, OTHER), (), (matrix(2, OTHER),))
    assert not overlaps(first, second, at(0, 2, 4))


def test_counters_are_numbered_after_the_matrices():
    second, third = convolution(matrix(1), matrix(2)), convolution(matrix(2), matrix(0))
    steps = [FIRST, second, None, third, convolution(matrix(0), matrix(1))]
    slots = link(steps, at(0, 2, 4))
    assert [(slot.index, slot.columns, slot.dtype) for slot in slots] == [(3, 3, torch.int32), (4, 3, torch.int32)]
    lines = Layer().lines(GRID)
    assert (FIRST.done, second.ready, second.done, third.ready) == (slots[0], (slots[0], lines), None, None)
    assert (third.done, steps[-1].ready) == (slots[1], (slots[1], lines))


@pytest.mark.parametrize("key", SCHEDULES, ids=str)
def test_lines_hold_every_tile_once(key):
    for schedule in SCHEDULES[key]:
        lines = lines_of(schedule, key[0], 37, 43)
        scale = 2 if key[0] == Mode.UPSAMPLE else 1
        height, width = schedule.tile()
        assert (lines.per_image - 1) * lines.rows < scale * 37 <= lines.per_image * lines.rows
        assert lines.finished == -(-43 // width) * schedule.split * scale**2 and lines.rows == scale * height


def planned(cls, shape, monkeypatch):
    """The launches of the published network on a GPU of few multiprocessors; what ``link`` was given and returned."""
    seen = []
    monkeypatch.setattr(builder_module, "link", lambda *given: seen.append((*given, link(*given))) or seen[-1][-1])
    monkeypatch.setattr(Sm90Layers, "to_host", lambda self, weights: weights)
    monkeypatch.setattr(cls, "_sm90_layers", lambda self, tuning: StandInLayers(self.device, tuning))
    network = cls(
        meta("decode" if cls is FusedDecoder else "encode"), dtype=torch.bfloat16,
        device=torch.device("meta"), config=FusedConfig(gpu=Gpu(132, 232448, True, True)),
    )  # fmt: skip
    return network.launches(shape), *seen[-1]


@pytest.mark.parametrize("cls", [FusedDecoder, FusedEncoder])
@pytest.mark.parametrize("size", [(128, 128), (116, 208), (60, 106)])
def test_most_convolutions_of_the_networks_overlap(cls, size, monkeypatch):
    decodes = cls is FusedDecoder
    shape = (2, 16, *size) if decodes else (2, 3, 8 * size[0], 8 * size[1])
    launches, _, _, slots = planned(cls, shape, monkeypatch)
    assert len(slots) >= (20 if decodes else 13)  # of 31 and 23 convolutions, 8 and 5 of them with resident weights
    assert launches.counters is not None and launches.counters.columns == sum(slot.columns for slot in slots)
    start, counted = launches.offsets[launches.counters.index], launches.counters.nbytes
    assert launches.scratch_bytes - 256 < start + counted <= launches.scratch_bytes


Spans = list[tuple[int, int]]


def rows_of(matrix: Matrix, offsets, image: int, first: int, last: int) -> Spans:
    """Bytes of the pixels of each of these rows that is in the image."""
    grid, pixel = matrix.grid, matrix.slot.columns * matrix.slot.dtype.itemsize
    rows = range(max(first, 0), min(last, grid.height - 1) + 1)
    starts = [offsets[matrix.slot.index] + ((image * (grid.height + 1) + y + 1) * grid.pitch + 1) * pixel for y in rows]
    return [(start, start + grid.width * pixel) for start in starts]


def touched_by(step: Overlap, offsets, image: int, line: int) -> tuple[tuple[int, int], Spans, Spans]:
    """Of the tiles of a line: first and last row of the input, bytes they read, bytes they write."""
    mode, height = step.layer.mode, step.layer.schedule(step.input.grid)[0].tile()[0]
    top, bottom = line * height, (line + 1) * height - 1
    needed = (2 * top, 2 * bottom + 2) if mode == Mode.DOWNSAMPLE else (top - 1, bottom + 1)
    reads = rows_of(step.input, offsets, image, *needed)
    reads += [span for other in step.others for span in rows_of(other, offsets, image, top, bottom)]
    scale = 2 if mode == Mode.UPSAMPLE else 1
    place = offsets, image, scale * top, scale * bottom + scale - 1
    return needed, reads, [span for output in step.outputs for span in rows_of(output, *place)]


def meet(a: Spans, b: Spans) -> bool:
    return any(low < other_high and other_low < high for low, high in a for other_low, other_high in b)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("cls", [FusedDecoder, FusedEncoder])
def test_no_tile_touches_what_a_tile_it_does_not_wait_for_may_still_use(cls, seed, monkeypatch):
    """Every pair of lines of tiles of two kernels that overlap, byte by byte, with the lines that conv.cu waits for."""
    monkeypatch.setattr(StandIn, "ends_early", lambda self, grid: True)
    draw = random.Random(seed)
    batch, height, width = draw.randint(1, 3), draw.randint(1, 12), draw.randint(1, 9)
    decodes = cls is FusedDecoder
    shape = (batch, 16, height, width) if decodes else (batch, 3, 8 * height + draw.randint(0, 7), 8 * width + seed)
    _, steps, offsets, slots = planned(cls, shape, monkeypatch)
    pairs = [(a, b) for a, b in zip(steps[:-1], steps[1:], strict=True) if b is not None and b.ready is not None]
    assert len(pairs) == len(slots) >= 15
    for first, second in pairs:
        lines = second.ready[1]
        before = {
            (image, line): touched_by(first, offsets, image, line)[1:]
            for image in range(batch)
            for line in range(lines.per_image)
        }
        for image, line in itertools.product(range(batch), range(second.layer.lines(second.input.grid).per_image)):
            (top, bottom), reads, writes = touched_by(second, offsets, image, line)
            waited = range(max(top, 0) // lines.rows, min(bottom // lines.rows, lines.per_image - 1) + 1)
            for place, (read_before, written_before) in before.items():
                if place[0] != image or place[1] not in waited:
                    assert not meet(writes, read_before + written_before) and not meet(reads, written_before)

"""Which convolutions overlap with the one before: the rule, the counters, and the plans of the published networks."""

from __future__ import annotations

import pytest
import torch

from qwen_vae_accel.kernels import FusedConfig, FusedDecoder, FusedEncoder
from qwen_vae_accel.kernels import network as network_module
from qwen_vae_accel.kernels.hopper import HopperConvs
from qwen_vae_accel.kernels.layout import Grid
from qwen_vae_accel.kernels.overlap import Matrix, Overlap, link, overlaps
from qwen_vae_accel.kernels.program import Slot
from qwen_vae_accel.kernels.sm90.schedules import SCHEDULES, Lines, Mode, lines_of
from qwen_vae_accel.kernels.topology import decoder_shapes, encoder_shapes
from qwen_vae_accel.kernels.tuning import Device
from tests.kernels.test_network import StandIn, meta

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
    return Overlap(Layer(), GRID, a, others, outputs)


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
    first = Overlap(Layer(), OTHER, matrix(0, OTHER), (), (matrix(1, OTHER),))
    second = Overlap(Layer(), OTHER, matrix(1, OTHER), (), (matrix(2, OTHER),))
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


@pytest.mark.parametrize("cls", [FusedDecoder, FusedEncoder])
@pytest.mark.parametrize("size", [(128, 128), (116, 208), (60, 106)])
def test_most_convolutions_of_the_networks_overlap(cls, size, monkeypatch):
    linked = []
    monkeypatch.setattr(network_module, "link", lambda *steps: linked.extend(found := link(*steps)) or found)
    monkeypatch.setattr(HopperConvs, "to_host", lambda self, weights: weights)
    monkeypatch.setattr(cls, "_hopper_convs", lambda self, tuning: HopperConvs(self.device, tuning, self._segments, StandIn))
    decodes = cls is FusedDecoder
    network = cls(
        meta(decoder_shapes(3) if decodes else encoder_shapes(3)), dtype=torch.bfloat16, device=torch.device("meta"),
        config=FusedConfig(device=Device(132, 232448, True, True)),
    )  # fmt: skip
    program = network.program((2, 16, *size) if decodes else (2, 3, 8 * size[0], 8 * size[1]))
    assert len(linked) >= (20 if decodes else 13)  # of 31 and 23 convolutions, 8 and 5 of them with resident weights
    assert program.counters is not None and program.counters.columns == sum(slot.columns for slot in linked)
    start, counted = program.offsets[program.counters.index], program.counters.nbytes
    assert program.scratch_bytes - 256 < start + counted <= program.scratch_bytes

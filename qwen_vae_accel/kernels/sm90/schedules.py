"""Compile-time choices of the kernel, as data, and the choice among them for one image size."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum
from typing import NamedTuple

from qwen_vae_accel.kernels.network import Kind

SHARED_LIMIT = 232448  # bytes one block may use on compute capability 9.0


class Mode(IntEnum):
    """Which convolution the kernel computes; conv.cu describes them."""

    CONV = 0
    UPSAMPLE = 1
    DOWNSAMPLE = 2
    POINTWISE = 3


MODES = {Kind.CONV: Mode.CONV, Kind.UP: Mode.UPSAMPLE, Kind.DOWN: Mode.DOWNSAMPLE, Kind.PROJ: Mode.POINTWISE}
_TAPS = {Mode.CONV: 9, Mode.UPSAMPLE: 4, Mode.DOWNSAMPLE: 9, Mode.POINTWISE: 1}


@dataclass(frozen=True, slots=True)
class Room:
    """How many blocks run at once, one on each multiprocessor.

    Attributes:
        multiprocessors: of the GPU.
        clusters: ``(blocks of a cluster, clusters that run at once)``: fewer than the multiprocessors would hold, since a
            cluster lies in one of the GPU's partitions. A size that is not there is as if it lay anywhere.
    """

    multiprocessors: int
    clusters: tuple[tuple[int, int], ...] = ()

    def of(self, size: int) -> int:
        """Clusters of ``size`` blocks that run at once, at least 1."""
        return max(1, dict(self.clusters).get(size, self.multiprocessors // size))


@dataclass(frozen=True, slots=True)
class Schedule:
    """How a kernel divides its work; the names are those of conv_tile.cuh."""

    split: int  # blocks of a cluster that share a tile's output channels
    kc: int  # input channels per chunk
    mb: int  # 8x8 pixel blocks per computing warpgroup
    a_stages: int  # buffers of activations,
    b_stages: int  # of weights,
    r_stages: int = 1  # and, for each computing warpgroup, of residual
    resident: bool = False  # weights stay in shared memory, warpgroups take turns
    warpgroups: int = 2
    stagger: int = 0  # steps by which the second warpgroup follows the first
    cost: float = 1.0  # time of a tile's pixel, relative to the alternatives; not part of the kernel

    @property
    def threads(self) -> int:
        """Threads of a block: those of the computing warpgroups and of the feeding one."""
        return 128 * (self.warpgroups + 1)

    def tile(self) -> tuple[int, int]:
        """Height and width of a tile in pixels."""
        return (8 if self.resident else 8 * self.warpgroups), 8 * self.mb


@dataclass(frozen=True, slots=True)
class Variant:
    """One compiled kernel, up to the dtype."""

    mode: Mode
    channels: int
    out: int
    shortcut: int  # input channels of the 1x1 shortcut, 0 for none
    residual: bool
    write_x: bool
    norm: int  # 0 none, 1 norm, 2 norm and SiLU
    schedule: Schedule
    a8: bool = False  # float8 instead of 16 bits: the input and its weights,
    x8: bool = False  # x,
    n8: bool = False  # the norm
    lower: int = 0  # UPSAMPLE: channels of the residual that odd output rows skip

    @property
    def columns(self) -> int:
        """Output channels of one block."""
        return self.out // self.schedule.split

    @property
    def pixel_bytes(self) -> int:
        """Bytes of a pixel's channels in a chunk."""
        return self.schedule.kc * (1 if self.a8 else 2)

    @property
    def parities(self) -> int:
        """Output pixels of a tile's pixel, each with weights of its own."""
        return 4 if self.mode == Mode.UPSAMPLE else 1

    @property
    def halo(self) -> int:
        """Pixels that the input of a tile has more than the tile, on each axis."""
        return 1 if self.mode == Mode.DOWNSAMPLE else 2

    def steps(self) -> int:
        """Weight blocks (a tap of a chunk) of one tile."""
        return -(-self.channels // self.schedule.kc) * _TAPS[self.mode] + -(-self.shortcut // self.schedule.kc)

    def shared_bytes(self) -> int:
        """Bytes of shared memory of one block, as conv_tile.cuh lays it out."""
        s = self.schedule
        height, width = s.tile()
        a = -(-(height + self.halo) * (width + self.halo) * self.pixel_bytes // 1024) * 1024
        b = self.columns * self.pixel_bytes
        r_stages = s.r_stages * s.warpgroups if self.residual and not s.resident else 0
        b_stages = 1 if s.resident else s.b_stages
        sums = s.warpgroups * 2 * (s.split - 1) * s.mb * 64 * 4
        barriers = 2 * (s.a_stages + b_stages + r_stages + s.warpgroups) + 1
        buffers = s.a_stages * a + (self.steps() if s.resident else b_stages) * b + r_stages * 8 * width * 64
        return buffers + (12 if self.a8 else 8) * self.columns + sums + 8 * barriers + 4 * s.warpgroups

    def fitted(self) -> Variant:
        """The same with as many buffers of weights as there is room for, at most those of its schedule."""
        stages = self.schedule.b_stages
        excess = self.shared_bytes() - SHARED_LIMIT
        if excess <= 0 or self.schedule.resident:
            return self
        fewer = stages - -(-excess // (self.columns * self.pixel_bytes + 16))  # a buffer and its barriers
        return replace(self, schedule=replace(self.schedule, b_stages=fewer))

    def defines(self) -> dict[str, int]:
        """The compile-time parameters, but for the dtype's and the size of the arguments."""
        s = self.schedule
        return {
            "MODE": int(self.mode), "CIN": self.channels, "COUT": self.out, "SHORTCUT": self.shortcut,
            "RESIDUAL": int(self.residual), "LOWER": self.lower, "WRITE_X": int(self.write_x), "NORM": self.norm,
            "SPLIT": s.split, "KC": s.kc, "MB": s.mb, "A_STAGES": s.a_stages, "B_STAGES": s.b_stages,
            "R_STAGES": s.r_stages, "RESIDENT": int(s.resident), "WARPGROUPS": s.warpgroups, "STAGGER": s.stagger,
            "A8": int(self.a8), "X8": int(self.x8), "N8": int(self.n8), "SHARED_BYTES": self.shared_bytes(),
        }  # fmt: skip


_RESIDENT = Schedule(split=1, kc=32, mb=2, a_stages=5, b_stages=1, resident=True)
_DEEP_RESIDENT = replace(_RESIDENT, a_stages=6)
_WIDE = Schedule(split=1, kc=32, mb=2, a_stages=3, b_stages=9, r_stages=3, stagger=8)
_PAIR = Schedule(split=2, kc=32, mb=2, a_stages=3, b_stages=9, r_stages=3, stagger=8)
# A tile of one 8x8 block per warpgroup loads its weights for half as many pixels. The same chunks, so that both take their
# weights from one packing.
_SMALL_192 = Schedule(split=2, kc=32, mb=1, a_stages=4, b_stages=16, r_stages=3, cost=1.25)
_SMALL_PAIR = replace(_PAIR, mb=1, a_stages=4, b_stages=12, cost=1.02)
_SMALL_384 = Schedule(split=4, kc=32, mb=1, a_stages=4, b_stages=16, r_stages=3, cost=1.25)


# Qwen-Image 2.1. Its decoder's widths are 144 times a power of two: blocks of 144 channels. The weights of its widest levels
# stream through the L2 cache anyway, and clusters of eight are few: there small tiles are no slower, and divide better.
_LARGE_144 = Schedule(split=1, kc=32, mb=2, a_stages=4, b_stages=16, r_stages=3, stagger=8)
_SMALL_144 = replace(_LARGE_144, mb=1, a_stages=3, cost=1.02)
_LARGE_288, _SMALL_288 = replace(_LARGE_144, split=2, a_stages=2), replace(_SMALL_144, split=2, cost=1.03)
_LARGE_576, _SMALL_576 = replace(_LARGE_144, split=4, a_stages=2), replace(_SMALL_144, split=4, cost=1.05)
_SMALL_1152 = replace(_SMALL_144, split=8, cost=1.0)
_SMALL_768 = Schedule(split=8, kc=32, mb=1, a_stages=4, b_stages=16, r_stages=3)
_UP_288 = replace(_LARGE_288, a_stages=3, stagger=0), replace(_SMALL_288, cost=1.17)
_UP_576 = replace(_LARGE_576, a_stages=3, stagger=0), replace(_SMALL_576, cost=1.06)
_UP_1152 = replace(_LARGE_144, split=8, a_stages=3), replace(_SMALL_1152, stagger=0, cost=1.16)


# (mode, input channels, output channels) -> candidates, the fastest on a full GPU first. Measured on one NVIDIA H200, partly
# by ``qwen-vae-accel tune`` (benchmarks/results/h200_tune.json). The small tiles of 384 channels were measured with chunks of
# twice as many channels, and have kept their cost.
SCHEDULES: dict[tuple[Mode, int, int], tuple[Schedule, ...]] = {
    (Mode.CONV, 96, 96): (_RESIDENT,),
    (Mode.CONV, 96, 192): (replace(_WIDE, a_stages=2, b_stages=11), _SMALL_192),
    (Mode.CONV, 192, 192): (_WIDE, _SMALL_192),
    (Mode.CONV, 192, 384): (_PAIR, _SMALL_PAIR),
    (Mode.CONV, 384, 384): (_PAIR, _SMALL_PAIR),
    (Mode.UPSAMPLE, 384, 192): (replace(_WIDE, a_stages=4, b_stages=11), replace(_SMALL_192, a_stages=5, cost=1.43)),
    (Mode.UPSAMPLE, 192, 96): (_RESIDENT,),
    (Mode.DOWNSAMPLE, 96, 96): (_DEEP_RESIDENT,),
    (Mode.DOWNSAMPLE, 192, 192): (
        replace(_WIDE, a_stages=4, b_stages=12, stagger=0), replace(_SMALL_192, a_stages=5, cost=1.39),
    ),
    (Mode.DOWNSAMPLE, 384, 384): (
        replace(_PAIR, b_stages=13, stagger=0), replace(_SMALL_384, cost=1.76),
    ),
    # Qwen-Image 2.1
    (Mode.CONV, 80, 1152): (_SMALL_1152,),
    (Mode.CONV, 1152, 1152): (_SMALL_1152,),
    (Mode.CONV, 1152, 576): (_LARGE_576, _SMALL_576),
    (Mode.CONV, 576, 576): (_LARGE_576, _SMALL_576),
    (Mode.CONV, 576, 288): (_LARGE_288, _SMALL_288),
    (Mode.CONV, 288, 288): (_LARGE_288, _SMALL_288),
    (Mode.CONV, 288, 144): (replace(_LARGE_144, a_stages=3), replace(_SMALL_144, cost=1.07)),
    (Mode.CONV, 144, 144): (_LARGE_144, _SMALL_144),
    (Mode.CONV, 384, 768): (_SMALL_768,),
    (Mode.CONV, 768, 768): (_SMALL_768,),
    (Mode.UPSAMPLE, 1152, 1152): _UP_1152,
    (Mode.UPSAMPLE, 576, 576): _UP_576,
    (Mode.UPSAMPLE, 288, 288): _UP_288,
    (Mode.DOWNSAMPLE, 768, 768): (_SMALL_768,),
    (Mode.POINTWISE, 1152, 1152): (replace(_SMALL_1152, stagger=0),),
    (Mode.POINTWISE, 768, 768): (_SMALL_768,),
}  # fmt: skip


def _float8(*schedules: Schedule) -> tuple[Schedule, ...]:
    """With float8 input: twice the channels in the same bytes."""
    return tuple(replace(schedule, kc=2 * schedule.kc) for schedule in schedules)


_DEEP_PAIR = replace(_PAIR, a_stages=2, b_stages=11)
FLOAT8_SCHEDULES: dict[tuple[Mode, int, int], tuple[Schedule, ...]] = {
    (Mode.CONV, 96, 96): _float8(_DEEP_RESIDENT),
    (Mode.CONV, 192, 192): _float8(_WIDE, _SMALL_192),
    (Mode.CONV, 192, 384): _float8(_DEEP_PAIR, _SMALL_384),
    (Mode.CONV, 384, 384): _float8(_DEEP_PAIR, replace(_SMALL_384, cost=1.9)),
    (Mode.UPSAMPLE, 384, 192): _float8(replace(_WIDE, a_stages=4, b_stages=11), _SMALL_192),
    (Mode.UPSAMPLE, 192, 96): _float8(replace(_RESIDENT, a_stages=4)),
    (Mode.CONV, 1152, 1152): _float8(_SMALL_1152),
    (Mode.CONV, 1152, 576): _float8(_LARGE_576, _SMALL_576),
    (Mode.CONV, 576, 576): _float8(_LARGE_576, _SMALL_576),
    (Mode.CONV, 576, 288): _float8(_LARGE_288, _SMALL_288),
    (Mode.CONV, 288, 288): _float8(_LARGE_288, _SMALL_288),
    (Mode.CONV, 288, 144): _float8(_LARGE_144, _SMALL_144),
    (Mode.CONV, 144, 144): _float8(_LARGE_144, _SMALL_144),
    (Mode.UPSAMPLE, 1152, 1152): _float8(*_UP_1152),
    (Mode.UPSAMPLE, 576, 576): _float8(*_UP_576),
    (Mode.UPSAMPLE, 288, 288): _float8(*_UP_288),
}


def tile_count(schedule: Schedule, mode: Mode, batch: int, height: int, width: int) -> tuple[int, int, int]:
    """``(tiles_x, tiles_y, tiles)`` over the tiled grid: the input's for UPSAMPLE, else the output's."""
    rows, columns = schedule.tile()
    tiles_y, tiles_x = -(-height // rows), -(-width // columns)
    return tiles_x, tiles_y, batch * tiles_y * tiles_x * (4 if mode == Mode.UPSAMPLE else 1)


class Lines(NamedTuple):
    """Lines of tiles of a kernel's output, whose finished tiles it counts."""

    per_image: int
    rows: int  # of pixels in a line
    finished: int  # count of a line that is


def lines_of(schedule: Schedule, mode: Mode, height: int, width: int) -> Lines:
    """For a tiled grid of ``height`` x ``width``, see :func:`tile_count`."""
    tiles_x, tiles_y, tiles = tile_count(schedule, mode, 1, height, width)
    scale = 2 if mode == Mode.UPSAMPLE else 1
    return Lines(tiles_y, scale * schedule.tile()[0], tiles // tiles_y * schedule.split)


def grid_blocks(schedule: Schedule, mode: Mode, tiles: int, room: Room) -> int:
    """Blocks to launch. Resident weights belong to one parity: then every parity has as many blocks."""
    clusters = min(tiles, room.of(schedule.split))
    if schedule.resident and mode == Mode.UPSAMPLE:
        clusters = clusters // 4 * 4
    return clusters * schedule.split


def rounds(schedule: Schedule, mode: Mode, batch: int, height: int, width: int, room: Room) -> float:
    """Tiles that a block computes on average."""
    tiles = tile_count(schedule, mode, batch, height, width)[2]
    return tiles * schedule.split / grid_blocks(schedule, mode, tiles, room)


def ends_early(schedule: Schedule, mode: Mode, batch: int, height: int, width: int, room: Room) -> bool:
    """Whether blocks end long enough before others for the next kernel to use that.

    They do not where each has one tile. With resident weights a tile takes 4 us, no more than the reports do and the
    loading of the next kernel's weights.
    """
    return not schedule.resident and rounds(schedule, mode, batch, height, width, room) > 1


def load(schedule: Schedule, mode: Mode, batch: int, height: int, width: int, room: Room) -> float:
    """Pixels, times its share of the channels, that a block has to do: what is missing from the last round of tiles is the
    next kernel's (kernels/overlap.py)."""
    rows, columns = schedule.tile()
    return rounds(schedule, mode, batch, height, width, room) * rows * columns / schedule.split


def choose_schedule(
    mode: Mode, channels: int, out: int, batch: int, height: int, width: int, room: Room, float8: bool = False,
    schedules: tuple[Schedule, ...] = (),
) -> Schedule:  # fmt: skip
    """The one of ``schedules`` (default: of the table) whose blocks take least."""
    choices = schedules or (FLOAT8_SCHEDULES if float8 else SCHEDULES)[mode, channels, out]
    return min(choices, key=lambda s: s.cost * load(s, mode, batch, height, width, room))

"""Tile configurations as data, and the choice among them.

The tables were measured on one NVIDIA H200; other GPUs start from the same tables, cut to their shared memory. What
``qwen-vae-accel tune`` measured on a GPU (autotune.py, tuned.py) comes first there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from qwen_vae_accel.kernels.sm90.schedules import Schedule

if TYPE_CHECKING:
    from qwen_vae_accel.kernels.layout import Grid
    from qwen_vae_accel.kernels.weights import ConvWeights, SmallConvWeights


@dataclass(frozen=True, slots=True)
class Device:
    """What kernel selection needs to know of a GPU; pass your own to look at another one's choices."""

    multiprocessors: int
    shared_memory: int  # bytes one program may use
    tma: bool  # bulk tensor copies (compute capability 9.0 and later)
    wgmma: bool = False  # the CUDA C++ kernels of sm90/ run (compute capability 9.0 alone, with NVRTC)


@dataclass(frozen=True, slots=True)
class ConvConfig:
    block_rows: int
    block_k: int
    warps: int
    stages: int
    per_sm: int = 0  # 0: one program per tile; n: persistent programs, n on each multiprocessor
    registers: int | None = None  # upper limit per thread
    wave: float = 1.0  # time of one wave of tiles, relative to the alternatives

    def programs(self, tiles: int, device: Device) -> int:
        return min(tiles, self.per_sm * device.multiprocessors) if self.per_sm else tiles

    def launch_options(self) -> dict[str, int]:
        options = {"num_warps": self.warps, "num_stages": self.stages}
        if self.registers is not None:
            options["maxnreg"] = self.registers
        return options


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    block_queries: int
    block_keys: int
    warps: int
    stages: int
    specialized: bool = False  # sm90/attention.py, with tiles of its own: block_queries and block_keys must say which
    rate: float = 390e12  # operations per second on 132 multiprocessors, for choosing splits


# Kernel, input channels, output channels, and where it matters the epilogue. Several configurations: the later ones have
# smaller tiles, for images too small to fill the GPU; ``wave`` is their time per wave of tiles, the first one's being 1.
H200_CONVS: dict[tuple, tuple[ConvConfig, ...]] = {
    ("in", 16, 384): (ConvConfig(64, 32, 4, 4),),
    ("in", 3, 96): (ConvConfig(128, 32, 4, 3),),
    ("in", 4, 96): (ConvConfig(128, 32, 4, 3),),
    ("conv", 96, 96): (ConvConfig(128, 32, 4, 4),),
    ("conv", 96, 96, "norm"): (ConvConfig(256, 32, 8, 4),),
    ("conv", 96, 192): (ConvConfig(128, 32, 4, 4),),
    ("conv", 192, 192): (ConvConfig(128, 32, 4, 4),),
    ("conv", 192, 192, "norm"): (ConvConfig(256, 64, 8, 3),),
    ("conv", 192, 192, "shortcut x norm"): (ConvConfig(256, 64, 8, 3),),
    ("conv", 192, 384): (ConvConfig(128, 64, 8, 3), ConvConfig(64, 64, 4, 3, wave=0.57)),
    ("conv", 384, 384): (ConvConfig(128, 64, 8, 3), ConvConfig(64, 64, 4, 3, wave=0.57)),
    ("proj", 384, 384): (ConvConfig(64, 64, 4, 2),),
    ("qkv", 384, 1152): (ConvConfig(64, 64, 4, 2),),
    ("up", 384, 192): (ConvConfig(128, 64, 8, 4),),
    ("up", 192, 96): (ConvConfig(128, 64, 8, 3),),
    ("down", 96, 96): (ConvConfig(128, 32, 4, 4),),
    ("down", 192, 192): (ConvConfig(64, 64, 4, 3),),
    ("down", 384, 384): (ConvConfig(128, 64, 8, 3), ConvConfig(64, 64, 4, 3, wave=0.6)),
    # Float8: not measured yet; the 16-bit choices with the same bytes per load where the width allows.
    ("conv float8", 96, 96): (ConvConfig(128, 32, 4, 5),),
    ("conv float8", 192, 192): (ConvConfig(128, 64, 4, 4),),
    ("conv float8", 192, 384): (ConvConfig(128, 64, 8, 4), ConvConfig(64, 64, 4, 4, wave=0.57)),
    ("conv float8", 384, 384): (ConvConfig(128, 128, 8, 3), ConvConfig(64, 128, 4, 3, wave=0.57)),
    ("up float8", 384, 192): (ConvConfig(128, 128, 8, 4),),
    ("up float8", 192, 96): (ConvConfig(128, 64, 8, 4),),
}
H200_ATTENTION = AttentionConfig(128, 32, 8, 2, specialized=True, rate=615e12)

# What a configuration is for: kernel, input channels, output channels, epilogue; ("attention",); or schedule_key's.
Key = tuple[str | int, ...]
Config = ConvConfig | AttentionConfig | Schedule

ATTENTION_KEY: Key = ("attention",)
SCHEDULE_PREFIX = "sm90 "
_FLOAT8_SUFFIX = " float8"
_RESERVED = 20 << 10  # bytes of shared memory left for the epilogue and barriers
_CHANNELS = 384  # of the attention


def conv_key(kind: str, weights: ConvWeights | SmallConvWeights, epilogue: str) -> Key:
    """Of a Triton convolution."""
    suffix = _FLOAT8_SUFFIX if weights.weight.element_size() == 1 else ""
    return kind + suffix, weights.in_channels, weights.out_channels, epilogue


def schedule_key(kind: str, weights: ConvWeights) -> Key:
    """Of a convolution of sm90/, whatever its epilogue."""
    return SCHEDULE_PREFIX + str(conv_key(kind, weights, "")[0]), weights.in_channels, weights.out_channels


def conv_fits(config: ConvConfig, key: Key, device: Device) -> bool:
    """Whether the operands of a Triton convolution fit into the shared memory of a program."""
    return config.stages * _stage_bytes(config, key) + _RESERVED <= device.shared_memory


def _stage_bytes(config: ConvConfig, key: Key) -> int:
    itemsize = 1 if str(key[0]).endswith(_FLOAT8_SUFFIX) else 2
    return itemsize * (config.block_rows + min(int(key[2]), 384)) * config.block_k


def attention_fits(config: AttentionConfig, device: Device) -> bool:
    tiles = config.block_queries + 2 * config.stages * config.block_keys
    return (device.wgmma or not config.specialized) and 2 * _CHANNELS * tiles + _RESERVED <= device.shared_memory


def conv_waves(config: ConvConfig, grid: Grid, device: Device) -> int:
    """Rounds of tiles, one on each multiprocessor, that cover ``grid``."""
    return -(-grid.rows // (config.block_rows * device.multiprocessors))


def attention_seconds(config: AttentionConfig, grid: Grid, device: Device, splits: int) -> float:
    """An estimate: whole waves of tiles, and the merging of partial results (fp32 through memory)."""
    count = grid.height * grid.width
    tiles = -(-count // config.block_queries) * grid.batch
    tile_time = 4 * config.block_queries * count * _CHANNELS * 132 / config.rate
    merge = 5e-6 + 8 * splits * grid.pixels * _CHANNELS / 3.5e12 if splits > 1 else 0.0
    return -(-tiles * splits // device.multiprocessors) * tile_time / splits + merge


@dataclass(frozen=True, slots=True)
class Tuning:
    """Which configuration each kernel runs with.

    ``hopper_convs``: the CUDA C++ convolutions of sm90/ where the GPU and NVRTC allow, else the Triton ones everywhere.
    ``measured``: configurations found on this very GPU; what is there comes before the tables.
    """

    convs: Mapping[tuple, tuple[ConvConfig, ...]] = field(default_factory=lambda: H200_CONVS)
    attention: AttentionConfig = H200_ATTENTION
    hopper_convs: bool = True
    measured: Mapping[Key, tuple[Config, ...]] = field(default_factory=dict)

    def with_measured(self, found: Mapping[Key, tuple[Config, ...]]) -> Tuning:
        """With ``found`` in place of what was measured of the same kernels."""
        return replace(self, measured={**self.measured, **found})

    def shipped(self, key: Key, device: Device) -> tuple[ConvConfig, ...]:
        """The table's configurations of a Triton convolution that fit ``device``."""
        # Without bulk copies, registers go to addresses, and the table's tiles spill.
        found = self.convs.get(key, self.convs.get(key[:3], ())) if device.tma else ()
        return tuple(config for config in found if conv_fits(config, key, device))

    def conv(self, kind: str, weights: ConvWeights | SmallConvWeights, grid: Grid, device: Device, epilogue: str) -> ConvConfig:
        key = conv_key(kind, weights, epilogue)
        measured = tuple(config for config in self.measured.get(key, ()) if isinstance(config, ConvConfig))
        if choices := measured or self.shipped(key, device):
            return min(choices, key=lambda c: conv_waves(c, grid, device) * c.wave)
        small = ConvConfig(64, 32, 8 if weights.out_channels > 192 else 4, 1)
        stages = max(1, min(4, (device.shared_memory - _RESERVED) // _stage_bytes(small, key)))
        return ConvConfig(64, 32, small.warps, stages)

    def attention_on(self, device: Device) -> AttentionConfig:
        measured = tuple(config for config in self.measured.get(ATTENTION_KEY, ()) if isinstance(config, AttentionConfig))
        plain = AttentionConfig(128, 32, 8, 2)
        shipped = (self.attention, plain, AttentionConfig(64, 32, 8, 2), AttentionConfig(64, 16, 8, 1))
        fitting = (choice for choice in (*measured, *shipped) if attention_fits(choice, device))
        return next(fitting, AttentionConfig(32, 16, 4, 1))

    def attention_splits(self, grid: Grid, device: Device) -> int:
        """Programs per query tile that fill the GPU best."""
        config = self.attention_on(device)
        most = max(1, min(8, grid.height * grid.width // 256))
        return min(range(1, most + 1), key=lambda splits: attention_seconds(config, grid, device, splits))

    def schedules(self, kind: str, weights: ConvWeights) -> tuple[Schedule, ...]:
        """Measured schedules of a convolution of sm90/; none: the ones shipped with it."""
        found = self.measured.get(schedule_key(kind, weights), ())
        return tuple(schedule for schedule in found if isinstance(schedule, Schedule))

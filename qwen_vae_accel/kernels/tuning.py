"""Tile configurations as data, and the choice among them.

The tables were measured on one NVIDIA H200; other GPUs start from the same tables, cut to their shared memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwen_vae_accel.kernels.layout import Grid
    from qwen_vae_accel.kernels.weights import ConvWeights, SmallConvWeights


@dataclass(frozen=True, slots=True)
class Device:
    """What kernel selection needs to know of a GPU; pass your own to look at another one's choices."""

    multiprocessors: int
    shared_memory: int  # bytes one program may use
    tma: bool  # bulk tensor copies (compute capability 9.0 and later)
    wgmma: bool = False  # warpgroup matrix instructions (compute capability 9.0 alone)


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
    specialized: bool = False  # attention_hopper.py; then the other fields are not used
    rate: float = 390e12  # operations per second on 132 multiprocessors, for choosing splits


# Kernel, input channels, output channels, and where it matters the epilogue. Several configurations: the later ones have
# smaller tiles, for images too small to fill the GPU; ``wave`` is their time per wave of tiles, the first one's being 1.
H200_CONVS: dict[tuple, tuple[ConvConfig, ...]] = {
    ("in", 16, 384): (ConvConfig(64, 32, 8, 3),),
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
    ("proj", 384, 384): (ConvConfig(128, 64, 8, 3), ConvConfig(64, 64, 4, 3, wave=0.57)),
    ("qkv", 384, 1152): (ConvConfig(128, 64, 8, 3),),
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
H200_ATTENTION = AttentionConfig(128, 32, 8, 2, specialized=True, rate=550e12)

_RESERVED = 20 << 10  # bytes of shared memory left for the epilogue and barriers


@dataclass(frozen=True, slots=True)
class Tuning:
    """Which configuration each kernel runs with.

    ``hopper_convs``: the CUDA C++ convolutions of sm90/ where the GPU and NVRTC allow, else the Triton ones everywhere.
    """

    convs: Mapping[tuple, tuple[ConvConfig, ...]] = field(default_factory=lambda: H200_CONVS)
    attention: AttentionConfig = H200_ATTENTION
    hopper_convs: bool = True

    def conv(self, kind: str, weights: ConvWeights | SmallConvWeights, grid: Grid, device: Device, epilogue: str) -> ConvConfig:
        key = (kind, weights.in_channels, weights.out_channels)
        width, itemsize = min(weights.out_channels, 384), weights.weight.element_size()
        if itemsize == 1:
            key = (f"{kind} float8", *key[1:])
        per_stage = lambda c: itemsize * (c.block_rows + width) * c.block_k  # noqa: E731
        choices = [
            config
            for config in self.convs.get((*key, epilogue), self.convs.get(key, ()))
            # Without bulk copies, registers go to addresses, and the table's tiles spill.
            if device.tma and config.stages * per_stage(config) + _RESERVED <= device.shared_memory
        ]
        if choices:
            waves = lambda c: -(-grid.rows // (c.block_rows * device.multiprocessors))  # noqa: E731
            return min(choices, key=lambda c: waves(c) * c.wave)
        small = ConvConfig(64, 32, 8 if width > 192 else 4, 1)
        stages = max(1, min(4, (device.shared_memory - _RESERVED) // per_stage(small)))
        return ConvConfig(64, 32, small.warps, stages)

    def attention_on(self, device: Device) -> AttentionConfig:
        channels = 384
        plain = AttentionConfig(128, 32, 8, 2)
        for choice in (self.attention, plain, AttentionConfig(64, 32, 8, 2), AttentionConfig(64, 16, 8, 1)):
            if choice.specialized and not device.wgmma:
                continue
            tiles = choice.block_queries + 2 * choice.stages * choice.block_keys
            if 2 * channels * tiles + _RESERVED <= device.shared_memory:
                return choice
        return AttentionConfig(32, 16, 4, 1)

    def attention_splits(self, grid: Grid, device: Device) -> int:
        """Programs per query tile that fill the GPU best: whole waves against the cost of merging (fp32 to memory)."""
        config = self.attention_on(device)
        count, channels, processors = grid.height * grid.width, 384, device.multiprocessors
        tiles = -(-count // config.block_queries) * grid.batch
        tile_time = 4 * config.block_queries * count * channels * 132 / config.rate

        def cost(splits: int) -> float:
            waves = -(-tiles * splits // processors)
            merge = 5e-6 + 8 * splits * grid.pixels * channels / 3.5e12 if splits > 1 else 0.0
            return waves * tile_time / splits + merge

        most = max(1, min(8, count // 256))
        return min(range(1, most + 1), key=cost)

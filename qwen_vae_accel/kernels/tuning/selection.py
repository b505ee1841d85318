"""Which configuration a kernel runs with: one measured on this GPU, or one of the tables, or one that fits any GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from qwen_vae_accel.kernels.gpu import Gpu
from qwen_vae_accel.kernels.layout import Grid
from qwen_vae_accel.kernels.sm90.schedules import Schedule
from qwen_vae_accel.kernels.tuning.configs import (
    RESERVED,
    AttentionConfig,
    Config,
    ConvConfig,
    attention_fits,
    attention_seconds,
    conv_fits,
    conv_waves,
    stage_bytes,
)
from qwen_vae_accel.kernels.tuning.keys import KernelKey
from qwen_vae_accel.kernels.tuning.tables import H200_ATTENTION, H200_CONVS

_PARTIAL_BYTES = 192 << 20  # of partial results; beyond, the waves are many


@dataclass(frozen=True, slots=True)
class Tuning:
    """Which configuration each kernel runs with.

    Attributes:
        convs: shipped configurations of Triton's convolutions.
        attention: the shipped one of the attention.
        sm90: whether convolutions run in ``sm90/`` where the GPU and NVRTC allow, or in Triton everywhere.
        measured: configurations found on this very GPU; what is there comes before what ships.
    """

    convs: Mapping[KernelKey, tuple[ConvConfig, ...]] = field(default_factory=lambda: H200_CONVS)
    attention: AttentionConfig = H200_ATTENTION
    sm90: bool = True
    measured: Mapping[KernelKey, tuple[Config, ...]] = field(default_factory=dict)

    def with_measured(self, found: Mapping[KernelKey, tuple[Config, ...]]) -> Tuning:
        """Return the same tuning with ``found`` in place of what was measured of the same kernels."""
        return replace(self, measured={**self.measured, **found})

    def shipped(self, key: KernelKey, gpu: Gpu) -> tuple[ConvConfig, ...]:
        """List the table's configurations of a Triton convolution that fit ``gpu``."""
        # Without bulk copies, registers go to addresses, and the table's tiles spill.
        found = self.convs.get(key, self.convs.get(key.any_epilogue, ())) if gpu.bulk_copies else ()
        return tuple(config for config in found if conv_fits(config, key, gpu))

    def conv(self, key: KernelKey, grid: Grid, gpu: Gpu) -> ConvConfig:
        """Choose for a Triton convolution whose tiles divide ``grid``."""
        measured = tuple(config for config in self.measured.get(key, ()) if isinstance(config, ConvConfig))
        if choices := measured or self.shipped(key, gpu):
            return min(choices, key=lambda c: conv_waves(c, grid, gpu) * c.wave)
        small = ConvConfig(64, 32, 8 if key.out_channels > 192 else 4, 1)
        stages = max(1, min(4, (gpu.shared_memory - RESERVED) // stage_bytes(small, key)))
        return ConvConfig(64, 32, small.warps, stages)

    def attention_on(self, key: KernelKey, gpu: Gpu) -> AttentionConfig:
        """Choose for the attention: the first that fits ``gpu``."""
        measured = tuple(config for config in self.measured.get(key, ()) if isinstance(config, AttentionConfig))
        plain = AttentionConfig(128, 32, 8, 2)
        shipped = (self.attention, plain, AttentionConfig(64, 32, 8, 2), AttentionConfig(64, 16, 8, 1))
        fitting = (choice for choice in (*measured, *shipped) if attention_fits(choice, key, gpu))
        return next(fitting, AttentionConfig(32, 16, 4, 1))

    def attention_splits(self, key: KernelKey, grid: Grid, gpu: Gpu) -> int:
        """Choose how many blocks share the keys of a tile of queries, so that they fill the GPU best."""
        config = self.attention_on(key, gpu)
        count, one = grid.height * grid.width, 4 * key.in_channels * grid.pixels  # keys; bytes of one split's results
        most = max(1, min(8, count // 256, _PARTIAL_BYTES // max(1, one)))
        return min(range(1, most + 1), key=lambda splits: attention_seconds(config, key, grid, gpu, splits))

    def schedules(self, key: KernelKey) -> tuple[Schedule, ...]:
        """List the measured schedules of a convolution of ``sm90/``; none stands for those shipped with it."""
        return tuple(schedule for schedule in self.measured.get(key, ()) if isinstance(schedule, Schedule))

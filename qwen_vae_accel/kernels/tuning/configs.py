"""Tile configurations as values, whether they fit a GPU, and how long they take by rule of thumb."""

from __future__ import annotations

from dataclasses import dataclass

from qwen_vae_accel.kernels.gpu import Gpu
from qwen_vae_accel.kernels.layout import Grid
from qwen_vae_accel.kernels.sm90.schedules import Schedule
from qwen_vae_accel.kernels.tuning.keys import KernelKey

RESERVED = 20 << 10  # bytes of shared memory left for the epilogue and barriers


@dataclass(frozen=True, slots=True)
class ConvConfig:
    """How a Triton convolution divides its work.

    Attributes:
        block_rows: rows of the output that a tile has.
        block_k: input channels that a step multiplies.
        warps: of a block.
        stages: steps whose operands are in flight.
        per_sm: 0 for one block per tile; n for persistent blocks, n on each multiprocessor.
        registers: upper limit per thread, None for the compiler's.
        wave: time of one wave of tiles, relative to the alternatives.
    """

    block_rows: int
    block_k: int
    warps: int
    stages: int
    per_sm: int = 0
    registers: int | None = None
    wave: float = 1.0

    def blocks(self, tiles: int, gpu: Gpu) -> int:
        """How many blocks to launch for ``tiles``."""
        return min(tiles, self.per_sm * gpu.multiprocessors) if self.per_sm else tiles

    def launch_options(self) -> dict[str, int]:
        """Keyword arguments of the launch that are Triton's own."""
        options = {"num_warps": self.warps, "num_stages": self.stages}
        if self.registers is not None:
            options["maxnreg"] = self.registers
        return options


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    """How the attention divides its work.

    Attributes:
        block_queries: queries of a tile.
        block_keys: keys of a step.
        warps: of a block.
        stages: steps whose operands are in flight.
        sm90: the kernel of ``sm90/``, whose tiles are its own: ``block_queries`` and ``block_keys`` must say which.
        rate: operations per second on 132 multiprocessors, for choosing splits.
    """

    block_queries: int
    block_keys: int
    warps: int
    stages: int
    sm90: bool = False
    rate: float = 390e12


Config = ConvConfig | AttentionConfig | Schedule

# The field by which alternatives are weighed against each other, and its value where nothing was measured.
RELATIVE_FIELDS: dict[type, tuple[str, float]] = {
    ConvConfig: ("wave", 1.0), Schedule: ("cost", 1.0), AttentionConfig: ("rate", 390e12),
}  # fmt: skip


def stage_bytes(config: ConvConfig, key: KernelKey) -> int:
    """Bytes of shared memory that the operands of one step take: a tile holds at most 384 output channels."""
    return (1 if key.float8 else 2) * (config.block_rows + min(key.out_channels, 384)) * config.block_k


def conv_fits(config: ConvConfig, key: KernelKey, gpu: Gpu) -> bool:
    """Whether the operands of a Triton convolution fit into the shared memory of a block."""
    return config.stages * stage_bytes(config, key) + RESERVED <= gpu.shared_memory


def attention_fits(config: AttentionConfig, key: KernelKey, gpu: Gpu) -> bool:
    """Whether queries, keys and values fit into the shared memory of a block, and the GPU has the kernel."""
    tiles = config.block_queries + 2 * config.stages * config.block_keys
    return (gpu.sm90 or not config.sm90) and 2 * key.in_channels * tiles + RESERVED <= gpu.shared_memory


def conv_waves(config: ConvConfig, grid: Grid, gpu: Gpu) -> int:
    """Rounds of tiles, one on each multiprocessor, that cover ``grid``."""
    return -(-grid.rows // (config.block_rows * gpu.multiprocessors))


def attention_seconds(config: AttentionConfig, key: KernelKey, grid: Grid, gpu: Gpu, splits: int) -> float:
    """An estimate: whole waves of tiles, and the merging of partial results (fp32 through memory)."""
    count = grid.height * grid.width
    tiles = -(-count // config.block_queries) * grid.batch
    tile_time = 4 * config.block_queries * count * key.in_channels * 132 / config.rate
    merge = 5e-6 + 8 * splits * grid.pixels * key.in_channels / 3.5e12 if splits > 1 else 0.0
    return -(-tiles * splits // gpu.multiprocessors) * tile_time / splits + merge

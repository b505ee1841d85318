"""Which configurations tuning tries for a kernel: bounded lists around the shipped ones, as data.

A stored configuration outside its list is not run: a schedule of sm90/ that breaks the rules below could wait forever.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from qwen_vae_accel.kernels.gpu import Gpu
from qwen_vae_accel.kernels.network import Kind
from qwen_vae_accel.kernels.sm90.schedules import (
    FLOAT8_SCHEDULES,
    MODES,
    SCHEDULES,
    SHARED_LIMIT,
    Mode,
    Schedule,
    Variant,
)
from qwen_vae_accel.kernels.tuning.configs import AttentionConfig, Config, ConvConfig, attention_fits, conv_fits
from qwen_vae_accel.kernels.tuning.keys import KernelKey
from qwen_vae_accel.kernels.tuning.selection import Tuning
from qwen_vae_accel.kernels.tuning.tables import ATTENTION_KEY, H200_ATTENTION, H200_CONVS

# Rows of a tile and warps. Accumulators decide: fewer registers leave the tensor cores idle, more are spilled.
_TILES = ((64, 4), (64, 8), (128, 4), (128, 8), (256, 8))
_ACCUMULATORS = range(24, 193)  # registers of a thread
_MOST_STAGES = 4
_MOST_WEIGHT_STAGES = 16
_STAGGERS = (8, 4, 0)  # steps


def candidates(key: KernelKey, gpu: Gpu) -> tuple[Config, ...]:
    """What to try for ``key`` on ``gpu``, the shipped configurations first; every relative cost in it is 1.

    Raises:
        ValueError: there is no such kernel.
    """
    if key == ATTENTION_KEY:
        return _attention(key, gpu)
    if key.sm90 and key.kind in MODES and not key.epilogue:
        table = FLOAT8_SCHEDULES if key.float8 else SCHEDULES
        place = MODES[key.kind], key.in_channels, key.out_channels
        if place in table:
            return tuple(dict.fromkeys(_schedules(*place, key.float8)))
    elif not key.sm90 and key.any_epilogue in H200_CONVS:
        found = (*Tuning().shipped(key, gpu), *_convs(key, gpu))
        return tuple(dict.fromkeys(replace(config, wave=1.0) for config in found))
    raise ValueError(f"no kernel {key}")


def _convs(key: KernelKey, gpu: Gpu) -> Iterator[ConvConfig]:
    width = min(key.out_channels, 384)
    dividing = [k for k in (32, 64, 128) if key.in_channels % k == 0]
    depths = [32] if key.kind is Kind.IN else dividing[: 3 if key.float8 else 2][-2:]
    for rows, warps in _TILES if gpu.bulk_copies else ((32, 4), *_TILES):  # warpgroup instructions need 64 rows
        if rows * width // (32 * warps) not in _ACCUMULATORS:
            continue
        for depth in depths:
            fitting = [s for s in range(1, _MOST_STAGES + 1) if conv_fits(ConvConfig(rows, depth, warps, s), key, gpu)]
            for stages in fitting[-2:] if depth == depths[-1] else fitting[-1:]:
                yield ConvConfig(rows, depth, warps, stages)
            if depth == depths[-1] and key.kind in (Kind.CONV, Kind.PROJ) and fitting[:-1]:
                yield ConvConfig(rows, depth, warps, fitting[-2], per_sm=1)


def _attention(key: KernelKey, gpu: Gpu) -> tuple[AttentionConfig, ...]:
    plain = (
        AttentionConfig(queries, keys, warps, stages)
        for queries, warps in ((128, 8), (64, 8), (64, 4))
        for keys in (16, 32, 64)
        for stages in (2, 1)
    )
    return tuple(config for config in (H200_ATTENTION, *plain) if attention_fits(config, key, gpu))


def _schedules(mode: Mode, channels: int, out: int, float8: bool) -> Iterator[Schedule]:
    """The shipped ones, and the same tiles with other depths of the rings and another distance between the warpgroups."""
    shipped = (FLOAT8_SCHEDULES if float8 else SCHEDULES)[mode, channels, out]
    yield from (replace(schedule, cost=1.0) for schedule in shipped)

    def variant(schedule: Schedule, residual: bool) -> Variant:
        return Variant(mode, channels, out, 0, residual, True, 2, schedule, float8, float8, float8)

    def fits(schedule: Schedule) -> bool:
        return variant(schedule, mode in (Mode.CONV, Mode.POINTWISE)).shared_bytes() <= SHARED_LIMIT

    taps = {Mode.CONV: 9, Mode.POINTWISE: 1}.get(mode, 4)  # of the first chunks
    for base in shipped:
        for a_stages in range(max(2, base.a_stages - 1), base.a_stages + 2):
            for stagger in (0,) if base.resident else _STAGGERS:
                trial = replace(base, a_stages=a_stages, stagger=stagger, cost=1.0)
                if not base.resident:
                    depths = range(_MOST_WEIGHT_STAGES, stagger, -1)
                    trial = next((t for b in depths if fits(t := replace(trial, b_stages=b))), replace(trial, b_stages=0))
                # The warpgroup ahead must reach its signal with what the rings hold: the other has released nothing yet.
                # A residual takes buffers from the weights; an upsampling that halves its channels has none.
                residual = not base.resident and (mode != Mode.UPSAMPLE or channels == out)
                kept = variant(trial, residual).fitted().schedule.b_stages
                if kept > stagger and a_stages > stagger // taps and fits(trial):
                    yield trial

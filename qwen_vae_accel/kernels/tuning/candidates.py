"""Which configurations tuning tries for a kernel: bounded lists around the shipped ones, as data.

A stored configuration outside its list is not run: a schedule of sm90/ that breaks the rules below could wait forever.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from qwen_vae_accel.kernels.sm90.layers import MODES
from qwen_vae_accel.kernels.sm90.schedules import FLOAT8_SCHEDULES, SCHEDULES, SHARED_LIMIT, Mode, Schedule, Variant
from qwen_vae_accel.kernels.tuning.selection import (
    ATTENTION_KEY,
    H200_ATTENTION,
    H200_CONVS,
    SCHEDULE_PREFIX,
    AttentionConfig,
    Config,
    ConvConfig,
    Device,
    Key,
    Tuning,
    attention_fits,
    conv_fits,
)

# Rows of a tile and warps. Accumulators decide: fewer registers leave the tensor cores idle, more are spilled.
_TILES = ((64, 4), (64, 8), (128, 4), (128, 8), (256, 8))
_ACCUMULATORS = range(24, 193)  # registers of a thread
_MOST_STAGES = 4
_MOST_WEIGHT_STAGES = 16
_STAGGERS = (8, 4, 0)  # steps


def candidates(key: Key, device: Device) -> tuple[Config, ...]:
    """What to try for ``key`` on ``device``, the shipped configurations first; every relative cost in it is 1.

    Raises:
        ValueError: there is no such kernel.
    """
    if key == ATTENTION_KEY:
        return _attention(device)
    try:
        kind, channels, out, *epilogue = key
        name, channels, out = str(kind), int(channels), int(out)
        if name.startswith(SCHEDULE_PREFIX):
            if not epilogue:
                kind, _, float8 = name.removeprefix(SCHEDULE_PREFIX).partition(" ")
                return tuple(dict.fromkeys(_schedules(MODES[kind], channels, out, bool(float8))))
        elif len(epilogue) == 1 and isinstance(epilogue[0], str) and key[:3] in H200_CONVS:
            found = (*Tuning().shipped(key, device), *_convs(name, channels, out, key, device))
            return tuple(dict.fromkeys(replace(config, wave=1.0) for config in found))
    except (KeyError, TypeError, ValueError):
        pass
    raise ValueError(f"no kernel {key}")


def _convs(kind: str, channels: int, out: int, key: Key, device: Device) -> Iterator[ConvConfig]:
    width = min(out, 384)
    name, _, float8 = kind.partition(" ")
    depths = [32] if name == "in" else [k for k in (32, 64, 128) if channels % k == 0][: 3 if float8 else 2][-2:]
    for rows, warps in _TILES if device.tma else ((32, 4), *_TILES):  # warpgroup instructions need 64 rows
        if rows * width // (32 * warps) not in _ACCUMULATORS:
            continue
        for depth in depths:
            fitting = [s for s in range(1, _MOST_STAGES + 1) if conv_fits(ConvConfig(rows, depth, warps, s), key, device)]
            for stages in fitting[-2:] if depth == depths[-1] else fitting[-1:]:
                yield ConvConfig(rows, depth, warps, stages)
            if depth == depths[-1] and name in ("conv", "proj") and fitting[:-1]:
                yield ConvConfig(rows, depth, warps, fitting[-2], per_sm=1)


def _attention(device: Device) -> tuple[AttentionConfig, ...]:
    plain = (
        AttentionConfig(queries, keys, warps, stages)
        for queries, warps in ((128, 8), (64, 8), (64, 4))
        for keys in (16, 32, 64)
        for stages in (2, 1)
    )
    return tuple(config for config in (H200_ATTENTION, *plain) if attention_fits(config, device))


def _schedules(mode: Mode, channels: int, out: int, float8: bool) -> Iterator[Schedule]:
    """The shipped ones, and the same tiles with other depths of the rings and another distance between the warpgroups."""
    shipped = (FLOAT8_SCHEDULES if float8 else SCHEDULES)[mode, channels, out]
    yield from (replace(schedule, cost=1.0) for schedule in shipped)

    def fits(schedule: Schedule) -> bool:
        variant = Variant(mode, channels, out, 0, mode == Mode.CONV, True, 2, schedule, float8, float8, float8)
        return variant.shared_bytes() <= SHARED_LIMIT

    taps = 9 if mode == Mode.CONV else 4  # of the first chunks
    for base in shipped:
        for a_stages in range(max(2, base.a_stages - 1), base.a_stages + 2):
            for stagger in (0,) if base.resident else _STAGGERS:
                trial = replace(base, a_stages=a_stages, stagger=stagger, cost=1.0)
                if not base.resident:
                    depths = range(_MOST_WEIGHT_STAGES, stagger, -1)
                    trial = next((t for b in depths if fits(t := replace(trial, b_stages=b))), replace(trial, b_stages=0))
                # The warpgroup ahead must reach its signal with what the rings hold: the other has released nothing yet.
                if trial.b_stages > stagger and a_stages > stagger // taps and fits(trial):
                    yield trial

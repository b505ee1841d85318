"""From measured times to the configurations worth keeping."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import combinations

from qwen_vae_accel.kernels.layout import Grid
from qwen_vae_accel.kernels.sm90.layers import MODES
from qwen_vae_accel.kernels.sm90.schedules import Schedule, load
from qwen_vae_accel.kernels.tuning.selection import (
    ATTENTION_KEY,
    SCHEDULE_PREFIX,
    AttentionConfig,
    Config,
    ConvConfig,
    Device,
    Key,
    Tuning,
    attention_seconds,
    conv_waves,
)

WORTH = 0.99  # of another's time; a gain below that is noise


@dataclass(frozen=True, slots=True)
class Case:
    """A kernel at a size. The same case of two networks is the same launch."""

    kernel: str
    shape: str
    grid: Grid  # that tiles divide


Times = dict[Config, dict[Case, float]]  # milliseconds; infinite for what cannot run


def choose(key: Key, times: Times, device: Device) -> tuple[Config, ...]:
    """The fastest configuration, and a second one with it where that makes some sizes faster; none if none ran.

    Every case counts alike: by how much slower it is than its fastest. Between two configurations the kernels choose by
    load (rounds of tiles) times relative cost; the second one's cost is that of the measured ratios that serves best.
    """
    cases = sorted({case for found in times.values() for case in found}, key=str)
    complete = {c: found for c, found in times.items() if all(math.isfinite(found.get(case, math.inf)) for case in cases)}
    if not complete or not cases:
        return ()
    fastest = {case: min(found[case] for found in complete.values()) for case in cases}

    def slowness(spent: Mapping[Case, float]) -> float:
        return sum(spent[case] / fastest[case] for case in cases) / len(cases)

    alone = min(complete, key=lambda config: slowness(complete[config]))
    if isinstance(alone, AttentionConfig):
        return (_calibrated(alone, complete[alone], device),)
    best = slowness(complete[alone])
    chosen: tuple[Config, ...] = (alone,)
    loads = {
        config: {case: _load(key, config, case.grid, device) for case in cases}
        for config in (alone, *(min(complete, key=lambda config: complete[config][case]) for case in cases))
        if not isinstance(config, AttentionConfig)
    }
    # The order decides only whose cost is 1.
    for first, second in combinations(sorted(loads, key=lambda config: sum(loads[config].values())), 2):
        ratios = {case: complete[second][case] / complete[first][case] for case in cases}
        for cost in {ratios[case] * loads[first][case] / loads[second][case] for case in cases}:
            taken = {c: second if loads[second][c] * cost < loads[first][c] else first for c in cases}
            found = slowness({case: complete[config][case] for case, config in taken.items()})
            if found < best * WORTH:
                best, chosen = found, (first, _with_cost(second, cost))
    return chosen


def _load(key: Key, config: ConvConfig | Schedule, grid: Grid, device: Device) -> float:
    if isinstance(config, ConvConfig):
        return conv_waves(config, grid, device)
    mode = MODES[str(key[0]).removeprefix(SCHEDULE_PREFIX).split()[0]]
    return load(config, mode, grid.batch, grid.height, grid.width, device.multiprocessors)


def _with_cost(config: ConvConfig | Schedule, ratio: float) -> Config:
    return replace(config, cost=ratio) if isinstance(config, Schedule) else replace(config, wave=ratio)


def _calibrated(config: AttentionConfig, times: dict[Case, float], device: Device) -> AttentionConfig:
    """With the rate that explains the time of the largest case."""
    case = max(times, key=lambda case: case.grid.pixels)
    splits = Tuning(measured={ATTENTION_KEY: (config,)}).attention_splits(case.grid, device)
    merge = attention_seconds(replace(config, rate=math.inf), case.grid, device, splits)
    computing = attention_seconds(config, case.grid, device, splits) - merge
    left = times[case] / 1e3 - merge
    return replace(config, rate=config.rate * computing / left) if left > 0 else config

"""From measured times to the configurations worth keeping."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import combinations

from qwen_vae_accel.kernels.gpu import Gpu
from qwen_vae_accel.kernels.layout import Grid
from qwen_vae_accel.kernels.sm90.schedules import MODES, Room, Schedule, load
from qwen_vae_accel.kernels.tuning.configs import AttentionConfig, Config, ConvConfig, attention_seconds, conv_waves
from qwen_vae_accel.kernels.tuning.keys import KernelKey
from qwen_vae_accel.kernels.tuning.selection import Tuning

WORTH = 0.99  # of another's time; a gain below that is noise


@dataclass(frozen=True, slots=True)
class Problem:
    """A kernel at a size. The same problem of two networks is the same launch."""

    kernel: str
    shape: str
    grid: Grid  # that tiles divide


Times = dict[Config, dict[Problem, float]]  # milliseconds; infinite for what cannot run


def choose(key: KernelKey, times: Times, gpu: Gpu) -> tuple[Config, ...]:
    """The fastest configuration, and a second one with it where that makes some sizes faster; none if none ran.

    Every problem counts alike: by how much slower it is than its fastest. Between two configurations the kernels choose by
    load (rounds of tiles) times relative cost; the second one's cost is that of the measured ratios that serves best.
    """
    problems = sorted({problem for found in times.values() for problem in found}, key=str)
    complete = {
        c: found for c, found in times.items() if all(math.isfinite(found.get(problem, math.inf)) for problem in problems)
    }
    if not complete or not problems:
        return ()
    fastest = {problem: min(found[problem] for found in complete.values()) for problem in problems}

    def slowness(spent: Mapping[Problem, float]) -> float:
        return sum(spent[problem] / fastest[problem] for problem in problems) / len(problems)

    alone = min(complete, key=lambda config: slowness(complete[config]))
    if isinstance(alone, AttentionConfig):
        return (_calibrated(key, alone, complete[alone], gpu),)
    best = slowness(complete[alone])
    chosen: tuple[Config, ...] = (alone,)
    loads = {
        config: {problem: _load(key, config, problem.grid, gpu) for problem in problems}
        for config in (alone, *(min(complete, key=lambda config: complete[config][problem]) for problem in problems))
        if not isinstance(config, AttentionConfig)
    }
    # The order decides only whose cost is 1.
    for first, second in combinations(sorted(loads, key=lambda config: sum(loads[config].values())), 2):
        ratios = {problem: complete[second][problem] / complete[first][problem] for problem in problems}
        for cost in {ratios[problem] * loads[first][problem] / loads[second][problem] for problem in problems}:
            taken = {c: second if loads[second][c] * cost < loads[first][c] else first for c in problems}
            found = slowness({problem: complete[config][problem] for problem, config in taken.items()})
            if found < best * WORTH:
                best, chosen = found, (first, _with_cost(second, cost))
    return chosen


def _load(key: KernelKey, config: ConvConfig | Schedule, grid: Grid, gpu: Gpu) -> float:
    if isinstance(config, ConvConfig):
        return conv_waves(config, grid, gpu)
    return load(config, MODES[key.kind], grid.batch, grid.height, grid.width, Room(gpu.multiprocessors, gpu.clusters))


def _with_cost(config: ConvConfig | Schedule, ratio: float) -> Config:
    return replace(config, cost=ratio) if isinstance(config, Schedule) else replace(config, wave=ratio)


def _calibrated(key: KernelKey, config: AttentionConfig, times: dict[Problem, float], gpu: Gpu) -> AttentionConfig:
    """With the rate that explains the time of the largest problem."""
    problem = max(times, key=lambda problem: problem.grid.pixels)
    splits = Tuning(measured={key: (config,)}).attention_splits(key, problem.grid, gpu)
    merge = attention_seconds(replace(config, rate=math.inf), key, problem.grid, gpu, splits)
    computing = attention_seconds(config, key, problem.grid, gpu, splits) - merge
    left = times[problem] / 1e3 - merge
    return replace(config, rate=config.rate * computing / left) if left > 0 else config

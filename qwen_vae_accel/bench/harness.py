"""Measures trials one after another: a fresh model for each, warm-up, latency, memory, error against float32.

A latency sample starts with an idle device and ends when the result is there, since that is how pipelines call a VAE.
"""

from __future__ import annotations

import copy
import gc
import logging
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qwen_vae_accel.accuracy import measure
from qwen_vae_accel.backends.base import Job
from qwen_vae_accel.backends.samples import sample_input
from qwen_vae_accel.bench.methods import BASELINE, SHORT, BenchError, Method, Run, Trial
from qwen_vae_accel.engines.selfcheck import psnr_db
from qwen_vae_accel.kernels.timing import elapsed_ms
from qwen_vae_accel.model import ModelSource
from qwen_vae_accel.sizes import Size

logger = logging.getLogger(__name__)

MIB = 2**20


@dataclass(frozen=True, slots=True)
class Effort:
    """How long to measure one trial: until ``iterations`` samples or ``seconds`` have passed, at least three samples."""

    iterations: int
    seconds: float
    warmup: int

    @classmethod
    def default(cls, device: torch.device, iterations: int | None = None, seconds: float | None = None) -> Effort:
        """The effort for ``device`` where the user says nothing."""
        cuda = device.type == "cuda"
        return cls(iterations or (50 if cuda else 5), seconds or (5.0 if cuda else 30.0), 5 if cuda else 1)


@dataclass(frozen=True, slots=True)
class Row:
    """The result of one trial; without ``median_ms`` where it failed, ``error`` says how.

    Attributes:
        prepare_s: seconds until the first result: building, loading and compiling included.
        peak_mib: most memory that the allocator held during a call above what it held before the model was made, that is
            with weights, buffers and activations; None on the CPU, where it is not measured.
        held_mib: the same between calls.
        outside_mib: device memory that appeared outside torch's allocator: engines' own weights, loaded kernels, graphs.
        relative_l2: ``||output - exact|| / ||exact||``, exact being diffusers in float32 without TF32.
    """

    method: str
    dtype: str
    task: str
    size: Size
    median_ms: float | None = None
    p10_ms: float | None = None
    p90_ms: float | None = None
    samples: int = 0
    prepare_s: float | None = None
    peak_mib: float | None = None
    held_mib: float | None = None
    outside_mib: float | None = None
    relative_l2: float | None = None
    max_abs: float | None = None
    psnr_db: float | None = None
    error: str | None = None

    @property
    def label(self) -> str:
        """Method and dtype, as tables show it."""
        return f"{self.method} {self.dtype}"


class Harness:
    """Runs trials over copies of one VAE.

    Args:
        template: the VAE; never run itself, nor changed.
        device: where to measure.
        effort: how long.
        folder: where engine backends build.
    """

    def __init__(self, template: nn.Module, device: torch.device, effort: Effort, folder: Path) -> None:
        # Copies are made on the device, where that takes no time.
        self._template = copy.deepcopy(template).to(device)
        self._device = device
        self._effort = effort
        self._folder = folder
        self._topology = ModelSource(template).topology
        self._exact: dict[tuple[str, Size], Tensor] = {}

    def run(self, trial: Trial) -> Row:
        """Measure one trial; a failure of any kind becomes a row that tells it."""
        try:
            return self._measure(trial)
        except Exception as error:
            logger.info("%s %s %s failed", trial.method.label, trial.task, trial.size, exc_info=True)
            text = f"{type(error).__name__}: {error}".strip()
            return Row(trial.method.name, SHORT[trial.method.dtype], trial.task, trial.size, error=text[:2000])
        finally:
            self._clean()

    def _measure(self, trial: Trial) -> Row:
        x, exact = self._input(trial), self._reference(trial)
        self._clean()
        before, outside = self._allocated(), self._outside()
        vae = self._fresh(trial.method.vae_dtype)
        start = time.perf_counter()
        with torch.no_grad(), trial.method.prepare(vae, trial, self._folder) as run:
            x = x.to(self._device, trial.method.vae_dtype)
            output = run(x)
            self._synchronize()
            prepared = time.perf_counter() - start
            relative, psnr, largest = self._errors(trial.task, output, exact)
            del output
            samples = self._samples(run, x)
            peak, held = self._memory(run, x, before)
            outside = self._outside() - outside
        deciles = statistics.quantiles(samples, n=10, method="inclusive")
        return Row(
            method=trial.method.name,
            dtype=SHORT[trial.method.dtype],
            task=trial.task,
            size=trial.size,
            median_ms=statistics.median(samples),
            p10_ms=deciles[0],
            p90_ms=deciles[-1],
            samples=len(samples),
            prepare_s=prepared,
            peak_mib=peak,
            held_mib=held,
            outside_mib=outside / MIB if self._device.type == "cuda" else None,
            relative_l2=relative,
            max_abs=largest,
            psnr_db=psnr,
        )

    def _fresh(self, dtype: torch.dtype) -> nn.Module:
        return copy.deepcopy(self._template).to(self._device, dtype)

    def _input(self, trial: Trial) -> Tensor:
        """``[1, C, 1, H, W]`` float32 on the CPU, of values that bfloat16 and float16 hold exactly."""
        job = Job(trial.task, self._topology, torch.float32, torch.device("cpu"))
        config = dict(getattr(self._template, "config", {}) or {})
        return sample_input(job, trial.size, config).to(torch.bfloat16).float().unsqueeze(2)

    def _reference(self, trial: Trial) -> Tensor:
        """What diffusers computes in float32, ``[1, C', H', W']``."""
        key = (trial.task, trial.size)
        if key not in self._exact:
            vae: Any = self._fresh(torch.float32)
            x = self._input(trial).to(self._device)
            with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                output = vae.decode(x).sample if trial.task == "decode" else vae.encode(x).latent_dist.parameters
            self._exact[key] = output[:, :, 0].clone()
        return self._exact[key]

    def _errors(self, task: str, output: Tensor, exact: Tensor) -> tuple[float, float, float]:
        if output.shape != exact.shape:
            raise BenchError(f"the output is {list(output.shape)}, expected {list(exact.shape)}")
        largest = (output.float() - exact).abs().max().item()
        return measure(output, exact).relative, psnr_db(output, exact, task), largest

    # Time.

    def _samples(self, run: Run, x: Tensor) -> list[float]:
        for _ in range(self._effort.warmup):
            run(x)
        self._synchronize()
        samples: list[float] = []
        gc.collect()
        gc.disable()
        try:
            end = time.perf_counter() + self._effort.seconds
            while len(samples) < 3 or (len(samples) < self._effort.iterations and time.perf_counter() < end):
                samples.append(self._one(run, x))
        finally:
            gc.enable()
        return samples

    def _one(self, run: Run, x: Tensor) -> float:
        if self._device.type != "cuda":
            start = time.perf_counter()
            run(x)
            return (time.perf_counter() - start) * 1e3
        self._synchronize()
        return elapsed_ms(lambda: run(x))

    # Memory.

    def _memory(self, run: Run, x: Tensor, before: int) -> tuple[float | None, float | None]:
        if self._device.type != "cuda":
            return None, None
        held = self._allocated() - before
        torch.cuda.reset_peak_memory_stats(self._device)
        run(x)
        self._synchronize()
        return (torch.cuda.max_memory_allocated(self._device) - before) / MIB, held / MIB

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self._device) if self._device.type == "cuda" else 0

    def _outside(self) -> int:
        if self._device.type != "cuda":
            return 0
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free - torch.cuda.memory_reserved(self._device)

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _clean(self) -> None:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def run_all(harness: Harness, trials: Sequence[Trial], done: Callable[[Row], None]) -> list[Row]:
    """All rows in the order of ``trials``; ``done`` is told of each as it comes. An interrupt ends it with those there are."""
    rows = []
    gc.collect()
    gc.freeze()  # what is here now stays, and need not be looked through again between trials
    try:
        for trial in trials:
            rows.append(harness.run(trial))
            done(rows[-1])
    except KeyboardInterrupt:
        logger.warning("interrupted after %d of %d trials", len(rows), len(trials))
    finally:
        gc.unfreeze()
    return rows


def make_trials(methods: Sequence[Method], sizes: Sequence[Size], tasks: Sequence[str]) -> list[Trial]:
    """Every combination, one size after another, the baseline first; some methods only decode."""
    ordered = sorted(methods, key=lambda method: method.name != BASELINE)
    return [
        Trial(method, task, size)
        for size in sizes
        for task in tasks
        for method in ordered
        if task == "decode" or not method.decodes_only
    ]


def geometric_mean(values: Sequence[float]) -> float:
    """Of positive numbers; nan for none."""
    return math.exp(statistics.fmean(map(math.log, values))) if values else math.nan

"""Sends the requests, to the plain pipeline and then to the accelerated one, and keeps the times of their parts."""

from __future__ import annotations

import gc
import logging
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from qwen_vae_accel.bench.methods import BenchError
from qwen_vae_accel.bench.serve.pipelines import ImageRequest, Pipelines
from qwen_vae_accel.bench.serve.stopwatch import MIB, PARTS, Stopwatch
from qwen_vae_accel.config import AccelConfig
from qwen_vae_accel.journal import ORIGINAL, Journal
from qwen_vae_accel.plugin.entry import accelerate
from qwen_vae_accel.plugin.handle import Handle
from qwen_vae_accel.plugin.processing import PostProcessing
from qwen_vae_accel.sizes import STATIC_MULTIPLE, Size

logger = logging.getLogger(__name__)

PLAIN, ACCELERATED = "plain", "accelerated"
# What the process has to do once (libraries, kernels) is done at a size that none of the guide's requests has.
WARMUP = Size(256, 384)
_VAE_PARTS = ("encode", "decode", "postprocess")
_VAE_METHODS = ("encode", "decode")

Values = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Done:
    """One side of one request: its parts and its image, or how it failed."""

    values: Values
    image: Image.Image | None = None


def vae_ms(parts: Mapping[str, float]) -> float:
    """What the VAE and the post-processing take of a request, in milliseconds."""
    return sum(parts.get(part, 0.0) for part in _VAE_PARTS)


class Measurement:
    """Measures requests to pipelines, plain and accelerated.

    Args:
        pipelines: which serve them.
        repeats: requests after the first one of each size; their median counts.
        backend: of ``accelerate``.
        engine_dir: where a backend that has engines keeps them; those that are missing are built first. None: none are used.
        told: called with a line for people as each side of a request is done.
        offload_reference: the setting of ``accelerate``.
    """

    def __init__(
        self,
        pipelines: Pipelines,
        repeats: int,
        backend: str,
        engine_dir: str | None,
        told: Callable[[str], None],
        offload_reference: bool = False,
    ) -> None:
        self._pipelines = pipelines
        self._repeats = repeats
        self._backend = backend
        self._engine_dir = engine_dir
        self._told = told
        self._offload_reference = offload_reference

    def run(self, wanted: Mapping[str, Sequence[Size]]) -> tuple[list[Values], list[Values]]:
        """One row per request, and the memory at rest with each task's engines or kernels.

        Args:
            wanted: the sizes of each task.
        """
        requests = {task: [ImageRequest(task, size) for size in sizes] for task, sizes in wanted.items()}
        plain = {task: self._plain(task, of_task) for task, of_task in requests.items()}
        # All plain requests come first: what acceleration loads into the process is not counted to them.
        at_rest = self._at_rest()
        rows, memory = [], []
        for task, of_task in requests.items():
            ours, entry = self._accelerated(task, of_task)
            if at_rest is not None:
                entry |= {"plain_mib": at_rest, "extra_mib": entry["accelerated_mib"] - at_rest}
            memory.append(entry)
            seen = {_shapes(ImageRequest(task, WARMUP))}
            for row in zip(of_task, plain[task], ours, strict=True):
                rows.append({**_row(*row), "new_size": _shapes(row[0]) not in seen})
                seen.add(_shapes(row[0]))
        return rows, memory

    def _plain(self, task: str, requests: Sequence[ImageRequest]) -> list[Done]:
        warmup = ImageRequest(task, WARMUP)
        self._pipelines.check_finite(warmup)
        self._pipelines.run(warmup)
        return [self._send(request, None) for request in requests]

    def _accelerated(self, task: str, requests: Sequence[ImageRequest]) -> tuple[list[Done], Values]:
        pipeline = self._pipelines.pipeline(task)
        config = self._config(task, [request.size for request in requests])
        start = time.perf_counter()
        if config.engine_dir is not None:
            with accelerate(pipeline, config) as handle:
                handle.warmup(progress=False)
        with accelerate(pipeline, config) as handle:
            self._pipelines.run(ImageRequest(task, WARMUP))
            warmup_s = time.perf_counter() - start
            done = [self._send(request, handle) for request in requests]
            return done, {"task": task, "warmup_s": warmup_s, "accelerated_mib": self._at_rest()}

    def _config(self, task: str, sizes: Sequence[Size]) -> AccelConfig:
        options: Values = {}
        if self._engine_dir is not None:
            shapes = [shape for size in sizes for shape in _shapes(ImageRequest(task, size)) if shape is not None]
            names = tuple(dict.fromkeys(map(str, shapes)))
            options = {"engine_dir": self._engine_dir, "sizes": names, "on_miss": "build"}
        return AccelConfig(task=task, backend=self._backend, offload_reference=self._offload_reference, **options)

    def _send(self, request: ImageRequest, handle: Handle | None) -> Done:
        """The first request of its size, then the others; a failure is told in the values."""
        side = PLAIN if handle is None else ACCELERATED
        try:
            done = self._measure(request, handle)
        except Exception as error:
            logger.info("%s %s %s failed", side, request.task, request.size, exc_info=True)
            done = Done({"error": f"{type(error).__name__}: {error}"[:2000]})
        gc.collect()
        text = (
            done.values.get("error") or f"{done.values['median']['total']:.0f} ms, VAE {vae_ms(done.values['median']):.1f} ms"
        )
        self._told(f"{request.task} {request.size!s:>10} {side:<12} {text}")
        return done

    def _measure(self, request: ImageRequest, handle: Handle | None) -> Done:
        samples: list[dict[str, float]] = []
        peaks: list[float] = []
        rises: list[dict[str, float]] = []
        before = _served(handle)
        with Stopwatch(self._pipelines.pipeline(request.task), self._pipelines.device) as watch:
            for _ in range(1 + self._repeats):
                watch.start()
                start = watch.now()
                images = self._pipelines.run(request)
                total = (watch.now() - start) * 1e3
                parts = {part: watch.ms[part] for part in PARTS if part in watch.ms}
                samples.append({**parts, "other": total - sum(parts.values()), "total": total})
                peaks.append(max(watch.peak_mib.values(), default=0.0))
                rises.append({part: watch.rise_mib[part] for part in _VAE_METHODS if part in watch.rise_mib})
        first, rest = samples[0], samples[1:]
        values: Values = {
            "first": first,
            "median": {part: statistics.median(sample[part] for sample in rest) for part in first},
            "least": {part: min(sample[part] for sample in rest) for part in first},
            "samples": len(rest),
            "peak_mib": max(peaks[1:]) if self._pipelines.device.type == "cuda" else None,
            "activation_mib": {part: max(rise[part] for rise in rises[1:]) for part in rises[0]},
        }
        values["first_extra_ms"] = vae_ms(first) - vae_ms(values["median"])
        if handle is not None:
            values["served"] = _difference(before, _served(handle))
            self._require_fast(values["served"], handle)
        return Done(values, images[0])

    def _require_fast(self, served: Mapping[str, Mapping[str, int]], handle: Handle) -> None:
        """Raise BenchError where not the accelerated path was measured."""
        wanted = None if self._backend == "auto" else self._backend
        for method, calls in served.items():
            slow = ORIGINAL in calls or (wanted is not None and method in _VAE_METHODS and set(calls) - {wanted})
            if slow:
                reasons = "; ".join(f["reason"] for f in handle.report().as_dict()["fallbacks"] if f["method"] == method)
                raise BenchError(f"{method} was served by {', '.join(calls)}: {reasons}")
        if "decode" not in served or "postprocess" not in served:
            raise BenchError(f"the request did not go through decode and post-processing: {dict(served)}")

    def _at_rest(self) -> float | None:
        """MiB of the GPU in use, caches that can be given back given back; None on the CPU."""
        if self._pipelines.device.type != "cuda":
            return None
        gc.collect()
        torch.cuda.synchronize(self._pipelines.device)
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self._pipelines.device)
        return float((total - free) / MIB)


def _served(handle: Handle | None) -> dict[str, dict[str, int]]:
    return {} if handle is None else {name: dict(calls) for name, calls in handle.report().as_dict()["calls"].items()}


def _difference(before: Mapping[str, Mapping[str, int]], after: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, int]]:
    """The calls of ``after`` that ``before`` has not."""
    counts = {m: {n: count - before.get(m, {}).get(n, 0) for n, count in calls.items()} for m, calls in after.items()}
    return {m: served for m, calls in counts.items() if (served := {n: count for n, count in calls.items() if count})}


def _shapes(request: ImageRequest) -> tuple[Size | None, Size]:
    """The sizes that a request encodes and decodes."""
    if request.task == "t2i":
        return None, request.size.floor(STATIC_MULTIPLE)
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as edit

    ratio = request.size.width / request.size.height
    encoded = Size(*edit.calculate_dimensions(edit.VAE_IMAGE_SIZE, ratio)[:2])
    return encoded, Size(*edit.calculate_dimensions(1024 * 1024, ratio)[:2])


def _row(request: ImageRequest, plain: Done, ours: Done) -> Values:
    encoded, decoded = _shapes(request)
    row: Values = {
        "task": request.task,
        "size": str(request.size),
        "encoded": None if encoded is None else str(encoded),
        "decoded": str(decoded),
        "steps": request.steps,
        PLAIN: plain.values,
        ACCELERATED: ours.values,
        "error": "; ".join(f"{name}: {e}" for name, e in _errors(plain, ours)) or None,
    }
    if row["error"] is None:
        row["speedup"] = speedups(plain.values["median"], ours.values["median"])
        row["difference"] = _compare(plain.image, ours.image)
    return row


def _errors(plain: Done, ours: Done) -> list[tuple[str, str]]:
    sides = ((PLAIN, plain), (ACCELERATED, ours))
    return [(name, done.values["error"]) for name, done in sides if "error" in done.values]


def speedups(plain: Mapping[str, float], ours: Mapping[str, float]) -> dict[str, float]:
    """Times faster, by part; decode also together with the post-processing, as the guide counts it."""
    found = {part: plain[part] / ours[part] for part in (*_VAE_PARTS, "total") if part in ours and ours[part] > 0}
    found["decode_postprocess"] = (plain["decode"] + plain["postprocess"]) / (ours["decode"] + ours["postprocess"])
    found["vae"] = vae_ms(plain) / vae_ms(ours)
    return found


def _compare(plain: Image.Image | None, ours: Image.Image | None) -> Values:
    """How far the images of the same seed are apart, in levels of 255."""
    a, b = (np.asarray(image, dtype=np.float64) for image in (plain, ours))
    if a.shape != b.shape:
        raise BenchError(f"the images differ in shape: {a.shape} and {b.shape}")
    mse = float(np.mean((a - b) ** 2))
    psnr: float | str = 10 * math.log10(255**2 / mse) if mse else str(math.inf)
    return {"largest": float(np.abs(a - b).max()), "mean": float(np.abs(a - b).mean()), "psnr_db": psnr}


def postprocessing(size: Size, device: torch.device, dtype: torch.dtype, repeats: int) -> Values:
    """Post-processing of one decoded image to PIL alone, in turns, in milliseconds.

    Raises:
        BenchError: if the two ways do not agree in every byte.
    """
    from diffusers.image_processor import VaeImageProcessor

    plain, ours = VaeImageProcessor(vae_scale_factor=16), VaeImageProcessor(vae_scale_factor=16)
    PostProcessing.install(ours, Journal())
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(1, 3, size.height, size.width, generator=generator, device="cpu")
    decoded = (noise * 2 - 1).to(device, dtype)
    times: dict[str, list[float]] = {PLAIN: [], ACCELERATED: []}
    for turn in range(-2, repeats):
        images = {}
        for name, processor in ((PLAIN, plain), (ACCELERATED, ours)):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            images[name] = processor.postprocess(decoded)[0]
            if turn >= 0:
                times[name].append((time.perf_counter() - start) * 1e3)
        if images[PLAIN].tobytes() != images[ACCELERATED].tobytes():
            raise BenchError(f"post-processing differs at {size}")
    medians = {f"{name}_ms": statistics.median(values) for name, values in times.items()}
    least = {f"{name}_least_ms": min(values) for name, values in times.items()}
    return {"size": str(size), "dtype": str(dtype).removeprefix("torch."), "samples": repeats, **medians, **least}

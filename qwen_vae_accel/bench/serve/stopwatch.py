"""Times the parts of a pipeline's request from outside: the VAE's methods, the image processor's, the denoising loop."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch

MIB = 2**20
PARTS = ("preprocess", "encode", "denoising", "decode", "postprocess")
# Who has the method, its name, the part that it is.
_METHODS = (
    ("image_processor", "resize", "preprocess"),
    ("image_processor", "preprocess", "preprocess"),
    ("vae", "encode", "encode"),
    ("vae", "decode", "decode"),
    ("image_processor", "postprocess", "postprocess"),
)


class Stopwatch:
    """While it is open, every request of ``pipeline`` is timed; afterwards the pipeline is as before.

    A part starts on an idle device and ends with one, so its milliseconds are its own. Denoising lasts from the first call
    of the transformer to the decode. It times whatever stands in for the methods when it is opened: open it after
    ``accelerate``, and close it before ``restore``.

    Attributes:
        ms: milliseconds of each part since :meth:`start`.
        peak_mib: most memory allocated in each part, CUDA only.
        rise_mib: the same, above what was allocated when the part began.
    """

    def __init__(self, pipeline: Any, device: torch.device) -> None:
        self._pipeline = pipeline
        self._device = device
        self._undo: list[Callable[[], object]] = []
        self.start()

    def start(self) -> None:
        """Forget the request before."""
        self.ms: dict[str, float] = {}
        self.peak_mib: dict[str, float] = {}
        self.rise_mib: dict[str, float] = {}
        self._open: tuple[str, float, int] | None = None

    def __enter__(self) -> Stopwatch:
        for owner_name, name, part in _METHODS:
            owner = getattr(self._pipeline, owner_name)
            own = owner.__dict__.get(name)
            owner.__dict__[name] = self._timed(part, getattr(owner, name))
            self._undo.append(functools.partial(_put_back, owner, name, own))
        hook = self._pipeline.transformer.register_forward_pre_hook(self._before_transformer)
        self._undo.append(hook.remove)
        return self

    def __exit__(self, *exception: object) -> None:
        while self._undo:
            self._undo.pop()()

    def _timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._open is not None and self._open[0] == "denoising":
                self._end()
            if self._open is not None:  # resize within preprocess
                return call(*args, **kwargs)
            self._begin(part)
            try:
                return call(*args, **kwargs)
            finally:
                self._end()

        return timed

    def _before_transformer(self, *_: Any) -> None:
        if self._open is None:
            self._begin("denoising")

    def _begin(self, part: str) -> None:
        now = self.now()
        allocated = 0
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            allocated = torch.cuda.memory_allocated(self._device)
        self._open = (part, now, allocated)

    def _end(self) -> None:
        assert self._open is not None
        part, begun, allocated = self._open
        self._open = None
        self.ms[part] = self.ms.get(part, 0.0) + (self.now() - begun) * 1e3
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device)
            self.peak_mib[part] = max(self.peak_mib.get(part, 0.0), peak / MIB)
            self.rise_mib[part] = max(self.rise_mib.get(part, 0.0), (peak - allocated) / MIB)

    def now(self) -> float:
        """Seconds, when the device has nothing left to do."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def _put_back(owner: Any, name: str, own: Any) -> None:
    if own is None:
        del owner.__dict__[name]
    else:
        owner.__dict__[name] = own

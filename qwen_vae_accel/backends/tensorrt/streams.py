"""The stream that an engine runs on: the caller's, without the host ever waiting."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch


class Streams(Protocol):
    """Gives the stream for one run."""

    def ordered(self, device: torch.device) -> AbstractContextManager[int]:
        """Inside the block, the handle of a stream ordered after the work queued on the caller's current stream; what is
        queued on the caller's after the block is ordered after the run. Memory handed to the run must outlive the block."""


class CudaStreams(Streams):
    """PyTorch's current stream; for CUDA's default stream, one of our own that events tie to it.

    On the default stream (handle 0) TensorRT adds a synchronisation of the whole device to each run. All runs of a
    device called from there share one stream, so they are ordered as their callers are.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._side: dict[torch.device, torch.cuda.Stream] = {}

    @contextmanager
    def ordered(self, device: torch.device) -> Iterator[int]:
        with torch.cuda.device(device):
            current = torch.cuda.current_stream(device)
            if current.cuda_stream != 0:
                yield current.cuda_stream
                return
            with self._lock:
                if device not in self._side:
                    self._side[device] = torch.cuda.Stream(device)
                side = self._side[device]
            side.wait_stream(current)
            try:
                yield side.cuda_stream
            finally:
                current.wait_stream(side)

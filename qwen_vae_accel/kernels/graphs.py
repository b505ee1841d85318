"""CUDA graphs of whole networks: a call costs one graph launch on the host instead of sixty kernel launches.

A graph holds the addresses it was captured with. Its small input and output are its own; the scratch memory, hundreds of
megabytes, is taken from torch's allocator at each call and given back after it, as for plain launches. The allocator gives
the same block for the same request as a rule: then the graph of that block is replayed, else kernels are launched plainly.
So nothing large stays allocated between calls. Results are copied out, so the caller owns what it gets. Calls are ordered
by an event: a second stream waits on the GPU; a second thread waits on the host only while a graph is captured. Graphs are
kept by input shape and scratch block, the least recently used dropped first.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen_vae_accel.kernels.launches import LaunchList
from qwen_vae_accel.kernels.segments import APART, OwnSegments
from qwen_vae_accel.kernels.sm90.driver import own_stream

logger = logging.getLogger(__name__)

_WAIT = 100  # uses until a graph for which there was no room is tried again


@dataclass(slots=True)
class _Entry:
    graph: torch.cuda.CUDAGraph
    image: Tensor
    output: Tensor


class GraphCache:
    """At most ``limit`` graphs, their inputs and outputs in ``segments``.

    A shape is captured on its ``after``-th use with the same scratch block, run plainly before.
    """

    def __init__(self, segments: OwnSegments, limit: int = 8, after: int = 2):
        self._segments, self._limit = segments, limit
        self._after: float = after
        self._lock = threading.Lock()
        self._entries: OrderedDict[tuple, _Entry] = OrderedDict()
        self._uses: OrderedDict[tuple, int] = OrderedDict()
        self._done: torch.cuda.Event | None = None

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        """Drop every graph, once the GPU has finished with them."""
        with self._lock:
            if self._done is not None:
                self._done.synchronize()
            self._entries.clear()
            self._done = None

    def run(self, launches: LaunchList, image: Tensor) -> Tensor:
        """Replay, or launch plainly and perhaps capture, for ``image`` on the current stream."""
        scratch = torch.empty(launches.scratch_bytes, dtype=torch.uint8, device=image.device)
        key = (*image.shape, launches.scratch_bytes, scratch.data_ptr())  # one shape may run in other bands at other times
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                self._entries.move_to_end(key)
                return self._serve(entry, image, entry.graph.replay)
            if self._due(key):
                try:
                    return self._capture(launches, image, scratch, key)
                except torch.OutOfMemoryError:  # its copies are a luxury: the call itself may still fit
                    self._uses[key] = -_WAIT
        memory = launches.memory(image, scratch)
        launches.run(memory)
        return memory.output

    def _serve(self, entry: _Entry, image: Tensor, run: Callable[[], None]) -> Tensor:
        stream = torch.cuda.current_stream(image.device)
        if self._done is not None:
            stream.wait_event(self._done)
        entry.image.copy_(image)
        run()
        output = entry.output.clone()
        self._done = torch.cuda.Event()
        self._done.record(stream)
        return output

    def _due(self, key: tuple) -> bool:
        self._uses[key] = self._uses.pop(key, 0) + 1
        if len(self._uses) > 16 * self._limit:
            self._uses.popitem(last=False)
        return self._uses[key] >= self._after

    def _capture(self, launches: LaunchList, image: Tensor, scratch: Tensor, key: tuple) -> Tensor:
        """Launch plainly with a graph's buffers, which compiles and describes what may not be during a capture. The capture
        itself takes host time alone, while the GPU works on that."""
        while len(self._entries) >= self._limit:
            if self._done is not None:
                self._done.synchronize()
            self._entries.popitem(last=False)
        memory = self._segments.allocate(
            lambda: launches.memory(torch.empty_like(image, memory_format=torch.contiguous_format), scratch)
        )
        entry = _Entry(torch.cuda.CUDAGraph(), memory.image, memory.output)
        output = self._serve(entry, image, lambda: launches.run(memory))
        # Other threads may allocate or launch meanwhile; nothing inside allocates, so nothing has to be given back before.
        try:
            with APART, own_stream(image.device) as stream, torch.cuda.stream(stream):
                entry.graph.capture_begin(capture_error_mode="thread_local")
                try:
                    launches.run(memory)
                finally:
                    entry.graph.capture_end()
        except RuntimeError:
            logger.warning("no CUDA graphs from now on: a capture failed at input %s", list(image.shape), exc_info=True)
            self._after = math.inf
        else:
            self._entries[key] = entry
        return output

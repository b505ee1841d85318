"""CUDA graphs of programs: a call costs one graph launch and two kernel launches on the host, instead of forty.

A graph holds the addresses it was captured with. The first and the last kernel, which alone touch the call's image and its
output, are therefore launched plainly before and after it: what is between knows only the scratch memory. That, hundreds of
megabytes, is taken from torch's allocator at each call and given back after it, as for plain launches. The allocator gives
the same block for the same request as a rule: then the graph of that block is replayed, else kernels are launched plainly.
So nothing stays allocated between calls. Graphs are kept by input shape and scratch address, the least recently used dropped
first. A block belongs to one stream, so a graph never runs beside itself.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

import torch
from torch import Tensor

from qwen_vae_accel.kernels.program import Memory, Program


class GraphCache:
    """At most ``limit`` graphs; a shape is captured on its ``after``-th use with the same scratch block, run plainly before."""

    def __init__(self, limit: int = 8, after: int = 2):
        self._limit, self._after = limit, after
        self._lock = threading.Lock()
        self._graphs: OrderedDict[tuple, torch.cuda.CUDAGraph] = OrderedDict()
        self._uses: OrderedDict[tuple, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._graphs)

    def clear(self) -> None:
        """Drop every graph; one that runs is freed by the driver when it is done."""
        with self._lock:
            self._graphs.clear()

    def run(self, program: Program, image: Tensor) -> Tensor:
        """Replay, or launch plainly and perhaps capture, for ``image`` on the current stream."""
        memory = program.memory(image)
        key = (*image.shape, memory.scratch.data_ptr())
        with self._lock:
            graph = self._graphs.get(key)
            if graph is not None:
                self._graphs.move_to_end(key)
        if graph is None:
            program.run(memory)
            with self._lock:
                if self._due(key):
                    self._capture(program, memory, key)
        else:
            program.steps[0].launch(memory)
            graph.replay()
            program.steps[-1].launch(memory)
        return memory.output

    def _due(self, key: tuple) -> bool:
        self._uses[key] = self._uses.pop(key, 0) + 1
        if len(self._uses) > 16 * self._limit:
            self._uses.popitem(last=False)
        return self._uses[key] >= self._after

    def _capture(self, program: Program, memory: Memory, key: tuple) -> None:
        """What ``program`` has just run plainly, which compiled and described what may not be during a capture.

        It takes host time alone, while the GPU works on that run.
        """
        while len(self._graphs) >= self._limit:
            self._graphs.popitem(last=False)
        graph = torch.cuda.CUDAGraph()
        # Other threads may allocate or launch meanwhile; nothing inside allocates, so nothing has to be given back before.
        with torch.cuda.stream(torch.cuda.Stream(memory.scratch.device)):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                for step in program.steps[1:-1]:
                    step.launch(memory)
            finally:
                graph.capture_end()
        self._graphs[key] = graph

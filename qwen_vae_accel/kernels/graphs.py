"""CUDA graphs of whole programs: a call costs one graph launch on the host instead of sixty kernel launches.

A graph holds the addresses it was captured with: of one block for its input, output and scratch memory, taken from torch's
allocator at each call and given back after it. The allocator gives the same block for the same request as a rule: then the
graph of that block is replayed, else kernels are launched plainly. So nothing stays allocated between calls, and calls on
different streams, which the allocator gives different blocks, share nothing. Results are copied out, so the caller owns what
it gets. Graphs are kept by input shape and address, the least recently used dropped first.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict

import torch
from torch import Tensor

from qwen_vae_accel.kernels.program import ALIGNMENT, Memory, Program


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _nbytes(program: Program, image: Tensor) -> tuple[int, int, int]:
    """Where scratch, input and output end in a block."""
    scratch = _aligned(program.scratch_bytes)
    inputs = scratch + _aligned(image.nbytes)
    return scratch, inputs, inputs + _aligned(math.prod(program.output_shape) * image.itemsize)


def _memory(program: Program, image: Tensor, block: Tensor) -> Memory:
    """Everything of a call in ``block``, the input not copied yet."""
    scratch, inputs, _ = _nbytes(program, image)

    def part(start: int, shape: tuple[int, ...]) -> Tensor:
        return block[start : start + math.prod(shape) * image.itemsize].view(image.dtype).view(shape)

    return Memory(block, program.offsets, part(scratch, image.shape), part(inputs, program.output_shape))


class GraphCache:
    """At most ``limit`` graphs; a shape is captured on its ``after``-th use with the same block, run plainly before."""

    def __init__(self, limit: int = 8, after: int = 2):
        self._limit, self._after = limit, after
        self._lock = threading.Lock()
        self._graphs: OrderedDict[tuple, torch.cuda.CUDAGraph] = OrderedDict()
        self._uses: OrderedDict[tuple, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._graphs)

    def clear(self) -> None:
        """Drop every graph, once the GPU has finished with them."""
        with self._lock:
            if self._graphs:
                torch.cuda.synchronize()
            self._graphs.clear()

    def run(self, program: Program, image: Tensor) -> Tensor:
        """Replay, capture and replay, or launch plainly, for ``image`` on the current stream."""
        block = torch.empty(_nbytes(program, image)[-1], dtype=torch.uint8, device=image.device)
        key = (*image.shape, block.data_ptr())
        with self._lock:
            graph = self._graphs.get(key)
            if graph is None and self._due(key):
                graph = self._capture(program, image, block, key)
            if graph is not None:
                self._graphs.move_to_end(key)
                memory = _memory(program, image, block)
                memory.image.copy_(image)
                graph.replay()
                return memory.output.clone()
        memory = program.memory(image, block)
        program.run(memory)
        return memory.output

    def _due(self, key: tuple) -> bool:
        self._uses[key] = self._uses.pop(key, 0) + 1
        if len(self._uses) > 16 * self._limit:
            self._uses.popitem(last=False)
        return self._uses[key] >= self._after

    def _capture(self, program: Program, image: Tensor, block: Tensor, key: tuple) -> torch.cuda.CUDAGraph:
        while len(self._graphs) >= self._limit:
            torch.cuda.synchronize(image.device)
            self._graphs.popitem(last=False)
        memory, graph = _memory(program, image, block), torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(image.device)
        stream.wait_stream(torch.cuda.current_stream(image.device))
        with torch.cuda.stream(stream):
            # Kernels are compiled, and described for these addresses, before the capture, where neither may happen.
            program.run(memory)
            # Not torch.cuda.graph(): that would first collect garbage and empty the allocator's cache. Nothing here
            # allocates, and other threads may allocate or launch meanwhile.
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                program.run(memory)
            finally:
                graph.capture_end()
        torch.cuda.current_stream(image.device).wait_stream(stream)
        self._graphs[key] = graph
        return graph

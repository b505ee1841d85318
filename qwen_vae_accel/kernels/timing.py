"""Time work on the GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch


def launch_ms(launch: Callable[[], object], repeats: int = 8, best_of: int = 3) -> float:
    """Milliseconds of one ``launch``: ``repeats`` in one CUDA graph, the best of ``best_of`` replays.

    It must have been launched before: nothing is compiled or loaded inside a graph.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    # Not torch.cuda.graph: its collection of garbage would take longer than the measurement.
    with torch.cuda.stream(stream):
        graph.capture_begin()
        try:
            for _ in range(repeats):
                launch()
        finally:
            graph.capture_end()
        return min(elapsed_ms(graph.replay) for _ in range(best_of)) / repeats


def first_ms(launch: Callable[[], object]) -> float:
    """Milliseconds of a single launch after another one; the host's part included."""
    launch()
    torch.cuda.synchronize()
    return elapsed_ms(launch)


def elapsed_ms(work: Callable[[], object]) -> float:
    """Milliseconds on the current stream from before ``work`` to the end of what it launches; waits for that."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)

"""The cache of CUDA graphs, with a stand-in for the GPU: when it captures, replays, drops, and does without."""

from __future__ import annotations

import contextlib
import logging
from types import SimpleNamespace

import pytest
import torch

from qwen_vae_accel.kernels import graphs
from qwen_vae_accel.kernels.graphs import GraphCache
from qwen_vae_accel.kernels.segments import OwnSegments

CPU = torch.device("cpu")


class Graph:
    """Keeps what is run between begin and end; ``broken``: a capture fails."""

    recording: Graph | None = None
    broken = False
    replays = 0

    def __init__(self):
        self.work = []

    def capture_begin(self, capture_error_mode):
        assert capture_error_mode == "thread_local"
        if Graph.broken:
            raise RuntimeError("not now")
        Graph.recording = self

    def capture_end(self):
        Graph.recording = None

    def replay(self):
        Graph.replays += 1
        for work in self.work:
            work()


class Doubling:
    """A list of launches; without scratch, so that its address is always the same."""

    scratch_bytes = 0

    def __init__(self):
        self.runs = 0

    def memory(self, image, scratch):
        return SimpleNamespace(image=image, output=torch.empty_like(image))

    def run(self, memory):
        def work():
            memory.output.copy_(2 * memory.image)

        if Graph.recording is not None:
            Graph.recording.work.append(work)
        else:
            self.runs += 1
            work()


@pytest.fixture
def gpu(monkeypatch):
    @contextlib.contextmanager
    def own_stream(device):
        yield None

    stream = SimpleNamespace(wait_event=lambda event: None)
    event = SimpleNamespace(record=lambda stream: None, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(graphs, "own_stream", own_stream)
    monkeypatch.setattr(Graph, "replays", 0)
    monkeypatch.setattr(Graph, "broken", False)


def call(cache: GraphCache, launches: Doubling, size: int, value: float) -> torch.Tensor:
    image = torch.full((1, size), value)
    result = cache.run(launches, image)
    assert torch.equal(result, 2 * image)
    return result


def test_plain_then_captured_then_replayed(gpu):
    cache, launches = GraphCache(OwnSegments(CPU), limit=8, after=2), Doubling()
    results = [call(cache, launches, 3, value) for value in (1.0, 2.0, 3.0, 4.0)]
    assert (launches.runs, Graph.replays, len(cache)) == (2, 2, 1)  # the capture runs nothing itself
    assert [result[0, 0].item() for result in results] == [2, 4, 6, 8]  # a later call does not touch an earlier result
    cache.clear()
    assert len(cache) == 0
    call(cache, launches, 3, 5.0)


def test_without_room_for_its_copies_a_call_is_plain_and_the_graph_is_tried_again_later(gpu, monkeypatch):
    def no_room(make):
        tried.append(make)
        raise torch.OutOfMemoryError("no room")

    tried: list = []
    cache, launches = GraphCache(OwnSegments(CPU), limit=8, after=2), Doubling()
    with monkeypatch.context() as without:
        without.setattr(OwnSegments, "allocate", lambda self, make: no_room(make))
        for value in range(graphs._WAIT):
            call(cache, launches, 3, value)
    assert (len(tried), launches.runs, len(cache)) == (1, graphs._WAIT, 0)
    for value in (1.0, 2.0, 3.0, 4.0, 5.0):
        call(cache, launches, 3, value)
    assert len(cache) == 1 and Graph.replays >= 1


def test_the_least_recently_used_graph_goes(gpu):
    cache, launches = GraphCache(OwnSegments(CPU), limit=2, after=1), Doubling()
    for size in (1, 2, 1, 3):
        call(cache, launches, size, 1.0)
    assert (launches.runs, Graph.replays, len(cache)) == (3, 1, 2)
    call(cache, launches, 1, 2.0)  # kept
    assert Graph.replays == 2
    call(cache, launches, 2, 2.0)  # dropped, captured again
    assert (launches.runs, Graph.replays, len(cache)) == (4, 2, 2)


def test_a_capture_that_fails_costs_no_result_and_is_the_last(gpu, monkeypatch, caplog):
    monkeypatch.setattr(Graph, "broken", True)
    cache, launches = GraphCache(OwnSegments(CPU), limit=8, after=1), Doubling()
    with caplog.at_level(logging.WARNING):
        for value in (1.0, 2.0, 3.0):
            call(cache, launches, 3, value)
    assert (launches.runs, len(cache), caplog.text.count("a capture failed")) == (3, 0, 1)
    monkeypatch.setattr(Graph, "broken", False)
    call(cache, launches, 3, 4.0)
    assert len(cache) == 0

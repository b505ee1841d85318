"""Where what stays is allocated, and what happens when there is no room for it."""

from __future__ import annotations

import contextlib

import pytest
import torch

from qwen_vae_accel.kernels import segments
from qwen_vae_accel.kernels.segments import OwnSegments


@pytest.fixture
def calls(monkeypatch):
    """Events of a stand-in for a GPU whose pools can be told to be full."""
    seen: list[str] = []

    @contextlib.contextmanager
    def use(pool, device):
        seen.append("pool")
        yield
        seen.append("left")

    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "MemPool", object)
    monkeypatch.setattr(torch.cuda, "use_mem_pool", use)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: seen.append("empty cache"))
    monkeypatch.setattr(segments, "_pools", {})
    return seen


def test_on_the_cpu_nothing_is_set_apart():
    tensor = torch.ones(3)
    kept = OwnSegments(torch.device("cpu")).keep(tensor)
    assert torch.equal(kept, tensor) and kept.data_ptr() != tensor.data_ptr()


def test_a_tensor_elsewhere_stays_as_it_is(calls):
    tensor = torch.ones(3)
    assert OwnSegments(torch.device("cuda")).keep(tensor) is tensor
    assert calls == []


@pytest.mark.parametrize(
    ("failures", "expected"),
    [
        (0, ["pool", "made", "left"]),
        (1, ["pool", "empty cache", "pool", "made", "left"]),
        (2, ["pool", "empty cache", "pool", "made"]),
    ],
)
def test_without_room_the_cache_is_given_back_and_then_any_place_will_do(calls, failures, expected):
    left = [torch.OutOfMemoryError("full")] * failures

    def make() -> str:
        if left:
            raise left.pop()
        calls.append("made")
        return "result"

    assert OwnSegments(torch.device("cuda")).allocate(make) == "result"
    assert calls == expected


def test_no_room_anywhere_is_an_error(calls):
    def make() -> None:
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError, match="full"):
        OwnSegments(torch.device("cuda")).allocate(make)


def test_a_device_has_one_pool_for_all_networks(calls, monkeypatch):
    first = OwnSegments(torch.device("cuda"))
    pool = first._pool
    assert OwnSegments(torch.device("cuda"))._pool is pool
    del first
    assert OwnSegments(torch.device("cuda"))._pool is pool
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert OwnSegments(torch.device("cuda", 1))._pool is not pool

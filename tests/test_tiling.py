"""``vae.enable_tiling()``: served by whoever can bound its memory, in bands that are no tiles, and told in the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from qwen_vae_accel import accelerate
from qwen_vae_accel.backends import registry
from qwen_vae_accel.backends.base import DirectBackend, Environment, Job, Program
from qwen_vae_accel.backends.eager import EagerBackend
from qwen_vae_accel.backends.fused.backend import FusedProgram
from qwen_vae_accel.model import ModelSource
from tests.contract import calls
from tests.helpers import FakeBackend, Reference, decoded, moments, picture, randn

pytestmark = pytest.mark.usefixtures("no_grad")
Z = randn(1, 4, 1, 24, 12)


class Network:
    """Eager in the place of a network of kernels; ``rows`` of every call are noted."""

    def __init__(self, network: Any, where: Kernels) -> None:
        self._network, self._where, self.nbytes = network, where, 0

    def __call__(self, x: Tensor, rows: int = 0) -> Tensor:
        self._where.rows.append(rows)
        if rows in self._where.full:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self._network(x)


class Kernels(DirectBackend):
    """Stands in for the fused kernels."""

    name: ClassVar[str] = "fused"
    can_tile: ClassVar[bool] = True

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.full: tuple[int, ...] = ()

    def reasons(self, environment: Environment, job: Job) -> list[str]:
        return []

    def program(self, source: ModelSource, job: Job) -> Program:
        network: Any = Network(EagerBackend().program(source, job), self)
        return FusedProgram(network)

    def bands(self, program: Program, shape: Sequence[int], rows: int) -> tuple[int, str]:
        return (3, f"{rows} rows") if rows else (1, "")


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    made = Kernels()
    monkeypatch.setattr(registry, "_BACKENDS", (made, EagerBackend()))
    return made


@pytest.mark.parametrize("backend", ["auto", "fused"])
def test_tiled_calls_stay_with_the_kernels(backend, kernels, micro):
    before = Reference(micro, "decode", Z)
    handle = accelerate(micro, backend=backend)
    micro.enable_tiling(tile_sample_min_height=64, tile_sample_min_width=64)
    for _ in range(2):
        before.check(decoded(micro, Z))
    decoded(micro, Z[:, :, :, :8, :8])  # no larger than a tile
    moments(micro, picture(1, 3, 1, 96, 48))
    assert kernels.rows == [64, 64, 0, 64]
    report = handle.report().as_dict()
    assert calls(handle) == {"encode": {"fused": 1}, "decode": {"fused": 3}} and report["fallbacks"] == []
    assert report["bands"] == [
        {"method": "decode", "size": "96x192", "backend": "fused", "bands": 3, "reason": "64 rows", "count": 2},
        {"method": "encode", "size": "48x96", "backend": "fused", "bands": 3, "reason": "64 rows", "count": 1},
    ]
    assert "decode 96x192: fused (3 bands), 2 times: 64 rows" in str(handle.report())


def test_tiled_calls_without_room_go_to_the_next(kernels, micro):
    before = Reference(micro, "decode", Z)
    handle = accelerate(micro)
    micro.enable_tiling(tile_sample_min_height=64, tile_sample_min_width=64)
    kernels.full = (64,)
    before.check(decoded(micro, Z))
    (fallback,) = handle.report().as_dict()["fallbacks"]
    assert calls(handle)["decode"] == {"eager": 1} and fallback["reason"] == "fused: out of memory at 96x192"


def test_engines_pass_tiled_calls_to_the_kernels(kernels, micro, tmp_path, monkeypatch):
    engines = FakeBackend()
    monkeypatch.setattr(registry, "_BACKENDS", (engines, kernels, EagerBackend()))
    handle = accelerate(micro, backend="tensorrt", engine_dir=tmp_path, sizes=["96x192"], verify=False)
    decoded(micro, Z)
    micro.enable_tiling(tile_sample_min_height=64, tile_sample_min_width=64)
    decoded(micro, Z)
    report = handle.report().as_dict()
    assert calls(handle)["decode"] == {"tensorrt": 1, "fused": 1} and kernels.rows == [64]
    assert report["fallbacks"][0]["reason"] == "tensorrt: use_tiling is on, and engines run the image in one piece"
    assert report["bands"][0]["bands"] == 3

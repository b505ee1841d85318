"""Real TensorRT-RTX for building, a stand-in for running: see the modules' headers for which is which."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from qwen_vae_accel.backends.base import Environment, Job
from qwen_vae_accel.backends.tensorrt import TensorRTBackend, runtime
from qwen_vae_accel.backends.tensorrt import flavour as flavours
from qwen_vae_accel.backends.tensorrt.settings import BuildSettings, parse_capabilities
from qwen_vae_accel.model import ModelSource
from qwen_vae_accel.model.source import build_model
from qwen_vae_accel.plan import EngineKey, Plan
from tests.tensorrt import standin
from tests.tensorrt.standin import StandIn

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def rtx() -> flavours.Flavour:
    """The installed TensorRT-RTX. Without it these tests fail: the development environment has it."""
    found = flavours.installed(Environment.detect(CPU).packages)
    if found is None or not found.is_rtx or flavours.build_reasons(Environment.detect(CPU).packages):
        pytest.fail("torch-tensorrt-rtx is not installed; make setup installs it")
    return found


@pytest.fixture(scope="session")
def cross_build(rtx: flavours.Flavour) -> Callable[..., TensorRTBackend]:
    """Build one engine for a named compute capability with the real TensorRT-RTX, as a user's build does."""

    def build(
        vae: nn.Module, method: str, dtype: torch.dtype, plan: Plan, target: str, path: Path, **settings: object
    ) -> TensorRTBackend:
        source = ModelSource(vae)
        backend = TensorRTBackend(BuildSettings.from_dict(settings), parse_capabilities(target))
        job, key = job_of(source, method, dtype), plan.engines(method)[0]
        assert backend.reasons(backend.target_environment(), job) == []
        state = {name: value.to(dtype, copy=True).contiguous() for name, value in source.state(method).items()}
        backend.build(build_model(state, method), job, key, path)
        return backend

    return build


def job_of(source: ModelSource, method: str, dtype: torch.dtype = torch.float32) -> Job:
    """A job on the CPU."""
    return Job(method, source.topology, dtype, CPU)


def key_of(method: str, sizes: str, multi_profile: bool = False) -> EngineKey:
    """The engine of a plan of ``sizes``."""
    return Plan.make(sizes.split(","), multi_profile).engines(method)[0]


@pytest.fixture
def source(_micro: nn.Module) -> ModelSource:
    """The networks of a very small VAE."""
    return ModelSource(copy.deepcopy(_micro))


@pytest.fixture
def trt(source: ModelSource, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> StandIn:
    """The stand-in, computing the exact networks of ``source``."""
    assert runtime.ALIGNMENT == 256
    threads = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    torch.set_num_threads(1)  # the networks are tiny
    monkeypatch.setattr(runtime, "ALIGNMENT", standin.ALIGNMENT)

    def network(method: str) -> Callable[[torch.Tensor], torch.Tensor]:
        model = source.model(method, torch.float32, CPU)

        def run(x: torch.Tensor) -> torch.Tensor:
            if x.device.type == "meta":
                scale = source.topology.scale
                height, width = (s * scale if method == "decode" else s // scale for s in x.shape[-2:])
                return torch.empty(len(x), 1, height, width, device="meta")
            with torch.no_grad():
                return model(x)

        return run

    return StandIn({method: network(method) for method in ("encode", "decode")})

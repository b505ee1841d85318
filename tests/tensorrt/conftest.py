"""Real TensorRT-RTX for building, a stand-in for running: see the modules' headers for which is which."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from qwen_vae_accel.backends.base import Environment, Job
from qwen_vae_accel.backends.tensorrt import TensorRTBackend, runtime
from qwen_vae_accel.backends.tensorrt import flavour as flavours
from qwen_vae_accel.backends.tensorrt.logs import collector_paused
from qwen_vae_accel.backends.tensorrt.settings import BuildSettings, parse_capabilities
from qwen_vae_accel.model import ModelSource
from qwen_vae_accel.model.source import build_model
from qwen_vae_accel.plan import EngineKey, Plan
from tests.tensorrt import standin
from tests.tensorrt.made import Made
from tests.tensorrt.standin import StandIn

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def rtx() -> flavours.Flavour:
    """The installed TensorRT-RTX, which builds on any machine; without it, see :func:`missing_rtx`."""
    here = Environment.detect(CPU)
    missing = missing_rtx(here, in_ci=bool(os.environ.get("CI")))
    if missing is not None:
        must_fail, text = missing
        (pytest.fail if must_fail else pytest.skip)(text)
    found = flavours.installed(here.packages)
    assert found is not None
    return found


def missing_rtx(here: Environment, in_ci: bool) -> tuple[bool, str] | None:
    """What keeps TensorRT-RTX's builder from running ``here``, and whether that is a failure; None: nothing.

    It is none where the environment cannot have both flavours of TensorRT and has the other one, or is of a platform that
    `make setup` does not install it on. In continuous integration it always is one: there it is installed.
    """
    needs = "engines for a named compute capability are built by TensorRT-RTX: pip install 'qwen-vae-accel[tensorrt-rtx]'"
    found, reasons = flavours.installed(here.packages), flavours.build_reasons(here.packages)
    if found is flavours.CLASSIC and not reasons:
        version = here.packages[found.library]
        other = f"here is {found.name} {version}, which builds for its own GPU only (make test-gpu tests that)"
        return in_ci, f"{needs} in an environment of its own; {other}"
    if here.platform != "linux-x86_64" and found is None:
        return in_ci, f"{needs}; make setup installs it on linux-x86_64, and this is {here.platform}"
    if found is flavours.RTX and not reasons:
        return None
    return True, f"{needs}; make setup installs it ({'; '.join(reasons)})"


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


@pytest.fixture
def made(rtx: flavours.Flavour) -> Iterator[Made]:
    """A TensorRT network in the making."""
    with collector_paused():
        yield Made(rtx.bindings())


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
def trt(source: ModelSource, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """The stand-in, computing the exact networks of ``source``."""
    assert runtime.ALIGNMENT == 256
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

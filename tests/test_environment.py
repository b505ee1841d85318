"""Decisions about the machine are functions of a value: what engines are tied to, and what cannot run where."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch

from qwen_vae_accel import AccelConfig
from qwen_vae_accel.accuracy import measure
from qwen_vae_accel.backends import registry
from qwen_vae_accel.backends.base import DirectBackend, EngineBackend, Environment, Job
from qwen_vae_accel.backends.eager import EagerBackend
from qwen_vae_accel.backends.inductor import InductorBackend
from qwen_vae_accel.backends.samples import sample_input
from qwen_vae_accel.config import BACKENDS
from qwen_vae_accel.engines.selfcheck import machine_id, psnr_db
from qwen_vae_accel.errors import AccelError, BackendUnavailableError
from qwen_vae_accel.model import inspect_vae
from qwen_vae_accel.sizes import Size
from tests.conftest import random_vae
from tests.helpers import CPU, ROOT

H200 = Environment(
    device_type="cuda",
    device_name="NVIDIA H200",
    capability=(9, 0),
    cuda="13.0",
    driver="580.65",
    packages={"torch": "2.13.0", "triton": "3.6.0", "diffusers": "0.42.1"},
)
HERE = Environment.detect(CPU)


def job(method: str = "decode", dtype: torch.dtype = torch.float32) -> Job:
    return Job(method, inspect_vae(random_vae()), dtype, CPU)


def test_this_machine():
    assert HERE.device_type == "cpu" and HERE.capability is None and HERE.cuda is None
    assert HERE.device_name == torch.backends.cpu.get_cpu_capability()
    assert HERE.packages["torch"] == torch.__version__
    assert Environment.detect(CPU) == HERE
    assert all(isinstance(value, str) for value in HERE.describe().values())


def test_description_of_a_gpu():
    facts = H200.describe()
    assert facts["compute_capability"] == "9.0" and facts["package:triton"] == "3.6.0" and facts["driver"] == "580.65"
    assert "compute_capability" not in HERE.describe()


@pytest.mark.parametrize(
    ("change", "tied"),
    [
        ({"device_name": "NVIDIA H100"}, True),
        ({"capability": (10, 0)}, True),
        ({"cuda": "12.9"}, True),
        ({"packages": {**H200.packages, "torch": "2.14.0"}}, True),
        ({"platform": "linux-aarch64"}, True),
        ({"device_type": "cpu"}, True),
        ({"packages": {**H200.packages, "diffusers": "0.43.0"}}, False),
    ],
)
def test_what_an_inductor_package_is_tied_to(change, tied):
    backend = InductorBackend()
    other = dataclasses.replace(H200, **change)
    assert (backend.identity(other) != backend.identity(H200)) == tied


def test_a_new_driver_or_release_is_another_machine(monkeypatch):
    ids = {machine_id(H200), machine_id(dataclasses.replace(H200, driver="590.00")), machine_id(HERE)}
    monkeypatch.setattr("platform.node", lambda: "another-host")
    assert len(ids | {machine_id(H200)}) == 4


@pytest.mark.parametrize("device_type", ["mps", "xpu", "meta"])
def test_reasons_of_inductor(device_type):
    assert InductorBackend().reasons(H200, job()) == []
    (reason,) = InductorBackend().reasons(dataclasses.replace(H200, device_type=device_type), job())
    assert device_type in reason


def test_inductor_without_a_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    (reason,) = InductorBackend().build_reasons()
    assert "no-such-compiler" in reason and "CXX" in reason


def test_the_registry():
    names = [backend.name for backend in registry._BACKENDS]
    assert len(set(names)) == len(names) and set(names) <= set(BACKENDS)
    assert isinstance(registry.direct_backends()[-1], EagerBackend), "the last resort takes everything"
    assert set(registry.direct_backends()) | set(registry.engine_backends()) == set(registry._BACKENDS)
    for backend in registry._BACKENDS:
        assert registry.get_backend(backend.name) is backend
        assert isinstance(backend, (DirectBackend, EngineBackend))
        for environment in (HERE, H200, dataclasses.replace(H200, capability=(7, 5)), Environment("mps", "Apple M4")):
            for method in ("encode", "decode"):
                reasons = backend.reasons(environment, job(method))
                assert isinstance(reasons, list) and all(isinstance(reason, str) and reason for reason in reasons)
        if isinstance(backend, EngineBackend):
            assert backend.suffix.startswith(".")
            assert all(isinstance(value, str) for value in backend.identity(H200).values())
    suffixes = [backend.suffix for backend in registry.engine_backends()]
    assert len(set(suffixes)) == len(suffixes)
    with pytest.raises(BackendUnavailableError, match="does not have it"):
        registry.get_backend("onnx")


# The self-check.


@pytest.mark.parametrize("method", ["encode", "decode"])
def test_inputs_of_the_self_check(method):
    config = dict(random_vae().config, latents_mean=[1.0, 2.0, 3.0, 4.0], latents_std=[0.1, 0.2, 0.3, 0.4])
    x = sample_input(job(method), Size(640, 512), config)
    assert x.shape == ((1, 3, 512, 640) if method == "encode" else (1, 4, 64, 80))
    assert torch.equal(x, sample_input(job(method), Size(640, 512), config)), "every machine checks with the same numbers"
    if method == "encode":
        assert x.abs().max() <= 1 and x.std() > 0.3
    else:
        assert torch.allclose(x.mean((0, 2, 3)), torch.tensor(config["latents_mean"]), atol=0.05)
        assert torch.allclose(x.std((0, 2, 3)), torch.tensor(config["latents_std"]), rtol=0.1)


@pytest.mark.parametrize(("error", "relative", "psnr"), [(0.0, 0.0, float("inf")), (0.02, 0.02, 40.0), (0.2, 0.2, 20.0)])
def test_measures_of_the_self_check(error, relative, psnr):
    exact = torch.ones(1, 3, 8, 8)
    exact[..., ::2] = -1
    assert measure(exact + error, exact).relative == pytest.approx(relative, rel=1e-3)
    assert psnr_db(exact + error, exact, "decode") == pytest.approx(psnr, rel=1e-3)


# Import and errors.


def test_importing_does_no_work():
    """No GPU is touched, and diffusers is loaded by whoever brings a pipeline, not by us."""
    script = (
        "import sys, torch, qwen_vae_accel\n"
        "assert not torch.cuda.is_initialized()\n"
        "heavy = [m for m in ('diffusers', 'transformers', 'triton', 'tensorrt', 'matplotlib') if m in sys.modules]\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, timeout=120)


def test_the_public_names():
    import qwen_vae_accel

    assert set(qwen_vae_accel.__all__) >= {"accelerate", "AccelConfig", "Handle", "__version__"}
    assert AccelConfig.__doc__ and qwen_vae_accel.accelerate.__doc__


def test_one_base_class_catches_all_errors():
    from qwen_vae_accel import errors

    for name, value in vars(errors).items():
        if isinstance(value, type) and issubclass(value, Exception):
            assert issubclass(value, AccelError), name
            assert value.__doc__, name

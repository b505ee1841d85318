"""The fused backend around its kernels, without a GPU."""

from __future__ import annotations

import pytest
import torch

from qwen_vae_accel import AccelConfig
from qwen_vae_accel.backends.base import Environment, Job
from qwen_vae_accel.backends.fused import backend as fused
from qwen_vae_accel.errors import BackendUnavailableError
from qwen_vae_accel.model import ModelSource
from tests.helpers import CPU


class Network:
    """A network of which one kernel fails to compile."""

    error: Exception
    nbytes = 0

    def __init__(self, *args: object, **options: object) -> None:
        pass

    def compile(self, progress: object = None) -> None:
        raise self.error


@pytest.fixture
def job(tiny, monkeypatch):
    monkeypatch.setattr(fused, "FusedDecoder", Network)
    return ModelSource(tiny), Job("decode", ModelSource(tiny).topology, torch.bfloat16, CPU)


def test_a_kernel_that_does_not_compile_is_a_reason(job, monkeypatch):
    monkeypatch.setattr(Network, "error", RuntimeError("ptxas is too old\nand a long log"), raising=False)
    with pytest.raises(BackendUnavailableError) as caught:
        fused.FusedBackend().program(*job)
    (reason,) = caught.value.reasons
    assert "does not compile here" in reason and "ptxas is too old" in reason and "long log" not in reason


def test_the_limit_of_the_configuration_reaches_the_network(job, monkeypatch):
    source, made = job[0], []

    class Seen(Network):
        def __init__(self, *args, config, **named):
            made.append(config.memory_limit)

        def compile(self, progress=None):
            pass

    monkeypatch.setattr(fused, "FusedDecoder", Seen)
    for limit in (None, 2**30, 0.25):
        config = AccelConfig(memory_limit=limit, dtype="bfloat16")
        wanted = Job.of(config, "decode", source.topology, CPU, torch.bfloat16, Environment("cuda", "a GPU"))
        fused.FusedBackend().program(source, wanted)
    assert made == [None, 2**30, 0.25]


def test_too_little_memory_is_told_as_such(job, monkeypatch):
    monkeypatch.setattr(Network, "error", torch.OutOfMemoryError("CUDA out of memory"), raising=False)
    with pytest.raises(torch.OutOfMemoryError):
        fused.FusedBackend().program(*job)

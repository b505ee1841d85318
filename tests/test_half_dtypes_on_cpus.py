"""16-bit dtypes on a CPU: computed natively where it has instructions for them, else in float32 and rounded at the ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from qwen_vae_accel import AccelConfig, accelerate
from qwen_vae_accel.backends.base import Environment, Job
from qwen_vae_accel.model import inspect_vae
from tests.helpers import CPU, as_if_on, decoded, latents

GPU = Environment("cuda", "NVIDIA H100", capability=(9, 0))
HALF = (torch.bfloat16, torch.float16)


def cpu(*half: str) -> Environment:
    return Environment("cpu", "AVX2", half_dtypes=half)


@pytest.mark.parametrize(
    ("environment", "bfloat16", "float16"),
    [
        (cpu(), torch.float32, torch.float32),
        (cpu("bfloat16"), torch.bfloat16, torch.float32),
        (cpu("bfloat16", "float16"), torch.bfloat16, torch.float16),
        (GPU, torch.bfloat16, torch.float16),
        (Environment("mps", "AVX2"), torch.bfloat16, torch.float16),
    ],
)
def test_the_arithmetic_is_what_the_cpu_has_instructions_for(environment, bfloat16, float16):
    assert [environment.arithmetic(dtype) for dtype in HALF] == [bfloat16, float16]
    assert environment.arithmetic(torch.float32) is torch.float32


def test_a_job_asks_for_what_the_machine_computes_in(micro: nn.Module):
    topology = inspect_vae(micro)
    job = Job.of(AccelConfig(decode_dtype="float16"), "decode", topology, CPU, torch.bfloat16, cpu("bfloat16"))
    assert job == Job("decode", topology, torch.float32, CPU)
    job = Job.of(AccelConfig(), "encode", topology, CPU, torch.bfloat16, cpu("bfloat16"))
    assert job == Job("encode", topology, torch.bfloat16, CPU)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.usefixtures("no_grad")
def test_without_instructions_the_image_is_the_rounded_one_of_float32(micro, dtype, monkeypatch):
    as_if_on(monkeypatch)
    z = latents("48x32").to(dtype)
    vae = micro.to(dtype)
    with accelerate(vae, backend="eager") as handle:
        image = decoded(vae, z)
        report = handle.report().as_dict()
    with accelerate(vae.float(), backend="eager"):
        wide = decoded(vae, z.float())
    assert image.dtype == dtype and torch.equal(image, wide.to(dtype))
    assert report["calls"]["decode"] == {"eager": 1} and report["fallbacks"] == []
    name = str(dtype).removeprefix("torch.")
    assert report["arithmetic"]["decode"] == f"{name} is computed in float32: this CPU has no instructions for it"


@pytest.mark.usefixtures("no_grad")
def test_with_instructions_nothing_is_widened(micro, monkeypatch):
    as_if_on(monkeypatch, "bfloat16", "float16")
    vae = micro.to(torch.bfloat16)
    z = latents("48x32").bfloat16()
    with accelerate(vae, backend="eager") as handle:
        image = decoded(vae, z)
        assert handle.report().as_dict()["arithmetic"] == {}
    with accelerate(vae.float(), backend="eager"):
        assert not torch.equal(image, decoded(vae, z.float()).bfloat16())


@pytest.mark.usefixtures("no_grad")
def test_engines_of_such_a_cpu_are_built_and_found_in_float32(micro, fake, tmp_path, monkeypatch):
    as_if_on(monkeypatch)
    vae = micro.to(torch.bfloat16)
    with accelerate(vae, backend="tensorrt", engine_dir=tmp_path, sizes=["32x32"]) as handle:
        assert decoded(vae, latents("32x32").bfloat16()).dtype == torch.bfloat16
        assert handle.report().as_dict()["calls"]["decode"] == {"tensorrt": 1}
    records = json.loads((tmp_path / "manifest.json").read_text())["engines"]
    assert [record["dtype"] for versions in records.values() for record in versions] == ["float32"]


@pytest.mark.slow
def test_limits_that_are_set_for_pytorch_are_kept():
    """oneDNN held below AVX-512 has no 16-bit arithmetic on an x86 processor, whatever the processor is."""
    script = "from qwen_vae_accel.backends.base import Environment, torch; "
    script += "print(Environment.detect(torch.device('cpu')).half_dtypes)"
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "()"

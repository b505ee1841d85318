"""The table of offloading modes in ``docs/pipelines.md``: right images, the fast path, in either order; here and on a GPU."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import pytest
import torch
from torch import nn

from qwen_vae_accel import accelerate
from qwen_vae_accel.demo.tiny_pipeline import tiny_pipeline
from tests.conftest import random_vae
from tests.contract import X, Z, calls, references
from tests.helpers import ROOT, Reference, decoded, moments
from tests.offloading import CPU, MODES, Mode

pytestmark = pytest.mark.usefixtures("no_grad")
GPU = torch.device("cuda", 0)
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@functools.cache
def expected_on(device: torch.device) -> tuple[Reference, Reference]:
    """What the plain VAE gives on ``device``."""
    return references(random_vae().to(device), X.to(device), Z.to(device))


@pytest.fixture(autouse=True)
def full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def check(vae: nn.Module, device: torch.device) -> None:
    """Both methods, right, with the output on ``device``."""
    ours = moments(vae, X.to(device)), decoded(vae, Z.to(device))
    assert all(output.device == device for output in ours)
    for reference, output in zip(expected_on(device), ours, strict=True):
        reference.check(output)


def run(vae: nn.Module, mode: Mode, first: str, device: torch.device, folder: Path) -> None:
    """All of a mode: the fast path, diffusers' own, a warm-up, the way back."""
    handle = accelerate(vae, backend="eager") if first == "accelerate" else None
    if handle is not None:
        check(vae.to(device), device)
        vae.to(CPU)
    kept = mode.apply(vae, device, folder)  # a pipeline, where there is one
    handle = handle or accelerate(vae, backend="eager")
    check(vae, device)
    if device != CPU and not mode.stays:
        assert {p.device.type for p in vae.decoder.parameters()} == {mode.between}
    # What only diffusers does works where it works without us, and after it the fast path does.
    if mode.loads or (device == CPU and "disk" not in mode.name):
        with torch.enable_grad():
            image = decoded(vae, Z.to(device, copy=True).requires_grad_())
        expected_on(device)[1].check(image.detach())
        check(vae, device)
    served = calls(handle)
    assert served["encode"].keys() == {"eager"} and served["decode"]["eager"] == served["encode"]["eager"]
    assert [fallback["reason"][:8] for fallback in handle.report().as_dict()["fallbacks"]] in ([], ["gradient"])
    handle.warmup(progress=False)
    handle.restore()
    del kept


@pytest.mark.parametrize("first", ["offload", "accelerate"])
@pytest.mark.parametrize("mode", [mode for mode in MODES if not mode.gpu], ids=lambda mode: mode.name)
def test_each_mode_on_the_cpu(micro, mode, first, tmp_path):
    run(micro, mode, first, CPU, tmp_path)


@pytest.mark.parametrize("first", ["offload", "accelerate"])
@pytest.mark.parametrize("mode", [pytest.param(mode, marks=needs_gpu, id=mode.name) for mode in MODES])
def test_each_mode_on_a_gpu(micro, mode, first, tmp_path):
    run(micro, mode, first, GPU, tmp_path)


@pytest.mark.parametrize("mode", [pytest.param(mode, marks=needs_gpu, id=mode.name) for mode in MODES])
def test_latents_on_the_cpu_go_where_diffusers_takes_them(micro, mode, tmp_path):
    """Hooks that move what passes through them, such as those of ``device_map``, also move the input."""
    plain = copy.deepcopy(micro)
    kept = mode.apply(plain, GPU, tmp_path / "plain"), mode.apply(micro, GPU, tmp_path / "ours")
    accelerate(micro, backend="eager")
    for method, x in (("encode", X), ("decode", Z)):
        try:
            theirs = getattr(plain, method)(x)
        except RuntimeError:
            with pytest.raises((RuntimeError, ValueError)):
                getattr(micro, method)(x)
        else:
            ours = getattr(micro, method)(x)
            pair = [output.sample if method == "decode" else output.latent_dist.parameters for output in (ours, theirs)]
            assert pair[0].device == pair[1].device
            if mode.loads:
                expected_on(GPU)[method == "decode"].check(pair[0].to(GPU))
    del kept


@pytest.mark.parametrize("method", [pytest.param(name, marks=needs_gpu) for name in ("model", "sequential", "group")])
def test_whole_pipelines_on_a_gpu(micro, method):
    """The images of ``enable_*_offload`` with and without the fast VAE."""
    images = []
    for fast_vae in (False, True):
        pipe = tiny_pipeline(copy.deepcopy(micro))
        if method == "group":
            pipe.enable_group_offload(onload_device=GPU, offload_type="leaf_level", use_stream=True)
        else:
            getattr(pipe, f"enable_{method}_cpu_offload")(device=GPU)
        handle = accelerate(pipe) if fast_vae else None
        for _ in range(2):  # the hooks are applied anew after a request
            generator = torch.Generator().manual_seed(0)
            options = {"height": 48, "width": 64, "num_inference_steps": 2, "generator": generator, "output_type": "pt"}
            images.append(pipe("a cup", **options).images.float().cpu())
    assert handle is not None and calls(handle)["decode"].get("diffusers", 0) == 0
    assert (images[3] - images[1]).abs().max() < 1e-3 and (images[2] - images[0]).abs().max() < 1e-3


def test_every_mode_is_in_the_documentation():
    text = (ROOT / "docs" / "pipelines.md").read_text(encoding="utf-8")
    assert [mode.name for mode in MODES if f"| {mode.name} |" not in text] == []

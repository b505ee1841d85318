"""``AutoencoderKLQwenImage21``: what is different for its users. The networks themselves are tested in ``test_model.py``."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from qwen_vae_accel import accelerate
from qwen_vae_accel.backends.base import Environment, Job
from qwen_vae_accel.backends.fused.backend import FusedBackend
from qwen_vae_accel.errors import ConfigError, InvalidInputError, UnsupportedVAEError
from qwen_vae_accel.kernels.network import QWEN_IMAGE_21
from qwen_vae_accel.kernels.sm90 import nvrtc
from qwen_vae_accel.loading import load_vae
from qwen_vae_accel.model import ModelSource
from qwen_vae_accel.model.source import fingerprint, image_state
from qwen_vae_accel.model.topology import Topology
from qwen_vae_accel.plan import Miss, Plan
from qwen_vae_accel.sizes import Size
from tests.conftest import MICRO_21, random_vae
from tests.helpers import CPU, Reference, decoded, moments, picture, randn, spread_gammas

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture
def vae() -> torch.nn.Module:
    return random_vae("2.1")


# Against float64: on weights of many channels two evaluations in float32 differ by the errors of both.


@pytest.mark.numeric
@pytest.mark.parametrize("method", ["encode", "decode"])
def test_of_published_depth_it_is_no_further_from_float64_than_diffusers(method):
    import diffusers

    random_vae("2.1")  # skips where diffusers does not have it
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = diffusers.AutoencoderKLQwenImage21(base_dim=24, decoder_base_dim=36).eval()
    x = picture(1, 4, 1, 96, 64) if method == "encode" else randn(1, 64, 1, 6, 4)
    exact = Reference(vae, method, x)
    accelerate(vae, backend="eager")
    exact.check((moments if method == "encode" else decoded)(vae, x))


# The plugin.


@pytest.mark.numeric
@pytest.mark.parametrize("batch", [1, 2, 3, 4])
def test_encode_and_decode_in_place(vae, batch):
    x, z = picture(batch, 4, 1, 48, 32), randn(batch, 6, 1, 3, 5)
    exact, image, plain = Reference(vae, "encode", x), Reference(vae, "decode", z), decoded(vae, z)
    with accelerate(vae, backend="eager") as handle:
        posterior = vae.encode(x).latent_dist
        assert isinstance(posterior, DiagonalGaussianDistribution)
        exact.check(posterior.parameters)
        image.check(vae.decode(z).sample)
        assert decoded(vae, z).shape == (batch, 4, 1, 48, 80)
        assert handle.report().as_dict()["calls"] == {"encode": {"eager": 1}, "decode": {"eager": 2}}
        assert handle.report().as_dict()["fallbacks"] == []
    assert torch.equal(decoded(vae, z), plain)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda v: v.encode(picture(1, 4, 1, 48, 40)), "multiples of 16 pixels, was given"),
        (lambda v: v.encode(picture(1, 4, 1, 8, 8)), "multiples of 16 pixels"),
        (lambda v: v.encode(picture(1, 3, 1, 48, 48)), "of 4 channels"),
        (lambda v: v.decode(randn(1, 16, 1, 4, 4)), "of 6 channels"),
    ],
)
def test_what_it_cannot_take(vae, call, says):
    with accelerate(vae), pytest.raises(InvalidInputError, match=says):
        call(vae)


@pytest.mark.numeric
def test_tiling_and_slicing(vae):
    x, z = picture(2, 4, 1, 320, 96), randn(2, 6, 1, 20, 6)
    exact, image = Reference(vae, "encode", x), Reference(vae, "decode", z)
    vae.enable_tiling()
    vae.enable_slicing()
    with accelerate(vae, backend="eager") as handle:
        exact.check(moments(vae, x))
        image.check(decoded(vae, z))
        assert handle.report().as_dict()["calls"] == {"encode": {"eager": 2}, "decode": {"eager": 2}}


def test_the_weights_of_time_do_not_act_and_their_presence_does(vae):
    """A fingerprint is of what the networks read; that a shortcut counts two frames is part of it, the values are not."""
    source = ModelSource(vae)
    before = {method: source.fingerprint(method, torch.float32) for method in ("encode", "decode")}
    vae.decoder.up_blocks[0].upsampler.time_conv.weight.mul_(2)
    vae.encoder.down_blocks[1].downsampler.time_conv.bias.add_(1)
    assert {method: source.fingerprint(method, torch.float32) for method in before} == before
    parameters = {name: value for name, value in vae.named_parameters() if "down_blocks.1.downsampler.time_conv" not in name}
    assert fingerprint(image_state(parameters, "encode"), torch.float32) != before["encode"]


def test_a_folder_of_it(vae, tmp_path, monkeypatch):
    vae.save_pretrained(tmp_path)
    loaded = load_vae(tmp_path, CPU)
    z = randn(1, 6, 1, 2, 3)
    assert torch.equal(decoded(loaded, z), decoded(vae, z))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["_class_name"] == "AutoencoderKLQwenImage21"
    import diffusers

    class Older:
        __version__ = "0.39.0"

    monkeypatch.setitem(__import__("sys").modules, "diffusers", Older())
    with pytest.raises(UnsupportedVAEError, match="0.39.0 has no AutoencoderKLQwenImage21: install a newer"):
        load_vae(tmp_path, CPU)
    assert diffusers.AutoencoderKLQwenImage21 is type(vae)


# Sizes: 16 pixels per latent pixel, pipelines round to 32.


def test_static_sizes_are_rounded_as_its_pipelines_round():
    plan = Plan.make(["4_3", "1_1", "1040x1000"], False, scale=16, multiple=16)
    assert [(p.name, str(p.optimum)) for p in plan.profiles] == [
        ("4_3", "1472x1120"),
        ("1_1", "1312x1312"),
        ("1024x992", "1024x992"),
    ]
    opened = Plan.make(None, False, scale=16, multiple=16)
    assert opened.select("decode", Size(1312, 1312)).key.stem == "1_1/vae_decoder"
    assert opened.select("decode", Size(640, 640)).key.stem == "640x640/vae_decoder"
    with pytest.raises(ConfigError, match="multiples of 32"):
        Plan.make(["24x64"], False, scale=16, multiple=16)


def test_ranges_are_of_sizes_that_its_encoder_takes():
    plan = Plan.make(None, True, scale=16, multiple=16)
    assert all(
        side % 16 == 0
        for p in plan.profiles
        for size in (p.minimum, p.optimum, p.maximum)
        for side in (size.width, size.height)
    )
    assert [p.name for p in plan.profiles] == [p.name for p in Plan.make(None, True).profiles]
    (profile,) = Plan.make(["40x40:50x50:100x70"], True, scale=16, multiple=16).profiles
    assert [str(s) for s in (profile.minimum, profile.optimum, profile.maximum)] == ["32x32", "48x48", "96x64"]
    assert profile.name == "48x48"
    assert isinstance(plan.select("encode", Size(2048, 2048)), Miss)
    with pytest.raises(ConfigError, match="at least 32 pixels"):
        Plan.make(["31x64:64x64:100x70"], True, scale=16, multiple=16)


# Backends.


def fused_reasons(topology: Topology, method: str, capability: tuple[int, int]) -> list[str]:
    gpu = Environment("cuda", "a GPU", capability, cuda="13.0")
    return FusedBackend().reasons(gpu, Job(method, topology, torch.bfloat16, CPU))


@pytest.mark.parametrize("method", ["encode", "decode"])
def test_fused_serves_it_on_hopper_and_says_elsewhere_what_it_needs(method, monkeypatch):
    topology = dataclasses.replace(QWEN_IMAGE_21, image_channels=3)
    monkeypatch.setattr(nvrtc, "library", object)
    assert fused_reasons(topology, method, (9, 0)) == fused_reasons(QWEN_IMAGE_21, method, (9, 0)) == []
    (reason,) = fused_reasons(topology, method, (8, 0))
    assert re.fullmatch(
        rf"its kernels for the {method}r's layers of .* need compute capability 9.0 \(Hopper\) and NVRTC", reason
    )
    monkeypatch.setattr(nvrtc, "library", lambda: None)
    assert fused_reasons(topology, method, (9, 0)) == [reason]


def test_fused_says_why_not_and_the_next_backend_serves(vae, monkeypatch):
    monkeypatch.setattr(nvrtc, "library", object)
    (reason,) = fused_reasons(ModelSource(vae).topology, "decode", (9, 0))
    assert "no kernels for these layers" in reason and "conv_in 6->" in reason and "->4" in reason
    with accelerate(vae, backend="auto") as handle:
        decoded(vae, randn(1, 6, 1, 2, 2))
        assert handle.report().as_dict()["calls"]["decode"] == {"eager": 1}


@pytest.mark.slow
def test_real_engines_of_inductor(vae, tmp_path):
    """Both networks for a range of sizes: built, checked, loaded again."""
    z, x = randn(1, 6, 1, 4, 6), picture(2, 4, 1, 48, 80)
    exact, image = Reference(vae, "encode", x), Reference(vae, "decode", z)
    sizes = {"sizes": ["32x32:64x64:130x128"], "multi_profile": True}
    options = {"backend": "inductor", "engine_dir": tmp_path, "task": "i2i", **sizes}
    with accelerate(vae, on_miss="build", **options) as handle:
        assert handle.warmup(progress=False).as_dict()["fallbacks"] == []
    with accelerate(vae, on_miss="error", **options) as handle:
        image.check(decoded(vae, z))
        exact.check(moments(vae, x))
        assert decoded(vae, randn(1, 6, 1, 8, 8)).shape == (1, 4, 1, 128, 128)
        report = handle.report().as_dict()
    assert report["calls"] == {"encode": {"inductor": 1}, "decode": {"inductor": 2}} and report["builds"] == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("backend", ["auto", "eager", "inductor"])
def test_on_a_gpu(vae, tmp_path, backend):
    """No further from float32 than diffusers in bfloat16; ``auto`` passes over the kernels, which have other widths."""
    z, x = randn(2, 6, 1, 6, 4).cuda(), picture(1, 4, 1, 96, 64).cuda()
    vae = vae.to(torch.bfloat16).float().cuda()
    torch.backends.cudnn.allow_tf32, before = False, torch.backends.cudnn.allow_tf32
    try:
        exact = decoded(vae, z), moments(vae, x)
    finally:
        torch.backends.cudnn.allow_tf32 = before
    vae = vae.to(torch.bfloat16)
    half = z.bfloat16(), x.bfloat16()
    theirs = decoded(vae, half[0]), moments(vae, half[1])
    options = {}
    if backend == "inductor":
        options = {"engine_dir": tmp_path, "sizes": ["32x32:64x96:128x128"], "multi_profile": True, "on_miss": "build"}
    with accelerate(vae, backend=backend, task="i2i", **options) as handle:
        ours = decoded(vae, half[0]), moments(vae, half[1])
        report = handle.report().as_dict()
    served = "eager" if backend == "auto" else backend
    assert report["calls"] == {"encode": {served: 1}, "decode": {served: 1}} and report["fallbacks"] == []
    for output, other, reference in zip(ours, theirs, exact, strict=True):
        assert (output.float() - reference).norm() <= 1.05 * (other.float() - reference).norm()


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs compute capability 9.0"
)
@pytest.mark.parametrize("channels", [4, 3])
def test_on_hopper_the_published_vae_is_served_by_fused(channels, monkeypatch):
    """Of full size with random weights; both directions, nothing passed over, and no further from float32 than diffusers."""
    import diffusers

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)

    random_vae("2.1")  # skips where diffusers does not have it
    with torch.random.fork_rng(devices=[0]), torch.device("cuda"):
        torch.manual_seed(0)
        vae = diffusers.AutoencoderKLQwenImage21(in_channels=channels, out_channels=channels)
    vae = spread_gammas(vae.eval().requires_grad_(False)).to(torch.bfloat16)
    z, x = randn(1, 64, 1, 12, 8).cuda(), picture(1, channels, 1, 192, 128).cuda()
    exact = decoded(vae.float(), z), moments(vae, x)
    vae.to(torch.bfloat16)
    theirs = decoded(vae, z.bfloat16()), moments(vae, x.bfloat16())
    with accelerate(vae, task="i2i") as handle:
        ours = decoded(vae, z.bfloat16()), moments(vae, x.bfloat16())
        report = handle.report().as_dict()
    assert report["calls"] == {"encode": {"fused": 1}, "decode": {"fused": 1}} and report["fallbacks"] == []
    for output, other, reference in zip(ours, theirs, exact, strict=True):
        assert (output.float() - reference).norm() <= (other.float() - reference).norm()


def test_the_tests_model_is_of_the_published_structure():
    assert not {"dim_mult", "temperal_downsample", "is_residual"} & set(MICRO_21)

"""A VAE that computes something else than the published one runs as diffusers runs it; otherwise it stays fast."""

from __future__ import annotations

import copy
from typing import Any

import diffusers
import pytest
import torch
from diffusers import AutoencoderKLQwenImage
from torch import nn

from qwen_vae_accel import accelerate
from qwen_vae_accel.errors import UnsupportedVAEError
from qwen_vae_accel.model import ModelSource, inspect_vae
from qwen_vae_accel.model.published import published_twin
from tests.changes import CHANGES
from tests.conftest import MICRO, TOPOLOGIES, random_vae
from tests.contract import X, Z, calls, fast, outputs
from tests.helpers import Reference, decoded, moments, randn

pytestmark = pytest.mark.usefixtures("no_grad")


# Changes that could matter, and here do not.
HARMLESS = {"a_helper_of_the_vae", "double_precision", "the_configuration", "parameters_of_a_subclass"}


def image(vae: Any) -> torch.Tensor:
    return decoded(vae, Z.to(vae.dtype)).as_subclass(torch.Tensor)


@pytest.mark.parametrize("name", CHANGES)
def test_what_somebody_changed_is_seen_at_the_next_call_and_undone_at_the_next(micro, name):
    change, reason = CHANGES[name]
    before, plain = image(micro), random_vae().requires_grad_(False)
    with change(plain):
        expected = image(plain)
    assert name in HARMLESS or (expected - before).abs().max() > 1e-3, "the change changes nothing"
    handle = accelerate(micro)
    image(micro)
    with change(micro):
        assert torch.equal(image(micro), expected)
        (fallback,) = handle.report().as_dict()["fallbacks"]
        assert reason in fallback["reason"]
    Reference(plain, "decode", Z).check(image(micro))
    assert calls(handle)["decode"] == {"eager": 2, "diffusers": 1}


@pytest.mark.parametrize("name", CHANGES)
def test_what_somebody_changed_before_is_the_same(micro, name):
    change, reason = CHANGES[name]
    plain = random_vae().requires_grad_(False)
    with change(plain):
        expected = image(plain)
    with change(micro):
        if name == "the_configuration":  # then it is the configuration of another network
            reason = "decoder.up_blocks.0.resnets holds layers 0, 1, in diffusers 0, 1, 2, 3"
        handle = accelerate(micro)
        assert torch.equal(image(micro), expected)
        (fallback,) = handle.report().as_dict()["fallbacks"]
        assert reason in fallback["reason"] and fallback["count"] == 1
    if name not in ("the_configuration", "the_class_of_the_vae"):  # the latter takes ours away with its own
        Reference(plain, "decode", Z).check(image(micro))
        assert calls(handle)["decode"] == {"eager": 1, "diffusers": 1}


def test_constructors_that_make_another_network(monkeypatch):
    """The well-known patch for seamless textures: every convolution that is made from now on pads in circles."""
    own = nn.Conv2d.__init__
    monkeypatch.setattr(nn.Conv2d, "__init__", lambda *args, **options: own(*args, **{**options, "padding_mode": "circular"}))
    torch.manual_seed(0)
    config = {**MICRO, "z_dim": 5, "latents_mean": [0.0] * 5, "latents_std": [1.0] * 5}  # no other test has a twin of it
    vae: Any = AutoencoderKLQwenImage(**config).eval()
    z = randn(1, 5, 1, 6, 8)
    expected = decoded(vae, z)
    handle = accelerate(vae)
    assert torch.equal(decoded(vae, z), expected)
    assert "Conv2d.__init__ was replaced" in handle.report().as_dict()["fallbacks"][0]["reason"]
    monkeypatch.undo()
    assert torch.equal(decoded(vae, z), expected)
    assert "padding_mode is 'circular'" in handle.report().as_dict()["fallbacks"][1]["reason"]
    for layer in vae.modules():
        if isinstance(layer, nn.Conv2d):
            layer.padding_mode = "zeros"
    Reference(copy.deepcopy(vae), "decode", z).check(decoded(vae, z))
    assert calls(handle)["decode"] == {"diffusers": 2, "eager": 1}


def test_dropout_counts_in_training_only():
    vae: Any = AutoencoderKLQwenImage(**MICRO, dropout=0.5).eval().requires_grad_(False)
    plain = copy.deepcopy(vae)
    handle = accelerate(vae)
    Reference(plain, "decode", Z).check(decoded(vae, Z))
    for each in (vae, plain):
        each.train()
    outcome = []
    for each in (vae, plain):
        torch.manual_seed(1)
        outcome.append(decoded(each, Z))
    assert torch.equal(*outcome)
    assert "training mode: call vae.eval()" in handle.report().as_dict()["fallbacks"][0]["reason"]
    vae.eval()
    decoded(vae, Z)
    assert calls(handle)["decode"] == {"eager": 2, "diffusers": 1}


@pytest.mark.parametrize("order", ["before", "after"])
def test_a_vae_without_its_encoder_decodes(micro, order):
    reference = Reference(micro, "decode", Z)
    if order == "before":
        micro.encoder = None
    handle = accelerate(micro)
    micro.encoder = None
    reference.check(decoded(micro, Z))
    with pytest.raises(AttributeError):  # diffusers' own
        moments(micro, X)
    assert calls(handle)["decode"] == {"eager": 1}
    assert handle.report().as_dict()["fallbacks"][0]["reason"] == "encoder is not there"


@pytest.mark.parametrize("order", ["before", "after"])
def test_weights_that_are_stored_in_float8_and_cast_by_layer_are_served_fast(micro, order):
    def cast(vae: Any) -> None:
        vae.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)

    plain = random_vae()
    cast(plain)
    expected = decoded(plain, Z)
    if order == "before":
        cast(micro)
    handle = accelerate(micro)
    if order == "after":
        decoded(micro, Z)
        cast(micro)
    assert (decoded(micro, Z) - expected).abs().max() < 1e-5
    assert set(calls(handle)["decode"]) == {"eager"}


def test_float8_without_a_hook_is_not_known(micro):
    handle = accelerate(micro)
    micro.decoder.conv_in.to(torch.float8_e4m3fn)
    with pytest.raises(RuntimeError):  # diffusers' own
        decoded(micro, Z)
    assert "decoder.conv_in.weight is stored as float8_e4m3fn" in handle.report().as_dict()["fallbacks"][0]["reason"]


# What is no change.


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_a_plain_vae_is_known(name):
    vae = random_vae(name)
    source = ModelSource(vae)
    for method in ("encode", "decode"):
        generation = source.generation(method)
        assert source.custom(method) == ""
        assert source.generation(method) == generation
        assert source._seen[method].same(), "a second look sees no change"


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_the_twin_takes_no_memory_and_no_random_numbers(name):
    vae = random_vae(name)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    twin = published_twin(vae)
    assert torch.equal(torch.rand(2), expected)
    assert not twin.doubt and {parameter.device.type for parameter in twin.vae.parameters()} == {"meta"}
    assert published_twin(random_vae(name)) is twin


def test_a_subclass_that_overrides_nothing_of_it_is_served_fast(micro):
    class Logging(AutoencoderKLQwenImage):
        def describe(self) -> str:
            return "a VAE"

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return None  # encode and decode do not use it

    reference = Reference(micro, "decode", Z)
    micro.__class__ = Logging
    handle = accelerate(micro)
    reference.check(decoded(micro, Z))
    assert calls(handle) == fast(decode=1)


def videos(vae: Any) -> None:
    """The original path keeps a cache in the VAE."""
    vae.decode(randn(1, 4, 2, 6, 8))
    assert "_feat_map" in vars(vae)


def mode_and_gradients(vae: Any) -> None:
    vae.train()
    vae.requires_grad_(False)
    vae.eval()


def settings(vae: Any) -> None:
    vae.enable_slicing()
    vae.enable_tiling(tile_sample_min_height=512, tile_sample_min_width=512)
    vae.register_to_config(latents_mean=[1.0] * 4)


def marks_of_tools(vae: Any) -> None:
    for layer in vae.modules():
        layer._is_hf_initialized = True
        layer.note = "seen"
    vae.decoder.register_buffer("steps", torch.zeros(1))
    vae.decoder.spare = nn.Linear(2, 2)
    vae.decoder.conv_in.in_channels = -1  # nobody reads it


def hooks_elsewhere(vae: Any) -> None:
    nn.Conv2d(1, 1, 1).register_forward_hook(print)
    vae.register_forward_hook(print)  # for vae(...), which encode and decode are not


def compiling_elsewhere(vae: Any) -> None:
    """Dynamo patches the constructor of every module."""
    torch.compile(nn.Linear(2, 2), backend="eager")(torch.zeros(1, 2))
    assert type(vae)(**MICRO) is not None


@pytest.mark.parametrize("act", [videos, mode_and_gradients, settings, marks_of_tools, hooks_elsewhere, compiling_elsewhere])
@pytest.mark.parametrize("order", ["before", "after"])
def test_what_changes_no_result_is_no_change(micro, act, order):
    before = [Reference(micro, method, x) for method, x in (("encode", X), ("decode", Z))]
    if order == "before":
        act(micro)
    handle = accelerate(micro)
    if order == "after":
        outputs(micro)
        act(micro)
    for reference, output in zip(before, outputs(micro), strict=True):
        reference.check(output)
    assert all(fallback["reason"].startswith("2 frames") for fallback in handle.report().as_dict()["fallbacks"])


# What is no such VAE at all.


def test_a_look_alike_is_refused(micro):
    class Vendored(nn.Module):
        """The same parameters under the same names, and methods that may do anything."""

        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = micro.encoder, micro.decoder
            self.quant_conv, self.post_quant_conv = micro.quant_conv, micro.post_quant_conv

        def encode(self, x: torch.Tensor, return_dict: bool = True) -> None: ...

        def decode(self, z: torch.Tensor, return_dict: bool = True) -> None: ...

    with pytest.raises(UnsupportedVAEError, match=r"it is a tests\.test_recognition\..*Vendored, no class of diffusers"):
        accelerate(Vendored())


def test_a_compiled_vae_is_refused_with_the_way_out(micro):
    with pytest.raises(UnsupportedVAEError, match=r"accelerate the VAE inside, vae\._orig_mod"):
        accelerate(torch.compile(micro, backend="eager"))


def test_the_topology_is_that_of_the_configuration(micro):
    expected = inspect_vae(micro)
    micro.decoder = nn.Identity()
    micro.encoder = None
    assert inspect_vae(micro) == expected
    micro._internal_dict = diffusers.configuration_utils.FrozenDict({**micro.config, "dim_mult": "none"})
    with pytest.raises(UnsupportedVAEError, match="its configuration makes no AutoencoderKLQwenImage"):
        inspect_vae(micro)

"""The description of the networks: against the models that diffusers makes, the packed weights' keys, and the tables."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from qwen_vae_accel.kernels.float8 import block_layers, calibrated_layers
from qwen_vae_accel.kernels.network import (
    QWEN_IMAGE,
    QWEN_IMAGE_21,
    KernelLayer,
    Kind,
    Network,
    describe,
    network_of,
    stored_channels,
)
from qwen_vae_accel.kernels.reasons import network_reasons, state_reasons
from qwen_vae_accel.kernels.sm90.schedules import FLOAT8_SCHEDULES, MODES, SCHEDULES, Mode
from qwen_vae_accel.kernels.tuning.keys import KernelKey
from qwen_vae_accel.kernels.tuning.tables import H200_CONVS, has_kernel
from qwen_vae_accel.model import inspect_vae
from qwen_vae_accel.model.image_vae import ImageDecoder, ImageEncoder
from qwen_vae_accel.model.source import build_model, image_state
from tests.kernels.cases import METHODS, NETWORKS

TOPOLOGIES = {"AutoencoderKLQwenImage": QWEN_IMAGE, "AutoencoderKLQwenImage21": QWEN_IMAGE_21}


def vae_of(name: str, **config) -> torch.nn.Module:
    """Without values."""
    diffusers = pytest.importorskip("diffusers")
    if not hasattr(diffusers, name):
        pytest.skip(f"this diffusers has no {name}")
    with torch.device("meta"):
        return getattr(diffusers, name)(**config)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_it_names_every_weight_of_the_published_networks(name, method):
    vae = vae_of(name)
    assert inspect_vae(vae) == TOPOLOGIES[name]
    state = image_state(dict(vae.named_parameters()), method)
    network = describe(TOPOLOGIES[name], method)
    assert network.parameters() == {key: tuple(value.shape) for key, value in state.items()}
    assert network_of(state) == network and network.scale == TOPOLOGIES[name].scale


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("name", "config"),
    [
        (
            "AutoencoderKLQwenImage",
            {"base_dim": 16, "dim_mult": [1, 3, 2], "num_res_blocks": 1, "temperal_downsample": [True, True]},
        ),
        ("AutoencoderKLQwenImage", {"base_dim": 32, "z_dim": 4, "num_res_blocks": 3, "input_channels": 4}),
        ("AutoencoderKLQwenImage21", {"base_dim": 8, "decoder_base_dim": 12, "z_dim": 6, "num_res_blocks": 1}),
    ],
)  # fmt: skip
def test_it_names_every_weight_of_others(name, config, method):
    vae = vae_of(name, **config)
    network = describe(inspect_vae(vae), method)
    state = image_state(dict(vae.named_parameters()), method)
    assert network.parameters() == {key: tuple(value.shape) for key, value in state.items()}


@pytest.mark.parametrize("method", METHODS)
def test_its_shortcuts_are_those_of_the_model(method):
    """Of Qwen-Image 2.1, and where time is resampled in other places than published."""
    for temporal in (None, [True, False, True, False]):
        vae = vae_of("AutoencoderKLQwenImage21", **({} if temporal is None else {"temperal_downsample": temporal}))
        model = build_model(image_state(dict(vae.named_parameters()), method), method)
        network = describe(QWEN_IMAGE_21, method, temporal)
        assert isinstance(model, ImageEncoder | ImageDecoder)
        blocks = model.down_blocks if isinstance(model, ImageEncoder) else model.up_blocks
        for level, block in zip(network.levels, blocks, strict=True):
            shortcut, found = level.shortcut, block.shortcut
            assert (shortcut is None) == (found is None)
            if shortcut is not None and method == "encode":
                group = shortcut.in_channels * shortcut.frames * shortcut.side**2 // shortcut.out_channels
                assert (shortcut.frames, shortcut.side, group) == (found.frames, found.side, found.group)
            elif shortcut is not None:
                copies = shortcut.out_channels * shortcut.frames * 4 // shortcut.in_channels
                folded = torch.arange(shortcut.out_channels * shortcut.frames * 4).view(-1, shortcut.frames, 4)[:, -1]
                assert found.channels.shape == folded.flatten().shape and (folded.max() // copies) < shortcut.in_channels
                assert shortcut.side == 2


def test_widths_that_do_not_spread_over_the_resolutions_are_told():
    uneven = dataclasses.replace(QWEN_IMAGE, decoder_widths=QWEN_IMAGE.decoder_widths[:-1])
    with pytest.raises(ValueError, match="13 residual blocks, two of them in the middle, over 4 resolutions"):
        describe(uneven, "decode")


def widths_of(networks: list[Network]) -> set[tuple]:
    return {(layer.kind, layer.in_channels, layer.out_channels) for network in networks for layer in network.kernel_layers()}


def test_every_kernel_of_the_tables_is_of_a_published_layer_and_the_other_way_round():
    layers = {layer for network in NETWORKS for layer in network.kernel_layers()}
    assert all(has_kernel(layer, True) for layer in layers)
    assert not any(network_reasons(network, sm90=True) for network in NETWORKS)
    widths = widths_of(NETWORKS)
    assert {(key.kind, key.in_channels, key.out_channels) for key in H200_CONVS} <= widths
    modes = {(MODES[kind], *channels) for kind, *channels in widths if kind in MODES}
    first = {(Mode.CONV, stored_channels(taken), given) for kind, taken, given in widths if kind is Kind.IN and taken > 16}
    # The projection of 384 channels is Triton's.
    assert set(SCHEDULES) == (modes | first) - {(Mode.POINTWISE, 384, 384)} and set(FLOAT8_SCHEDULES) <= modes


def test_without_the_kernels_of_sm90_the_first_vae_has_every_kernel():
    first = [network for network in NETWORKS if network.latent_channels == 16]
    assert len(first) == 4 and not any(network_reasons(network, sm90=False) for network in first)
    assert all(has_kernel(layer, False) for network in first for layer in network.kernel_layers())


@pytest.mark.parametrize(("topology", "count"), [(QWEN_IMAGE, 26), (QWEN_IMAGE_21, 30)], ids=["Qwen-Image", "2.1"])
def test_every_layer_in_float8_has_a_kernel_in_float8(topology, count):
    """Products of float8 with a shortcut are Triton's: sm90 has no such kernel."""
    network = describe(topology, "decode")
    eight = {*block_layers(network), *calibrated_layers(network)}
    assert len(eight) == count and all(f"{name}.weight" in network.parameters() for name in eight)
    resamplings = [level.resampling for level in network.levels if level.resampling is not None]
    assert [layer.name in eight for layer in resamplings] == [False] + [True] * (len(resamplings) - 1)
    for layer in resamplings[1:]:
        assert (Mode.UPSAMPLE, layer.in_channels, layer.out_channels) in FLOAT8_SCHEDULES
    for block in (block for level in network.levels for block in level.blocks):
        for conv, shortcut in ((block.conv1, None), (block.conv2, block.shortcut)):
            place = conv.in_channels, conv.out_channels
            by_triton = KernelKey(Kind.CONV, *place, float8=True) in H200_CONVS
            if shortcut is None:
                assert conv.name in eight and (Mode.CONV, *place) in FLOAT8_SCHEDULES
            else:
                assert (conv.name in eight) == by_triton


def test_reasons_name_the_layers_that_have_no_kernel():
    odd = describe(dataclasses.replace(QWEN_IMAGE_21, z_dim=48, image_channels=7), "decode")
    assert network_reasons(odd, sm90=True) == [
        "it has no kernels for these layers of the decoder: conv_in 48->1152; conv_out 144->7"
    ]
    state = {name: torch.empty(shape, device="meta") for name, shape in describe(QWEN_IMAGE_21, "decode").parameters().items()}
    assert state_reasons({**state, "conv_in.bias": state["conv_in.bias"][:5]}, sm90=True) == [
        "conv_in.bias has shape [5], the published network has [1152]"
    ]
    del state["up_blocks.1.upsampler.time_conv"]
    assert state_reasons(state, sm90=True) == ["up_blocks.1.upsampler.time_conv is missing"]


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("decode", "its kernels for the decoder's layers of 1152, 576, 288 and 144 channels need compute capability 9.0"),
        ("encode", "its kernels for the encoder's layers of 768 channels need compute capability 9.0"),
    ],
)
def test_elsewhere_a_reason_names_the_widths_and_what_they_need(method, reason):
    network = describe(QWEN_IMAGE_21, method)
    assert network_reasons(network, sm90=False) == [f"{reason} (Hopper) and NVRTC"]
    state = {name: torch.empty(shape, device="meta") for name, shape in network.parameters().items()}
    assert state_reasons(state, sm90=False) == network_reasons(network, sm90=False)
    assert state_reasons(state, sm90=True) == []
    both = describe(dataclasses.replace(QWEN_IMAGE_21, image_channels=7), method)
    nowhere, elsewhere = network_reasons(both, sm90=False)
    assert nowhere == network_reasons(both, sm90=True)[0] and "7" in nowhere and elsewhere == f"{reason} (Hopper) and NVRTC"


def test_a_layer_reads_as_in_the_list_of_launches():
    assert str(KernelLayer(Kind.UP, 384, 192)) == "upsample 384->192"
    assert str(KernelLayer(Kind.ATTENTION, 384, 384)) == "attention 384"

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
    describe,
    network_of,
    published,
)
from qwen_vae_accel.kernels.reasons import network_reasons, state_reasons
from qwen_vae_accel.kernels.sm90.schedules import FLOAT8_SCHEDULES, MODES, SCHEDULES
from qwen_vae_accel.kernels.tuning.tables import H200_CONVS, has_kernel
from qwen_vae_accel.model import inspect_vae
from qwen_vae_accel.model.image_vae import ImageDecoder, ImageEncoder
from qwen_vae_accel.model.source import build_model, image_state

METHODS = ("encode", "decode")
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


def test_every_kernel_of_the_tables_is_of_a_published_layer_and_the_other_way_round():
    networks = [published(method, channels) for method in METHODS for channels in (3, 4)]
    layers = {layer for network in networks for layer in network.kernel_layers()}
    assert all(map(has_kernel, layers)) and not any(map(network_reasons, networks))
    widths = {(layer.kind, layer.in_channels, layer.out_channels) for layer in layers}
    assert {(key.kind, key.in_channels, key.out_channels) for key in H200_CONVS} <= widths
    modes = {(MODES[kind], *channels) for kind, *channels in widths if kind in MODES}
    assert set(SCHEDULES) == modes and set(FLOAT8_SCHEDULES) <= modes
    eight = {*block_layers(networks[2]), *calibrated_layers(networks[2])}
    assert len(eight) == 26 and all(f"{name}.weight" in networks[2].parameters() for name in eight)
    assert "up_blocks.0.upsamplers.0.resample.1" not in eight


def test_reasons_name_the_layers_that_have_no_kernel():
    decoder = describe(QWEN_IMAGE_21, "decode")
    layers, shortcuts = network_reasons(decoder)
    assert layers.startswith(
        "it has no kernels for these layers of the decoder: attention 1152; conv3x3 1152->1152, 1152->576, "
    )
    assert "576->576 + shortcut of 1152" in layers and "conv_in 64->1152" in layers and "conv_out 144->4" in layers
    assert shortcuts == (
        "it has no kernels for the residual shortcuts of copies around levels: 1152->1152, 1152->1152, 1152->576, 576->288"
    )
    # Qwen-Image 2.1's encoder has widths that have kernels, and others.
    layers, shortcuts = network_reasons(describe(QWEN_IMAGE_21, "encode"))
    assert "384->768" in layers and " 96->96" not in layers and " 192->192" not in layers
    assert "averages around levels: 96->96, 96->192" in shortcuts
    state = {name: torch.empty(shape, device="meta") for name, shape in decoder.parameters().items()}
    assert state_reasons(state) == network_reasons(decoder)
    assert state_reasons({**state, "conv_in.bias": state["conv_in.bias"][:5]}) == [
        "conv_in.bias has shape [5], the published network has [1152]"
    ]


def test_a_layer_reads_as_in_the_list_of_launches():
    assert str(KernelLayer(Kind.UP, 384, 192)) == "upsample 384->192"
    assert str(KernelLayer(Kind.ATTENTION, 384, 384)) == "attention 384"

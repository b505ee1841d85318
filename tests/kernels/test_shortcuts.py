"""In the order in which channels are stored, the shortcuts around levels are plain sums: against the model's own shortcuts."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from qwen_vae_accel.kernels.layout import Grid
from qwen_vae_accel.kernels.network import QWEN_IMAGE_21, LevelShortcut, describe, published
from qwen_vae_accel.kernels.reasons import network_reasons
from qwen_vae_accel.kernels.shortcuts import layer_orders, level_orders, reordered, stored_shortcut
from qwen_vae_accel.kernels.triton.conv3x3 import conv_reference
from qwen_vae_accel.kernels.weights import Packer, pack_network
from qwen_vae_accel.model.shortcuts import AverageDown, DuplicateUp
from tests.kernels.cases import METHODS, random_flat, random_layer

CPU = torch.device("cpu")


def whole_numbers(*shape: int) -> torch.Tensor:
    """Sums and means of four of them are exact."""
    return torch.randint(-64, 65, shape, generator=torch.Generator().manual_seed(sum(shape))).float()


def plain_sum(shortcut: LevelShortcut, stored: torch.Tensor, decodes: bool) -> torch.Tensor:
    """What the kernels add of the stored input of a level to its stored output: the formulas in ``kernels/shortcuts.py``."""
    how = stored_shortcut(shortcut, decodes)
    batch, _, height, width = stored.shape
    if decodes:
        out = stored.new_empty(batch, shortcut.out_channels, 2 * height, 2 * width)
        for py in (0, 1):
            for px in (0, 1):
                out[:, :, py::2, px::2] = stored[:, how.lower * py : how.lower * py + shortcut.out_channels]
        return out
    assert how.lower == 0
    first = F.avg_pool2d(stored, 2) if how.pooled else stored
    return F.pad(first, (0, 0, 0, 0, 0, shortcut.out_channels - first.shape[1]))


@pytest.mark.parametrize("method", METHODS)
def test_shortcuts_of_qwen_image_21_are_plain_sums_between_stored_channels(method):
    network = describe(QWEN_IMAGE_21, method)
    orders, found = level_orders(network), 0
    assert len(orders) == len(network.levels) + 1
    for level, before, after in zip(network.levels, orders[:-1], orders[1:], strict=True):
        shortcut = level.shortcut
        if shortcut is None:
            continue
        x = whole_numbers(2, shortcut.in_channels, 4, 6)
        exact: torch.nn.Module = AverageDown(shortcut.in_channels, shortcut.out_channels, shortcut.frames, shortcut.side)
        if network.decodes:
            exact = DuplicateUp(shortcut.in_channels, shortcut.out_channels, shortcut.frames, CPU)
        stored = x if before is None else x[:, before]
        expected = exact(x) if after is None else exact(x)[:, after]
        assert torch.equal(plain_sum(shortcut, stored, network.decodes), expected)
        found += 1
    assert found == (4 if network.decodes else 5)


@pytest.mark.parametrize("method", METHODS)
def test_orders_lose_no_channel_and_the_ends_are_as_published(method):
    network = describe(QWEN_IMAGE_21, method)
    orders = level_orders(network)
    assert orders[-1 if network.decodes else 0] is None  # image channels meet no order
    for order in orders:
        assert order is None or order.sort().values.equal(torch.arange(len(order)))
    names = {layer.name: layer for layer in layer_orders(network)}
    assert len(names) == len(list(layer_orders(network)))  # each layer once
    for name, out, taken in names.values():
        shapes = network.parameters()
        if name.endswith(("norm1", ".norm", "norm_out")):
            assert out is None and taken is not None and shapes[f"{name}.gamma"] == (len(taken),)
            continue
        shape = shapes[f"{name}.weight"]
        assert out is None or len(out) == shape[0]
        assert taken is None or len(taken) == shape[1]


def test_networks_without_shortcuts_are_stored_as_published():
    for method in METHODS:
        network = published(method)
        assert set(level_orders(network)) == {None} and list(layer_orders(network)) == []


def test_weights_are_reordered_and_no_others():
    """Every number says which channel of the output, or of a norm, it is of."""
    network = describe(QWEN_IMAGE_21, "decode")
    sizes = {name: shape[:2] for name, shape in network.parameters().items() if "time_conv" not in name}
    state = {name: torch.arange(shape[0]).view(-1, *[1] * (len(shape) - 1)).expand(shape) for name, shape in sizes.items()}
    result, expected = reordered(state, network), dict(state)
    for name, out, taken in layer_orders(network):
        if f"{name}.gamma" in state:
            expected[f"{name}.gamma"] = taken
        elif out is not None:
            expected[f"{name}.bias"] = out
            expected[f"{name}.weight"] = out[:, None].expand(sizes[f"{name}.weight"])
    assert expected.keys() == result.keys() and all(torch.equal(result[name], expected[name]) for name in expected)
    assert not torch.equal(result["conv_in.bias"], state["conv_in.bias"])
    columns = torch.arange(1152).expand(2, -1)
    (layer,) = (layer for layer in layer_orders(network) if layer.name == "mid_block.resnets.0.conv1")
    assert layer.out is None and layer.input is not None
    assert torch.equal(
        reordered(state | {"mid_block.resnets.0.conv1.weight": columns}, network)["mid_block.resnets.0.conv1.weight"],
        layer.input.expand(2, -1),
    )


@pytest.mark.parametrize(
    ("shortcut", "decodes", "says"),
    [
        (LevelShortcut(64, 16, 1, 2), True, "copies of 64 channels to 16 differ from column to column"),
        (LevelShortcut(96, 48, 1, 2), False, "averages of 8 numbers in blocks of 4 pixels"),
        (LevelShortcut(96, 96, 2, 2), False, "averages of 8 numbers in blocks of 4 pixels"),
        (LevelShortcut(768, 384, 1, 1), False, "averages of 2 numbers in blocks of 1 pixels"),
    ],
    ids=str,
)
def test_other_shortcuts_are_refused(shortcut, decodes, says):
    network = describe(QWEN_IMAGE_21, "decode" if decodes else "encode")
    level = network.levels[0]
    broken = dataclasses.replace(network, levels=(dataclasses.replace(level, shortcut=shortcut),))
    with pytest.raises(ValueError, match=says):
        level_orders(broken)
    if decodes:
        with pytest.raises(ValueError, match=says):
            stored_shortcut(shortcut, decodes)
    assert any(says in reason and "shortcuts around levels" in reason for reason in network_reasons(broken, sm90=True))


def test_where_time_is_resampled_elsewhere_the_shortcuts_are_a_reason():
    """Averages of eight numbers, half of them zeros, have no kernel."""
    (reason,) = network_reasons(describe(QWEN_IMAGE_21, "encode", [True, True, True, True]), sm90=True)
    assert reason == (
        "it has no kernels for the shortcuts around levels of the encoder: averages of 8 numbers in blocks of 4 pixels"
    )


# ---- their weights --------------------------------------------------------------------------------------------------


def test_the_last_block_of_an_encoder_adds_the_levels_input_through_an_identity():
    grid, dtype = Grid(2, 3, 4), torch.float16
    pack = Packer(random_layer("c", 96, 96, 3), dtype, CPU)
    plain, adding = pack.conv("c"), pack.conv("c", adds=True)
    assert (adding.shortcut, adding.taps, plain.shortcut) == (96, 9, 0)
    a, residual, entry = (random_flat(grid, 96, dtype, seed) for seed in range(3))
    expected = conv_reference(a, grid, plain, residual=residual)[0] + entry.float()
    assert torch.allclose(conv_reference(a, grid, adding, residual=residual, shortcut=entry)[0], expected, atol=1e-5)


def test_only_the_level_that_keeps_its_resolution_adds_its_input_so():
    network = describe(QWEN_IMAGE_21, "encode")
    state = {name: torch.empty(shape, device="meta") for name, shape in network.parameters().items()}
    weights = pack_network(Packer(state, torch.bfloat16, torch.device("meta")), network)
    adding = [block.conv2 for level in weights.levels for block in level.blocks if block.conv2.shortcut == 768]
    assert len(adding) == 1 and adding[0] is weights.levels[-1].blocks[-1].conv2
    assert [level.shortcut.pooled for level in weights.levels] == [True] * 4 + [False]

"""In which order channels are stored, so that the shortcuts around levels of the residual networks are plain sums.

A shortcut (model/shortcuts.py) copies channels of a level's input on the way up, and averages the pixels of a block on the way
down. It has no weights, yet it picks channels in an order of its own. Nothing but weights knows which channel is stored where,
and the norm adds up all of them, so the order is ours to choose:

    up     out[2y + py, 2x + px, j] += x[y, x, j + py * lower]     x: the level's input
    down   out[y, x, j] += pooled[y, x, j]                         pooled: means of 2x2 pixels of the level's input, for the
                                                                   first of the output's channels; the others take nothing

Orders are index tensors: stored channel j is channel ``order[j]`` of the published network.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from qwen_vae_accel.kernels.network import AttentionLayer, ConvLayer, LevelShortcut, Network, ResidualLayer
from qwen_vae_accel.model.shortcuts import AverageDown, DuplicateUp

Order = Tensor | None  # None: as published

_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class StoredShortcut:
    """A shortcut between stored channels.

    Attributes:
        pooled: whether it adds means of 2x2 pixels; else copies, or at one resolution the input itself.
        lower: how many channels odd rows of the output skip.
    """

    pooled: bool
    lower: int


def _rows_of_copies(shortcut: LevelShortcut) -> Tensor:
    """``[2, O]``: the channel of the input that even and odd rows of the output copy.

    Raises:
        ValueError: the columns of a block copy different channels.
    """
    copies = DuplicateUp(shortcut.in_channels, shortcut.out_channels, shortcut.frames, _CPU)
    parities = copies.channels.view(shortcut.out_channels, 2, 2)
    if not torch.equal(parities[..., 0], parities[..., 1]):
        raise ValueError(f"copies of {shortcut.in_channels} channels to {shortcut.out_channels} differ from column to column")
    return parities[..., 0].T


def _averaged(shortcut: LevelShortcut) -> Tensor:
    """``[I]``: the channel of the output that averages a channel of the input.

    Raises:
        ValueError: an average is of more than one channel, or of some of its pixels.
    """
    pixels = shortcut.side**2
    average = AverageDown(shortcut.in_channels, shortcut.out_channels, shortcut.frames, shortcut.side)
    if average.group != pixels:
        raise ValueError(f"averages of {average.group} numbers in blocks of {pixels} pixels")
    return torch.arange(shortcut.in_channels) * shortcut.frames + shortcut.frames - 1


def _with_rest(first: Tensor, channels: int) -> Tensor:
    """``first``, and behind it what it lacks of ``channels``."""
    missing = torch.ones(channels, dtype=torch.bool)
    missing[first] = False
    return torch.cat([first, missing.nonzero().flatten()])


def stored_shortcut(shortcut: LevelShortcut, decodes: bool) -> StoredShortcut:
    """Describe a shortcut between channels that are stored in the order of :func:`level_orders`."""
    if not decodes:
        return StoredShortcut(shortcut.side > 1, 0)
    even, odd = _rows_of_copies(shortcut)
    return StoredShortcut(False, 0 if torch.equal(even, odd) else shortcut.out_channels)


def level_orders(network: Network) -> list[Order]:
    """The orders of channels before each level, and behind the last.

    Raises:
        ValueError: a shortcut is none of those described above.
    """
    orders: list[Order] = [None] * (len(network.levels) + 1)
    shortcuts = [level.shortcut for level in network.levels]
    if network.decodes:  # a level's input follows from its output
        for index in reversed(range(len(shortcuts))):
            shortcut, after = shortcuts[index], orders[index + 1]
            if shortcut is not None:
                even, odd = (row if after is None else row[after] for row in _rows_of_copies(shortcut))
                copied = even if torch.equal(even, odd) else torch.cat([even, odd])
                orders[index] = _with_rest(copied, shortcut.in_channels)
    else:
        for index, shortcut in enumerate(shortcuts):
            before = orders[index]
            if shortcut is not None:
                averaged = _averaged(shortcut)
                orders[index + 1] = _with_rest(averaged if before is None else averaged[before], shortcut.out_channels)
    return orders


class LayerOrder(NamedTuple):
    """Orders of a layer's channels: those it gives and those it takes."""

    name: str
    out: Order
    input: Order


def layer_orders(network: Network) -> Iterator[LayerOrder]:
    """Yield the orders of every layer whose channels are not all stored as published; norms have ``input`` alone."""
    for layer in _walk(network, level_orders(network)):
        if layer.out is not None or layer.input is not None:
            yield layer


def _walk(network: Network, orders: list[Order]) -> Iterator[LayerOrder]:
    inner = orders[0] if network.decodes else orders[-1]
    yield LayerOrder(network.conv_in.name, orders[0], None)
    for layer in network.middle:
        yield from _attention(layer, inner) if isinstance(layer, AttentionLayer) else _block(layer, inner, inner)
    for level, before, after in zip(network.levels, orders[:-1], orders[1:], strict=True):
        order = before
        for block in level.blocks:
            following = order if block.shortcut is None else None
            yield from _block(block, order, following)
            order = following
        if level.resampling is not None:
            yield _conv(level.resampling, after, order)
    last = orders[-1]
    yield LayerOrder("norm_out", None, last)
    yield LayerOrder(network.conv_out.name, None, last)


def _conv(layer: ConvLayer, out: Order, taken: Order) -> LayerOrder:
    return LayerOrder(layer.name, out, taken)


def _block(block: ResidualLayer, taken: Order, out: Order) -> Iterator[LayerOrder]:
    yield LayerOrder(f"{block.name}.norm1", None, taken)
    yield _conv(block.conv1, None, taken)
    yield _conv(block.conv2, out, None)
    if block.shortcut is not None:
        yield _conv(block.shortcut, out, taken)


def _attention(layer: AttentionLayer, order: Order) -> Iterator[LayerOrder]:
    yield LayerOrder(f"{layer.name}.norm", None, order)
    yield _conv(layer.qkv, None, order)
    yield _conv(layer.proj, order, None)


def reordered(state: Mapping[str, Tensor], network: Network) -> dict[str, Tensor]:
    """Return the 2-D weights of ``network`` with their channels in the order in which they are stored.

    Args:
        state: diffusers' names without ``encoder.`` or ``decoder.``.
    """
    result = dict(state)

    def put(name: str, dimension: int, order: Order) -> None:
        if order is not None:
            result[name] = result[name].index_select(dimension, order.to(result[name].device))

    for name, out, taken in layer_orders(network):
        if f"{name}.gamma" in state:
            result[f"{name}.gamma"] = result[f"{name}.gamma"].reshape(-1)
            put(f"{name}.gamma", 0, taken)
            continue
        put(f"{name}.weight", 0, out)
        put(f"{name}.bias", 0, out)
        put(f"{name}.weight", 1, taken)
    return result

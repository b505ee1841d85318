"""Weights packed for the kernels, from a 2-D state dict with diffusers names: layer by layer, then whole networks.

Every convolution is stored as ``[N, K]`` with K contiguous: K counts taps in reading order and, inside a tap, input
channels. Sums of kernel entries (folded upsample, folded 1x1 convolutions) are taken in fp32 and rounded once: to 16 bits,
or, for the layers that the packer is given an input scale for, to float8 (float8.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qwen_vae_accel.kernels.float8 import FLOAT8, quantize_weight
from qwen_vae_accel.kernels.network import AttentionLayer, ConvLayer, Level, Network, ResidualLayer, stored_channels
from qwen_vae_accel.kernels.shortcuts import StoredShortcut, reordered, stored_shortcut


def with_each(kind: type, function: Callable[[Any], Any], weights: Any) -> Any:
    """Return ``weights``, dataclasses and tuples of them, with ``function`` of every ``kind`` in its place."""
    if isinstance(weights, kind):
        return function(weights)
    if isinstance(weights, tuple):
        return tuple(with_each(kind, function, part) for part in weights)
    if is_dataclass(weights) and not isinstance(weights, type):
        return replace(weights, **{f.name: with_each(kind, function, getattr(weights, f.name)) for f in fields(weights)})
    return weights


@dataclass(frozen=True, slots=True)
class ConvWeights:
    """A 3x3 (taps 9) or 1x1 (taps 1) convolution; a 1x1 shortcut's K columns may follow the taps'.

    In float8 the shortcut keeps its 16 bits, and a matrix of its own.
    """

    weight: Tensor  # [N, taps * C + shortcut]; float8: [N, taps * C]
    bias: Tensor  # [N] fp32, the shortcut's bias added
    in_channels: int
    taps: int
    shortcut: int = 0  # input channels of the shortcut, 0 for none
    input_scale: float | None = None  # float8: the input matrix holds the input times this
    rescale: Tensor | None = None  # float8: [N] fp32, what the taps' sums are multiplied by
    shortcut_weight: Tensor | None = None  # float8: [N, shortcut]

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        return self.weight.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        tensors = (self.weight, self.bias, self.rescale, self.shortcut_weight)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def flops(self, pixels: int) -> int:
        """Operations for ``pixels`` of the output."""
        return 2 * pixels * self.out_channels * (self.taps * self.in_channels + self.shortcut)


@dataclass(frozen=True, slots=True)
class SmallConvWeights:
    """conv_in: 3x3 over few channels, with K padded to a multiple of 16. Columns 9 * C .. 9 * C + 8, if ``ones``, weigh
    a constant-one channel (1 inside the image, 0 outside): a folded 1x1 convolution's bias, exact at the borders."""

    weight: Tensor  # [N, K]
    bias: Tensor  # [N] fp32
    in_channels: int
    ones: bool

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        return self.weight.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return self.weight.nbytes + self.bias.nbytes


@dataclass(frozen=True, slots=True)
class Norm:
    """RMS norm in an epilogue: fp32 gain [C] (sqrt(C) included), then SiLU or not, then times ``scale`` into float8."""

    gamma: Tensor
    silu: bool = True
    scale: float | None = None

    def __post_init__(self) -> None:
        if self.scale is not None and not self.silu:
            raise ValueError("float8 follows SiLU only")

    def dtype(self, plain: torch.dtype) -> torch.dtype:
        """The dtype of the normed matrix, ``plain`` being that of the others."""
        return plain if self.scale is None else FLOAT8


def _round(value: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    return value.to(device=device, dtype=dtype).contiguous()


def _bias(value: Tensor, device: torch.device) -> Tensor:
    return _round(value.float().reshape(-1), torch.float32, device)


def _taps_last(weight: Tensor) -> Tensor:
    """[O, I, kh, kw] -> [O, kh * kw * I]."""
    return weight.float().permute(0, 2, 3, 1).reshape(weight.shape[0], -1)


@dataclass(frozen=True, slots=True)
class Packer:
    """Reads one state dict; every method packs one layer by its diffusers name."""

    state: Mapping[str, Tensor]
    dtype: torch.dtype
    device: torch.device
    float8: Mapping[str, float] = field(default_factory=dict)  # layers in float8 -> scale of their input

    def _layer(self, name: str) -> tuple[Tensor, Tensor]:
        return self.state[f"{name}.weight"].detach(), self.state[f"{name}.bias"].detach()

    def conv(self, name: str, shortcut: str | None = None, *, adds: bool = False) -> ConvWeights:
        """3x3 or 1x1 convolution, optionally with the 1x1 shortcut whose output is added to it.

        With ``adds`` that shortcut is the identity: the product adds a second matrix besides the residual.
        """
        weight, bias = self._layer(name)
        matrix, total, extra = _taps_last(weight), bias.float(), None
        if adds:
            extra = torch.eye(weight.shape[0], device=weight.device)
        if shortcut is not None:
            shortcut_weight, shortcut_bias = self._layer(shortcut)
            extra = _taps_last(shortcut_weight)
            total = total + shortcut_bias.float()
        return self._pack(name, matrix, total, weight.shape[1], weight.shape[2] * weight.shape[3], extra)

    def _pack(
        self, name: str, matrix: Tensor, bias: Tensor, channels: int, taps: int, extra: Tensor | None = None
    ) -> ConvWeights:
        bias, shortcut = _bias(bias, self.device), 0 if extra is None else extra.shape[1]
        if name not in self.float8:
            joined = matrix if extra is None else torch.cat([matrix, extra], 1)
            return ConvWeights(_round(joined, self.dtype, self.device), bias, channels, taps, shortcut)
        scale = self.float8[name]
        rounded, factor = quantize_weight(matrix.to(self.device))
        return ConvWeights(
            rounded, bias, channels, taps, shortcut, scale, _bias(factor / scale, self.device),
            None if extra is None else _round(extra, self.dtype, self.device),
        )  # fmt: skip

    def upsample(self, name: str) -> ConvWeights:
        """Nearest 2x then 3x3, folded: for each output parity (py, px) a 2x2 kernel over the small image.

        K counts parities (0,0) (0,1) (1,0) (1,1), then the 2x2 taps, then channels.
        """
        weight, bias = self._layer(name)
        weight = weight.float()
        groups = {0: ((0,), (1, 2)), 1: ((0, 1), (2,))}
        parts = [
            weight[:, :, rows][:, :, :, columns].sum((2, 3))
            for py in (0, 1)
            for px in (0, 1)
            for rows in groups[py]
            for columns in groups[px]
        ]
        return self._pack(name, torch.cat(parts, 1), bias, weight.shape[1], 16)

    def _after_pointwise(self, name: str, pointwise: str | None) -> tuple[Tensor, Tensor | None, Tensor]:
        """Weight ``[O, I, 3, 3]``, weight of a channel of ones ``[O, 9]``, and bias of a 3x3 convolution after a 1x1 one.

        conv(P z + p) = (W P) * z + (W p) * 1, where 1 is the indicator of the image: the zero padding comes after P.
        """
        weight, bias = self._layer(name)
        weight = weight.float()
        if pointwise is None:
            return weight, None, bias
        matrix, offset = self._layer(pointwise)
        ones = torch.einsum("omyx,m->oyx", weight, offset.float()).flatten(1)
        return torch.einsum("omyx,mi->oiyx", weight, matrix.float().flatten(1)), ones, bias

    def conv_of_latent(self, name: str, pointwise: str) -> ConvWeights:
        """3x3 convolution of many latent channels in the flat layout, post_quant_conv folded in; their ``stored_channels``."""
        weight, ones, bias = self._after_pointwise(name, pointwise)
        assert ones is not None
        wide = torch.cat([weight, ones.view(-1, 1, 3, 3)], 1)
        channels = stored_channels(weight.shape[1])
        wide = torch.nn.functional.pad(wide, (0, 0, 0, 0, 0, channels - wide.shape[1]))
        return ConvWeights(_round(_taps_last(wide), self.dtype, self.device), _bias(bias, self.device), channels, 9)

    def conv_after_pointwise(self, name: str, pointwise: str | None) -> SmallConvWeights:
        """3x3 convolution of few channels, with a 1x1 convolution before it (post_quant_conv) folded in."""
        weight, ones, bias = self._after_pointwise(name, pointwise)
        packed = _taps_last(weight)
        if ones is not None:
            packed = torch.cat([packed, ones], 1)
        packed = torch.nn.functional.pad(packed, (0, -packed.shape[1] % 32))
        return SmallConvWeights(
            _round(packed, self.dtype, self.device), _bias(bias, self.device), weight.shape[1], ones is not None
        )

    def conv_before_pointwise(self, name: str, pointwise: str | None) -> ConvWeights:
        """3x3 convolution with the 1x1 convolution after it (quant_conv) folded in: Q (W * x + b) + q."""
        weight, bias = self._layer(name)
        weight, bias = weight.float(), bias.float()
        if pointwise is not None:
            matrix, offset = self._layer(pointwise)
            matrix = matrix.float().flatten(1)
            weight = torch.einsum("om,miyx->oiyx", matrix, weight)
            bias = matrix @ bias + offset.float()
        return ConvWeights(_round(_taps_last(weight), self.dtype, self.device), _bias(bias, self.device), weight.shape[1], 9)

    def head(self, name: str) -> tuple[Tensor, Tensor]:
        """conv_out as one matrix product per pixel: ``[C, J]`` with J = 9 * O padded to a power of two, bias [O].

        Column tap * O + o holds the weights of that tap, so the taps' products are summed over neighbours afterwards.
        """
        weight, bias = self._layer(name)
        columns = weight.float().permute(1, 2, 3, 0).reshape(weight.shape[1], -1)
        padded = 1 << (columns.shape[1] - 1).bit_length()
        columns = torch.nn.functional.pad(columns, (0, padded - columns.shape[1]))
        return _round(columns, self.dtype, self.device), _bias(bias, self.device)

    def gamma(self, name: str) -> Tensor:
        """RMS norm gain with the sqrt(C) of ``F.normalize(x) * sqrt(C) * gamma`` multiplied in, fp32 [C]."""
        gamma = self.state[f"{name}.gamma"].detach().float().reshape(-1)
        return _round(gamma * gamma.numel() ** 0.5, torch.float32, self.device)


@dataclass(frozen=True, slots=True)
class ResidualWeights:
    """Weights of a residual block."""

    norm1: Norm
    conv1: ConvWeights
    norm2: Norm
    conv2: ConvWeights  # with the shortcut, where there is one


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    """Weights of the attention."""

    norm: Norm
    qkv: ConvWeights
    proj: ConvWeights


@dataclass(frozen=True, slots=True)
class LevelWeights:
    """Weights of one resolution."""

    blocks: tuple[ResidualWeights, ...]  # the last one's conv2 adds the level's input, if the shortcut is nothing else
    resampling: ConvWeights | None
    shortcut: StoredShortcut | None = None


@dataclass(frozen=True, slots=True)
class HeadWeights:
    """A decoder's last convolution as one matrix product per pixel, see :meth:`Packer.head`."""

    columns: Tensor  # [C, J]
    bias: Tensor  # [O] fp32


@dataclass(frozen=True, slots=True)
class NetworkWeights:
    """Weights of a whole encoder or decoder."""

    conv_in: SmallConvWeights | ConvWeights  # of few channels, of many
    levels: tuple[LevelWeights, ...]
    middle: tuple[ResidualWeights, AttentionWeights, ResidualWeights]
    norm_out: Norm
    conv_out: HeadWeights | ConvWeights  # a decoder's, an encoder's


def pack_network(pack: Packer, network: Network) -> NetworkWeights:
    """Pack the weights of ``network``.

    Raises:
        KeyError: ``pack.state`` lacks one.
        ValueError: the shortcuts around its levels are none that ``kernels/shortcuts.py`` knows.
    """
    pack = replace(pack, state=reordered(pack.state, network))

    def block(layer: ResidualLayer, adds: bool = False) -> ResidualWeights:
        shortcut = None if layer.shortcut is None else layer.shortcut.name
        return ResidualWeights(
            Norm(pack.gamma(f"{layer.name}.norm1"), scale=pack.float8.get(layer.conv1.name)),
            pack.conv(layer.conv1.name),
            Norm(pack.gamma(f"{layer.name}.norm2"), scale=pack.float8.get(layer.conv2.name)),
            pack.conv(layer.conv2.name, shortcut, adds=adds),
        )

    def attention(layer: AttentionLayer) -> AttentionWeights:
        norm = Norm(pack.gamma(f"{layer.name}.norm"), silu=False)
        return AttentionWeights(norm, pack.conv(layer.qkv.name), pack.conv(layer.proj.name))

    def resampling(layer: ConvLayer) -> ConvWeights:
        return pack.upsample(layer.name) if network.decodes else pack.conv(layer.name)

    def level_weights(level: Level) -> LevelWeights:
        shortcut = None if level.shortcut is None else stored_shortcut(level.shortcut, network.decodes)
        adds = shortcut is not None and level.resampling is None
        *first, last = level.blocks
        blocks = (*map(block, first), block(last, adds))
        return LevelWeights(blocks, None if level.resampling is None else resampling(level.resampling), shortcut)

    levels = tuple(map(level_weights, network.levels))
    middle = block(network.middle.first), attention(network.middle.attention), block(network.middle.last)
    before, after = (network.pointwise.name, None) if network.decodes else (None, network.pointwise.name)
    first, last = network.conv_in, network.conv_out.name
    conv_in: SmallConvWeights | ConvWeights
    if before is not None and first.in_channels > 16:
        conv_in = pack.conv_of_latent(first.name, before)
    else:
        conv_in = pack.conv_after_pointwise(first.name, before)
    return NetworkWeights(
        conv_in, levels, middle, Norm(pack.gamma("norm_out")),
        HeadWeights(*pack.head(last)) if network.decodes else pack.conv_before_pointwise(last, after),
    )  # fmt: skip

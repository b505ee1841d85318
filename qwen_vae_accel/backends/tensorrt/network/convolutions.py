"""Convolutions and deconvolutions of two or three dimensions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from qwen_vae_accel.backends.tensorrt.network.reading import Compute, Layer, LayerKind, widened

_PARAMETERS = (
    "bias", "dilation_nd", "kernel", "kernel_size_nd", "num_groups", "num_output_maps", "padding_mode", "padding_nd",
    "post_padding", "pre_padding", "stride_nd",
)  # fmt: skip
_PADDING = ("EXPLICIT_ROUND_DOWN", "EXPLICIT_ROUND_UP", "SAME_UPPER", "SAME_LOWER")
_CONVOLUTION = {2: F.conv2d, 3: F.conv3d}
_DECONVOLUTION = {2: F.conv_transpose2d, 3: F.conv_transpose3d}


@dataclass(frozen=True, slots=True)
class _Window:
    """What both kinds of layers say, one number per axis.

    Attributes:
        kernel, stride, dilation: of the window.
        before, after: the padding that is named.
        mode: how the padding is meant.
        maps: channels of the output.
        groups: of channels.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    mode: str
    maps: int
    groups: int

    @classmethod
    def read(cls, layer: Layer) -> _Window:
        names = ("kernel_size_nd", "stride_nd", "dilation_nd", "pre_padding", "post_padding")
        lists = [layer.dims(name) or () for name in names]
        axes = len(lists[0])
        if axes not in _CONVOLUTION or any(len(values) != axes for values in lists):
            raise layer.error(f"{', '.join(names)} are {lists}; known are two or three axes")
        if min(lists[3] + lists[4]) < 0:
            raise layer.error(f"its padding is {lists[3]} and {lists[4]}; negative padding is not known here")
        mode = layer.choice("padding_mode", _PADDING)
        kernel, stride, dilation, before, after = lists
        return cls(
            kernel, stride, dilation, before, after, mode, int(layer.value("num_output_maps")), int(layer.value("num_groups"))
        )

    def reach(self, axis: int) -> int:
        """Pixels from the first to the last that a window sees."""
        return self.dilation[axis] * (self.kernel[axis] - 1) + 1

    def padding(self, axis: int, side: int) -> tuple[int, int]:
        """Zeros before and after an image of ``side`` pixels, for a convolution."""
        before, after = self.before[axis], self.after[axis]
        step = self.stride[axis]
        if self.mode == "EXPLICIT_ROUND_UP":
            # A last window that runs over the end sees zeros there.
            after += -(side + before + after - self.reach(axis)) % step
        elif self.mode != "EXPLICIT_ROUND_DOWN":
            before, after = self._shares(max(0, (-(-side // step) - 1) * step + self.reach(axis) - side))
        return before, after

    def cropping(self, axis: int) -> tuple[int, int]:
        """Pixels that a deconvolution drops before and after, of the ``(side - 1) * stride + reach`` that it spreads to."""
        if self.mode.startswith("EXPLICIT"):
            return self.before[axis], self.after[axis]
        surplus = self.reach(axis) - self.stride[axis]  # the result has side * stride
        return self._shares(surplus)

    def _shares(self, total: int) -> tuple[int, int]:
        less, more = total // 2, total - total // 2
        return (less, more) if self.mode == "SAME_UPPER" else (more, less)


def _operands(
    layer: Layer, shape: Callable[[_Window, int], tuple[int, ...]], window: _Window
) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The kernel, shaped for an input of some channels, and the bias: constants of the layer, or inputs of it."""
    layer.takes(1, 3)
    kernel, bias = layer.weights("kernel"), layer.weights("bias")

    def find(x: Tensor, given: Tensor | None = None, shift: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        found, offset = given if kernel is None else kernel, shift if bias is None else bias
        if found is None:
            raise layer.error("it has no kernel")
        if kernel is not None and given is not None or bias is not None and shift is not None:
            raise layer.error("its kernel or bias is given twice, as a constant and as an input")
        expected = shape(window, x.shape[1])
        if (
            x.dim() != len(window.kernel) + 2
            or found.numel() != _elements(expected)
            or offset is not None
            and offset.numel() != window.maps
        ):
            numbers = f"{found.numel()} weights and {0 if offset is None else offset.numel()} of bias"
            raise layer.error(
                f"its input is {list(x.shape)} and it has {numbers}; expected are {list(expected)} and {window.maps}"
            )
        found, offset = (w if w is None else w.to(x.device, x.dtype) for w in (found, offset))
        assert found is not None
        return found.reshape(expected), offset

    return find


def _elements(shape: tuple[int, ...]) -> int:
    product = 1
    for side in shape:
        product *= side
    return product


def _convolution(layer: Layer) -> Compute:
    window = _Window.read(layer)
    operands = _operands(layer, lambda w, channels: (w.maps, channels // w.groups, *w.kernel), window)
    axes = range(len(window.kernel))

    def run(x: Tensor, *given: Tensor | None) -> Tensor:
        kernel, bias = operands(x, *given)
        sides = [window.padding(axis, x.shape[axis + 2]) for axis in axes]
        padding: tuple[int, ...] | int = tuple(before for before, _ in sides)
        if any(before != after for before, after in sides):
            x = F.pad(x, [zeros for pair in reversed(sides) for zeros in pair])
            padding = 0
        convolve = _CONVOLUTION[len(axes)]
        return convolve(x, kernel, bias, window.stride, padding, window.dilation, window.groups)

    return widened(run, layer)


def _deconvolution(layer: Layer) -> Compute:
    window = _Window.read(layer)
    operands = _operands(layer, lambda w, channels: (channels, w.maps // w.groups, *w.kernel), window)
    axes = range(len(window.kernel))

    def run(x: Tensor, *given: Tensor | None) -> Tensor:
        kernel, bias = operands(x, *given)
        spread = _DECONVOLUTION[len(axes)](x, kernel, bias, window.stride, 0, 0, window.groups, window.dilation)
        for axis in axes:
            before, after = window.cropping(axis)
            length = spread.shape[axis + 2] - before - after
            if before < 0 or after < 0 or length < 1:
                raise layer.error(f"of {spread.shape[axis + 2]} pixels it drops {before} and {after}")
            spread = spread.narrow(axis + 2, before, length)
        return spread

    return widened(run, layer)


KINDS = {
    "CONVOLUTION": LayerKind("IConvolutionLayer", _PARAMETERS, _convolution),
    "DECONVOLUTION": LayerKind("IDeconvolutionLayer", _PARAMETERS, _deconvolution),
}

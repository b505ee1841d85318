"""Convolutions and deconvolutions: every mode that is known, in tiny networks; results written by hand.

Shapes and types need no hand: what TensorRT infers for a tensor is compared in each run, and a difference is an error.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from tests.tensorrt.made import Made

# Convolutions.


def _weights(made: Made, shape: tuple[int, ...], *values: float) -> Any:
    return made.keep(np.array(values or range(1, math.prod(shape) + 1), dtype=np.float32).reshape(shape))


def _row(made: Made, kernel: tuple[float, ...], *pixels: float, transposed: bool = False, bias: float = 0.0) -> Any:
    """A convolution along one row of pixels."""
    x = made.floats(*pixels, shape=(1, 1, 1, len(pixels)))
    add = made.net.add_deconvolution_nd if transposed else made.net.add_convolution_nd
    return add(x, 1, (1, len(kernel)), _weights(made, (len(kernel),), *kernel), made.keep(np.array([bias], dtype=np.float32)))


def test_convolution_correlates_and_adds_the_bias(made: Made) -> None:
    layer = _row(made, (1.0, 10.0, 100.0), 1.0, 2.0, 3.0, 4.0, bias=0.5)
    assert made.run(layer).flatten().tolist() == [321.5, 432.5]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"padding_nd": (0, 1)}, [210.0, 321.0, 432.0, 543.0, 54.0]),
        ({"pre_padding": (0, 2)}, [100.0, 210.0, 321.0, 432.0, 543.0]),
        ({"post_padding": (0, 1)}, [321.0, 432.0, 543.0, 54.0]),
        ({"stride_nd": (1, 2)}, [321.0, 543.0]),
        ({"dilation_nd": (1, 2)}, [531.0]),
    ],
    ids=str,
)
def test_convolution_windows(made: Made, change: dict[str, Any], expected: list[float]) -> None:
    layer = _row(made, (1.0, 10.0, 100.0), 1.0, 2.0, 3.0, 4.0, 5.0)
    for name, value in change.items():
        setattr(layer, name, value)
    assert made.run(layer).flatten().tolist() == expected


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("EXPLICIT_ROUND_DOWN", [321.0, 543.0]),
        ("EXPLICIT_ROUND_UP", [321.0, 543.0, 65.0]),  # of six pixels the last window sees two
        ("SAME_UPPER", [321.0, 543.0, 65.0]),  # 6 / 2 results: one zero, at the end
        ("SAME_LOWER", [210.0, 432.0, 654.0]),  # ... at the start
    ],
)
def test_convolution_padding_modes(made: Made, mode: str, expected: list[float]) -> None:
    layer = _row(made, (1.0, 10.0, 100.0), 1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
    layer.stride_nd = (1, 2)
    layer.padding_mode = getattr(made.trt.PaddingMode, mode)
    assert made.run(layer).flatten().tolist() == expected


def test_convolution_of_channels_and_both_axes(made: Made) -> None:
    x = made.numbered(1, 2, 2, 2)  # channels 0 1 / 2 3 and 4 5 / 6 7
    layer = made.net.add_convolution_nd(x, 2, (2, 1), _weights(made, (2, 2, 2, 1)))
    # Output 0: rows of channel 0 by 1 and 2, of channel 1 by 3 and 4; output 1 by 5, 6, 7, 8.
    assert made.list(layer) == [[[[40.0, 50.0]], [[88.0, 114.0]]]]


def test_convolution_of_groups(made: Made) -> None:
    layer = made.net.add_convolution_nd(made.floats(1.0, 2.0, shape=(1, 2, 1, 1)), 4, (1, 1), _weights(made, (4, 1, 1, 1)))
    layer.num_groups = 2
    assert made.run(layer).flatten().tolist() == [1.0, 2.0, 6.0, 8.0]


def test_convolution_of_three_axes(made: Made) -> None:
    x = made.numbered(1, 1, 2, 1, 2)
    layer = made.net.add_convolution_nd(x, 1, (2, 1, 2), _weights(made, (1, 1, 2, 1, 2)))
    assert made.run(layer).flatten().tolist() == [0 * 1 + 1 * 2 + 2 * 3 + 3 * 4]


def test_convolution_with_a_kernel_and_a_bias_that_other_layers_give(made: Made) -> None:
    x = made.floats(1.0, 2.0, 3.0, shape=(1, 1, 1, 3))
    layer = made.net.add_convolution_nd(x, 1, (1, 2), made.trt.Weights(made.trt.DataType.FLOAT))
    layer.set_input(1, made.floats(1.0, 10.0, shape=(1, 1, 1, 2)))
    layer.set_input(2, made.constant([0.5], np.float32))
    assert made.run(layer).flatten().tolist() == [21.5, 32.5]


def test_convolution_of_bfloat16(made: Made) -> None:
    x = made.input(torch.tensor([1.0, 2.0], dtype=torch.bfloat16).reshape(1, 1, 1, 2))
    kernel = made.keep(torch.tensor([1.0, 2.0**-8], dtype=torch.bfloat16))
    layer = made.net.add_convolution_nd(x, 1, (1, 2), made.trt.Weights(made.trt.DataType.BF16, kernel.data_ptr(), 2))
    assert made.run(layer).flatten().tolist() == [1 + 2.0**-7]


def test_deconvolution_spreads(made: Made) -> None:
    layer = _row(made, (1.0, 10.0, 100.0), 1.0, 2.0, transposed=True, bias=0.5)
    layer.stride_nd = (1, 2)
    assert made.run(layer).flatten().tolist() == [1.5, 10.5, 102.5, 20.5, 200.5]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"padding_nd": (0, 1)}, [10.0, 102.0, 20.0]),
        ({"pre_padding": (0, 2)}, [102.0, 20.0, 200.0]),
        ({"post_padding": (0, 1)}, [1.0, 10.0, 102.0, 20.0]),
        ({"dilation_nd": (1, 2)}, [1.0, 0.0, 12.0, 0.0, 120.0, 0.0, 200.0]),
    ],
    ids=str,
)
def test_deconvolution_windows(made: Made, change: dict[str, Any], expected: list[float]) -> None:
    layer = _row(made, (1.0, 10.0, 100.0), 1.0, 2.0, transposed=True)
    layer.stride_nd = (1, 2)
    for name, value in change.items():
        setattr(layer, name, value)
    assert made.run(layer).flatten().tolist() == expected


@pytest.mark.parametrize(
    ("mode", "expected"), [("SAME_UPPER", [1.0, 10.0, 102.0, 20.0]), ("SAME_LOWER", [10.0, 102.0, 20.0, 200.0])]
)
def test_deconvolution_padding_modes(made: Made, mode: str, expected: list[float]) -> None:
    layer = _row(made, (1.0, 10.0, 100.0), 1.0, 2.0, transposed=True)
    layer.stride_nd = (1, 2)  # 2 * 2 of the 5 pixels stay
    layer.padding_mode = getattr(made.trt.PaddingMode, mode)
    assert made.run(layer).flatten().tolist() == expected


def test_deconvolution_of_channels_and_groups(made: Made) -> None:
    x = made.floats(1.0, 10.0, shape=(1, 2, 1, 1))
    layer = made.net.add_deconvolution_nd(x, 4, (1, 1), _weights(made, (2, 2, 1, 1)))  # input channel, output of its group
    layer.num_groups = 2
    assert made.run(layer).flatten().tolist() == [1.0, 2.0, 30.0, 40.0]

"""Every kind of layer, and every mode of it that is known: tiny networks made by TensorRT's own API, results written by hand.

Shapes and types need no hand: what TensorRT infers for a tensor is compared in each run, and a difference is an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from qwen_vae_accel.backends.tensorrt.flavour import Flavour
from qwen_vae_accel.backends.tensorrt.logs import make_logger
from qwen_vae_accel.backends.tensorrt.network import Network, NetworkError, NetworkProgram
from qwen_vae_accel.backends.tensorrt.network.network import KINDS

TYPES = {torch.float32: "FLOAT", torch.float16: "HALF", torch.bfloat16: "BF16", torch.int32: "INT32", torch.bool: "BOOL"}


class Made:
    """A network in the making. Inputs are given by their values; ``dynamic`` leaves their sides open."""

    def __init__(self, trt: ModuleType) -> None:
        self.trt = trt
        self._builder = trt.Builder(make_logger(trt))
        self.net = self._builder.create_network(0)
        self.values: dict[str, torch.Tensor] = {}
        self._kept: list[Any] = []  # TensorRT does not own the weights

    def input(self, value: torch.Tensor, dynamic: bool = False) -> Any:
        name = f"input{len(self.values)}"
        self.values[name] = value
        shape = [-1] * value.dim() if dynamic else list(value.shape)
        return self.net.add_input(name, getattr(self.trt.DataType, TYPES[value.dtype]), shape)

    def floats(self, *values: float, shape: tuple[int, ...] = (-1,), dynamic: bool = False) -> Any:
        return self.input(torch.tensor(values, dtype=torch.float32).reshape(shape), dynamic)

    def constant(self, values: Any, dtype: type = np.int32) -> Any:
        array = self.keep(np.array(values, dtype=dtype))
        return self.net.add_constant(array.shape, array).get_output(0)

    def keep(self, array: Any) -> Any:
        self._kept.append(array)
        return array

    def run(self, layer: Any) -> torch.Tensor:
        output = layer.get_output(0)
        self.net.mark_output(output)
        (result,) = Network(self.trt, self.net).run(self.values).values()
        return result

    def list(self, layer: Any) -> Any:
        return self.run(layer).tolist()

    def refused(self, layer: Any) -> str:
        with pytest.raises(NetworkError) as caught:
            self.run(layer)
        return str(caught.value)


@pytest.fixture
def made(rtx: Flavour) -> Made:
    return Made(rtx.bindings())


# Element by element.


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        ("SUM", [9.0, -5.0]),
        ("PROD", [14.0, 6.0]),
        ("MAX", [7.0, -2.0]),
        ("MIN", [2.0, -3.0]),
        ("SUB", [5.0, -1.0]),
        ("DIV", [3.5, 1.5]),
        ("POW", [49.0, 1 / 9]),
        ("FLOOR_DIV", [3.0, 1.0]),
    ],
)
def test_elementwise_of_floats(made: Made, op: str, expected: list[float]) -> None:
    x, y = made.floats(7.0, -3.0), made.floats(2.0, -2.0)
    layer = made.net.add_elementwise(x, y, getattr(made.trt.ElementWiseOperation, op))
    assert made.list(layer) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("op", "expected"),
    [("SUM", [-5, 9]), ("PROD", [-14, 14]), ("MAX", [2, 7]), ("MIN", [-7, 2]), ("SUB", [-9, 5]), ("DIV", [-3, 3]),
     ("FLOOR_DIV", [-4, 3])],
)  # fmt: skip
def test_elementwise_of_whole_numbers(made: Made, op: str, expected: list[int]) -> None:
    # DIV drops the fraction, FLOOR_DIV rounds down.
    x, y = (made.input(torch.tensor(values, dtype=torch.int32)) for values in ([-7, 7], [2, 2]))
    assert made.list(made.net.add_elementwise(x, y, getattr(made.trt.ElementWiseOperation, op))) == expected


@pytest.mark.parametrize(
    ("op", "expected"), [("EQUAL", [False, True, False]), ("GREATER", [False, False, True]), ("LESS", [True, False, False])]
)
def test_elementwise_comparisons(made: Made, op: str, expected: list[bool]) -> None:
    x, y = made.floats(1.0, 2.0, 3.0), made.floats(2.0, 2.0, 2.0)
    assert made.list(made.net.add_elementwise(x, y, getattr(made.trt.ElementWiseOperation, op))) == expected


@pytest.mark.parametrize(
    ("op", "expected"),
    [("AND", [True, False, False]), ("OR", [True, True, False]), ("XOR", [False, True, False])],
)
def test_elementwise_of_truth_values(made: Made, op: str, expected: list[bool]) -> None:
    x, y = (made.input(torch.tensor(values)) for values in ([True, True, False], [True, False, False]))
    assert made.list(made.net.add_elementwise(x, y, getattr(made.trt.ElementWiseOperation, op))) == expected


def test_sides_of_one_are_broadcast(made: Made) -> None:
    x, y = made.floats(1.0, 2.0, shape=(2, 1)), made.floats(10.0, 20.0, 30.0, shape=(1, 3))
    layer = made.net.add_elementwise(x, y, made.trt.ElementWiseOperation.SUM)
    assert made.list(layer) == [[11.0, 21.0, 31.0], [12.0, 22.0, 32.0]]


def test_a_power_of_many_exponents(made: Made) -> None:
    x, y = made.floats(2.0, 3.0, 4.0), made.floats(3.0, 2.0, 0.5)
    assert made.list(made.net.add_elementwise(x, y, made.trt.ElementWiseOperation.POW)) == [8.0, 9.0, 2.0]


def test_sixteen_bit_floats_are_rounded_once_per_layer(made: Made) -> None:
    # 1 + 2**-9 rounds to 1 in bfloat16: of 256 numbers a sum in bfloat16 would stay at 1, in float32 it grows to 1.5.
    x = made.input(torch.tensor([[1.0] + [2.0**-9] * 256], dtype=torch.bfloat16))
    result = made.run(made.net.add_reduce(x, made.trt.ReduceOperation.SUM, 0b10, False))
    assert result.dtype == torch.bfloat16 and result.tolist() == [1.5]


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        ("EXP", [math.exp(-1.5), math.exp(2.5)]),
        ("ABS", [1.5, 2.5]),
        ("NEG", [1.5, -2.5]),
        ("CEIL", [-1.0, 3.0]),
        ("FLOOR", [-2.0, 2.0]),
        ("ROUND", [-2.0, 2.0]),
        ("SIGN", [-1.0, 1.0]),
        ("RECIP", [-2 / 3, 0.4]),
        ("ERF", [math.erf(-1.5), math.erf(2.5)]),
    ],
)
def test_unary(made: Made, op: str, expected: list[float]) -> None:
    layer = made.net.add_unary(made.floats(-1.5, 2.5), getattr(made.trt.UnaryOperation, op))
    assert made.list(layer) == pytest.approx(expected)


@pytest.mark.parametrize(("op", "expected"), [("SQRT", [0.5, 3.0]), ("LOG", [math.log(0.25), math.log(9.0)])])
def test_unary_of_positive_numbers(made: Made, op: str, expected: list[float]) -> None:
    layer = made.net.add_unary(made.floats(0.25, 9.0), getattr(made.trt.UnaryOperation, op))
    assert made.list(layer) == pytest.approx(expected)


def test_unary_not(made: Made) -> None:
    x = made.input(torch.tensor([True, False]))
    assert made.list(made.net.add_unary(x, made.trt.UnaryOperation.NOT)) == [False, True]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("RELU", [0.0, 2.0]),
        ("SIGMOID", [1 / (1 + math.e**3), 1 / (1 + math.e**-2)]),
        ("TANH", [math.tanh(-3.0), math.tanh(2.0)]),
        ("CLIP", [-1.0, 1.5]),
    ],
)
def test_activation(made: Made, kind: str, expected: list[float]) -> None:
    layer = made.net.add_activation(made.floats(-3.0, 2.0), getattr(made.trt.ActivationType, kind))
    layer.alpha, layer.beta = -1.0, 1.5  # the bounds of CLIP
    assert made.list(layer) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("target", "expected"),
    [("INT32", [-1, 0, 2]), ("BOOL", [True, False, True]), ("HALF", [-1.5, 0.0, 2.75]), ("BF16", [-1.5, 0.0, 2.75])],
)
def test_cast(made: Made, target: str, expected: list[float]) -> None:
    x = made.floats(-1.5, 0.0, 2.75)
    assert made.list(made.net.add_cast(x, getattr(made.trt.DataType, target))) == expected


def test_cast_rounds_to_the_nearest(made: Made) -> None:
    x = made.floats(1 + 2.0**-8 + 2.0**-12)  # bfloat16 has 1 and 1 + 2**-7
    assert made.list(made.net.add_cast(x, made.trt.DataType.BF16)) == [1 + 2.0**-7]


def test_select(made: Made) -> None:
    condition = made.input(torch.tensor([[True], [False]]))
    x, y = made.floats(1.0, 2.0, shape=(1, 2)), made.floats(-1.0, -2.0, shape=(1, 2))
    assert made.list(made.net.add_select(condition, x, y)) == [[1.0, 2.0], [-1.0, -2.0]]


# Over axes.


@pytest.mark.parametrize(
    ("op", "expected"),
    [("SUM", [6.0, 15.0]), ("AVG", [2.0, 5.0]), ("MAX", [3.0, 6.0]), ("MIN", [1.0, 4.0]), ("PROD", [6.0, 120.0])],
)
def test_reduce(made: Made, op: str, expected: list[float]) -> None:
    x = made.floats(1.0, 2.0, 3.0, 4.0, 5.0, 6.0, shape=(2, 3))
    assert made.list(made.net.add_reduce(x, getattr(made.trt.ReduceOperation, op), 0b10, False)) == expected


def test_reduce_over_axes_of_a_bit_mask_keeps_them_if_told(made: Made) -> None:
    x = made.input(torch.arange(8.0).reshape(2, 2, 2))
    # Axes 0 and 2: 0 + 1 + 4 + 5 and 2 + 3 + 6 + 7.
    assert made.list(made.net.add_reduce(x, made.trt.ReduceOperation.SUM, 0b101, True)) == [[[10.0], [18.0]]]


def test_reduce_product_over_two_axes(made: Made) -> None:
    x = made.floats(1.0, 2.0, 3.0, 4.0, shape=(1, 2, 2))
    assert made.list(made.net.add_reduce(x, made.trt.ReduceOperation.PROD, 0b110, False)) == [24.0]


@pytest.mark.parametrize(("axes", "expected"), [(0b10, [[0.25, 0.75], [0.5, 0.5]]), (0b01, [[0.5, 0.75], [0.5, 0.25]])])
def test_softmax(made: Made, axes: int, expected: list[list[float]]) -> None:
    log3 = math.log(3.0)
    layer = made.net.add_softmax(made.floats(0.0, log3, 0.0, 0.0, shape=(2, 2)))
    layer.axes = axes
    assert made.run(layer).flatten().tolist() == pytest.approx([value for row in expected for value in row])


A, B = (1.0, 2.0, 3.0, 4.0), (5.0, 6.0, 7.0, 8.0)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("NONE", "NONE", [[19.0, 22.0], [43.0, 50.0]]),
        ("TRANSPOSE", "NONE", [[26.0, 30.0], [38.0, 44.0]]),
        ("NONE", "TRANSPOSE", [[17.0, 23.0], [39.0, 53.0]]),
        ("TRANSPOSE", "TRANSPOSE", [[23.0, 31.0], [34.0, 46.0]]),
    ],
)
def test_matrix_multiply(made: Made, first: str, second: str, expected: list[list[float]]) -> None:
    x, y = made.floats(*A, shape=(2, 2)), made.floats(*B, shape=(2, 2))
    ops = made.trt.MatrixOperation
    assert made.list(made.net.add_matrix_multiply(x, getattr(ops, first), y, getattr(ops, second))) == expected


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [("VECTOR", "NONE", [19.0, 22.0]), ("NONE", "VECTOR", [5.0, 11.0]), ("VECTOR", "VECTOR", 5.0)],
)
def test_matrix_multiply_of_vectors(made: Made, first: str, second: str, expected: object) -> None:
    ops = made.trt.MatrixOperation
    x = made.floats(1.0, 2.0) if first == "VECTOR" else made.floats(*A, shape=(2, 2))
    y = made.floats(1.0, 2.0) if second == "VECTOR" else made.floats(*B, shape=(2, 2))
    assert made.list(made.net.add_matrix_multiply(x, getattr(ops, first), y, getattr(ops, second))) == expected


def test_matrix_multiply_broadcasts_batches(made: Made) -> None:
    x, y = made.floats(*A, *B, shape=(2, 2, 2)), made.floats(1.0, 0.0, 0.0, 2.0, shape=(1, 2, 2))
    none = made.trt.MatrixOperation.NONE
    assert made.list(made.net.add_matrix_multiply(x, none, y, none)) == [[[1.0, 4.0], [3.0, 8.0]], [[5.0, 12.0], [7.0, 16.0]]]


# Shapes.


def test_shape_of_a_tensor_whose_sides_are_open(made: Made) -> None:
    x = made.input(torch.zeros(1, 3, 5), dynamic=True)
    assert made.list(made.net.add_shape(x)) == [1, 3, 5]


def test_identity(made: Made) -> None:
    assert made.list(made.net.add_identity(made.floats(1.0, 2.0))) == [1.0, 2.0]


@pytest.mark.parametrize(("axis", "expected"), [(0, [[1.0, 2.0], [3.0, 4.0]]), (1, [[1.0, 2.0, 3.0, 4.0]])])
def test_concatenation(made: Made, axis: int, expected: list[list[float]]) -> None:
    layer = made.net.add_concatenation([made.floats(1.0, 2.0, shape=(1, 2)), made.floats(3.0, 4.0, shape=(1, 2))])
    layer.axis = axis
    assert made.list(layer) == expected


@pytest.mark.parametrize(
    ("dtype", "values"), [(np.float32, [0.5, -1.0]), (np.float16, [0.5, -1.0]), (np.int32, [3, -4]), (np.int64, [2**40, -4])]
)
def test_constant(made: Made, dtype: type, values: list[float]) -> None:
    array = made.keep(np.array([values, values], dtype=dtype))
    assert made.list(made.net.add_constant(array.shape, array)) == [values, values]


def test_constant_of_bfloat16_which_numpy_does_not_have(made: Made) -> None:
    values = made.keep(torch.tensor([1.0, -2.5, 3.0e38, 2.0**-130], dtype=torch.bfloat16))
    weights = made.trt.Weights(made.trt.DataType.BF16, values.data_ptr(), 4)
    result = made.run(made.net.add_constant((2, 2), weights))
    assert result.dtype == torch.bfloat16 and torch.equal(result.flatten(), values)


def test_a_constant_without_axes(made: Made) -> None:
    assert made.list(made.net.add_constant((), made.keep(np.array([7], dtype=np.int32)))) == 7


def _numbered(made: Made, *shape: int, dynamic: bool = False) -> Any:
    return made.input(torch.arange(float(math.prod(shape))).reshape(shape), dynamic)


@pytest.mark.parametrize(
    ("dims", "expected"),
    [
        ((3, 2), [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]),
        ((-1,), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]),
        ((0, 1, -1), [[[0.0, 1.0, 2.0]], [[3.0, 4.0, 5.0]]]),  # 0 copies the input's side in that place
    ],
)
def test_shuffle_reshapes(made: Made, dims: tuple[int, ...], expected: object) -> None:
    layer = made.net.add_shuffle(_numbered(made, 2, 3))
    layer.reshape_dims = dims
    assert made.list(layer) == expected


def test_shuffle_transposes_before_and_after(made: Made) -> None:
    layer = made.net.add_shuffle(_numbered(made, 2, 3))
    layer.first_transpose = (1, 0)  # 0 3, 1 4, 2 5
    layer.reshape_dims = (2, 3)  # 0 3 1, 4 2 5
    layer.second_transpose = (1, 0)
    assert made.list(layer) == [[0.0, 4.0], [3.0, 2.0], [1.0, 5.0]]


def test_the_zero_of_a_reshape_means_the_side_after_the_first_transpose(made: Made) -> None:
    layer = made.net.add_shuffle(_numbered(made, 2, 3))
    layer.first_transpose = (1, 0)
    layer.reshape_dims = (0, -1, 1)
    assert made.list(layer) == [[[0.0], [3.0]], [[1.0], [4.0]], [[2.0], [5.0]]]


def test_shuffle_of_three_axes(made: Made) -> None:
    layer = made.net.add_shuffle(_numbered(made, 1, 2, 3))
    layer.first_transpose = (2, 0, 1)  # the axis in place i is the input's order[i]
    result = made.run(layer)
    assert list(result.shape) == [3, 1, 2] and result.flatten().tolist() == [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]


def test_shuffle_reshapes_to_sides_that_another_tensor_gives(made: Made) -> None:
    layer = made.net.add_shuffle(_numbered(made, 2, 3, dynamic=True))
    layer.set_input(1, made.constant([0, -1, 1]))
    assert made.list(layer) == [[[0.0], [1.0], [2.0]], [[3.0], [4.0], [5.0]]]


def test_a_zero_that_is_no_placeholder_is_a_side_of_nothing(made: Made) -> None:
    layer = made.net.add_shuffle(made.input(torch.zeros(2, 0)))
    layer.zero_is_placeholder = False
    layer.reshape_dims = (0, 5)
    assert list(made.run(layer).shape) == [0, 5]


# Along an axis of five elements 0 .. 4: start, size and stride, and what is taken.
INSIDE = [
    ((1, 3, 1), [1, 2, 3]),
    ((0, 3, 2), [0, 2, 4]),
    ((4, 5, -1), [4, 3, 2, 1, 0]),
    ((2, 3, 0), [2, 2, 2]),
    ((1, 0, 1), []),
]
OUTSIDE = [
    ("FILL", (-2, 4, 1), [0, 0, 0, 1]),
    ("FILL", (3, 4, 1), [3, 4, 0, 0]),
    ("CLAMP", (-2, 4, 1), [0, 0, 0, 1]),
    ("CLAMP", (3, 4, 1), [3, 4, 4, 4]),
    ("WRAP", (-2, 4, 1), [3, 4, 0, 1]),
    ("WRAP", (3, 4, 1), [3, 4, 0, 1]),
    ("REFLECT", (-2, 4, 1), [2, 1, 0, 1]),
    ("REFLECT", (3, 4, 1), [3, 4, 3, 2]),
    ("REFLECT", (0, 3, 4), [0, 4, 0]),
]


@pytest.mark.parametrize("mode", ["STRICT_BOUNDS", "FILL", "CLAMP", "WRAP", "REFLECT"])
@pytest.mark.parametrize(("taken", "expected"), INSIDE)
def test_slice_within_bounds(made: Made, mode: str, taken: tuple[int, int, int], expected: list[int]) -> None:
    layer = made.net.add_slice(_numbered(made, 5), *((number,) for number in taken))
    layer.mode = getattr(made.trt.SampleMode, mode)
    assert made.list(layer) == expected


@pytest.mark.parametrize(("mode", "taken", "expected"), OUTSIDE)
def test_slice_out_of_bounds(made: Made, mode: str, taken: tuple[int, int, int], expected: list[int]) -> None:
    layer = made.net.add_slice(_numbered(made, 5), *((number,) for number in taken))
    layer.mode = getattr(made.trt.SampleMode, mode)
    assert made.list(layer) == expected


def test_strict_slices_stay_within_bounds(made: Made) -> None:
    # TensorRT itself refuses what it sees; sides that are open it sees when the network runs.
    layer = made.net.add_slice(_numbered(made, 5, dynamic=True), (3,), (4,), (1,))
    assert "takes 4 from 3 in steps of 1, out of bounds" in made.refused(layer)


def test_slice_fills_with_a_value_on_both_axes(made: Made) -> None:
    layer = made.net.add_slice(_numbered(made, 2, 2), (-1, 0), (3, 3), (1, 1))
    layer.mode = made.trt.SampleMode.FILL
    layer.set_input(4, made.constant([9.0], np.float32))
    assert made.list(layer) == [[9.0, 9.0, 9.0], [0.0, 1.0, 9.0], [2.0, 3.0, 9.0]]


@pytest.mark.parametrize(
    ("place", "value", "expected"), [(1, [2], [2.0, 3.0]), (2, [3], [1.0, 2.0, 3.0]), (3, [3], [1.0, 4.0])], ids=str
)
def test_slice_takes_start_size_and_stride_from_tensors(
    made: Made, place: int, value: list[int], expected: list[float]
) -> None:
    layer = made.net.add_slice(_numbered(made, 5, dynamic=True), (1,), (2,), (1,))
    layer.set_input(place, made.constant(value))
    assert made.list(layer) == expected


def test_slice_along_named_axes(made: Made) -> None:
    layer = made.net.add_slice(_numbered(made, 2, 3), (1,), (2,), (1,))
    layer.axes = (1,)
    assert made.list(layer) == [[1.0, 2.0], [4.0, 5.0]]


@pytest.mark.parametrize(
    ("axis", "index", "expected"),
    [
        (0, [1, 1], [[3.0, 4.0, 5.0], [3.0, 4.0, 5.0]]),
        (1, [2, 0], [[2.0, 0.0], [5.0, 3.0]]),
        (1, 1, [1.0, 4.0]),
        (0, [[1], [0]], [[[3.0, 4.0, 5.0]], [[0.0, 1.0, 2.0]]]),
    ],
    ids=str,
)  # fmt: skip
def test_gather(made: Made, axis: int, index: Any, expected: object) -> None:
    data = _numbered(made, 2, 3)
    assert made.list(made.net.add_gather(data, made.constant(index), axis)) == expected


def _resize(made: Made) -> Any:
    layer = made.net.add_resize(made.floats(1.0, 2.0, 3.0, shape=(1, 3), dynamic=True))
    layer.resize_mode = made.trt.InterpolationMode.NEAREST
    layer.coordinate_transformation = made.trt.ResizeCoordinateTransformation.ASYMMETRIC
    layer.nearest_rounding = made.trt.ResizeRoundMode.FLOOR
    return layer


def test_resize_by_scales(made: Made) -> None:
    layer = _resize(made)
    layer.scales = [1.0, 2.0]
    assert made.list(layer) == [[1.0, 1.0, 2.0, 2.0, 3.0, 3.0]]


def test_resize_to_sides(made: Made) -> None:
    layer = _resize(made)
    layer.shape = (2, 4)  # columns 0, 0.75, 1.5, 2.25 of the input
    assert made.list(layer) == [[1.0, 1.0, 2.0, 3.0]] * 2


def test_resize_to_sides_that_another_tensor_gives(made: Made) -> None:
    layer = _resize(made)
    layer.set_input(1, made.constant([1, 2]))
    assert made.list(layer) == [[1.0, 2.0]]


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
    x = _numbered(made, 1, 2, 2, 2)  # channels 0 1 / 2 3 and 4 5 / 6 7
    layer = made.net.add_convolution_nd(x, 2, (2, 1), _weights(made, (2, 2, 2, 1)))
    # Output 0: rows of channel 0 by 1 and 2, of channel 1 by 3 and 4; output 1 by 5, 6, 7, 8.
    assert made.list(layer) == [[[[40.0, 50.0]], [[88.0, 114.0]]]]


def test_convolution_of_groups(made: Made) -> None:
    layer = made.net.add_convolution_nd(made.floats(1.0, 2.0, shape=(1, 2, 1, 1)), 4, (1, 1), _weights(made, (4, 1, 1, 1)))
    layer.num_groups = 2
    assert made.run(layer).flatten().tolist() == [1.0, 2.0, 6.0, 8.0]


def test_convolution_of_three_axes(made: Made) -> None:
    x = _numbered(made, 1, 1, 2, 1, 2)
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


# A whole network.


def test_inputs_that_were_set_later_and_tensors_used_twice(made: Made) -> None:
    x = made.floats(1.0, 2.0)
    layer = made.net.add_elementwise(x, x, made.trt.ElementWiseOperation.SUM)
    later = made.net.add_unary(x, made.trt.UnaryOperation.NEG)
    layer.set_input(1, later.get_output(0))
    final = made.net.add_elementwise(layer.get_output(0), x, made.trt.ElementWiseOperation.SUM)
    assert made.list(final) == [1.0, 2.0]


def test_on_the_meta_device_only_shapes_are_computed(made: Made) -> None:
    x = made.input(torch.empty(2, 3, device="meta"), dynamic=True)
    shape = made.net.add_cast(made.net.add_shape(x).get_output(0), made.trt.DataType.INT32).get_output(0)
    half = made.net.add_elementwise(shape, made.constant([1, 2]), made.trt.ElementWiseOperation.FLOOR_DIV).get_output(0)
    layer = made.net.add_slice(x, (0, 0), (1, 1), (1, 1))
    layer.set_input(2, half)
    result = made.run(layer)
    assert result.is_meta and list(result.shape) == [2, 1]


# What is not known is refused, by name.


def test_a_kind_of_layer_that_is_not_known_is_named(made: Made) -> None:
    layer = made.net.add_cumulative(made.floats(1.0, 2.0), made.constant(0), made.trt.CumulativeOperation.SUM, False, False)
    layer.name = "running total"
    assert made.refused(layer) == "layer 'running total' (CUMULATIVE): layers of this kind are not known here"


UNKNOWN: list[tuple[str, Callable[[Made], Any]]] = [
    ("op SINH", lambda m: m.net.add_unary(m.floats(1.0), m.trt.UnaryOperation.SINH)),
    ("type GELU_ERF", lambda m: m.net.add_activation(m.floats(1.0), m.trt.ActivationType.GELU_ERF)),
    ("mode ELEMENT", lambda m: m.net.add_gather_v2(m.floats(1.0), m.constant([0]), m.trt.GatherMode.ELEMENT)),
]


@pytest.mark.parametrize(("says", "make"), UNKNOWN, ids=[says for says, _ in UNKNOWN])
def test_a_mode_that_is_not_known_is_named(made: Made, says: str, make: Callable[[Made], Any]) -> None:
    assert f"{says} is not known here; known are" in made.refused(make(made))


@pytest.mark.parametrize(
    ("parameter", "kind", "value"),
    [
        ("resize_mode", "InterpolationMode", "LINEAR"),
        ("coordinate_transformation", "ResizeCoordinateTransformation", "HALF_PIXEL"),
        ("nearest_rounding", "ResizeRoundMode", "CEIL"),
        ("selector_for_single_pixel", "ResizeSelector", "UPPER"),
    ],
)
def test_a_way_to_resize_that_is_not_known_is_named(made: Made, parameter: str, kind: str, value: str) -> None:
    layer = _resize(made)
    layer.scales = [1.0, 2.0]
    setattr(layer, parameter, getattr(getattr(made.trt, kind), value))
    assert f"{parameter} {value} is not known here; known are" in made.refused(layer)


def test_a_type_that_is_not_known_is_named(made: Made) -> None:
    layer = made.net.add_cast(made.floats(1.0), made.trt.DataType.FP8)
    assert "FP8, which is not known here" in made.refused(layer)


def test_a_parameter_that_a_later_release_adds_is_named(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(made.trt.IUnaryLayer, "saturate", property(lambda layer: False), raising=False)
    layer = made.net.add_unary(made.floats(1.0), made.trt.UnaryOperation.NEG)
    assert "has the parameters saturate, not known here" in made.refused(layer)


def test_inputs_must_be_those_of_the_network(made: Made) -> None:
    layer = made.net.add_unary(made.floats(1.0), made.trt.UnaryOperation.NEG)
    made.net.mark_output(layer.get_output(0))
    network = Network(made.trt, made.net)
    for inputs, says in (
        ({}, "is missing; given are none"),
        ({"input0": torch.zeros(2)}, r"has shape \[2\], TensorRT says \[1\]"),
        ({"input0": torch.zeros(1, dtype=torch.float16)}, "is of type torch.float16, TensorRT says torch.float32"),
    ):
        with pytest.raises(NetworkError, match=says):
            network.run(inputs)


def test_a_program_has_one_input_and_one_output(made: Made) -> None:
    layer = made.net.add_elementwise(made.floats(1.0), made.floats(2.0), made.trt.ElementWiseOperation.SUM)
    made.net.mark_output(layer.get_output(0))
    with pytest.raises(NetworkError, match="input0, input1, .*; expected one of each"):
        NetworkProgram(Network(made.trt, made.net))


def test_out_of_range_elements_are_not_gathered(made: Made) -> None:
    layer = made.net.add_gather(_numbered(made, 3, dynamic=True), made.constant([3]), 0)
    assert "takes element [3] of 3 along axis 0" in made.refused(layer)


def test_every_kind_has_a_test_here() -> None:
    names = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert [kind for kind in KINDS if not any(kind.lower() in name for name in names)] == []

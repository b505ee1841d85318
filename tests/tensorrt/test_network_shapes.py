"""Layers that move elements and calculate with shapes: every mode that is known, in tiny networks; results written by hand.

Shapes and types need no hand: what TensorRT infers for a tensor is compared in each run, and a difference is an error.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.tensorrt.made import Made

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


@pytest.mark.parametrize(
    ("dims", "expected"),
    [
        ((3, 2), [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]),
        ((-1,), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]),
        ((0, 1, -1), [[[0.0, 1.0, 2.0]], [[3.0, 4.0, 5.0]]]),  # 0 copies the input's side in that place
    ],
)
def test_shuffle_reshapes(made: Made, dims: tuple[int, ...], expected: object) -> None:
    layer = made.net.add_shuffle(made.numbered(2, 3))
    layer.reshape_dims = dims
    assert made.list(layer) == expected


def test_shuffle_transposes_before_and_after(made: Made) -> None:
    layer = made.net.add_shuffle(made.numbered(2, 3))
    layer.first_transpose = (1, 0)  # 0 3, 1 4, 2 5
    layer.reshape_dims = (2, 3)  # 0 3 1, 4 2 5
    layer.second_transpose = (1, 0)
    assert made.list(layer) == [[0.0, 4.0], [3.0, 2.0], [1.0, 5.0]]


def test_the_zero_of_a_reshape_means_the_side_after_the_first_transpose(made: Made) -> None:
    layer = made.net.add_shuffle(made.numbered(2, 3))
    layer.first_transpose = (1, 0)
    layer.reshape_dims = (0, -1, 1)
    assert made.list(layer) == [[[0.0], [3.0]], [[1.0], [4.0]], [[2.0], [5.0]]]


def test_shuffle_of_three_axes(made: Made) -> None:
    layer = made.net.add_shuffle(made.numbered(1, 2, 3))
    layer.first_transpose = (2, 0, 1)  # the axis in place i is the input's order[i]
    result = made.run(layer)
    assert list(result.shape) == [3, 1, 2] and result.flatten().tolist() == [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]


def test_shuffle_reshapes_to_sides_that_another_tensor_gives(made: Made) -> None:
    layer = made.net.add_shuffle(made.numbered(2, 3, dynamic=True))
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
    layer = made.net.add_slice(made.numbered(5), *((number,) for number in taken))
    layer.mode = getattr(made.trt.SampleMode, mode)
    assert made.list(layer) == expected


@pytest.mark.parametrize(("mode", "taken", "expected"), OUTSIDE)
def test_slice_out_of_bounds(made: Made, mode: str, taken: tuple[int, int, int], expected: list[int]) -> None:
    layer = made.net.add_slice(made.numbered(5), *((number,) for number in taken))
    layer.mode = getattr(made.trt.SampleMode, mode)
    assert made.list(layer) == expected


def test_strict_slices_stay_within_bounds(made: Made) -> None:
    # TensorRT itself refuses what it sees; sides that are open it sees when the network runs.
    layer = made.net.add_slice(made.numbered(5, dynamic=True), (3,), (4,), (1,))
    assert "takes 4 from 3 in steps of 1, out of bounds" in made.refused(layer)


def test_slice_fills_with_a_value_on_both_axes(made: Made) -> None:
    layer = made.net.add_slice(made.numbered(2, 2), (-1, 0), (3, 3), (1, 1))
    layer.mode = made.trt.SampleMode.FILL
    layer.set_input(4, made.constant([9.0], np.float32))
    assert made.list(layer) == [[9.0, 9.0, 9.0], [0.0, 1.0, 9.0], [2.0, 3.0, 9.0]]


@pytest.mark.parametrize(
    ("place", "value", "expected"), [(1, [2], [2.0, 3.0]), (2, [3], [1.0, 2.0, 3.0]), (3, [3], [1.0, 4.0])], ids=str
)
def test_slice_takes_start_size_and_stride_from_tensors(
    made: Made, place: int, value: list[int], expected: list[float]
) -> None:
    layer = made.net.add_slice(made.numbered(5, dynamic=True), (1,), (2,), (1,))
    layer.set_input(place, made.constant(value))
    assert made.list(layer) == expected


def test_slice_along_named_axes(made: Made) -> None:
    layer = made.net.add_slice(made.numbered(2, 3), (1,), (2,), (1,))
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
    data = made.numbered(2, 3)
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


def test_out_of_range_elements_are_not_gathered(made: Made) -> None:
    layer = made.net.add_gather(made.numbered(3, dynamic=True), made.constant([3]), 0)
    assert "takes element [3] of 3 along axis 0" in made.refused(layer)

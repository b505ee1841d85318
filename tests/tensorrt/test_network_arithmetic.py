"""Layers that calculate: every mode that is known, in tiny networks; results written by hand.

Shapes and types need no hand: what TensorRT infers for a tensor is compared in each run, and a difference is an error.
"""

from __future__ import annotations

import math

import pytest
import torch

from tests.tensorrt.made import Made

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

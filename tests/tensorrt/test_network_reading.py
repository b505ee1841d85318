"""Whole networks, and what is not known of them: refused, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from qwen_vae_accel.backends.tensorrt.network import Network, NetworkError, NetworkProgram
from tests.tensorrt.made import Made

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

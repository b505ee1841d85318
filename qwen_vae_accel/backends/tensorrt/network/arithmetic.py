"""Layers that calculate: element by element, over axes, and matrix products."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qwen_vae_accel.backends.tensorrt.network.reading import Compute, Inputs, Layer, LayerKind, widened

_Binary = Callable[[Tensor, Tensor], Tensor]
_Unary = Callable[[Tensor], Tensor]


def _power(x: Tensor, y: Tensor) -> Tensor:
    # A scalar exponent of 2 is a product; the general function takes ten times as long.
    return torch.pow(x, y.item()) if y.numel() == 1 and not y.is_meta else torch.pow(x, y)


def _quotient(x: Tensor, y: Tensor) -> Tensor:
    return x / y if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc")


_ELEMENTWISE: dict[str, _Binary] = {
    "SUM": torch.add,
    "PROD": torch.mul,
    "MAX": torch.maximum,
    "MIN": torch.minimum,
    "SUB": torch.sub,
    "DIV": _quotient,
    "POW": _power,
    "FLOOR_DIV": lambda x, y: torch.div(x, y, rounding_mode="floor"),
    "AND": torch.logical_and,
    "OR": torch.logical_or,
    "XOR": torch.logical_xor,
    "EQUAL": torch.eq,
    "GREATER": torch.gt,
    "LESS": torch.lt,
}
_UNARY: dict[str, _Unary] = {
    "EXP": torch.exp,
    "LOG": torch.log,
    "SQRT": torch.sqrt,
    "RECIP": torch.reciprocal,
    "ABS": torch.abs,
    "NEG": torch.neg,
    "CEIL": torch.ceil,
    "FLOOR": torch.floor,
    "ROUND": torch.round,  # halves to the even neighbour
    "SIGN": torch.sign,
    "ERF": torch.erf,
    "NOT": torch.logical_not,
}
_ACTIVATION: dict[str, Callable[[float, float], _Unary]] = {
    "RELU": lambda alpha, beta: torch.relu,
    "SIGMOID": lambda alpha, beta: torch.sigmoid,
    "TANH": lambda alpha, beta: torch.tanh,
    "CLIP": lambda alpha, beta: lambda x: x.clamp(alpha, beta),
}


def _product(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    for axis in sorted(axes, reverse=True):
        x = x.prod(axis, keepdim=keep)
    return x


_REDUCE: dict[str, Callable[[Tensor, tuple[int, ...], bool], Tensor]] = {
    "SUM": lambda x, axes, keep: x.sum(axes, keepdim=keep, dtype=x.dtype),
    "AVG": lambda x, axes, keep: x.mean(axes, keepdim=keep),
    "MAX": lambda x, axes, keep: x.amax(axes, keepdim=keep),
    "MIN": lambda x, axes, keep: x.amin(axes, keepdim=keep),
    "PROD": _product,
}


def _same_rank(layer: Layer, *inputs: Tensor) -> None:
    """Tensors of one rank are broadcast where one's side is 1; TensorRT adds no axes."""
    if len({x.dim() for x in inputs}) != 1:
        raise layer.error(f"its inputs have the shapes {', '.join(str(list(x.shape)) for x in inputs)}, not one rank")


def _elementwise(layer: Layer) -> Compute:
    layer.takes(2, 2)
    operation = _ELEMENTWISE[layer.choice("op", _ELEMENTWISE)]

    def run(x: Tensor, y: Tensor) -> Tensor:
        _same_rank(layer, x, y)
        return operation(x, y)

    return widened(run, layer)


def _unary(layer: Layer) -> Compute:
    layer.takes(1, 1)
    return widened(_UNARY[layer.choice("op", _UNARY)], layer)


def _activation(layer: Layer) -> Compute:
    layer.takes(1, 1)
    kind = layer.choice("type", _ACTIVATION)
    return widened(_ACTIVATION[kind](float(layer.value("alpha")), float(layer.value("beta"))), layer)


def _reduce(layer: Layer) -> Compute:
    layer.takes(1, 1)
    operation = _REDUCE[layer.choice("op", _REDUCE)]
    axes, keep = layer.axes(), bool(layer.value("keep_dims"))
    if not axes:
        raise layer.error("it reduces no axes")
    return widened(lambda x: operation(x, axes, keep), layer)


def _softmax(layer: Layer) -> Compute:
    layer.takes(1, 1)
    axes = layer.axes()
    if len(axes) != 1:
        raise layer.error(f"it is over the axes {list(axes)}; known is one")
    return widened(lambda x: torch.softmax(x, axes[0]), layer)


_OPERAND: dict[str, _Unary] = {"NONE": lambda x: x, "TRANSPOSE": lambda x: x.transpose(-1, -2), "VECTOR": lambda x: x}


def _matrix_multiply(layer: Layer) -> Compute:
    layer.takes(2, 2)
    names = layer.choice("op0", _OPERAND), layer.choice("op1", _OPERAND)

    def run(x: Tensor, y: Tensor) -> Tensor:
        left, right = (_OPERAND[name](operand) for name, operand in zip(names, (x, y), strict=True))
        # A vector has one axis less, and so has the result: a row on the left, a column on the right.
        left = left.unsqueeze(-2) if names[0] == "VECTOR" else left
        right = right.unsqueeze(-1) if names[1] == "VECTOR" else right
        _same_rank(layer, left, right)
        product = torch.matmul(left, right)
        product = product.squeeze(-1) if names[1] == "VECTOR" else product
        if names[0] == "VECTOR":
            product = product.squeeze(-1 if names[1] == "VECTOR" else -2)
        return product

    return widened(run, layer)


def _cast(layer: Layer) -> Compute:
    layer.takes(1, 1)
    dtype = layer.dtype(layer.value("to_type"))

    def run(inputs: Inputs) -> Tensor:
        (x,) = inputs
        assert x is not None
        return x.to(dtype)

    return run


def _select(layer: Layer) -> Compute:
    layer.takes(3, 3)

    def run(inputs: Inputs) -> Tensor:
        condition, chosen, other = inputs
        assert condition is not None and chosen is not None and other is not None
        _same_rank(layer, condition, chosen, other)
        if condition.dtype != torch.bool or chosen.dtype != other.dtype:
            types = ", ".join(str(x.dtype) for x in (condition, chosen, other))
            raise layer.error(f"its inputs have the types {types}; types are strong")
        return torch.where(condition, chosen, other)

    return run


KINDS = {
    "ELEMENTWISE": LayerKind("IElementWiseLayer", ("op",), _elementwise),
    "UNARY": LayerKind("IUnaryLayer", ("op",), _unary),
    "ACTIVATION": LayerKind("IActivationLayer", ("alpha", "beta"), _activation),
    "REDUCE": LayerKind("IReduceLayer", ("axes", "keep_dims", "op"), _reduce),
    "SOFTMAX": LayerKind("ISoftMaxLayer", ("axes",), _softmax),
    "MATRIX_MULTIPLY": LayerKind("IMatrixMultiplyLayer", ("op0", "op1"), _matrix_multiply),
    "CAST": LayerKind("ICastLayer", ("to_type",), _cast),
    "SELECT": LayerKind("ISelectLayer", (), _select),
}

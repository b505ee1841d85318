"""Layers that move elements and calculate with shapes: no arithmetic on floats."""

from __future__ import annotations

import torch
from torch import Tensor

from qwen_vae_accel.backends.tensorrt.network.reading import Compute, Inputs, Layer, LayerKind, numbers, present


def _first(layer: Layer, inputs: Inputs) -> Tensor:
    x = inputs[0]
    if x is None:
        raise layer.error("its first input is not set")
    return x


def _constant(layer: Layer) -> Compute:
    layer.takes(0, 0)
    value, shape = layer.weights("weights"), layer.dims("shape")
    if shape is None:
        raise layer.error("its shape is not set")
    constant = torch.empty(0) if value is None else value
    if constant.numel() != torch.Size(shape).numel():
        raise layer.error(f"it has {constant.numel()} weights for the shape {list(shape)}")
    shaped = constant.reshape(shape)
    return lambda inputs: shaped


def _identity(layer: Layer) -> Compute:
    layer.takes(1, 1)
    return lambda inputs: _first(layer, inputs)


def _shape(layer: Layer) -> Compute:
    layer.takes(1, 1)
    return lambda inputs: torch.tensor(_first(layer, inputs).shape, dtype=torch.int64, device="cpu")


def _concatenation(layer: Layer) -> Compute:
    axis = int(layer.value("axis"))

    def run(inputs: Inputs) -> Tensor:
        parts = [x for x in inputs if x is not None]
        if len(parts) != len(inputs) or len({x.dtype for x in parts}) != 1:
            raise layer.error("its inputs are not all set, or not of one type")
        return torch.cat(parts, axis)

    return run


def _shuffle(layer: Layer) -> Compute:
    layer.takes(1, 2)
    first, second = layer.dims("first_transpose"), layer.dims("second_transpose")
    static = layer.dims("reshape_dims")
    placeholder = bool(layer.value("zero_is_placeholder"))

    def permuted(x: Tensor, order: tuple[int, ...] | None) -> Tensor:
        # The order that nobody set is 0, 1, 2, ... for as many axes as a tensor may have.
        order = tuple(range(x.dim())) if order is None else order[: x.dim()]
        if sorted(order) != list(range(x.dim())):
            raise layer.error(f"it permutes {x.dim()} axes as {list(order)}")
        return x.permute(order)

    def run(inputs: Inputs) -> Tensor:
        x = permuted(_first(layer, inputs), first)
        given = present(inputs, 1)
        shape = static if given is None else numbers(given)
        if shape is not None:
            if placeholder:
                if any(side == 0 and axis >= x.dim() for axis, side in enumerate(shape)):
                    raise layer.error(f"it copies a side that an input of {x.dim()} axes does not have: {list(shape)}")
                shape = tuple(x.shape[axis] if side == 0 else side for axis, side in enumerate(shape))
            if min(shape, default=0) < -1 or shape.count(-1) > 1:
                raise layer.error(f"it reshapes to {list(shape)}")
            try:
                x = x.reshape(shape)
            except RuntimeError as error:
                raise layer.error(f"it reshapes {list(x.shape)} to {list(shape)}") from error
        return permuted(x, second)

    return run


_MODES = ("STRICT_BOUNDS", "FILL", "CLAMP", "WRAP", "REFLECT")


def _slice(layer: Layer) -> Compute:
    layer.takes(1, 6)
    mode = layer.choice("mode", _MODES)
    names = ("start", "shape", "stride")
    static = [layer.dims(name) for name in names]
    static_axes = layer.dims("axes")

    def run(inputs: Inputs) -> Tensor:
        x = _first(layer, inputs)
        lists = []
        for index, (name, values) in enumerate(zip(names, static, strict=True), start=1):
            given = present(inputs, index)
            found = values if given is None else numbers(given)
            if found is None:
                raise layer.error(f"its {name} is not set")
            lists.append(found)
        fill = present(inputs, 4)
        given = present(inputs, 5)
        axes = (static_axes or tuple(range(x.dim()))) if given is None else numbers(given)
        if any(len(values) != len(axes) for values in lists):
            raise layer.error(f"start, shape and stride are {lists} for the axes {list(axes)}")
        if fill is not None and (mode != "FILL" or fill.numel() != 1 or fill.dtype != x.dtype):
            raise layer.error(f"it has a value to fill with, {fill.numel()} of type {fill.dtype}, in mode {mode}")
        for axis, start, size, stride in zip(axes, *lists, strict=True):
            x = _sliced(layer, x, axis, (start, size, stride), mode, fill)
        return x

    return run


def _sliced(layer: Layer, x: Tensor, axis: int, what: tuple[int, int, int], mode: str, fill: Tensor | None) -> Tensor:
    """``size`` elements along ``axis`` from ``start`` in steps of ``stride``, which may be negative or zero."""
    start, size, stride = what
    side = x.shape[axis]
    if size < 0:
        raise layer.error(f"its size along axis {axis} is {size}")
    last = start + (size - 1) * stride
    within = size == 0 or (min(start, last) >= 0 and max(start, last) < side)
    if within and size > 0 and stride > 0:
        return x[(slice(None),) * axis + (slice(start, last + 1, stride),)]
    if within and size > 0 and stride == 0:
        return x.narrow(axis, start, 1).expand(*x.shape[:axis], size, *x.shape[axis + 1 :])
    index = start + torch.arange(size, device=x.device) * stride
    if within:
        return x.index_select(axis, index)
    if mode == "STRICT_BOUNDS":
        raise layer.error(
            f"along axis {axis} of {side} elements it takes {size} from {start} in steps of {stride}, out of bounds"
        )
    if side == 0 and mode != "FILL":
        raise layer.error(f"axis {axis} is empty, which mode {mode} cannot repeat")
    if mode == "WRAP":
        return x.index_select(axis, index % side)
    if mode == "CLAMP":
        return x.index_select(axis, index.clamp(0, side - 1))
    if mode == "REFLECT":  # without repeating the edge
        period = max(1, 2 * (side - 1))
        index = index % period
        return x.index_select(axis, torch.minimum(index, period - index) if side > 1 else index)
    outside = (index < 0) | (index >= side)
    shape = [-1 if place == axis else 1 for place in range(x.dim())]
    value = torch.zeros((), dtype=x.dtype, device=x.device) if fill is None else fill.to(x.device).reshape(())
    if side == 0:
        return value.expand(*x.shape[:axis], size, *x.shape[axis + 1 :])
    return torch.where(outside.view(shape), value, x.index_select(axis, index.clamp(0, side - 1)))


def _gather(layer: Layer) -> Compute:
    layer.takes(2, 2)
    layer.must_be("mode", "DEFAULT")
    layer.must_be("num_elementwise_dims", 0)
    axis = int(layer.value("axis"))

    def run(inputs: Inputs) -> Tensor:
        x, index = inputs
        if x is None or index is None:
            raise layer.error("its inputs are not set")
        if index.numel() and not (int(index.min()) >= 0 and int(index.max()) < x.shape[axis]):
            raise layer.error(f"it takes element {index.tolist()} of {x.shape[axis]} along axis {axis}")
        taken = x.index_select(axis, index.flatten().to(x.device))
        return taken.reshape(*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])

    return run


def _resize(layer: Layer) -> Compute:
    layer.takes(1, 2)
    layer.must_be("resize_mode", "NEAREST")
    layer.must_be("coordinate_transformation", "ASYMMETRIC")
    layer.must_be("nearest_rounding", "FLOOR")
    layer.must_be("selector_for_single_pixel", "FORMULA")
    # Of cubic interpolation only: cubic_coeff, exclude_outside.
    scales, static = tuple(float(scale) for scale in layer.value("scales")), layer.dims("shape")

    def run(inputs: Inputs) -> Tensor:
        x = _first(layer, inputs)
        given = present(inputs, 1)
        shape = static if given is None else numbers(given)
        if scales:
            if len(scales) != x.dim():
                raise layer.error(f"it has the scales {list(scales)} for {x.dim()} axes")
            sides = [(int(side * scale), scale) for side, scale in zip(x.shape, scales, strict=True)]
        elif shape is not None and len(shape) == x.dim():
            sides = [(wanted, wanted / side) for side, wanted in zip(x.shape, shape, strict=True)]
        else:
            raise layer.error(f"it has neither scales nor the {x.dim()} sides of its result")
        for axis, (side, scale) in enumerate(sides):
            if scale != 1:
                index = (torch.arange(side, dtype=torch.float64, device=x.device) / scale).long()
                x = x.index_select(axis, index)
        return x

    return run


KINDS = {
    "CONSTANT": LayerKind("IConstantLayer", ("shape", "weights"), _constant),
    "IDENTITY": LayerKind("IIdentityLayer", (), _identity),
    "SHAPE": LayerKind("IShapeLayer", (), _shape),
    "CONCATENATION": LayerKind("IConcatenationLayer", ("axis",), _concatenation),
    "SHUFFLE": LayerKind(
        "IShuffleLayer", ("first_transpose", "reshape_dims", "second_transpose", "zero_is_placeholder"), _shuffle
    ),
    "SLICE": LayerKind("ISliceLayer", ("axes", "mode", "shape", "start", "stride"), _slice),
    "GATHER": LayerKind("IGatherLayer", ("axis", "mode", "num_elementwise_dims"), _gather),
    "RESIZE": LayerKind(
        "IResizeLayer",
        ("coordinate_transformation", "cubic_coeff", "exclude_outside", "nearest_rounding", "resize_mode", "scales",
         "selector_for_single_pixel", "shape"),
        _resize,
    ),
}  # fmt: skip

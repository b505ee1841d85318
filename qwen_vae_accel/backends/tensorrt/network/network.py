"""A TensorRT network as a program of PyTorch, by TensorRT's documented meaning of each layer.

What TensorRT compiles is an ``INetworkDefinition``: layers, their parameters and constants. It can be read back, so
that whoever made it can be checked without running TensorRT. Types are strong: a layer computes in the type of its
inputs (16-bit floats in float32, rounded once), and a result that differs in type or shape from what TensorRT itself
infers for that tensor is an error. So is a layer, a mode or a parameter that is not known: nothing is skipped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from qwen_vae_accel.backends.tensorrt.network import arithmetic, convolutions, shapes
from qwen_vae_accel.backends.tensorrt.network.reading import TYPES, Layer, LayerKind, NetworkError, sides

KINDS: Mapping[str, LayerKind] = {**shapes.KINDS, **arithmetic.KINDS, **convolutions.KINDS}


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor of a network: its name, its type, and what TensorRT says of its shape (-1: known when it runs)."""

    name: str
    shape: tuple[int, ...] | None
    dtype: torch.dtype

    def refuses(self, x: Tensor) -> str:
        """Why ``x``, of any shape, cannot be its value; empty if it can."""
        if x.dtype != self.dtype:
            return f"it is of type {x.dtype}, TensorRT says {self.dtype}"
        expected = self.shape
        if expected is None:
            return ""
        if len(expected) != x.dim() or any(e not in (-1, s) for e, s in zip(expected, x.shape, strict=True)):
            return f"it has shape {list(x.shape)}, TensorRT says {list(expected)}"
        return ""


@dataclass(frozen=True, slots=True, eq=False)
class _Node:
    """A layer in its place: the names of the tensors that it reads, None for one that is not set, and what it gives."""

    layer: Layer
    inputs: tuple[str | None, ...]
    output: Value


def _ordered(nodes: list[_Node], given: list[str]) -> list[_Node]:
    """``nodes`` so that each comes after what it reads; a layer may get an input that was added after it.

    Raises:
        NetworkError: if there is no such order, or a tensor is given twice.
    """
    ready, waiting, ordered = set(given), nodes, []
    while waiting:
        later = []
        for node in waiting:
            if not all(name is None or name in ready for name in node.inputs):
                later.append(node)
                continue
            if node.output.name in ready:
                raise node.layer.error(f"{node.output.name!r} is given twice")
            ready.add(node.output.name)
            ordered.append(node)
        if len(later) == len(waiting):
            missing = next(name for name in later[0].inputs if name is not None and name not in ready)
            raise later[0].layer.error(f"it reads {missing!r}, which nothing gives before it")
        waiting = later
    return ordered


class Network:
    """A TensorRT network that can be computed.

    Everything is read and judged when it is made; it holds copies of the weights, and nothing of TensorRT's.

    Args:
        trt: TensorRT's bindings.
        definition: the ``INetworkDefinition``.

    Attributes:
        inputs: in their order.
        outputs: in their order.
        nbytes: of the weights.

    Raises:
        NetworkError: if it holds what is not known here.
    """

    def __init__(self, trt: ModuleType, definition: Any) -> None:
        self.inputs = tuple(self._value(definition.get_input(i)) for i in range(definition.num_inputs))
        self.outputs = tuple(self._value(definition.get_output(i)) for i in range(definition.num_outputs))
        nodes = []
        for index in range(definition.num_layers):
            handle = definition.get_layer(index)
            inputs = tuple(_name(handle.get_input(i)) for i in range(handle.num_inputs))
            nodes.append(_Node(Layer(trt, handle, KINDS), inputs, self._value(handle.get_output(0))))
        ordered = _ordered(nodes, [value.name for value in self.inputs])
        last = {name: node for node in ordered for name in node.inputs if name is not None}
        kept = {value.name for value in self.outputs}
        self._steps = tuple(
            (node, tuple(name for name in set(node.inputs) - kept if name is not None and last[name] is node))
            for node in ordered
        )
        self.nbytes = sum(node.layer.nbytes for node in nodes)

    def _value(self, tensor: Any) -> Value:
        dtype = TYPES.get(tensor.dtype.name)
        if dtype is None:
            raise NetworkError(f"tensor {tensor.name!r} is of type {tensor.dtype.name}, which is not known here")
        return Value(tensor.name, sides(tensor.shape), dtype)

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute the outputs for ``inputs``, both by name, in the shapes that :class:`Value` gives.

        Floats are computed on the device of the first input, whole numbers on the CPU. On PyTorch's ``meta`` device no
        value is computed, and the shapes of all tensors are still checked.

        Raises:
            NetworkError: if an input is missing or not of its type and shape, or a layer contradicts what TensorRT says.
        """
        values: dict[str, Tensor] = {}
        for value in self.inputs:
            if value.name not in inputs:
                raise NetworkError(f"input {value.name!r} is missing; given are {', '.join(inputs) or 'none'}")
            trouble = value.refuses(inputs[value.name])
            if trouble:
                raise NetworkError(f"input {value.name!r}: {trouble}")
            values[value.name] = inputs[value.name]
        device = next((x.device for x in values.values() if x.is_floating_point()), torch.device("cpu"))
        with torch.no_grad(), torch.device("cpu"):  # the default device has no say
            for node, done_with in self._steps:
                result = node.layer.compute([None if name is None else values[name] for name in node.inputs])
                result = result.to(device) if result.is_floating_point() else result
                trouble = node.output.refuses(result)
                if trouble:
                    raise node.layer.error(f"its output {node.output.name!r}: {trouble}")
                values[node.output.name] = result
                for name in done_with:
                    del values[name]
        return {value.name: values[value.name] for value in self.outputs}


class NetworkProgram:
    """A network of one input and one output as a program, see :class:`qwen_vae_accel.backends.base.Program`."""

    def __init__(self, network: Network) -> None:
        if len(network.inputs) != 1 or len(network.outputs) != 1:
            names = [value.name for value in (*network.inputs, *network.outputs)]
            raise NetworkError(f"the network has the inputs and outputs {', '.join(names)}; expected one of each")
        self._network = network
        self.nbytes = network.nbytes

    def __call__(self, x: Tensor, profile: int = 0) -> Tensor:
        (source,), (result,) = self._network.inputs, self._network.outputs
        return self._network.run({source.name: x})[result.name].contiguous()


def _name(tensor: Any) -> str | None:
    return None if tensor is None else str(tensor.name)

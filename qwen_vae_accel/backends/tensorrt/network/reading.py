"""One layer of a TensorRT network, opened: its parameters, its weights, and how what is not understood is refused."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qwen_vae_accel.errors import BuildError

Inputs = Sequence[Tensor | None]
# What a layer makes of its inputs, which are in the order of its own; None stands for one that is not set.
Compute = Callable[[Inputs], Tensor]

# TensorRT's types, by their names in ``DataType``.
TYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "BOOL": torch.bool,
}

# Of every layer. num_ranks is of networks that run on several GPUs at once.
_COMMON = {"metadata", "name", "num_inputs", "num_outputs", "num_ranks", "precision", "precision_is_set", "type"}


class NetworkError(BuildError):
    """A TensorRT network that cannot be computed here, or that contradicts itself; the text names the layer."""


@dataclass(frozen=True, slots=True)
class LayerKind:
    """How layers of one kind are read.

    Attributes:
        opened_as: name of their class in TensorRT's bindings.
        parameters: all that the class may have. A class with others is of a release that can say more than is understood.
        read: gives what a layer computes; raises :class:`NetworkError` for values of parameters that it does not know.
    """

    opened_as: str
    parameters: tuple[str, ...]
    read: Callable[[Layer], Compute]


class Layer:
    """One layer: TensorRT's ``ILayer``, as the class of its kind.

    Args:
        trt: TensorRT's bindings.
        handle: the layer, as ``INetworkDefinition.get_layer`` gives it.
        kinds: the known kinds, by their names in ``LayerType``.

    Raises:
        NetworkError: if its kind is not known, or it has parameters that its kind should not have.
    """

    def __init__(self, trt: ModuleType, handle: Any, kinds: Mapping[str, LayerKind]) -> None:
        self.name: str = handle.name
        # The class of some kinds has a "type" of its own, and the object may have been opened before.
        self.kind: str = trt.ILayer.type.__get__(handle).name
        self._trt = trt
        known = kinds.get(self.kind)
        if known is None:
            raise self.error("layers of this kind are not known here")
        opened = getattr(trt, known.opened_as)
        foreign = _properties(trt.ILayer) - _COMMON
        foreign |= _properties(opened) - _properties(trt.ILayer) - {*known.parameters, "type"}
        if foreign:
            raise self.error(f"TensorRT {trt.__version__} has the parameters {', '.join(sorted(foreign))}, not known here")
        handle.__class__ = opened
        self._handle = handle
        self.num_inputs: int = handle.num_inputs
        if getattr(handle, "precision_is_set", False):
            raise self.error(f"its precision is set to {handle.precision.name}; networks must be strongly typed")
        if getattr(handle, "num_ranks", 1) != 1:
            raise self.error(f"it runs on {handle.num_ranks} GPUs")
        if handle.num_outputs != 1:
            raise self.error(f"it has {handle.num_outputs} outputs, expected 1")
        self.nbytes = 0  # of the weights that were read
        self.compute = known.read(self)
        del self._handle  # nothing of TensorRT's is kept

    def error(self, text: str) -> NetworkError:
        """An error that names the layer."""
        return NetworkError(f"layer {self.name!r} ({self.kind}): {text}")

    def value(self, parameter: str) -> Any:
        """The parameter, as the bindings give it."""
        return getattr(self._handle, parameter)

    def choice(self, parameter: str, known: Sequence[str] | Mapping[str, Any]) -> str:
        """The name of the parameter's value, which must be one of ``known``."""
        name = str(self.value(parameter).name)
        if name not in known:
            raise self.error(f"{parameter} {name} is not known here; known are {', '.join(known)}")
        return name

    def must_be(self, parameter: str, *values: Any) -> None:
        """Refuse a parameter that is none of ``values``."""
        value = self.value(parameter)
        value = getattr(value, "name", value)
        if value not in values:
            raise self.error(f"{parameter} {value} is not known here; known are {', '.join(map(str, values))}")

    def takes(self, least: int, most: int) -> None:
        """Refuse a number of inputs outside ``least .. most``."""
        if not least <= self.num_inputs <= most:
            raise self.error(f"it has {self.num_inputs} inputs; known are {least} to {most}")

    def dims(self, parameter: str) -> tuple[int, ...] | None:
        """A list of whole numbers; None where TensorRT says that it is not set, or known only when the network runs."""
        return sides(self.value(parameter))

    def axes(self) -> tuple[int, ...]:
        """The axes of the bit mask ``axes``."""
        mask = int(self.value("axes"))
        return tuple(axis for axis in range(mask.bit_length()) if mask >> axis & 1)

    def dtype(self, kind: Any) -> torch.dtype:
        """PyTorch's name of a ``DataType``."""
        found = TYPES.get(kind.name)
        if found is None:
            raise self.error(f"type {kind.name} is not known here; known are {', '.join(TYPES)}")
        return found

    def weights(self, parameter: str) -> Tensor | None:
        """Weights, as a flat tensor of their own memory; None where there are none."""
        value = self.value(parameter)
        if isinstance(value, np.ndarray):
            if value.size == 0:
                return None
            read = torch.from_numpy(np.array(value)).flatten()
        elif value.size == 0:
            return None
        elif value.dtype.name == "BF16":
            read = _bfloat16(self._trt, value)
        else:
            raise self.error(f"{parameter} are of type {value.dtype.name}, which is not known here")
        self.nbytes += read.nbytes
        return read


def sides(dims: Any) -> tuple[int, ...] | None:
    """TensorRT's ``Dims`` as whole numbers; None where it has no length, which TensorRT writes as a negative one."""
    try:
        length = len(dims)
    except ValueError:
        return None
    return tuple(int(dims[index]) for index in range(length))


def _properties(owner: type) -> set[str]:
    return {name for name in dir(owner) if isinstance(getattr(owner, name, None), property)}


class _CWeights(ctypes.Structure):
    """``nvinfer1::Weights``."""

    _fields_ = (("type", ctypes.c_int32), ("values", ctypes.c_void_p), ("count", ctypes.c_int64))


def _opened(weights: Any) -> _CWeights:
    """The structure behind a ``Weights`` object: its address follows the header of the Python object."""
    address = ctypes.c_void_p.from_address(id(weights) + object.__basicsize__).value
    assert address is not None
    return _CWeights.from_address(address)


def _bfloat16(trt: ModuleType, weights: Any) -> Tensor:
    """A copy of bfloat16 weights. NumPy has no such type, so the bindings keep them to themselves."""
    sample = torch.zeros(3, dtype=torch.bfloat16)
    probe = trt.Weights(trt.DataType.BF16, sample.data_ptr(), 3)
    kind = int(trt.DataType.BF16)
    seen = _opened(probe)
    if (seen.type, seen.values, seen.count) != (kind, sample.data_ptr(), 3):
        raise NetworkError(
            f"bfloat16 weights of TensorRT {trt.__version__} cannot be read: its bindings lie otherwise in memory"
        )
    found = _opened(weights)
    if (found.type, found.count) != (kind, weights.size) or not found.values:
        raise NetworkError(f"bfloat16 weights contradict themselves: {weights.size} of them, in memory {found.count}")
    raw = ctypes.string_at(found.values, 2 * found.count)
    return torch.frombuffer(bytearray(raw), dtype=torch.bfloat16)


def widened(compute: Callable[..., Tensor], layer: Layer) -> Compute:
    """``compute`` on inputs of one type; 16-bit floats go through float32, and are rounded once at the end as TensorRT does."""

    def run(inputs: Inputs) -> Tensor:
        types = {x.dtype for x in inputs if x is not None}
        if len(types) != 1:
            raise layer.error(f"its inputs have the types {', '.join(sorted(map(str, types)))}; types are strong")
        (dtype,) = types
        if dtype not in (torch.float16, torch.bfloat16):
            return compute(*inputs)
        result = compute(*(x if x is None else x.float() for x in inputs))
        return result.to(dtype) if result.is_floating_point() else result

    return run


def present(inputs: Inputs, index: int) -> Tensor | None:
    """Input ``index`` where it is there and set."""
    return inputs[index] if index < len(inputs) else None


def numbers(tensor: Tensor) -> tuple[int, ...]:
    """The elements of a shape tensor ``[N]`` or ``[]``."""
    return tuple(int(value) for value in tensor.flatten().tolist())

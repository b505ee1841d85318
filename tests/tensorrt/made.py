"""Tiny networks made by TensorRT's own API, and what our reading of them computes."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from qwen_vae_accel.backends.tensorrt.logs import make_logger
from qwen_vae_accel.backends.tensorrt.network import Network, NetworkError

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

    def numbered(self, *shape: int, dynamic: bool = False) -> Any:
        """An input of 0, 1, 2, ..."""
        return self.input(torch.arange(float(math.prod(shape))).reshape(shape), dynamic)

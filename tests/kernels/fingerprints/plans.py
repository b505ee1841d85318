"""Hashes of launch lists, scratch plans and packed weights."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from qwen_vae_accel.kernels.compiling import TritonKernel
from qwen_vae_accel.kernels.layout import Grid
from qwen_vae_accel.kernels.network import QWEN_IMAGE_21, describe, published
from qwen_vae_accel.kernels.sm90 import attention as attention_sm90
from qwen_vae_accel.kernels.sm90 import conv3x3, driver
from qwen_vae_accel.kernels.sm90.conv3x3 import Conv3x3
from qwen_vae_accel.kernels.sm90.packing import pack
from qwen_vae_accel.kernels.sm90.schedules import SCHEDULES, Mode
from qwen_vae_accel.kernels.weights import ConvWeights, Packer, pack_network
from qwen_vae_accel.model.topology import Topology
from tests.kernels.fingerprints.subjects import META, NETWORKS, gpus_of, input_shape, make, pretended_gpu, sizes_of


def digest(value: Any) -> str:
    """Of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _described(value: Any) -> Any:
    """JSON that says the same wherever the code lies: a tensor by its dtype, shape, strides and offset in its storage."""
    if isinstance(value, Tensor):
        return [str(value.dtype), list(value.shape), list(value.stride()), value.storage_offset()]
    if hasattr(value, "block_shape"):
        return ["tile", _described(value.base), list(value.block_shape)]
    if isinstance(value, Grid):
        return [value.batch, value.height, value.width]
    if isinstance(value, tuple | list):
        return [_described(part) for part in value]
    if isinstance(value, dict):
        return {str(key): _described(part) for key, part in value.items()}
    return value if value is None or isinstance(value, bool | int | float) else str(value)


@contextlib.contextmanager
def _recording() -> Iterator[list[Any]]:
    """Inside, launches are added to the list instead of made."""
    launches: list[Any] = []

    def triton_launch(self: TritonKernel, grid: tuple[int, ...]) -> Callable[..., None]:
        name = getattr(self._jit, "fn", self._jit).__name__
        return lambda *args, **options: launches.append([name, list(grid), _described(args), _described(options)])

    def tensor_map(address, *args):
        storage = ctypes.create_string_buffer(128)
        storage.raw = hashlib.sha512(json.dumps(_described([address, *args])).encode()).digest() * 2
        return storage

    class Launch:
        def __init__(self, kernel, grid, threads, parameters, keep=()):
            self.made = [_described(kernel), list(grid), threads, [bytes(part).hex() for part in parameters]]

        def __call__(self):
            launches.append(self.made)

    call = Conv3x3.__call__

    def layer_call(self, a, grid, **options):
        present = {name: value for name, value in options.items() if value is not None}
        launches.append(["sm90 layer", _described([a, grid]), _described(present)])
        call(self, a, grid, **options)

    def conv_kernel(variant, dtype, device, cache):
        return [variant.defines(), dtype]

    with contextlib.ExitStack() as stack:
        for target, name, value in (
            (TritonKernel, "__getitem__", triton_launch),
            (Conv3x3, "__call__", layer_call),
            (Conv3x3, "_weights", lambda self, schedule: torch.empty(0, device=META)),
            (conv3x3, "_kernel", conv_kernel),
            (attention_sm90, "_load", lambda split, dtype: [attention_sm90._defines(split, dtype), dtype]),
            (driver, "encode_tensor_map", tensor_map),
            (driver, "bind_context", lambda device: None),
            (driver, "PreparedLaunch", Launch),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        attention_sm90._prepare.cache_clear()
        try:
            yield launches
        finally:
            attention_sm90._prepare.cache_clear()


def plans(wanted: Callable[[str], bool] = lambda name: True) -> dict[str, str]:
    """Name of a network, GPU and size -> hashes of its launches and of its scratch plan, for names that are ``wanted``."""
    found = {}
    with pretended_gpu(), _recording() as launches:
        for name in NETWORKS:
            for gpu in gpus_of(name):
                places = {f"{name}, {gpu}, {'x'.join(map(str, size))}": size for size in sizes_of(name)}
                if not any(map(wanted, places)):
                    continue
                network = make(name, gpu, torch.bfloat16)
                for place, size in places.items():
                    if not wanted(place):
                        continue
                    launches.clear()
                    listed = network.launches(input_shape(name, size))
                    memory = listed.memory(torch.empty(input_shape(name, size), dtype=torch.bfloat16, device=META))
                    listed.run(memory)
                    steps = [[step.kernel, step.shape, step.flops] for step in listed.steps]
                    counters = None if listed.counters is None else [listed.counters.index, listed.counters.columns]
                    scratch = [
                        list(listed.offsets),
                        listed.scratch_bytes,
                        counters,
                        list(listed.output_shape),
                    ]
                    found[place] = f"launches {digest([steps, launches])} scratch {digest(scratch)}"
    return found


def _whole_numbers(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Small fractions of a power of two: their sums and products are exact, on every machine."""
    draw = torch.Generator().manual_seed(0)
    return {name: torch.randint(-8, 9, shape, generator=draw).float() / 16 for name, shape in shapes.items()}


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))


def _bytes(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()


def weights() -> dict[str, str]:
    """Hashes of what a network holds, in whatever order; float8's rounding searches, so of that the shapes alone."""
    found = {}
    states = {
        "encode": _whole_numbers(published("encode").parameters()),
        "decode": _whole_numbers(published("decode").parameters()),
    }
    for name in ("decode", "encode", "decode float8"):
        network = make(name, "A100", torch.bfloat16, states[name.split()[0]])
        exact = "float8" not in name
        held = [[str(t.dtype), list(t.shape), _bytes(t) if exact else ""] for t in _tensors(network._weights)]
        found[name] = digest(sorted(held))
    for method in ("decode", "encode"):  # a twelfth of the published widths: orders of channels and identities are the same
        narrow = describe(_narrowed(QWEN_IMAGE_21, 12), method)
        packer = Packer(_whole_numbers(narrow.parameters()), torch.bfloat16, torch.device("cpu"))
        held = [[str(t.dtype), list(t.shape), _bytes(t)] for t in _tensors(pack_network(packer, narrow))]
        found[f"{method} 2.1"] = digest(sorted(held))
    for mode, channels, out in SCHEDULES:
        side = 1 if mode == Mode.POINTWISE else 3
        layer = _whole_numbers({"c.weight": (out, channels, side, side), "c.bias": (out,)})
        packer = Packer(layer, torch.bfloat16, torch.device("cpu"))
        packed: ConvWeights = packer.upsample("c") if mode == Mode.UPSAMPLE else packer.conv("c")
        found[f"sm90 {mode.name.lower()} {channels}->{out}"] = digest(_bytes(pack(packed.weight, mode, channels, 32)))
    return found


def _narrowed(topology: Topology, by: int) -> Topology:
    widths = {name: tuple(width // by for width in getattr(topology, name)) for name in ("encoder_widths", "decoder_widths")}
    return replace(topology, **widths)

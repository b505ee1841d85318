"""A deserialized engine, and what it says of itself: inputs, outputs, dtypes, optimization profiles, memory.

Deserializing an engine amounts to running the code of whoever made it; nothing here decides whether to trust a file.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from qwen_vae_accel.backends.base import Job
from qwen_vae_accel.backends.tensorrt.logs import collector_paused, make_logger, make_recorder
from qwen_vae_accel.errors import EngineError
from qwen_vae_accel.plan import EngineKey
from qwen_vae_accel.sizes import Profile, Size, profile_name

logger = logging.getLogger(__name__)

_DTYPES = {"FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16}


class TensorRTError(EngineError):
    """TensorRT refused something; the text says what, and TensorRT's own reasons."""


@dataclass(frozen=True, slots=True)
class Port:
    """The input or the output of an engine.

    Attributes:
        name: of the tensor.
        dtype: that its memory holds.
        shape: as the engine declares it, -1 for what a profile decides.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def frames(self) -> bool:
        """Whether it is 5-D, ``[B, C, 1, H, W]``, as engines made from the video VAE are."""
        return len(self.shape) == 5


@dataclass(frozen=True, slots=True)
class Range:
    """One optimization profile: batch sizes and image sides (height, width) in the network's own pixels."""

    batch: tuple[int, int]
    minimum: tuple[int, int]
    optimum: tuple[int, int]
    maximum: tuple[int, int]

    def __str__(self) -> str:
        low, best, high = (f"{h}x{w}" for h, w in (self.minimum, self.optimum, self.maximum))
        return low if low == high else f"{low}..{best}..{high}"


@dataclass(frozen=True, slots=True)
class TensorRTEngine:
    """An engine in device memory, and what it says of itself. TensorRT's objects keep those that they came from alive.

    Attributes:
        trt: TensorRT's bindings.
        handle: the ``ICudaEngine``.
        recorder: collects TensorRT's errors, see :func:`.logs.make_recorder`.
        input: its one input.
        output: its one output.
        ranges: one per optimization profile; one for a static engine.
        scratch: bytes of device memory that a run needs at most, per profile.
        weights: bytes of weights.
    """

    trt: ModuleType
    handle: Any
    recorder: Any
    input: Port
    output: Port
    ranges: tuple[Range, ...]
    scratch: tuple[int, ...]
    weights: int

    def sizes(self, method: str, scale: int) -> tuple[Profile, ...]:
        """Its profiles in pixels of the image, named like a plan's of the same ranges."""
        factor = 1 if method == "encode" else scale
        profiles: list[Profile] = []
        for r in self.ranges:
            low, best, high = (Size(w * factor, h * factor) for h, w in (r.minimum, r.optimum, r.maximum))
            name = str(best) if low == high else profile_name(best, factor)
            taken = any(name == profile.name for profile in profiles)  # hosts give one name to two sizes
            profiles.append(Profile(str(best) if taken else name, low, best, high))
        return tuple(profiles)

    def differences(self, job: Job) -> list[str]:
        """Why it is not the network of ``job``; sizes aside."""
        outputs = 2 * job.topology.z_dim if job.method == "encode" else job.topology.image_channels
        found = []
        for what, port, channels in (("input", self.input, job.in_channels), ("output", self.output, outputs)):
            if len(port.shape) not in (4, 5):
                found.append(f"{what} {port.name!r} has shape {list(port.shape)}, expected [B, C, H, W] or [B, C, 1, H, W]")
            elif port.shape[1] not in (channels, -1):
                found.append(f"{what} {port.name!r} has {port.shape[1]} channels, the VAE's {job.method}r has {channels}")
            elif port.frames and port.shape[2] not in (1, -1):
                found.append(f"{what} {port.name!r} has {port.shape[2]} frames, expected 1")
        return found

    def range_differences(self, job: Job, key: EngineKey) -> list[str]:
        """Why its profiles are not those of ``key``, in their order."""
        wanted = [tuple(map(job.input_hw, (p.minimum, p.optimum, p.maximum))) for p in key.profiles]
        have = [(r.minimum, r.optimum, r.maximum) for r in self.ranges]
        if len(have) != len(wanted):
            return [f"it has {len(have)} optimization profiles, the plan {len(wanted)}"]
        return [
            f"optimization profile {index} is {self.ranges[index]} (height x width of its input), the plan's {name!r} is not"
            for index, (ours, theirs, name) in enumerate(zip(wanted, have, (p.name for p in key.profiles), strict=True))
            if ours != theirs
        ]


@collector_paused()
def deserialize(trt: ModuleType, data: bytes, what: str) -> TensorRTEngine:
    """Bring the engine ``data`` into the memory of the current device. The caller trusts whoever made it.

    Raises:
        TensorRTError: with TensorRT's reasons, if it cannot be used here or is no engine of one input and one output.
    """
    runtime = trt.Runtime(make_logger(trt))
    if runtime is None:
        raise TensorRTError(f"TensorRT {trt.__version__} gives no runtime here: is there an NVIDIA driver?")
    recorder = make_recorder(trt)
    runtime.error_recorder = recorder
    # A version-compatible engine carries the runtime that reads it. Whoever calls this trusts the file's code already.
    runtime.engine_host_code_allowed = True
    handle = runtime.deserialize_cuda_engine(data)
    if handle is None:
        reasons = [*_validity(trt, runtime, data), recorder.take()]
        raise TensorRTError(f"TensorRT {trt.__version__} cannot load {what}: {'; '.join(reasons)}")
    return _read(trt, handle, recorder)


def _validity(trt: ModuleType, runtime: Any, data: bytes) -> list[str]:
    """TensorRT-RTX's diagnosis of a file that it refuses; TensorRT has none."""
    if not hasattr(runtime, "get_engine_validity") or len(data) < runtime.engine_header_size:
        return []
    _, bits = runtime.get_engine_validity(data[: runtime.engine_header_size])
    members = trt.EngineInvalidityDiagnostics.__members__
    return [name.lower().replace("_", " ") for name, member in members.items() if int(member.value) & int(bits)]


def _read(trt: ModuleType, engine: Any, recorder: Any) -> TensorRTEngine:
    """The ``ICudaEngine`` with what it says of itself.

    Raises:
        TensorRTError: if it has not one floating-point input and one such output in device memory.
    """
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
    outputs = [name for name in names if name not in inputs]
    if len(inputs) != 1 or len(outputs) != 1:
        raise TensorRTError(f"the engine has the inputs {inputs} and the outputs {outputs}; expected one of each")
    source, result = _port(trt, engine, inputs[0]), _port(trt, engine, outputs[0])
    profiles = range(engine.num_optimization_profiles)
    ranges = tuple(_range(source, engine.get_tensor_profile_shape(source.name, index)) for index in profiles)
    scratch = tuple(int(engine.get_device_memory_size_for_profile_v2(index)) for index in profiles)
    weights = int(engine.get_engine_stat(trt.EngineStat.TOTAL_WEIGHTS_SIZE)) if hasattr(engine, "get_engine_stat") else 0
    return TensorRTEngine(trt, engine, recorder, source, result, ranges, scratch, max(0, weights))


def _port(trt: ModuleType, engine: Any, name: str) -> Port:
    kind = engine.get_tensor_dtype(name)
    dtype = _DTYPES.get(kind.name)
    if dtype is None:
        raise TensorRTError(f"tensor {name!r} of the engine is {kind.name}; known are {', '.join(_DTYPES)}")
    if engine.get_tensor_location(name) != trt.TensorLocation.DEVICE:
        raise TensorRTError(f"tensor {name!r} of the engine is in host memory")
    shape = tuple(int(side) for side in engine.get_tensor_shape(name))
    if not 4 <= len(shape) <= 5:
        raise TensorRTError(f"tensor {name!r} of the engine has shape {list(shape)}, expected [B, C, H, W] or [B, C, 1, H, W]")
    return Port(name, dtype, shape)


def _range(port: Port, shapes: Sequence[Sequence[int]]) -> Range:
    low, best, high = ([int(side) for side in shape] for shape in shapes)
    if not len(low) == len(best) == len(high) == len(port.shape):
        raise TensorRTError(f"a profile of input {port.name!r} has the shapes {low}, {best}, {high}")
    return Range((low[0], high[0]), (low[-2], low[-1]), (best[-2], best[-1]), (high[-2], high[-1]))

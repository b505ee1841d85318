"""A stand-in for TensorRT's Python API: it records calls, follows the documented semantics, and computes with PyTorch.

It is not TensorRT. It lets the runtime be tested on a machine without a GPU, in every way that TensorRT's documentation
says a call can fail. That TensorRT itself behaves so is tested by ``test_gpu.py``, on a machine that has both.
An "engine" here is JSON: what a real one says of itself, from which the stand-in answers.
"""

from __future__ import annotations

import ctypes
import enum
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

MAGIC = b"standin\n"
# PyTorch's CPU allocator aligns to 64 bytes; TensorRT asks for 256, and PyTorch's GPU allocator gives 512.
ALIGNMENT = 64
DataType = enum.Enum("DataType", "FLOAT HALF BF16 INT8 INT32")
TensorIOMode = enum.Enum("TensorIOMode", "NONE INPUT OUTPUT")
TensorLocation = enum.Enum("TensorLocation", "DEVICE HOST")
EngineStat = enum.Enum("EngineStat", "TOTAL_WEIGHTS_SIZE STRIPPED_WEIGHTS_SIZE")
ExecutionContextAllocationStrategy = enum.Enum("ExecutionContextAllocationStrategy", "STATIC ON_PROFILE_CHANGE USER_MANAGED")
EngineInvalidityDiagnostics = enum.IntFlag("EngineInvalidityDiagnostics", "VERSION_MISMATCH UNSUPPORTED_CC OLD_CUDA_DRIVER")
_DTYPES = {"FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16}

Shape = Sequence[int]


def engine_file(
    method: str,
    profiles: Sequence[tuple[Shape, Shape, Shape]],
    channels: tuple[int, int] = (4, 3),
    dtype: str = "FLOAT",
    frames: bool = False,
    scratch: Sequence[int] = (),
    **changes: Any,
) -> bytes:
    """The bytes of an engine for ``profiles`` (min, opt, max of ``[H, W]`` or ``[B, H, W]``); ``changes`` replace its facts."""

    def full(shape: Shape) -> list[int]:
        batch, height, width = (1, *shape) if len(shape) == 2 else shape
        return [batch, channels[0], *([1] if frames else []), height, width]

    ranges = [[full(shape) for shape in profile] for profile in profiles]
    sides = [{shape[axis] for profile in ranges for shape in profile} for axis in range(len(ranges[0][0]))]
    shape = [side.pop() if len(side) == 1 else -1 for side in sides]
    facts = {
        "method": method,
        "tensors": [
            {"name": "x", "mode": "INPUT", "dtype": dtype, "shape": shape, "location": "DEVICE"},
            {"name": "y", "mode": "OUTPUT", "dtype": dtype, "shape": [shape[0], channels[1], *shape[2:-2], -1, -1],
             "location": "DEVICE"},
        ],
        "profiles": ranges,
        "scratch": list(scratch) or [1024] * len(ranges),
        "weights": 4096,
        **changes,
    }  # fmt: skip
    return MAGIC + json.dumps(facts).encode()


class ILogger:
    """As TensorRT's: an application derives from it."""

    def log(self, severity: Any, message: str) -> None: ...


class IErrorRecorder:
    """As TensorRT's: an application derives from it."""


class StandIn:
    """What ``import tensorrt`` would give.

    Attributes:
        networks: what an engine of a method computes, ``[B, C, H, W]`` -> ``[B, C', H', W']`` in float32.
        fail: names of calls that fail as documented, when they are made next and ever after.
        calls: every call, in order: its name and arguments.
        alive: TensorRT objects that exist now, by kind.
        violations: what an application must not do, and did.
    """

    __version__ = "10.99"
    ILogger, IErrorRecorder = ILogger, IErrorRecorder
    DataType, TensorIOMode, TensorLocation, EngineStat = DataType, TensorIOMode, TensorLocation, EngineStat
    ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy
    EngineInvalidityDiagnostics = EngineInvalidityDiagnostics

    def __init__(self, networks: dict[str, Callable[[Tensor], Tensor]]) -> None:
        self.networks = networks
        self.fail: set[str] = set()
        self.calls: list[tuple[Any, ...]] = []
        self.alive: list[str] = []
        self.violations: list[str] = []
        self.streams = StandInStreams()
        self.streams.of = self

    def record(self, *call: Any) -> bool:
        """Note a call; False if it is to fail."""
        self.calls.append(call)
        return call[0] not in self.fail

    def named(self, name: str) -> list[tuple[Any, ...]]:
        """Arguments of all calls of ``name``."""
        return [call[1:] for call in self.calls if call[0] == name]

    def Runtime(self, logger: ILogger) -> Any:
        return Runtime(self) if self.record("Runtime") else None


class _Object:
    """Something of TensorRT's; it must not outlive what it came from."""

    def __init__(self, trt: StandIn, kind: str, recorder: Any = None) -> None:
        self.trt, self.kind, self.error_recorder = trt, kind, recorder
        trt.alive.append(kind)

    def __del__(self) -> None:
        self.trt.alive.remove(self.kind)
        self.trt.calls.append(("free", self.kind))

    def refuse(self, text: str) -> bool:
        if self.error_recorder is not None:
            self.error_recorder.report_error(3, text)
        return False


class Runtime(_Object):
    def __init__(self, trt: StandIn) -> None:
        super().__init__(trt, "runtime")
        self.engine_host_code_allowed = False
        self.engine_header_size = 64

    def get_engine_validity(self, header: bytes) -> tuple[int, int]:
        return (2, 2) if "deserialize_cuda_engine" in self.trt.fail else (0, 0)

    def deserialize_cuda_engine(self, data: bytes) -> Any:
        if not self.trt.record("deserialize_cuda_engine", len(data)):
            self.refuse("the engine plan file is not compatible with this version of TensorRT")
            return None
        if not data.startswith(MAGIC):
            self.refuse("Serialization assertion magicTag failed")
            return None
        return ICudaEngine(self, json.loads(data[len(MAGIC) :]))


class ICudaEngine(_Object):
    def __init__(self, runtime: Runtime, facts: dict[str, Any]) -> None:
        super().__init__(runtime.trt, "engine", runtime.error_recorder)
        self.runtime, self.facts = runtime, facts  # TensorRT's bindings keep the parent alive too
        self.tensors = {tensor["name"]: tensor for tensor in facts["tensors"]}
        self.num_io_tensors = len(self.tensors)
        self.num_optimization_profiles = len(facts["profiles"])

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> Any:
        return TensorIOMode[self.tensors[name]["mode"]]

    def get_tensor_dtype(self, name: str) -> Any:
        return DataType[self.tensors[name]["dtype"]]

    def get_tensor_location(self, name: str) -> Any:
        return TensorLocation[self.tensors[name]["location"]]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name]["shape"])

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        return [tuple(shape) for shape in self.facts["profiles"][profile]]

    def get_device_memory_size_for_profile_v2(self, profile: int) -> int:
        return int(self.facts["scratch"][profile])

    def get_engine_stat(self, stat: Any) -> int:
        return int(self.facts["weights"])

    def create_execution_context(self, strategy: Any) -> Any:
        if not self.trt.record("create_execution_context", strategy):
            self.refuse("out of memory")
            return None
        return IExecutionContext(self)


class IExecutionContext(_Object):
    def __init__(self, engine: ICudaEngine) -> None:
        super().__init__(engine.trt, "context", engine.error_recorder)
        self.engine = engine
        self.profile = 0
        self.shape: tuple[int, ...] | None = None
        self.addresses: dict[str, int] = {}
        self.memory = (0, 0)
        self.on_stream: int | None = None
        self.entered = threading.Lock()
        static = -1 not in engine.tensors["x"]["shape"] if "x" in engine.tensors else False
        if static:
            self.shape = tuple(engine.tensors["x"]["shape"])

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        if not self.trt.record("set_optimization_profile_async", profile, stream):
            return self.refuse("profile is in use")
        if not 0 <= profile < self.engine.num_optimization_profiles:
            return self.refuse(f"profile {profile} does not exist")
        self.profile, self.shape = profile, None  # "will invalidate all dynamic bindings"
        return True

    def set_input_shape(self, name: str, shape: Shape) -> bool:
        if not self.trt.record("set_input_shape", name, tuple(shape)):
            return self.refuse("setInputShape failed")
        low, _, high = self.engine.facts["profiles"][self.profile]
        inside = len(low) == len(shape) and all(a <= s <= b for a, s, b in zip(low, shape, high, strict=True))
        if name not in self.engine.tensors or not inside:
            return self.refuse(f"static dimension mismatch, or {list(shape)} outside of [{low}, {high}]")
        self.shape = tuple(shape)
        return True

    def infer_shapes(self) -> list[str]:
        if not self.trt.record("infer_shapes"):
            raise RuntimeError("shape inference failed")
        return [] if self.shape is not None and "insufficient" not in self.trt.fail else ["x"]

    def _output_shape(self) -> tuple[int, ...]:
        assert self.shape is not None
        source = torch.empty(self.shape[0], self.shape[1], *self.shape[-2:], device="meta")
        height, width = self.trt.networks[self.engine.facts["method"]](source).shape[-2:]
        declared = self.engine.tensors["y"]["shape"]
        return (self.shape[0], declared[1], *declared[2:-2], height, width)

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if not self.trt.record("get_tensor_shape", name) or self.shape is None:
            return tuple(self.engine.tensors[name]["shape"])  # -1 where it is not known
        return self._output_shape() if name == "y" else self.shape

    def update_device_memory_size_for_shapes(self) -> int:
        if not self.trt.record("update_device_memory_size_for_shapes") or self.shape is None:
            return 0
        return min(int(self.engine.facts["scratch"][self.profile]), self.shape[-1] * self.shape[-2])

    def set_device_memory(self, memory: int, size: int) -> None:
        self.trt.record("set_device_memory", memory, size)
        self.memory = (memory, size)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if not self.trt.record("set_tensor_address", name, memory):
            return self.refuse("setTensorAddress failed")
        if name not in self.engine.tensors or memory == 0:
            return self.refuse(f"no such tensor, or null: {name}")
        if memory % ALIGNMENT:
            self.trt.violations.append(f"{name} is at {memory}, which is not aligned")
        self.addresses[name] = memory
        return True

    def execute_async_v3(self, stream: int) -> bool:
        if not self.trt.record("execute_async_v3", stream):
            return self.refuse("enqueueV3 failed")
        if self.shape is None or set(self.addresses) != set(self.engine.tensors):
            return self.refuse("not all shapes and addresses are set")
        if not self.entered.acquire(blocking=False) or self.on_stream not in (None, stream):
            self.trt.violations.append("two runs of one context at once")
            return False
        needed = min(int(self.engine.facts["scratch"][self.profile]), self.shape[-1] * self.shape[-2])
        if self.memory[1] < needed or self.memory[0] % ALIGNMENT:
            self.trt.violations.append(f"scratch memory {self.memory} for a need of {needed}")
        self.on_stream = stream
        self.trt.streams.queue(stream, self._compute, [*self.addresses.values(), self.memory[0]])
        self.entered.release()
        return True

    def _compute(self) -> None:
        assert self.shape is not None
        x = self._at("x", self.shape).float()
        y = self._at("y", self._output_shape())
        batch, channels, *_, height, width = self.shape
        result = self.trt.networks[self.engine.facts["method"]](x.view(batch, channels, height, width))
        y.copy_(result.view(y.shape))
        self.on_stream = None

    def _at(self, name: str, shape: Shape) -> Tensor:
        dtype = _DTYPES[self.engine.tensors[name]["dtype"]]
        count = torch.Size(shape).numel()
        buffer = (ctypes.c_char * (count * dtype.itemsize)).from_address(self.addresses[name])
        return torch.frombuffer(buffer, dtype=dtype).view(*shape)


class StandInStreams:
    """Streams of a machine that has none: what is queued runs when the caller's stream is tied to it again.

    Attributes:
        current: the caller's stream; a thread may set its own.
        live: asked whether an address still belongs to a tensor, when the work is run; None: not asked.
    """

    def __init__(self) -> None:
        self.of: StandIn | None = None
        self.local = threading.local()
        self.live: Callable[[int], bool] | None = None
        self._pending: dict[int, list[tuple[Callable[[], None], list[int]]]] = {}
        self._locks: dict[int, threading.RLock] = {}

    @contextmanager
    def ordered(self, device: torch.device) -> Iterator[int]:
        stream = getattr(self.local, "stream", 7)
        with self._locks.setdefault(stream, threading.RLock()):
            yield stream
            for work, addresses in self._pending.pop(stream, []):
                if self.live is not None and self.of is not None:
                    dead = [a for a in addresses if a and not self.live(a)]
                    self.of.violations += [f"memory at {a} was given back before the run" for a in dead]
                work()

    def queue(self, stream: int, work: Callable[[], None], addresses: list[int]) -> None:
        """Have ``work`` done on ``stream``."""
        self._pending.setdefault(stream, []).append((work, addresses))

"""The few calls of the CUDA driver that launching a cubin takes, through ctypes: no package beyond torch is needed."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_TYPES = {torch.float8_e4m3fn: 0, torch.float16: 6, torch.bfloat16: 9}  # bytes stand for float8; CU_TENSOR_MAP_DATA_TYPE_*
_SWIZZLES = {64: 2, 128: 3}  # CU_TENSOR_MAP_SWIZZLE_*
_L2_PROMOTION_256 = 3
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
_CLUSTER_DIMENSION = 4  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
_PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_INVALID_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT


class DriverError(RuntimeError):
    """A CUDA driver call failed."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """Load the CUDA driver; None where there is none."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def _cuda() -> ctypes.CDLL:
    cuda = library()
    if cuda is None:
        raise DriverError("the CUDA driver (libcuda.so.1) is not installed")
    return cuda


def _check(status: int, what: str) -> None:
    if status:
        name = ctypes.c_char_p()
        _cuda().cuGetErrorName(status, ctypes.byref(name))
        raise DriverError(f"{what}: {(name.value or b'unknown error').decode()} ({status})")


class TensorMap(ctypes.Structure):
    """CUtensorMap: how the copy engine reads tiles of one tensor."""

    _fields_ = [("opaque", ctypes.c_uint64 * 16)]


def encode_tensor_map(
    address: int,
    dtype: torch.dtype,
    shape: Sequence[int],
    strides: Sequence[int],
    box: Sequence[int],
    steps: Sequence[int],
    swizzle: int,
) -> ctypes.Array:
    """Tensor map of a tensor with contiguous innermost dimension; outside it, tiles read as zero.

    Args:
        shape, box: elements, innermost dimension first.
        strides: bytes of every dimension but the innermost, multiples of 16.
        steps: of every ``steps[i]`` elements of the box in dimension i, one is loaded.
        swizzle: width in bytes, 64 or 128.

    Returns:
        Storage of the map, 64-byte aligned as the driver demands; pass ``ctypes.addressof`` of it as an argument.
    """
    rank = len(shape)
    storage = aligned_storage(ctypes.sizeof(TensorMap), 64)
    status = _cuda().cuTensorMapEncodeTiled(
        ctypes.c_void_p(ctypes.addressof(storage)),
        _TYPES[dtype],
        ctypes.c_uint32(rank),
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * rank)(*shape),
        (ctypes.c_uint64 * (rank - 1))(*strides),
        (ctypes.c_uint32 * rank)(*box),
        (ctypes.c_uint32 * rank)(*steps),
        0,  # not interleaved
        _SWIZZLES[swizzle],
        _L2_PROMOTION_256,
        0,  # outside the tensor: zeros
    )
    _check(status, f"cannot describe a tensor of {list(shape)}, strides {list(strides)}")
    return storage


def aligned_storage(size: int, alignment: int) -> ctypes.Array:
    """Zeroed bytes whose address is a multiple of ``alignment``."""
    raw = ctypes.create_string_buffer(size + alignment)
    return (ctypes.c_char * size).from_buffer(raw, -ctypes.addressof(raw) % alignment)


@contextmanager
def own_stream(device: torch.device) -> Iterator[torch.cuda.Stream]:
    """A stream for use inside the context. The first one of torch's own makes a pool of them all: 70 MiB of GPU memory."""
    stream = ctypes.c_void_p()
    with torch.cuda.device(device):
        bind_context(torch.cuda.current_device())
        _check(_cuda().cuStreamCreate(ctypes.byref(stream), _NON_BLOCKING), "creating a stream")
    try:
        yield torch.cuda.ExternalStream(stream.value, device)
    finally:
        _check(_cuda().cuStreamDestroy_v2(stream), "destroying a stream")


def bind_context(device: int) -> None:
    """Make the device's primary context (torch's) current in this thread, if no context is."""
    cuda, context = _cuda(), ctypes.c_void_p()
    _check(cuda.cuInit(0), "initializing the driver")
    _check(cuda.cuCtxGetCurrent(ctypes.byref(context)), "reading the context")
    if not context.value:
        _check(cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device), "retaining the context")
        _check(cuda.cuCtxSetCurrent(context), "setting the context")


class _LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute; its value is a union of 64 bytes."""

    _fields_ = [("id", ctypes.c_int), ("_pad", ctypes.c_char * 4), ("value", ctypes.c_int * 16)]


class _LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(_LaunchAttribute)), ("attribute_count", ctypes.c_uint),
    ]  # fmt: skip


# The kernel may start before the one in front of it ends, and waits for it by itself where it has to.
_OVERLAPPED = ctypes.pointer(_LaunchAttribute(_PROGRAMMATIC_STREAM_SERIALIZATION, value=(ctypes.c_int * 16)(1)))


@functools.cache
def _overlaps() -> bool:
    """Whether such launches can be captured into graphs: since CUDA 12.3."""
    version = ctypes.c_int()
    _check(_cuda().cuDriverGetVersion(ctypes.byref(version)), "reading the driver's version")
    return version.value >= 12030


def clusters_at_once(cubin: bytes, name: str, size: int, threads: int, shared_bytes: int, device: int) -> int:
    """How many clusters of ``size`` blocks of a kernel run at once on ``device``, which must be the current one."""
    kernel = LoadedKernel(cubin, name, shared_bytes, device)
    cluster = _LaunchAttribute(_CLUSTER_DIMENSION, value=(ctypes.c_int * 16)(size, 1, 1))
    config = _LaunchConfig((size, 1, 1), (threads, 1, 1), shared_bytes, None, ctypes.pointer(cluster), 1)
    count = ctypes.c_int()
    status = _cuda().cuOccupancyMaxActiveClusters(ctypes.byref(count), kernel.function, ctypes.byref(config))
    _check(status, f"counting clusters of {size}")
    return count.value


class LoadedKernel:
    """One function of a cubin, loaded on ``device``, which must be the current one.

    A thread of every block must execute ``griddepcontrol.wait`` before it lets the next kernel start and before the block ends;
    and whoever touches what the kernel before touches must wait in the same way, or for what kernels/overlap.py says. What is
    read before that (weights and other parameters) must be complete when the launch is made.
    """

    def __init__(self, cubin: bytes, name: str, shared_bytes: int, device: int) -> None:
        self.shared_bytes, self.device = shared_bytes, device
        self._module, self.function = ctypes.c_void_p(), ctypes.c_void_p()
        bind_context(device)
        cuda = _cuda()
        _check(cuda.cuModuleLoadData(ctypes.byref(self._module), cubin), f"loading {name}")
        _check(cuda.cuModuleGetFunction(ctypes.byref(self.function), self._module, name.encode()), f"finding {name}")
        status = cuda.cuFuncSetAttribute(self.function, _MAX_DYNAMIC_SHARED, shared_bytes)
        _check(status, f"{name}: {shared_bytes} bytes of shared memory")

    def launch(self, grid: tuple[int, int, int], threads: int, arguments: ctypes.Array, stream: int) -> None:
        """``arguments``: array of pointers to the kernel's parameters. The kernel's device must be the current one."""
        config = _LaunchConfig(grid, (threads, 1, 1), self.shared_bytes, stream, _OVERLAPPED, int(_overlaps()))
        launch = functools.partial(_cuda().cuLaunchKernelEx, ctypes.byref(config), self.function, arguments, None)
        status = launch()
        if status == _INVALID_CONTEXT:  # a thread that has not used CUDA yet
            bind_context(self.device)
            status = launch()
        _check(status, "kernel launch")


class PreparedLaunch:
    """A launch prepared once and made by calling it, on the current stream of the kernel's device.

    Args:
        parameters: the kernel's, as it takes them by value.
        keep: tensors that they point into and nobody else holds.
    """

    def __init__(
        self, kernel: LoadedKernel, grid: tuple[int, int, int], threads: int, parameters: Sequence[Any], keep: tuple = ()
    ) -> None:
        self._kernel, self._grid, self._threads, self._keep = kernel, grid, threads, (*parameters, *keep)
        self._arguments = (ctypes.c_void_p * len(parameters))(*map(ctypes.addressof, parameters))

    def __call__(self) -> None:
        device = self._kernel.device
        stream = torch._C._cuda_getCurrentRawStream(device)  # what current_stream() wraps at ten times the cost
        if torch.cuda.current_device() == device:
            self._kernel.launch(self._grid, self._threads, self._arguments, stream)
        else:
            with torch.cuda.device(device):
                self._kernel.launch(self._grid, self._threads, self._arguments, stream)

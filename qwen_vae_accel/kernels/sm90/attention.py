"""Attention over all pixels of an image (attention.cu), with the arguments of ``kernels.triton.attention.attention``."""

from __future__ import annotations

import ctypes
import functools
import math

import torch
from torch import Tensor

from qwen_vae_accel.kernels.compiling import listed
from qwen_vae_accel.kernels.layout import Grid
from qwen_vae_accel.kernels.sm90 import driver, nvrtc
from qwen_vae_accel.kernels.sm90.schedules import SHARED_LIMIT
from qwen_vae_accel.kernels.sm90.source import headers, kernel_source

CHANNELS = 384  # of queries, keys and values
KEYS = 32  # at a time
_CLUSTER = 2  # blocks that share the loads of keys
_ROWS = 64  # queries of a computing warpgroup, of which a block has two
_THREADS = 384


def _defines(split: bool, dtype: torch.dtype) -> dict[str, int]:
    queries, slot, barrier = 2 * _ROWS * 2 * CHANNELS, KEYS * 2 * CHANNELS, 8  # bytes
    slots = (SHARED_LIMIT - queries - barrier) // (slot + 2 * barrier)
    return {
        "KEYS": KEYS, "CLUSTER": _CLUSTER, "SLOTS": slots, "SPLIT": int(split), "BF16": int(dtype == torch.bfloat16),
        "SHARED_BYTES": queries + slots * slot + (1 + 2 * slots) * barrier,
    }  # fmt: skip


def compile_attention(split: bool, dtype: torch.dtype) -> bytes:
    """Compile the kernel to machine code; this needs NVRTC but no GPU.

    Args:
        split: whether it writes partial results, to be merged.
        dtype: bfloat16 or float16.

    Raises:
        CompileError: NVRTC is missing or rejects the source.
    """
    defines = _defines(split, dtype) | {"ARGS_BYTES": ctypes.sizeof(_Args)}
    return nvrtc.compile_cubin(kernel_source("attention"), defines, headers=headers())


@functools.cache
def _kernel(split: bool, dtype: torch.dtype, device: int) -> driver.LoadedKernel:
    shared = _defines(split, dtype)["SHARED_BYTES"]
    return driver.LoadedKernel(compile_attention(split, dtype), "attention", shared, device)


def _load(split: bool, dtype: torch.dtype) -> driver.LoadedKernel:
    """On the current device."""
    return _kernel(split, dtype, torch.cuda.current_device())


class _Args(ctypes.Structure):
    """``Args`` of attention.cu, which checks its size."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("out", "partial", "tops")),
        *((name, ctypes.c_int) for name in ("count", "width", "all_tokens", "splits", "first")),
        ("scale", ctypes.c_float),
    ]


@functools.lru_cache(maxsize=256)
def _prepare(
    device: int, dtype: torch.dtype, grid: Grid, splits: int, queries: range, tokens: int, out: int, partial: int, tops: int
) -> driver.PreparedLaunch:
    driver.bind_context(device)  # describing tensors needs one, and this thread may be new to CUDA
    width, count = 3 * CHANNELS, grid.height * grid.width
    shape, strides = (width, count, grid.batch), (2 * width, 2 * width * count)

    def boxes(rows: int) -> ctypes.Array:
        return driver.encode_tensor_map(tokens, dtype, shape, strides, (64, rows, 1), (1, 1, 1), 128)

    scale = CHANNELS**-0.5 * math.log2(math.e)
    args = _Args(out, partial, tops, count, grid.width, grid.pixels, splits, queries.start, scale)
    with torch.cuda.device(device):
        kernel = _load(splits > 1, dtype)
    tiles = -(-len(queries) // (2 * _ROWS * _CLUSTER)) * _CLUSTER
    return driver.PreparedLaunch(kernel, (tiles, splits, grid.batch), _THREADS, (boxes(_ROWS), boxes(KEYS // _CLUSTER), args))


def attention_sm90(
    tokens: Tensor, grid: Grid, out: Tensor, partial: Tensor | None, tops: Tensor | None, splits: int, queries: range
) -> None:
    """Launch the kernel on the current stream; ``kernels.triton.attention.attention`` checks the arguments and merges."""
    tasks = listed()
    if tasks is not None:
        kernel = (splits > 1, tokens.dtype)
        tasks.setdefault(("attention", *kernel), functools.partial(_load, *kernel))
        return
    addresses = (0 if t is None else t.data_ptr() for t in (tokens, out, partial, tops))
    _prepare(tokens.get_device(), tokens.dtype, grid, splits, queries, *addresses)()

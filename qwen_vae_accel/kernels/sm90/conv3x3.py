"""The VAE's 3x3 convolutions with their whole epilogue in one kernel (conv.cu).

    value  = conv(a) [+ 1x1 shortcut of a second input] + bias [+ residual]
    x      = value                                    if asked for
    normed = value / rms * gamma, then SiLU           if asked for, rms over the channels of a pixel, in fp32

``conv`` is the plain convolution, the one after nearest 2x upsampling (folded) or the stride-2 one. The matrices are
those of the Triton kernels, in the flat haloed layout (layout.py). The kernel reads pixels outside the image as zeros by
itself, and zeroes the halo of what it writes. Reference: kernels/triton/conv3x3.py.

The input (with its weights), ``x`` and ``normed`` may each be float8 (kernels/float8.py), the residual stays in 16 bits.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from qwen_vae_accel.kernels.compiling import listed
from qwen_vae_accel.kernels.float8 import FLOAT8
from qwen_vae_accel.kernels.layout import Grid
from qwen_vae_accel.kernels.sm90 import driver, nvrtc
from qwen_vae_accel.kernels.sm90.packing import pack
from qwen_vae_accel.kernels.sm90.room import room_of
from qwen_vae_accel.kernels.sm90.schedules import (
    FLOAT8_SCHEDULES,
    SCHEDULES,
    Lines,
    Mode,
    Schedule,
    Variant,
    choose_schedule,
    ends_early,
    grid_blocks,
    lines_of,
    tile_count,
)
from qwen_vae_accel.kernels.sm90.source import headers, kernel_source
from qwen_vae_accel.kernels.weights import ConvWeights

_PREPARED = 512  # launches a layer remembers, each by its addresses and grid


def unsupported(capability: tuple[int, int] | None, mode: Mode, channels: int, out: int, dtype: torch.dtype) -> list[str]:
    """Say why the kernel cannot be used for a layer; the list is empty if it can.

    Args:
        capability: compute capability of the GPU, None without one.
        mode, channels, out: the convolution, its input and output channels.
        dtype: of its weights: bfloat16, float16 or float8 (e4m3).
    """
    reasons = []
    if capability is None:
        reasons.append("no CUDA device")
    elif capability != (9, 0):
        reasons.append(f"needs compute capability 9.0 (Hopper), this GPU has {capability[0]}.{capability[1]}")
    known = FLOAT8_SCHEDULES if dtype == FLOAT8 else SCHEDULES
    if (mode, channels, out) not in known:
        widths = ", ".join(f"{m.name.lower()} {c} -> {n}" for m, c, n in known)
        reasons.append(f"no kernel for {mode.name.lower()} {channels} -> {out} channels; have {widths}")
    if dtype not in (torch.bfloat16, torch.float16, FLOAT8):
        reasons.append(f"needs bfloat16, float16 or float8 (e4m3), not {dtype}")
    if nvrtc.library() is None:
        reasons.append("NVRTC (libnvrtc.so, part of torch's CUDA wheels) not found")
    if driver.library() is None:
        reasons.append("CUDA driver (libcuda.so.1) not found")
    return reasons


def compile_variant(variant: Variant, dtype: torch.dtype, cache: Path | None = None) -> bytes:
    """Compile one kernel to machine code; this needs NVRTC but no GPU, and may run in several threads at once.

    Args:
        variant: which kernel.
        dtype: bfloat16 or float16, of what is not float8.
        cache: directory of compiled kernels; default: ``nvrtc.default_cache()``.

    Raises:
        CompileError: NVRTC is missing or rejects the source.
    """
    defines = variant.defines() | {"BF16": int(dtype == torch.bfloat16), "ARGS_BYTES": ctypes.sizeof(_Args)}
    return nvrtc.compile_cubin(kernel_source("conv"), defines, cache, headers=headers())


@functools.cache
def _kernel(variant: Variant, dtype: torch.dtype, device: int, cache: Path | None) -> driver.LoadedKernel:
    return driver.LoadedKernel(compile_variant(variant, dtype, cache), "conv", variant.shared_bytes(), device)


class _Args(ctypes.Structure):
    """``Args`` of conv_tile.cuh, which checks its size."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weights", "bias", "gamma", "rescale", "residual", "x", "n")),
        *((f"{name}_{what}", ctypes.c_int64) for name in ("residual", "x", "n") for what in ("row", "image")),
        *((name, ctypes.c_int) for name in ("height", "width", "tiles_x", "tiles_y", "tiles")),
        *((name, ctypes.c_int) for name in ("halo_lines", "halo_pitch", "halo_period")),
        *((name, ctypes.c_float) for name in ("x_scale", "n_scale")),
        *((name, ctypes.c_void_p) for name in ("ready", "done")),
        *((name, ctypes.c_int) for name in ("ready_lines", "ready_rows")),
        ("ready_count", ctypes.c_uint32),
    ]


class _Call(NamedTuple):
    """Arguments of one call of a layer."""

    a: Tensor
    x: Tensor | None
    normed: Tensor | None
    gamma: Tensor | None
    residual: Tensor | None
    shortcut: Tensor | None
    done: Tensor | None
    ready: tuple[Tensor, Lines] | None
    lower: int
    grid: Grid
    silu: bool
    x_scale: float | None
    n_scale: float | None


def _strides(grid: Grid, channels: int) -> tuple[int, int, int]:
    """Elements before pixel (0, 0, 0), from row to row, from image to image."""
    return (grid.pitch + 1) * channels, grid.pitch * channels, (grid.height + 1) * grid.pitch * channels


class Conv3x3:
    """One convolution layer with its weights packed for the GPU they are on.

    Args:
        weights: a 3x3 convolution of ``kernels.weights``, with or without a shortcut; for UPSAMPLE the folded one.
        mode: which convolution.
        schedules: compile-time choices, the best one for an image size is taken; default: those of the table.
        cache: directory of compiled kernels; default: ``caches.cubin_folder()``.
        device: where to run, if the matrix of ``weights`` is in CPU memory; its other tensors are on the GPU.
        keep: given packed weights, returns them in memory that may stay occupied for long.

    Raises:
        ValueError: the layer cannot run here (``unsupported`` lists why).
    """

    def __init__(
        self,
        weights: ConvWeights,
        mode: Mode = Mode.CONV,
        *,
        schedules: tuple[Schedule, ...] = (),
        cache: Path | None = None,
        device: torch.device | None = None,
        keep: Callable[[Tensor], Tensor] = lambda packed: packed,
    ) -> None:
        matrix = weights.weight
        self.device = matrix.device if device is None else device
        capability = torch.cuda.get_device_capability(self.device) if self.device.type == "cuda" else None
        if reasons := unsupported(capability, mode, weights.in_channels, weights.out_channels, matrix.dtype):
            raise ValueError("conv3x3: " + "; ".join(reasons))
        if weights.shortcut and matrix.dtype == FLOAT8:
            raise ValueError("conv3x3: no float8 kernel with a shortcut")
        self.mode, self.channels, self.out, self.shortcut = (
            mode, weights.in_channels, weights.out_channels, weights.shortcut,
        )  # fmt: skip
        self.dtype = matrix.dtype
        self._index = torch.cuda.current_device() if self.device.index is None else self.device.index
        self._matrix, self._bias, self._rescale = matrix, weights.bias, weights.rescale
        self._schedules, self._cache, self._keep = schedules, cache, keep
        self._packed: dict[int, Tensor] = {}  # by channels of a chunk
        self._prepared: dict[tuple, driver.PreparedLaunch] = {}
        self._lock = threading.Lock()
        self._room = room_of(self._index)

    @property
    def nbytes(self) -> int:
        """Bytes of GPU memory of the packed weights."""
        return sum(packed.nbytes for packed in self._packed.values())

    def lines(self, grid: Grid) -> Lines:
        """What a call on ``grid`` (of the input) counts in ``done``, for each image."""
        tiled = self._tiled(grid)
        return lines_of(self._schedule(grid), self.mode, tiled.height, tiled.width)

    def ends_early(self, grid: Grid) -> bool:
        """Whether blocks of such a call end long enough before others for the next kernel to use that."""
        tiled = self._tiled(grid)
        place = tiled.batch, tiled.height, tiled.width, self._room
        return ends_early(self._schedule(grid), self.mode, *place)

    def _tiled(self, grid: Grid) -> Grid:
        return grid.halved() if self.mode == Mode.DOWNSAMPLE else grid

    def _schedule(self, grid: Grid) -> Schedule:
        tiled = self._tiled(grid)
        return choose_schedule(
            self.mode, self.channels, self.out, grid.batch, tiled.height, tiled.width, self._room,
            self.dtype == FLOAT8, self._schedules,
        )  # fmt: skip

    def __call__(
        self,
        a: Tensor,
        grid: Grid,
        *,
        x: Tensor | None = None,
        normed: Tensor | None = None,
        gamma: Tensor | None = None,
        silu: bool = True,
        residual: Tensor | None = None,
        shortcut: Tensor | None = None,
        x_scale: float | None = None,
        n_scale: float | None = None,
        lower: int = 0,
        done: Tensor | None = None,
        ready: tuple[Tensor, Lines] | None = None,
    ) -> None:
        """Launch on the current stream of the layer's device; into a CUDA graph only what was launched before.

        Args:
            a: input ``[rows, C]`` on ``grid``.
            x, normed: outputs ``[rows, N]`` on the output's grid; at least one. Neither may overlap ``a``.
            gamma: fp32 ``[N]``, sqrt(N) included; with ``normed``.
            residual: ``[rows, N]``; may be ``x``. UPSAMPLE: ``[rows, R]`` on ``grid``, each row added to four pixels.
                DOWNSAMPLE: ``[rows, R]`` on the output's grid, added to the first R channels.
            shortcut: ``[rows, S]``, if the weights have a shortcut.
            x_scale, n_scale: ``x``, ``normed`` are float8, times this and clamped.
            lower: UPSAMPLE: odd rows of the output take the residual's channels from this one on, even ones the first.
            done: int32 ``[1, batch * lines]``; counts the finished tiles of every line (:meth:`lines`) from what it holds.
            ready: ``done`` and the lines of the launch before this one on the stream, for whose tiles this one's wait instead
                of for all of it. The caller has made sure that they may overlap (overlap.py).

        Raises:
            ValueError: a tensor of the wrong shape, dtype or device, or a combination that has no meaning.
        """
        call = _Call(a, x, normed, gamma, residual, shortcut, done, ready, lower, grid, silu, x_scale, n_scale)
        tasks = listed()
        if tasks is not None:
            kernel = self._wanted(call)
            tasks.setdefault(kernel, functools.partial(_kernel, *kernel))
            return
        counters, lines = ready or (None, None)
        tensors = (a, x, normed, gamma, residual, shortcut, done, counters)
        where = (grid.batch, grid.height, grid.width, silu, x_scale, n_scale, lower, lines)
        key = (where, *(None if t is None else t.data_ptr() for t in tensors))
        launch = self._prepared.get(key)
        if launch is None:
            launch = self._prepare(call)
            with self._lock:
                if len(self._prepared) >= _PREPARED:
                    self._prepared.clear()
                self._prepared[key] = launch
        launch()

    def _wanted(self, call: _Call) -> tuple[Variant, torch.dtype, int, Path | None]:
        """The kernel that the call needs: arguments of :func:`_kernel`."""
        norm = 0 if call.normed is None else 2 if call.silu else 1
        variant = Variant(
            self.mode, self.channels, self.out, self.shortcut, call.residual is not None, call.x is not None, norm,
            self._schedule(call.grid), self.dtype == FLOAT8, call.x_scale is not None, call.n_scale is not None, call.lower,
        ).fitted()  # fmt: skip
        return variant, self._plain(call), self._index, self._cache

    def _prepare(self, call: _Call) -> driver.PreparedLaunch:
        grid, x, normed, gamma = call.grid, call.x, call.normed, call.gamma
        tiled = self._tiled(grid)
        after = grid.doubled() if self.mode == Mode.UPSAMPLE else tiled
        self._check(call, after)
        wanted = self._wanted(call)
        variant = wanted[0]
        schedule = variant.schedule
        tiles_x, tiles_y, tiles = tile_count(schedule, self.mode, grid.batch, tiled.height, tiled.width)
        packed = self._weights(schedule)
        args = _Args(
            weights=packed.data_ptr(), bias=self._bias.data_ptr(), gamma=None if gamma is None else gamma.data_ptr(),
            rescale=None if self._rescale is None else self._rescale.data_ptr(),
            x_scale=call.x_scale or 1.0, n_scale=call.n_scale or 1.0,
            height=tiled.height, width=tiled.width, tiles_x=tiles_x, tiles_y=tiles_y, tiles=tiles,
            halo_lines=grid.batch * (after.height + 1) + 1,
            halo_pitch=after.pitch, halo_period=after.height + 1, done=None if call.done is None else call.done.data_ptr(),
        )  # fmt: skip
        if call.ready is not None:
            counters, lines = call.ready
            args.ready = counters.data_ptr()
            args.ready_lines, args.ready_rows, args.ready_count = lines
        start, row, image = _strides(after, self.out)
        for name, tensor in (("residual", call.residual), ("x", x), ("n", normed)):
            if tensor is not None:
                setattr(args, name, tensor.data_ptr() + tensor.element_size() * start)
                setattr(args, f"{name}_row", row)
                setattr(args, f"{name}_image", image)
        driver.bind_context(self._index)  # describing tensors needs one too, and this thread may be new to CUDA
        rows, columns = schedule.tile()
        box = (schedule.kc, columns + variant.halo, rows + variant.halo)
        a = self._map(call.a, grid, self.channels, box, 2 if self.mode == Mode.DOWNSAMPLE else 1)
        second = a if call.shortcut is None else self._map(call.shortcut, grid, self.shortcut, box)
        addend = a if call.residual is None else self._map(
            call.residual, grid if self.mode == Mode.UPSAMPLE else after, call.residual.shape[1], (32, columns, 8)
        )  # fmt: skip
        with torch.cuda.device(self._index):
            kernel = _kernel(*wanted)
        blocks = grid_blocks(schedule, self.mode, tiles, self._room)
        return driver.PreparedLaunch(kernel, (blocks, 1, 1), schedule.threads, (a, second, addend, args), (packed, gamma))

    def _residual_channels(self, call: _Call) -> int:
        """How many channels the residual must have."""
        assert call.residual is not None
        found = call.residual.shape[1]
        if self.mode == Mode.UPSAMPLE:
            return max(found, self.out + call.lower)
        # With resident weights every pixel is read from global memory at the output's stride.
        return min(found, self.out) if self.mode == Mode.DOWNSAMPLE and not self._schedule(call.grid).resident else self.out

    def _plain(self, call: _Call) -> torch.dtype:
        """The 16-bit dtype of a call: that of any such matrix; where all are float8 it makes no difference."""
        if self.dtype != FLOAT8:
            return self.dtype
        tensors = (call.residual, call.x, call.normed)
        return next((t.dtype for t in tensors if t is not None and t.dtype != FLOAT8), torch.bfloat16)

    def _map(self, matrix: Tensor, grid: Grid, channels: int, box: tuple[int, int, int], step: int = 1):
        start, row, image = _strides(grid, channels)
        # a box that takes every step-th pixel is given in pixels of the tensor
        spans = (box[0], *((extent - 1) * step + 1 for extent in box[1:]), 1)
        size = matrix.element_size()
        return driver.encode_tensor_map(
            matrix.data_ptr() + size * start, matrix.dtype, (channels, grid.width, grid.height, grid.batch),
            (size * channels, size * row, size * image), spans, (1, step, step, 1), size * box[0],
        )  # fmt: skip

    def _weights(self, schedule: Schedule) -> Tensor:
        packed = self._packed.get(schedule.kc)
        if packed is None:  # two threads may both pack; the first one's stays
            packed = self._keep(pack(self._matrix.to(self.device), self.mode, self.channels, schedule.kc))
            torch.cuda.current_stream(self.device).synchronize()  # other threads use it on other streams
            packed = self._packed.setdefault(schedule.kc, packed)
        return packed

    def _check(self, call: _Call, after: Grid) -> None:
        if call.x is None and call.normed is None:
            raise ValueError("nothing to write: give x, normed or both")
        if (call.shortcut is not None) != (self.shortcut > 0):
            raise ValueError("a shortcut's input is needed with, and only with, weights packed with a shortcut")
        before, residual = call.grid, (0, 0)
        if call.residual is not None:
            residual = ((before if self.mode == Mode.UPSAMPLE else after).rows, self._residual_channels(call))
        gamma = call.gamma
        if call.normed is not None and (gamma is None or gamma.dtype != torch.float32 or gamma.shape != (self.out,)):
            raise ValueError(f"normed needs gamma: fp32 [{self.out}]")
        plain = self._plain(call)
        own = self.lines(before)
        counters, lines = call.ready or (None, own)

        wanted = (
            ("input", call.a, self.dtype, (before.rows, self.channels)),
            ("shortcut", call.shortcut, plain, (before.rows, self.shortcut)),
            ("x", call.x, plain if call.x_scale is None else FLOAT8, (after.rows, self.out)),
            ("normed", call.normed, plain if call.n_scale is None else FLOAT8, (after.rows, self.out)),
            ("residual", call.residual, plain, residual),
            ("done", call.done, torch.int32, (1, before.batch * own.per_image)),
            ("ready", counters, torch.int32, (1, before.batch * lines.per_image)),
        )
        for name, tensor, dtype, shape in wanted:
            if tensor is None:
                continue
            aligned = tensor.data_ptr() % (4 if dtype == torch.int32 else 16) == 0
            good = tuple(tensor.shape) == shape and tensor.is_contiguous() and aligned
            if not good or tensor.dtype != dtype or tensor.device != self.device:
                raise ValueError(
                    f"{name}: expected contiguous {dtype} {list(shape)} on {self.device}, "
                    f"got {tensor.dtype} {list(tensor.shape)}, strides {list(tensor.stride())}, on {tensor.device}"
                )

"""Running a TensorRT engine: thin, and checked at every step.

TensorRT's API returns False or None where something failed, and leaves the output as it was: uninitialised memory. Here
each such return is a :class:`TensorRTError` with TensorRT's own reasons, so a wrong image is never shown.

Memory: an engine keeps its weights. The scratch memory of a run comes from PyTorch's allocator, for the run's own sizes,
and goes back to it when the run is queued; the allocator hands it to the next run of the same stream, which starts after
this one has ended. So all engines that cannot run at once share one piece, and between images the rest of the pipeline
has it. Contexts: one per stream, since two runs of one context must never overlap.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qwen_vae_accel.backends.tensorrt.engine import TensorRTEngine, TensorRTError
from qwen_vae_accel.backends.tensorrt.streams import Streams

# TensorRT's requirement for the addresses of inputs, outputs and scratch memory.
ALIGNMENT = 256


@dataclass(slots=True)
class _Context:
    """An execution context with what was last set on it."""

    handle: Any
    lock: threading.Lock = field(default_factory=threading.Lock)
    profile: int = 0
    shape: tuple[int, ...] = ()
    output_shape: tuple[int, ...] = ()
    scratch_bytes: int = 0


class TensorRTProgram:
    """A loaded engine as a program: ``[B, C, H, W]`` to ``[B, C', H', W']`` on the caller's current stream.

    Args:
        engine: the engine, in the memory of ``device``.
        dtype: of the results; the engine's own input and output dtypes are read from it and converted to and from.
        device: where it is.
        streams: gives the stream of a run.
        nbytes: of the engine's file.

    Attributes:
        engine: what was loaded, with what it says of itself.
        nbytes: device memory that it keeps while it is loaded.
        max_batch: images it takes at once, per profile; more go one run after another.
    """

    def __init__(self, engine: TensorRTEngine, dtype: torch.dtype, device: torch.device, streams: Streams, nbytes: int) -> None:
        self.engine = engine
        self._dtype = dtype
        self._device = device
        self._streams = streams
        self._lock = threading.Lock()
        self._contexts: dict[int, _Context] = {}
        self.nbytes = max(nbytes, engine.weights)
        self.max_batch = {index: max(1, r.batch[1]) for index, r in enumerate(engine.ranges)}

    def __call__(self, x: Tensor, profile: int = 0) -> Tensor:
        """Run profile number ``profile`` of the engine over ``x``.

        Raises:
            TensorRTError: if TensorRT refuses any step; there is no output then.
        """
        engine = self.engine
        if not 0 <= profile < len(engine.ranges):
            raise TensorRTError(f"optimization profile {profile} is not one of the engine's {len(engine.ranges)}")
        if x.device != self._device:
            raise TensorRTError(f"the engine is on {self._device}, its input on {x.device}")
        step = self.max_batch[profile]
        if len(x) > step:
            return torch.cat([self(images, profile) for images in x.split(step)])
        source = x.to(engine.input.dtype).contiguous()
        if source.data_ptr() % ALIGNMENT:
            source = source.clone()
        if engine.input.frames:
            source = source.unsqueeze(2)
        # What the run reads and writes stays referenced until its stream is tied to the caller's again.
        with self._streams.ordered(self._device) as stream:
            context = self._context(stream)
            with context.lock:
                output, scratch = self._queue(context, source, profile, stream)
        del source, scratch
        return (output.squeeze(2) if engine.output.frames else output).to(self._dtype)

    def _context(self, stream: int) -> _Context:
        with self._lock:
            context = self._contexts.get(stream)
            if context is None:
                trt, engine = self.engine.trt, self.engine.handle
                handle = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
                self._require(handle is not None, "gives no execution context")
                context = self._contexts[stream] = _Context(handle)
            return context

    def _queue(self, context: _Context, source: Tensor, profile: int, stream: int) -> tuple[Tensor, Tensor]:
        """Queue one run; returns its output and its scratch memory."""
        handle, engine = context.handle, self.engine
        if context.profile != profile:
            context.shape = ()
            self._require(
                handle.set_optimization_profile_async(profile, stream), f"does not switch to optimization profile {profile}"
            )
            context.profile = profile
        shape = tuple(source.shape)
        if context.shape != shape:
            self._set_shape(context, shape, profile)
        output = torch.empty(context.output_shape, dtype=engine.output.dtype, device=self._device)
        scratch = torch.empty(context.scratch_bytes, dtype=torch.uint8, device=self._device)
        handle.set_device_memory(scratch.data_ptr(), context.scratch_bytes)
        for port, tensor in ((engine.input, source), (engine.output, output)):
            self._require(handle.set_tensor_address(port.name, tensor.data_ptr()), f"takes no address for {port.name!r}")
        self._require(handle.execute_async_v3(stream), f"did not run the engine for an input of shape {list(shape)}")
        return output, scratch

    def _set_shape(self, context: _Context, shape: tuple[int, ...], profile: int) -> None:
        handle, engine = context.handle, self.engine
        context.shape = ()
        self._require(
            handle.set_input_shape(engine.input.name, shape),
            f"takes no input of shape {list(shape)} in optimization profile {profile}, {engine.ranges[profile]}",
        )
        try:
            unknown = handle.infer_shapes()
        except RuntimeError as error:
            raise TensorRTError(f"TensorRT cannot infer shapes for an input of {list(shape)}: {error}") from error
        self._require(not unknown, f"says that {unknown} lack a shape or an address")
        output_shape = tuple(int(side) for side in handle.get_tensor_shape(engine.output.name))
        self._require(
            len(output_shape) == len(engine.output.shape) and min(output_shape, default=0) > 0,
            f"gives the output the shape {list(output_shape)}",
        )
        # For these sizes; 0 can also mean failure, and then the bound of the whole profile is right in any case.
        needed = int(handle.update_device_memory_size_for_shapes())
        context.scratch_bytes = needed if needed > 0 else engine.scratch[profile]
        context.output_shape = output_shape
        context.shape = shape

    def _require(self, done: object, failure: str) -> None:
        if not done:
            raise TensorRTError(f"TensorRT {failure}: {self.engine.recorder.take()}")

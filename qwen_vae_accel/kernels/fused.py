"""``FusedDecoder`` and ``FusedEncoder``: the whole network in hand-written kernels, any batch, height and width."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from qwen_vae_accel.kernels import compiling
from qwen_vae_accel.kernels.compiling import Progress, Tasks
from qwen_vae_accel.kernels.graphs import GraphCache
from qwen_vae_accel.kernels.memory import Program, Traffic
from qwen_vae_accel.kernels.network import LATENT_CHANNELS, state_reasons
from qwen_vae_accel.kernels.segments import OwnSegments
from qwen_vae_accel.kernels.sm90 import nvrtc
from qwen_vae_accel.kernels.timing import launch_ms
from qwen_vae_accel.kernels.tuning.selection import Device, Tuning
from qwen_vae_accel.kernels.weights import Packer, with_each

# The kernels' modules need Triton, so they are imported when a network is made.
if TYPE_CHECKING:
    from qwen_vae_accel.kernels.launches import Planner, Tuned
    from qwen_vae_accel.kernels.sm90.layers import HopperConvs

# The choices of tiles and attention splits change between these.
_COMPILED_LATENTS = ((8, 8), (32, 32), (64, 64), (96, 128), (166, 166), (240, 240))
_PROGRAMS = 64  # plans kept, least recently used dropped first; a plan is a few kB of host memory


@dataclass(frozen=True, slots=True)
class FusedConfig:
    """Launch options.

    Attributes:
        graphs: CUDA graphs kept per object, 0 for plain launches. Each holds a buffer for its input and its output.
        graph_after: Uses of an input shape, with the same scratch block, before it is captured.
        tuning: Tile configurations.
        device: What to know of the GPU, None to ask it.
    """

    graphs: int = 8
    graph_after: int = 2
    tuning: Tuning = field(default_factory=Tuning)
    device: Device | None = None


class KernelTime(NamedTuple):
    kernel: str
    shape: str
    milliseconds: float
    teraflop: float
    gigabyte: float


def describe_device(device: torch.device) -> Device:
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", 99 << 10)
    wgmma = properties.major == 9 and nvrtc.library() is not None
    return Device(properties.multi_processor_count, shared, properties.major >= 9, wgmma)


def _nbytes(weights: object, device: torch.device) -> int:
    if isinstance(weights, Tensor):
        return weights.nbytes if weights.device == device else 0
    if isinstance(weights, tuple):
        return sum(_nbytes(part, device) for part in weights)
    if is_dataclass(weights):
        return sum(_nbytes(getattr(weights, f.name), device) for f in fields(weights))
    return 0


class _Fused:
    """Shared by both directions: plans by shape, plain launches or graphs."""

    channels: int  # of the input

    def __init__(
        self, state: Mapping[str, Tensor], *, dtype: torch.dtype, device: torch.device,
        config: FusedConfig | None = None, float8: Mapping[str, float] | None = None,
    ):  # fmt: skip
        """Pack ``state``: diffusers names without ``encoder.`` / ``decoder.``, every weight 2-D.

        ``float8``: layers of a decoder that compute in float8 -> scale of their input (``float8.input_scales``).

        Raises:
            ValueError: the state does not have the published topology; the message lists the differences.
        """
        reasons = state_reasons(state)
        if reasons:
            raise ValueError(f"{type(self).__name__} cannot run this model: " + "; ".join(reasons))
        self.dtype, self.device = dtype, torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.config = config or FusedConfig()
        self._traits = self.config.device or describe_device(self.device)
        self.float8 = bool(float8)
        segments = OwnSegments(self.device)
        weights = self._pack(Packer(state, dtype, self.device, float8 or {}))
        self._hopper = self._hopper_convs(self.config.tuning)
        if self._hopper is not None:
            weights = self._hopper.to_host(weights)
        self._weights = with_each(Tensor, segments.keep, weights)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # other threads use them on other streams
        self._programs: OrderedDict[tuple, Program] = OrderedDict()
        self._lock = threading.Lock()
        use_graphs = self.config.graphs > 0 and self.device.type == "cuda"
        self._graphs = GraphCache(segments, self.config.graphs, self.config.graph_after) if use_graphs else None

    @property
    def nbytes(self) -> int:
        """Bytes of GPU memory of the weights."""
        return _nbytes(self._weights, self.device) + (self._hopper.nbytes if self._hopper is not None else 0)

    def _hopper_convs(self, tuning: Tuning) -> HopperConvs | None:
        if not (tuning.hopper_convs and self._traits.wgmma):
            return None
        from qwen_vae_accel.kernels.sm90.layers import HopperConvs

        return HopperConvs(self.device, tuning)

    def _pack(self, pack: Packer):
        raise NotImplementedError

    def _plan(self, shape: tuple[int, ...], planner: Planner) -> Program:
        raise NotImplementedError

    def program(self, shape: tuple[int, ...]) -> Program:
        """The launches for inputs of ``shape``; planning takes one or two milliseconds and no GPU work."""
        from qwen_vae_accel.kernels.launches import Planner

        with self._lock:
            program = self._programs.pop(shape, None)
            if program is None:
                program = self._plan(shape, Planner(self.dtype, self._traits, self.config.tuning, self._hopper))
            while len(self._programs) >= _PROGRAMS:
                self._programs.popitem(last=False)
            self._programs[shape] = program
        return program

    def tuned_program(self, shape: tuple[int, ...], tuning: Tuning) -> tuple[Program, tuple[Tuned | None, ...]]:
        """``program`` with another tuning, kept nowhere, and what each of its steps is tuned by.

        Raises:
            ValueError: ``tuning`` goes without sm90/, and this network has given its weights to that.
        """
        from qwen_vae_accel.kernels.launches import Planner

        if self._hopper is not None and not tuning.hopper_convs:
            raise ValueError("this network was made with hopper_convs, its weights are not where Triton's kernels read")
        planner = Planner(self.dtype, self._traits, tuning, self._hopper_convs(tuning))
        return self._plan(shape, planner), tuple(planner.tuned)

    def __call__(self, image: Tensor) -> Tensor:
        if image.dim() != 4 or image.shape[1] != self.channels or image.dtype != self.dtype:
            raise ValueError(
                f"{type(self).__name__}: expected {self.dtype} [B, {self.channels}, H, W], "
                f"got {image.dtype} {list(image.shape)}"
            )
        program = self.program(tuple(image.shape))
        if min(program.output_shape) < 1:
            raise ValueError(f"{type(self).__name__}: input {list(image.shape)} is too small")
        if self._graphs is None or torch.cuda.is_current_stream_capturing():
            return self.run_plain(image)
        with torch.cuda.device(self.device):
            return self._graphs.run(program, image)

    def run_plain(self, image: Tensor) -> Tensor:
        """Without graphs: scratch and output come from torch's allocator on the current stream."""
        program = self.program(tuple(image.shape))
        memory = program.memory(image)
        with torch.cuda.device(self.device if self.device.type == "cuda" else -1):
            program.run(memory)
        return memory.output

    def compile(self, progress: Progress | None = None) -> None:
        """Compile, in parallel, the kernels that images from 64 pixels a side need, so that no request waits for them.

        What the disk holds from an earlier process is loaded. Tiny images may still compile one or two kernels of their own.
        ``progress(done, total)`` is told of each kernel.
        """
        compiling.run(self.kernels(self.usual_shapes()), self.device, progress)

    def usual_shapes(self) -> list[tuple[int, ...]]:
        """Input shapes that between them run every kernel but those of tiny images."""
        scale = 1 if self.channels == LATENT_CHANNELS else 8
        return [(1, self.channels, height * scale, width * scale) for height, width in _COMPILED_LATENTS]

    def kernels(self, shapes: Iterable[tuple[int, ...]]) -> Tasks:
        """The kernels that inputs of ``shapes`` run, each by what tells it from others, with a task that compiles it."""
        with compiling.collecting() as tasks:
            for shape in shapes:
                program = self.program(shape)
                program.run(program.memory(torch.empty(shape, dtype=self.dtype, device="meta")))
        return tasks

    def release(self) -> None:
        """Free the graphs."""
        if self._graphs is not None:
            self._graphs.clear()

    def kernel_times(self, image: Tensor, repeats: int = 8) -> list[KernelTime]:
        """Time every kernel of one call alone, ``repeats`` launches in one graph, best of three.

        Sums and residuals accumulate over the repeats, so only the times mean anything.
        """
        program = self.program(tuple(image.shape))
        memory = program.memory(image)
        program.run(memory)
        times = []
        for step in program.steps:
            traffic = Traffic(memory)
            step.launch(traffic)
            spent = launch_ms(partial(step.launch, memory), repeats)
            times.append(KernelTime(step.kernel, step.shape, spent, step.flops / 1e12, traffic.nbytes / 1e9))
        return times


class FusedDecoder(_Fused):
    """``[B, 16, h, w]`` latents -> ``[B, C, 8h, 8w]`` clamped to [-1, 1]. Safe to call from several threads."""

    channels = LATENT_CHANNELS

    def _pack(self, pack: Packer):
        from qwen_vae_accel.kernels.launches import pack_decoder

        return pack_decoder(pack)

    def _plan(self, shape: tuple[int, ...], planner: Planner) -> Program:
        from qwen_vae_accel.kernels.launches import plan_decoder

        return plan_decoder(self._weights, shape, planner)


class FusedEncoder(_Fused):
    """``[B, C, H, W]`` images -> ``[B, 32, H // 8, W // 8]`` mean and log-variance, quant_conv applied.
    Safe to call from several threads."""

    def _pack(self, pack: Packer):
        self.channels = pack.state["conv_in.weight"].shape[1]
        from qwen_vae_accel.kernels.launches import pack_encoder

        return pack_encoder(pack)

    def _plan(self, shape: tuple[int, ...], planner: Planner) -> Program:
        from qwen_vae_accel.kernels.launches import plan_encoder

        return plan_encoder(self._weights, shape, planner)

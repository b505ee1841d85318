"""``FusedDecoder`` and ``FusedEncoder``: the whole network in hand-written kernels, any batch, height and width."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor

from qwen_vae_accel.kernels import compiling
from qwen_vae_accel.kernels.bands import Bands, Listed
from qwen_vae_accel.kernels.compiling import Progress, Tasks
from qwen_vae_accel.kernels.gpu import Gpu, describe_gpu
from qwen_vae_accel.kernels.graphs import GraphCache
from qwen_vae_accel.kernels.launches import LaunchList, Traffic
from qwen_vae_accel.kernels.limits import Plan
from qwen_vae_accel.kernels.network import network_of
from qwen_vae_accel.kernels.planning import Listings
from qwen_vae_accel.kernels.reasons import state_reasons
from qwen_vae_accel.kernels.segments import OwnSegments
from qwen_vae_accel.kernels.timing import launch_ms
from qwen_vae_accel.kernels.tuning.selection import Tuning
from qwen_vae_accel.kernels.weights import NetworkWeights, Packer, pack_network, with_each
from qwen_vae_accel.share import Share, divides, exchange_ms

# The kernels' modules need Triton, so they are imported when a network is made.
if TYPE_CHECKING:
    from qwen_vae_accel.kernels.builder import LaunchBuilder
    from qwen_vae_accel.kernels.sm90.layers import Sm90Layers

# The choices of tiles and attention splits change between these.
_COMPILED_LATENTS = ((8, 8), (32, 32), (64, 64), (96, 128), (166, 166), (240, 240))
# Where a call found no room: how much of what is free its next lists may take. Fragments may keep it from having all.
_TRIES = (1.0, 0.5)


@dataclass(frozen=True, slots=True)
class FusedConfig:
    """Launch options.

    Attributes:
        graphs: CUDA graphs kept per object, 0 for plain launches. Each holds a buffer for its input and its output.
        graph_after: uses of an input shape, with the same scratch block, before it is captured.
        tuning: tile configurations.
        gpu: what to know of the GPU, None to ask it.
        memory_limit: bytes of scratch memory of a call, or a share (a float between 0 and 1) of what is free when a size is
            first seen; what takes more runs in bands of rows (bands.py). None: ``limits.SOFT_LIMIT``.
    """

    graphs: int = 8
    graph_after: int = 2
    tuning: Tuning = field(default_factory=Tuning)
    gpu: Gpu | None = None
    memory_limit: int | float | None = None


class KernelTime(NamedTuple):
    """A kernel of a network, timed alone.

    Attributes:
        kernel: its name, such as ``"conv3x3 96->96 norm"``.
        shape: the pixels that it writes, such as ``"1x1024x1024"``.
        milliseconds: of one launch.
        teraflop: 10^12 operations of one launch.
        gigabyte: 10^9 bytes that one launch asks of the memory, weights left out.
    """

    kernel: str
    shape: str
    milliseconds: float
    teraflop: float
    gigabyte: float


def _nbytes(weights: object, device: torch.device) -> int:
    if isinstance(weights, Tensor):
        return weights.nbytes if weights.device == device else 0
    if isinstance(weights, tuple):
        return sum(_nbytes(part, device) for part in weights)
    if is_dataclass(weights):
        return sum(_nbytes(getattr(weights, f.name), device) for f in fields(weights))
    return 0


class _FusedNetwork:
    """Shared by both directions: launches by input shape, made plainly or from graphs."""

    _method: ClassVar[str]

    def __init__(
        self, state: Mapping[str, Tensor], *, dtype: torch.dtype, device: torch.device,
        config: FusedConfig | None = None, float8: Mapping[str, float] | None = None, share: Share | None = None,
    ):  # fmt: skip
        """Pack the weights; the GPU holds a copy of its own.

        Args:
            state: diffusers' names without ``encoder.`` or ``decoder.``, every weight 2-D (``model.source.image_state``).
            dtype: bfloat16 or float16, of input and output and of whatever is not float8.
            device: a CUDA device.
            config: launch options.
            float8: layers of a decoder that compute in float8 -> scale of their input (``float8.input_scales``).
            share: of several processes that compute every image together, on a GPU each; None: alone.

        Raises:
            ValueError: there are no kernels for a network with these weights; the message says why.
        """
        self.dtype, self.device = dtype, torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.config = config or FusedConfig()
        if self.config.gpu is None and self.device.type != "cuda":
            raise ValueError(f"{type(self).__name__} needs a CUDA device, not {self.device}")
        self._gpu = self.config.gpu or describe_gpu(self.device)
        reasons = state_reasons(state, sm90=self._gpu.sm90 and self.config.tuning.sm90)
        if reasons:
            raise ValueError(f"{type(self).__name__} cannot run this model: " + "; ".join(reasons))
        self.description = network_of(state)
        if self.description.method != self._method:
            raise ValueError(f"{type(self).__name__} was given the weights of a network that {self.description.method}s")
        self.float8 = bool(float8)
        segments = OwnSegments(self.device)
        weights = pack_network(Packer(state, dtype, self.device, float8 or {}), self.description)
        self._sm90 = self._sm90_layers(self.config.tuning)
        if self._sm90 is not None:
            weights = self._sm90.to_host(weights)
        self._weights: NetworkWeights = with_each(Tensor, segments.keep, weights)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # other threads use them on other streams
        self._share = share
        use_graphs = self.config.graphs > 0 and self.device.type == "cuda" and share is None
        self._graphs = GraphCache(segments, self.config.graphs, self.config.graph_after) if use_graphs else None
        self._listings = Listings(
            type(self).__name__, self.description, dtype, self.device, self.config.memory_limit, use_graphs, self._as_configured
        )

    @property
    def nbytes(self) -> int:
        """Bytes of GPU memory of the weights."""
        return _nbytes(self._weights, self.device) + (self._sm90.nbytes if self._sm90 is not None else 0)

    def _sm90_layers(self, tuning: Tuning) -> Sm90Layers | None:
        if not (tuning.sm90 and self._gpu.sm90):
            return None
        from qwen_vae_accel.kernels.sm90.layers import Sm90Layers

        return Sm90Layers(self.device, tuning)

    def _listed(
        self, shape: tuple[int, ...], builder: LaunchBuilder, bands: Bands | None = None, *, sample: bool = False
    ) -> Listed:  # fmt: skip
        raise NotImplementedError

    def _builder(self, share: Share | None, tuning: Tuning, layers: Sm90Layers | None) -> LaunchBuilder:
        from qwen_vae_accel.kernels.builder import LaunchBuilder

        return LaunchBuilder(self.dtype, self._gpu, tuning, layers, share)

    def _share_of(self, shape: tuple[int, ...]) -> Share | None:
        return divides(self._share, shape[2] if self.description.decodes else shape[2] // self.description.scale)

    def _as_configured(self, shape: tuple[int, ...], bands: Bands | None, sample: bool) -> Listed:
        return self._listed(shape, self._builder(self._share_of(shape), self.config.tuning, self._sm90), bands, sample=sample)

    def launches(self, shape: tuple[int, ...]) -> LaunchList:
        """The launches for inputs of ``shape``.

        Listing them takes no GPU work and a few milliseconds, a tenth of a second where a limit asks for bands.
        """
        return self._listings.get(shape).launches

    def plan(self, shape: tuple[int, ...], rows: int = 0) -> Plan:
        """Plan what a call with an input of ``shape`` ``[B, C, H, W]`` takes, and its bands; ``rows`` as for a call."""
        return self._listings.get(tuple(shape), rows).plan

    def predicted_ms(self, shape: tuple[int, ...], alone_ms: float) -> float:
        """An estimate of a call for inputs of ``shape`` by several processes, from what one GPU takes alone.

        The operations of this process as a part of all, plus the exchanges (constants in share.py).
        """
        alone = self._listed(shape, self._builder(None, self.config.tuning, self._sm90)).launches
        mine = self.launches(shape)
        return alone_ms * mine.flops / alone.flops + exchange_ms(mine.exchanged)

    def tuned_launches(self, shape: tuple[int, ...], tuning: Tuning) -> LaunchList:
        """``launches`` with another tuning, kept nowhere.

        Raises:
            ValueError: ``tuning`` goes without sm90/, and this network has given its weights to that.
        """
        if self._sm90 is not None and not tuning.sm90:
            raise ValueError("this network was made with Tuning(sm90=True): its weights are not where Triton's kernels read")
        layers = self._sm90_layers(tuning)

        def listed(shape: tuple[int, ...], bands: Bands | None, sample: bool) -> Listed:
            return self._listed(shape, self._builder(self._share_of(shape), tuning, layers), bands, sample=sample)

        return self._listings.make(shape, self._listings.limit(shape), listed).launches

    def __call__(self, image: Tensor, rows: int = 0) -> Tensor:
        """Run the network on the current stream, from a graph where this shape is used often.

        Where there is no room for the scratch memory, the size is listed again in bands that fit into what is free.

        Args:
            image: ``[B, C, H, W]`` in the network's dtype, on its device.
            rows: of the image; where it is not 0, take no more scratch memory than an image of so many rows in one piece.

        Returns:
            A fresh tensor in the same dtype.

        Raises:
            ValueError: another dtype or other channels, or an image so small that nothing would be left of it.
            torch.OutOfMemoryError: there is no room, in whatever bands.
        """
        channels = self.description.in_channels
        if image.dim() != 4 or image.shape[1] != channels or image.dtype != self.dtype:
            raise ValueError(
                f"{type(self).__name__}: expected {self.dtype} [B, {channels}, H, W], got {image.dtype} {list(image.shape)}"
            )
        shape = tuple(image.shape)
        listing = self._listings.get(shape, rows)
        if min(listing.launches.output_shape) < 1:
            raise ValueError(f"{type(self).__name__}: input {list(shape)} is too small")
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return self.run_plain(image, rows)
        for share in _TRIES:
            output = self._unless_no_room(listing.launches, image)
            if isinstance(output, Tensor):
                return output
            if not self._listings.shrink(shape, rows, listing, share):
                raise output
            listing = self._listings.get(shape, rows)
        return self._run(listing.launches, image)

    def _unless_no_room(self, launches: LaunchList, image: Tensor) -> Tensor | torch.OutOfMemoryError:
        try:
            return self._run(launches, image)
        except torch.OutOfMemoryError as error:
            return error.with_traceback(None)  # with its frames go their tensors

    def _run(self, launches: LaunchList, image: Tensor) -> Tensor:
        if self._graphs is None:
            return self._run_plain(launches, image)
        with torch.cuda.device(self.device):
            return self._graphs.run(launches, image)

    def run_plain(self, image: Tensor, rows: int = 0) -> Tensor:
        """The same as a call, without graphs or a second try: memory comes from torch's allocator on the current stream."""
        return self._run_plain(self._listings.get(tuple(image.shape), rows).launches, image)

    def _run_plain(self, launches: LaunchList, image: Tensor) -> Tensor:
        memory = launches.memory(image)
        with torch.cuda.device(self.device if self.device.type == "cuda" else -1):
            launches.run(memory)
        return memory.output

    def compile(self, progress: Progress | None = None) -> None:
        """Compile, in parallel, the kernels that images from 64 pixels a side need, so that no request waits for them.

        What the disk holds from an earlier process is loaded. Tiny images may still compile one or two kernels of their own.
        ``progress(done, total)`` is told of each kernel.
        """
        compiling.run(self.kernels(self.usual_shapes()), self.device, progress)

    def usual_shapes(self) -> list[tuple[int, ...]]:
        """Input shapes that between them run every kernel but those of tiny images."""
        network, scale = self.description, self.description.scale
        sizes = (network.input_size(height * scale, width * scale) for height, width in _COMPILED_LATENTS)
        return [(1, network.in_channels, *size) for size in sizes]

    def kernels(self, shapes: Iterable[tuple[int, ...]]) -> Tasks:
        """The kernels that inputs of ``shapes`` run, each by what tells it from others, with a task that compiles it."""
        with compiling.collecting() as tasks:
            for shape in shapes:
                launches = self.launches(shape)
                launches.run(launches.memory(torch.empty(shape, dtype=self.dtype, device="meta")))
        return tasks

    def limit_memory(self, memory_limit: int | float | None) -> None:
        """Use another ``FusedConfig.memory_limit`` from now on: every size is listed, and captured, again."""
        self._listings.limit_memory(memory_limit)
        self.release()

    def release(self) -> None:
        """Free the graphs."""
        if self._graphs is not None:
            self._graphs.clear()

    def kernel_times(self, image: Tensor, repeats: int = 8) -> list[KernelTime]:
        """Milliseconds of every kernel of one call alone: ``repeats`` launches in one graph, the best of three.

        Sums and residuals accumulate over the repeats, so only the times mean anything.
        """
        launches = self.launches(tuple(image.shape))
        memory = launches.memory(image)
        launches.run(memory)
        times = []
        for step in launches.steps:
            traffic = Traffic(memory)
            step.launch(traffic)
            spent = launch_ms(partial(step.launch, memory), repeats)
            times.append(KernelTime(step.kernel, step.shape, spent, step.flops / 1e12, traffic.nbytes / 1e9))
        return times


class FusedDecoder(_FusedNetwork):
    """``[B, Z, h, w]`` latents -> ``[B, C, s * h, s * w]`` images, clamped to [-1, 1]. Safe to call from several threads.

    ``Z`` and ``s`` are 16 and 8, or 64 and 16 (Qwen-Image 2.1).
    """

    _method = "decode"

    def _listed(
        self, shape: tuple[int, ...], builder: LaunchBuilder, bands: Bands | None = None, *, sample: bool = False
    ) -> Listed:  # fmt: skip
        from qwen_vae_accel.kernels.order import decoder_launches

        return decoder_launches(self._weights, shape, builder, bands, sample=sample)


class FusedEncoder(_FusedNetwork):
    """``[B, C, H, W]`` images -> ``[B, 2 * Z, H // s, W // s]`` mean and log-variance, quant_conv applied.

    ``Z`` and ``s`` as in :class:`FusedDecoder`. Safe to call from several threads.
    """

    _method = "encode"

    def _listed(
        self, shape: tuple[int, ...], builder: LaunchBuilder, bands: Bands | None = None, *, sample: bool = False
    ) -> Listed:  # fmt: skip
        from qwen_vae_accel.kernels.order import encoder_launches

        return encoder_launches(self._weights, shape, builder, bands, sample=sample)

"""From an image network to a serialized engine: ``torch.export``, Torch-TensorRT's converters, TensorRT's builder.

The conversion is all or nothing: an operation without a converter is an error, so no part of an engine is left to
PyTorch. Neither of Torch-TensorRT's shared caches is used (they sit in /tmp, and one of them unpickles): what speeds up a
later build is a timing cache in the engine directory. The network is converted on the CPU on every machine.
"""

from __future__ import annotations

import dataclasses
import logging
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from qwen_vae_accel.backends.base import Job, export_network
from qwen_vae_accel.backends.tensorrt.logs import activation_memory, collector_paused, make_recorder
from qwen_vae_accel.backends.tensorrt.network import Network, NetworkError
from qwen_vae_accel.backends.tensorrt.settings import BuildSettings, Capability, capability_text
from qwen_vae_accel.errors import BuildError
from qwen_vae_accel.files import write_atomically
from qwen_vae_accel.model.spelling import query_chunks, spell
from qwen_vae_accel.plan import EngineKey

logger = logging.getLogger(__name__)

# minimum, optimum and maximum of an input [1, C, H, W]
Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
# phase of the builder, its step, its number of steps
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Binding:
    """One input or output of a network: name, shape with -1 for what may vary, dtype as TensorRT names it."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class BuildReport:
    """What was built, read back from TensorRT's network and builder configuration.

    Attributes:
        inputs: of the engine, in the order of the network's arguments.
        outputs: of the engine.
        profiles: ranges of the input, one per optimization profile; empty for a static engine.
        layers: layers of TensorRT's network.
        attention_chunks: runs of queries in the attention.
        capabilities: compute capabilities it is built for; empty: the GPU of this machine.
        scratch: bytes of scratch memory that the builder plans, one per profile (one for a static engine); None where its
            log does not say so.
        nbytes: size of the engine.
        seconds: of the builder alone, after export and conversion.
        network: what TensorRT was handed, to be computed without it, or why it cannot be; None where it was not asked for.
    """

    inputs: tuple[Binding, ...]
    outputs: tuple[Binding, ...]
    profiles: tuple[Shapes, ...]
    layers: int
    attention_chunks: int
    capabilities: tuple[str, ...]
    scratch: tuple[int, ...] | None
    nbytes: int
    seconds: float
    network: Network | NetworkError | None = None


def input_shapes(job: Job, key: EngineKey) -> tuple[Shapes, ...]:
    """The input's range for each profile of ``key``, in their order."""

    def shape(size: Any) -> tuple[int, ...]:
        return (1, job.in_channels, *job.input_hw(size))

    return tuple((shape(p.minimum), shape(p.optimum), shape(p.maximum)) for p in key.profiles)


def export(network: nn.Module, job: Job, shapes: Sequence[Shapes], limit: int) -> tuple[torch.export.ExportedProgram, int]:
    """Export ``network`` for all of ``shapes``; returns the program and the number of runs of its attention."""
    scale = job.topology.scale if job.method == "encode" else 1

    chunks = query_chunks(max((high[2] // scale) * (high[3] // scale) for _, _, high in shapes), limit)
    low = tuple(min(sides) for sides in zip(*(shape[0] for shape in shapes), strict=True))
    high = tuple(max(sides) for sides in zip(*(shape[2] for shape in shapes), strict=True))
    # Any size in the range will do; 0 and 1 would be taken for constants, and equal sides for one symbol.
    example = list(shapes[0][1])
    for axis in (2, 3):
        step = job.multiple
        example[axis] = max(low[axis], min(high[axis], max(2 * step, example[axis]) + (axis == 3) * step))
    x = torch.zeros(example, dtype=job.dtype, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return export_network(spell(network.cpu(), chunks), x, low[2:], high[2:], job.multiple), chunks


def convert(
    network: nn.Module, job: Job, key: EngineKey, torch_tensorrt: ModuleType, trt: ModuleType, settings: BuildSettings
) -> tuple[Any, Any, int]:
    """Turn ``network`` (2-D, in ``job.dtype``) into TensorRT's, for the profiles of ``key``.

    Returns:
        Torch-TensorRT's interpreter with the network in ``ctx.net``, TensorRT's error recorder, the runs of the attention.

    Raises:
        BuildError: if it cannot be converted as a whole.
    """
    shapes = input_shapes(job, key)
    program, chunks = export(network, job, shapes, settings.query_limit)
    interpreter = _interpreter(torch_tensorrt, trt, program, job, shapes, _is_static(shapes), settings)
    recorder = make_recorder(trt)
    interpreter.builder.error_recorder = recorder
    try:
        interpreter._construct_trt_network_def()
    except Exception as error:
        raise BuildError(f"Torch-TensorRT cannot convert the network: {error}") from error
    return interpreter, recorder, chunks


def _handed(trt: ModuleType, definition: Any) -> Network | NetworkError:
    try:
        return Network(trt, definition)
    except NetworkError as error:  # no reason not to build: whoever wants to compute it is told
        return error


def _is_static(shapes: Sequence[Shapes]) -> bool:
    return all(shape == shapes[0][0] for triple in shapes for shape in triple)


@collector_paused()
def build_engine(
    network: nn.Module,
    job: Job,
    key: EngineKey,
    torch_tensorrt: ModuleType,
    trt: ModuleType,
    settings: BuildSettings,
    targets: Sequence[Capability] = (),
    timing_cache: Path | None = None,
    progress: Progress | None = None,
    read_network: bool = False,
) -> tuple[memoryview, BuildReport]:
    """Compile ``network`` (2-D, in ``job.dtype``) for the profiles of ``key``.

    Args:
        torch_tensorrt: the module, from :func:`.crossbuild.torch_tensorrt_for`.
        trt: TensorRT's bindings.
        targets: compute capabilities to build for (TensorRT-RTX); empty: the GPU of this machine.
        timing_cache: file that keeps kernel timings between builds; made if missing. TensorRT-RTX times nothing.
        progress: told of each step of the builder, from its threads.
        read_network: whether the report is to hold the network that TensorRT was handed.

    Returns:
        The engine's bytes, and what TensorRT says was built.

    Raises:
        BuildError: with TensorRT's own reasons.
    """
    shapes = input_shapes(job, key)
    interpreter, recorder, chunks = convert(network, job, key, torch_tensorrt, trt, settings)
    config = interpreter._populate_trt_builder_config()
    _configure(config, trt, settings, targets, 0 if _is_static(shapes) else len(shapes), recorder)
    handed = _handed(trt, interpreter.ctx.net) if read_network else None
    if progress is not None:
        config.progress_monitor = _monitor(trt, progress)
    # TensorRT does not own the cache that a build uses: it must live until the build is over.
    cache = _attach_timing_cache(config, timing_cache) if timing_cache is not None else None
    with activation_memory() as planned:
        start = time.perf_counter()
        memory = interpreter.builder.build_serialized_network(interpreter.ctx.net, config)
        seconds = time.perf_counter() - start
    if memory is None:
        raise BuildError(f"TensorRT built no engine: {recorder.take()}")
    interpreter.ctx.clear_cpu_weights_reference_holder()
    if timing_cache is not None and cache is not None:
        _save_timing_cache(config, timing_cache)
    net = interpreter.ctx.net
    report = BuildReport(
        inputs=tuple(_binding(net.get_input(index)) for index in range(net.num_inputs)),
        outputs=tuple(_binding(net.get_output(index)) for index in range(net.num_outputs)),
        profiles=tuple(_ranges(p, net.get_input(0).name) for p in interpreter.optimization_profiles or ()),
        layers=net.num_layers,
        attention_chunks=chunks,
        capabilities=tuple(map(capability_text, targets)),
        scratch=tuple(planned) if len(planned) == len(shapes) else None,
        nbytes=memory.nbytes,
        seconds=seconds,
        network=handed,
    )
    return memoryview(memory), report


def _interpreter(
    torch_tensorrt: ModuleType,
    trt: ModuleType,
    program: torch.export.ExportedProgram,
    job: Job,
    shapes: Sequence[Shapes],
    is_static: bool,
    settings: BuildSettings,
) -> Any:
    """Torch-TensorRT's converter of one graph, with all optimization profiles set."""
    from torch_tensorrt.dynamo._settings import CompilationSettings
    from torch_tensorrt.dynamo.conversion._conversion import infer_module_output_dtypes
    from torch_tensorrt.dynamo.conversion._TRTInterpreter import TRTInterpreter
    from torch_tensorrt.dynamo.lowering import get_decompositions, post_lowering, pre_export_lowering

    known = {field.name for field in dataclasses.fields(CompilationSettings)}
    wanted = {
        "optimization_level": settings.optimization_level,
        "hardware_compatible": settings.hardware_compatible,
        "version_compatible": settings.version_compatible,
        "disable_tf32": not settings.tf32,
        "require_full_compilation": True,
    }
    missing = sorted(set(wanted) - known)
    if missing:
        raise BuildError(f"this release of Torch-TensorRT does not know the settings {', '.join(missing)}")
    options = CompilationSettings(**wanted)
    profiles = [{"min_shape": low, "opt_shape": best, "max_shape": high} for low, best, high in shapes]
    # From 2.14 on an input carries several profiles itself.
    native = hasattr(torch_tensorrt.Input, "profiles")
    if is_static:
        spec = torch_tensorrt.Input(shapes[0][1], dtype=job.dtype)
    elif native:
        spec = torch_tensorrt.Input(profiles=profiles, dtype=job.dtype)
    else:
        spec = torch_tensorrt.Input(**profiles[0], dtype=job.dtype)

    class Interpreter(TRTInterpreter):
        def placeholder(self, target: str, args: Any, kwargs: Any) -> Any:
            if is_static or native:
                return super().placeholder(target, args, kwargs)
            self._input_names.append(target)
            self.input_specs_iter += 1
            self.optimization_profiles = [self.builder.create_optimization_profile() for _ in shapes]
            for profile, ranges in zip(self.optimization_profiles, shapes, strict=True):
                profile.set_shape(target, *ranges)
            sides = [{shape[axis] for triple in shapes for shape in triple} for axis in range(4)]
            shape = tuple(side.pop() if len(side) == 1 else -1 for side in sides)
            return self.ctx.net.add_input(target, self.input_specs[0].dtype.to(trt.DataType), shape)

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lowered = pre_export_lowering(program, options)
        lowered = lowered.run_decompositions(get_decompositions(False, options.decompose_attention, False))
        graph = post_lowering(lowered.module(), options)
        outputs = infer_module_output_dtypes(graph)
        return Interpreter(graph, [spec], output_dtypes=outputs, compilation_settings=options)


def _configure(
    config: Any, trt: ModuleType, settings: BuildSettings, targets: Sequence[Capability], profiles: int, recorder: Any
) -> None:
    if config.num_optimization_profiles != profiles:
        raise BuildError(
            f"TensorRT took {config.num_optimization_profiles} of {profiles} optimization profiles: {recorder.take()}"
        )
    if settings.version_compatible:
        # The engine carries the lean runtime that later releases load it with; Torch-TensorRT leaves it out.
        config.clear_flag(trt.BuilderFlag.EXCLUDE_LEAN_RUNTIME)
    if targets:
        config.num_compute_capabilities = len(targets)
        for index, target in enumerate(targets):
            member = getattr(trt.ComputeCapability, f"SM{target[0]}{target[1]}", None)
            if member is None or not config.set_compute_capability(member, index):
                raise BuildError(f"TensorRT does not build for compute capability {capability_text(target)}: {recorder.take()}")


def _monitor(trt: ModuleType, progress: Progress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[name-defined]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str, num_steps: int) -> None:
            self._steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            progress(phase_name, step + 1, self._steps.get(phase_name, 0))
            return True

        def phase_finish(self, phase_name: str) -> None:
            self._steps.pop(phase_name, None)

    return Monitor()


def _attach_timing_cache(config: Any, path: Path) -> Any:
    """Give the build the timings of earlier ones; a file that TensorRT will not have (other GPU or version) is left out."""
    try:
        kept = path.read_bytes()
    except OSError:
        kept = b""
    cache = config.create_timing_cache(kept)
    if kept and (cache is None or not config.set_timing_cache(cache, False)):
        logger.info("the timing cache %s is of another GPU or TensorRT; starting a new one", path)
        kept, cache = b"", config.create_timing_cache(b"")
    if cache is None or (not kept and not config.set_timing_cache(cache, False)):
        logger.warning("TensorRT takes no timing cache; building without one")
        return None
    return cache


def _save_timing_cache(config: Any, path: Path) -> None:
    cache = config.get_timing_cache()
    data = cache.serialize() if cache is not None else None
    if data is None:
        return
    try:
        write_atomically(path, memoryview(data))
    except OSError as error:
        logger.warning("the timing cache %s is not kept: %s", path, error)


def _binding(tensor: Any) -> Binding:
    return Binding(tensor.name, tuple(tensor.shape), tensor.dtype.name)


def _ranges(profile: Any, name: str) -> Shapes:
    low, best, high = profile.get_shape(name)
    return tuple(low), tuple(best), tuple(high)

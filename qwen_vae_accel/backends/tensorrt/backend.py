"""Backend ``tensorrt``: TensorRT or TensorRT-RTX engines, static and multi-profile, in the guide's directory."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from qwen_vae_accel.backends.base import NO_FLOAT8, EngineBackend, EngineImage, Environment, Job, Program
from qwen_vae_accel.backends.tensorrt import flavour as flavours
from qwen_vae_accel.backends.tensorrt.build import BuildReport, Progress, build_engine
from qwen_vae_accel.backends.tensorrt.crossbuild import common_processor, target_environment, torch_tensorrt_for
from qwen_vae_accel.backends.tensorrt.engine import TensorRTEngine, TensorRTError, deserialize
from qwen_vae_accel.backends.tensorrt.network import NetworkError, NetworkProgram
from qwen_vae_accel.backends.tensorrt.runtime import TensorRTProgram
from qwen_vae_accel.backends.tensorrt.settings import BuildSettings, Capability, capability_text
from qwen_vae_accel.backends.tensorrt.streams import CudaStreams, Streams
from qwen_vae_accel.errors import BuildError
from qwen_vae_accel.plan import EngineKey
from qwen_vae_accel.sizes import Profile

logger = logging.getLogger(__name__)

_ANY_AMPERE = "any GPU of compute capability 8.0 or later"
_OR_LATER = " or later of its major version"
_CAPABILITY_FACT = "compute capability "


class TensorRTBackend(EngineBackend):
    """TensorRT engines.

    Args:
        settings: how engines are built. Engines already built run whatever they were built with.
        targets: compute capabilities to build for instead of this machine's GPU (TensorRT-RTX; no GPU needed). Such a
            backend builds; what it builds is loaded and checked on the target.
        progress: told of each step of the builder, from its threads.

    Attributes:
        last_build: what was built last. Of a build for ``targets`` it holds the network until :meth:`take_network`.
    """

    name: ClassVar[str] = "tensorrt"
    suffix: ClassVar[str] = ".trt"

    def __init__(
        self, settings: BuildSettings | None = None, targets: Sequence[Capability] = (), progress: Progress | None = None
    ) -> None:
        self.settings = settings or BuildSettings()
        self.targets = tuple(sorted(targets))
        self.last_build: BuildReport | None = None
        self._progress = progress
        self._streams: Streams = CudaStreams()

    # What it can do, and where.

    def reasons(self, environment: Environment, job: Job) -> list[str]:
        found = flavours.run_reasons(environment.packages) + ([NO_FLOAT8] if job.float8 else [])
        if environment.device_type != "cuda" or environment.capability is None:
            return [*found, f"TensorRT engines run on NVIDIA GPUs, and this is {environment.device_type}"]
        flavour = flavours.installed(environment.packages)
        for capability in self.targets or (environment.capability,):
            found += self._capability_reasons(flavour, capability, job)
        return found

    @staticmethod
    def _capability_reasons(flavour: flavours.Flavour | None, capability: Capability, job: Job) -> list[str]:
        where, found = f"compute capability {capability_text(capability)}", []
        if flavour is not None and flavour.is_rtx and capability not in flavours.RTX_CAPABILITIES:
            known = ", ".join(map(capability_text, flavours.RTX_CAPABILITIES))
            found.append(
                f"TensorRT-RTX runs on compute capabilities {known}, not {capability_text(capability)}: "
                "pip uninstall torch-tensorrt-rtx tensorrt-rtx && pip install 'qwen-vae-accel[tensorrt]'"
            )
        elif capability < flavours.CLASSIC_MINIMUM:
            found.append(f"TensorRT needs compute capability {capability_text(flavours.CLASSIC_MINIMUM)}, this is {where}")
        if job.dtype == torch.bfloat16 and capability < flavours.BFLOAT16_MINIMUM:
            found.append(f"{where} has no bfloat16: set dtype to float16 or float32")
        return found

    def build_reasons(self, environment: Environment) -> list[str]:
        """Why nothing can be built here, though engines could be run."""
        found = flavours.build_reasons(environment.packages)
        flavour = flavours.installed(environment.packages)
        if flavour is None:
            return found
        if self.targets and not flavour.is_rtx:
            found.append(
                "TensorRT times kernels on the GPU that it builds for; only TensorRT-RTX builds for a named compute "
                "capability: pip install 'qwen-vae-accel[tensorrt-rtx]'"
            )
        if flavour.is_rtx and (self.settings.hardware_compatible or self.settings.version_compatible):
            found.append("TensorRT-RTX has no hardware- or version-compatible engines: name several compute capabilities")
        return found

    def target_environment(self) -> Environment:
        """The machine that engines are built for, where ``targets`` are given: pass it on in place of the detected one."""
        return target_environment(Environment.detect(torch.device("cpu")), self.targets)

    def identity(self, environment: Environment) -> dict[str, str]:
        flavour = flavours.installed(environment.packages)
        if flavour is None:
            return {"flavour": "none"}
        version = environment.packages[flavour.library]
        targets = self.targets or ((environment.capability,) if environment.capability is not None else ())
        capability = _CAPABILITY_FACT + ", ".join(map(capability_text, targets)) if targets else "no NVIDIA GPU"
        if flavour.is_rtx:
            # Built ahead of time for a capability, finished on the GPU: any GPU of it, on Linux and Windows.
            gpu = capability
            place = common_processor(environment.platform.rpartition("-")[2])
        else:
            gpu = f"{environment.device_name}, {capability}"
            gpu = _ANY_AMPERE if self.settings.hardware_compatible else gpu
            place = environment.platform
            version += _OR_LATER if self.settings.version_compatible else ""
        return {"flavour": flavour.name, "tensorrt": version, "gpu": gpu, "platform": place}

    def accepts(self, fact: str, built: str, here: str) -> bool:
        if built == here:
            return True
        if fact == "gpu" and built == _ANY_AMPERE:
            return _capability(here) >= (8, 0)
        if fact == "gpu" and built.startswith(_CAPABILITY_FACT):
            return here in (_CAPABILITY_FACT + part for part in built.removeprefix(_CAPABILITY_FACT).split(", "))
        if fact == "tensorrt" and built.endswith(_OR_LATER):
            old, new = (_version(text.removesuffix(_OR_LATER)) for text in (built, here))
            return old[:1] == new[:1] and old <= new
        return False

    # Building.

    @contextmanager
    def telling(self, progress: Progress) -> Iterator[None]:
        """Tell ``progress`` of each step of the builder inside the block."""
        before, self._progress = self._progress, progress
        try:
            yield
        finally:
            self._progress = before

    def build(self, model: nn.Module, job: Job, key: EngineKey, path: Path) -> tuple[int, ...] | None:
        environment = Environment.detect(job.device)
        reasons = self.build_reasons(environment)
        flavour = flavours.installed(environment.packages)
        if not self.targets and environment.device_type != "cuda":
            reasons.append("there is no GPU here to build for; name one: qwen-vae-accel build --compute-capability 8.9")
        if reasons or flavour is None:
            raise BuildError("; ".join(reasons))
        targets = self.targets
        if flavour.is_rtx and not targets and environment.capability is not None:
            targets = (environment.capability,)
        logger.info(
            "building %s for %s (%d profile%s); TensorRT-RTX takes seconds, TensorRT minutes: it times kernels on the GPU",
            key.stem + self.suffix,
            ", ".join(map(capability_text, targets)) or environment.device_name,
            len(key.profiles),
            "" if len(key.profiles) == 1 else "s",
        )
        cache = None if flavour.is_rtx else self._timing_cache(path, environment)
        with torch_tensorrt_for(targets[0] if targets else None) as torch_tensorrt, _on(job.device):
            data, report = build_engine(
                model,
                job,
                key,
                torch_tensorrt,
                flavour.bindings(),
                self.settings,
                targets,
                cache,
                self._progress,
                read_network=bool(self.targets),
            )
        path.write_bytes(data)
        self.last_build = report
        logger.info("built %s: %.1f s in TensorRT, %.1f MB", key.stem, report.seconds, report.nbytes / 1e6)
        return report.scratch

    def take_network(self) -> Program | None:
        report = self.last_build
        if report is None or report.network is None:
            return None
        self.last_build = dataclasses.replace(report, network=None)
        if isinstance(report.network, NetworkError):
            raise report.network
        return NetworkProgram(report.network)

    @staticmethod
    def _timing_cache(path: Path, environment: Environment) -> Path:
        """A file in the engine directory; ``path`` is in its folder of unfinished files."""
        folder = path.parent.parent if path.parent.name == ".tmp" else path.parent
        gpu = "".join(c if c.isalnum() else "_" for c in environment.device_name)
        return folder / ".timing" / f"{gpu}.bin"

    # Loading.

    def load(self, image: EngineImage, job: Job, key: EngineKey) -> TensorRTProgram:
        engine = self._open(image, job)
        differences = [*engine.differences(job), *engine.range_differences(job, key)]
        if differences:
            raise TensorRTError("; ".join(differences))
        return TensorRTProgram(engine, job.dtype, job.device, self._streams, len(image.data))

    def scratch(self, program: Program) -> tuple[int, ...] | None:
        return program.engine.scratch if isinstance(program, TensorRTProgram) else None

    def profiles(self, image: EngineImage, job: Job) -> tuple[Profile, ...]:
        engine = self._open(image, job)
        differences = engine.differences(job)
        if differences:
            raise TensorRTError(f"{image.path.name} is not the VAE's {job.method}r: {'; '.join(differences)}")
        return engine.sizes(job.method, job.topology.scale)

    def _open(self, image: EngineImage, job: Job) -> TensorRTEngine:
        flavour = flavours.installed(Environment.detect(job.device).packages)
        if flavour is None:
            raise TensorRTError(flavours.run_reasons({})[0])
        try:
            trt = flavour.bindings()
        except ImportError as error:
            raise TensorRTError(f"{flavour.name} is installed but does not load: {error}") from error
        with _on(job.device):
            return deserialize(trt, image.data, image.path.name)


def _on(device: torch.device) -> AbstractContextManager[object]:
    """``device`` as the current one; the CPU leaves things as they are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _capability(text: str) -> Capability:
    major, _, minor = text.rpartition(_CAPABILITY_FACT)[2].partition(".")
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else (0, 0)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdigit())

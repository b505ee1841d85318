"""What a backend is.

A *direct* backend makes a program from the VAE's weights when it is needed. An *engine* backend compiles a network into
a file first, and loads the file later, perhaps in another process. Either way a program maps ``[1 or B, C, H, W]`` to
``[B, C', H', W']`` on the caller's current stream, and gives a fresh contiguous tensor in its compute dtype.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from qwen_vae_accel.config import AccelConfig
from qwen_vae_accel.files import read_file
from qwen_vae_accel.kernels.limits import Plan
from qwen_vae_accel.model import ModelSource, Topology
from qwen_vae_accel.plan import EngineKey
from qwen_vae_accel.share import Share
from qwen_vae_accel.sizes import Profile, Size

_PACKAGES = ("torch", "triton", "diffusers", "torch-tensorrt", "torch-tensorrt-rtx", "tensorrt", "tensorrt-rtx")


@dataclass(frozen=True, slots=True)
class Environment:
    """The machine and its software, as a value, so that every decision about them can be tested anywhere.

    Backends, engines, benchmarks and commands know a machine by nothing else: :meth:`describe` is its text, and
    :func:`qwen_vae_accel.engines.selfcheck.machine_id` its short name. The kernels, which lie below, have two narrower values:
    ``kernels.gpu.Gpu`` for choosing a kernel, and ``kernels.tuning.stored.Machine`` for what measured times are tied to.

    Attributes:
        device_type: ``"cpu"`` or ``"cuda"``.
        device_name: the GPU's name, or the CPU's instruction set.
        capability: CUDA compute capability, None on the CPU.
        cuda: CUDA version of torch, None on the CPU.
        driver: version of the NVIDIA driver, None where it is not known.
        platform: operating system and processor, such as ``linux-x86_64``.
        packages: versions of the installed packages that matter to some backend.
        half_dtypes: names of the 16-bit dtypes that a CPU has instructions for, as far as PyTorch may use them; empty on a GPU.
    """

    device_type: str
    device_name: str
    capability: tuple[int, int] | None = None
    cuda: str | None = None
    driver: str | None = None
    platform: str = "linux-x86_64"
    packages: Mapping[str, str] = field(default_factory=dict)
    half_dtypes: tuple[str, ...] = ()

    @classmethod
    def detect(cls, device: torch.device) -> Environment:
        """Read the facts of this machine, for work on ``device``."""
        packages = {}
        for name in _PACKAGES:
            try:
                packages[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                continue
        packages["torch"] = str(torch.__version__)
        where = f"{platform.system().lower()}-{platform.machine()}"
        if device.type != "cuda":
            half = _cpu_half_dtypes() if device.type == "cpu" else ()
            name = torch.backends.cpu.get_cpu_capability()
            return cls(device.type, name, platform=where, packages=packages, half_dtypes=half)
        if not torch.cuda.is_available():  # where hooks are told to compute, or a driver that is gone
            return cls("cuda", "no GPU", platform=where, packages=packages)
        properties = torch.cuda.get_device_properties(device)
        return cls(
            device_type="cuda",
            device_name=properties.name,
            capability=(properties.major, properties.minor),
            cuda=torch.version.cuda,
            driver=_nvidia_driver(),
            platform=where,
            packages=packages,
        )

    def describe(self) -> dict[str, str]:
        """Return the facts that are known as flat text by name, for manifests and reports."""
        facts = {
            "device": self.device_type,
            "device_name": self.device_name,
            "compute_capability": f"{self.capability[0]}.{self.capability[1]}" if self.capability else None,
            "cuda": self.cuda,
            "driver": self.driver,
            "platform": self.platform,
            "half_dtypes": ", ".join(self.half_dtypes) or None,
            **{f"package:{name}": version for name, version in sorted(self.packages.items())},
        }
        return {name: value for name, value in facts.items() if value is not None}

    def arithmetic(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype to compute a network in whose inputs and outputs are ``dtype``.

        A CPU without instructions for a 16-bit dtype converts at every step, and takes many times longer than in float32. There
        the whole network computes in float32, and only its input and output are rounded: never less exact.
        """
        half = str(dtype).removeprefix("torch.")
        emulated = self.device_type == "cpu" and dtype.itemsize == 2 and half not in self.half_dtypes
        return torch.float32 if emulated else dtype


# Flags of x86 processors that multiply in a 16-bit dtype. oneDNN also accepts AVX-512 alone for bfloat16, and converts there.
_HALF_FLAGS = {
    "bfloat16": {"avx512_bf16", "amx_bf16", "avx_ne_convert"},
    "float16": {"avx512_fp16", "amx_fp16", "avx_ne_convert"},
}


@functools.cache
def _cpu_half_dtypes() -> tuple[str, ...]:
    """The 16-bit dtypes that this CPU multiplies in, within the limit that ``ONEDNN_MAX_CPU_ISA`` sets."""
    if not torch.backends.mkldnn.is_available():
        return ()
    checks = {"bfloat16": "_is_mkldnn_bf16_supported", "float16": "_is_mkldnn_fp16_supported"}
    usable = [name for name, check in checks.items() if getattr(torch.ops.mkldnn, check)()]
    flags = _x86_flags()
    return tuple(name for name in usable if not flags or flags & _HALF_FLAGS[name])


def _x86_flags() -> set[str]:
    """The features that Linux lists for an x86 processor; empty where it lists none."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return set()
    line = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return set(line.partition(":")[2].split())


def _nvidia_driver() -> str | None:
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return None
    words = text.split("\n", 1)[0].split()
    return next((word for word in words if word[:1].isdigit() and "." in word), None)


NO_FLOAT8 = "it does not compute in float8; the fused backend does"


@dataclass(frozen=True, slots=True)
class Job:
    """What a program is wanted for.

    ``dtype`` is that of its input and output; with ``float8`` a backend that can computes the costly convolutions in
    e4m3, the other layers in ``dtype``. ``memory_limit`` is that of the configuration. ``share``: of several processes that
    compute every image together.
    """

    method: str
    topology: Topology = field(hash=False)  # one VAE has one; jobs are looked up at every call
    dtype: torch.dtype
    device: torch.device
    float8: bool = False
    memory_limit: int | float | None = None
    share: Share | None = None

    @classmethod
    def of(
        cls,
        config: AccelConfig,
        method: str,
        topology: Topology,
        device: torch.device,
        stored: torch.dtype,
        environment: Environment,
        share: Share | None = None,
    ) -> Job:
        """Make the job that ``config`` asks of ``method`` for weights of dtype ``stored`` on ``device`` of ``environment``."""
        dtype = environment.arithmetic(config.compute_dtype(method, stored))
        return cls(method, topology, dtype, device, config.float8(method), config.memory_limit, share)

    @property
    def in_channels(self) -> int:
        """Channels of the network's input."""
        return self.topology.image_channels if self.method == "encode" else self.topology.z_dim

    @property
    def multiple(self) -> int:
        """Sides of the network's input must be multiples of this."""
        return self.topology.multiple if self.method == "encode" else 1

    def input_hw(self, size: Size) -> tuple[int, int]:
        """Height and width of the network's input for an image of ``size``."""
        scale = 1 if self.method == "encode" else self.topology.scale
        return size.height // scale, size.width // scale


class Program(Protocol):
    """Something that runs one network. ``profile`` numbers an engine's optimization profile; others ignore it."""

    @property
    def nbytes(self) -> int:
        """Bytes of device memory that the program keeps between its runs."""

    def __call__(self, x: Tensor, profile: int = 0) -> Tensor: ...


class Backend(ABC):
    """Common to all: a name, and the reasons why it cannot do a job."""

    name: ClassVar[str]

    @abstractmethod
    def reasons(self, environment: Environment, job: Job) -> list[str]:
        """Why this backend cannot do ``job`` in ``environment``; empty if it can."""


class DirectBackend(Backend):
    """A backend that needs no file: any size, any batch, at once."""

    can_tile: ClassVar[bool] = (
        False  # its programs have ``tiled(x, rows)``, which bounds the memory by that of so many image rows
    )

    @abstractmethod
    def program(self, source: ModelSource, job: Job) -> Program:
        """A program for ``job`` over the current weights of ``source``."""

    def plan(self, job: Job, size: Size) -> Plan | None:
        """Plan what a call of ``job`` for one image of ``size`` takes, without weights or work; None where it is not known."""
        return None

    def bands(self, program: Program, shape: Sequence[int], rows: int) -> tuple[int, str]:
        """Tell in how many bands of rows ``program`` runs an input of ``shape``, and why; ``rows`` as for ``tiled``, or 0.

        One band, without a reason, for backends that do not tell.
        """
        return 1, ""


@dataclass(frozen=True, slots=True)
class EngineImage:
    """An engine file as it was when it was read: what is checked is what is loaded, whatever becomes of the file.

    Attributes:
        path: of the file, for messages.
        data: its bytes.
        sha256: of these bytes, hex.
    """

    path: Path
    data: bytes = field(repr=False)
    sha256: str

    @classmethod
    def read(cls, path: Path) -> EngineImage:
        """The file as it is now; OSError if it cannot be read or is not a regular file."""
        data = read_file(path)
        return cls(path, data, hashlib.sha256(data).hexdigest())


class EngineBackend(Backend):
    """A backend that compiles networks into engine files."""

    suffix: ClassVar[str]

    @abstractmethod
    def identity(self, environment: Environment) -> dict[str, str]:
        """The facts an engine file is tied to; a file is loaded only where :meth:`accepts` takes all of them."""

    def accepts(self, fact: str, built: str, here: str) -> bool:
        """Whether a file whose identity says ``built`` may be run where this machine's says ``here``."""
        return built == here

    @abstractmethod
    def build(self, model: nn.Module, job: Job, key: EngineKey, path: Path) -> tuple[int, ...] | None:
        """Compile ``model`` (2-D network in ``job``'s dtype and device) for the sizes of ``key`` into ``path``.

        Returns:
            Bytes of scratch memory that a run will need, per profile, where the compiler says so; else None.
        """

    @abstractmethod
    def load(self, image: EngineImage, job: Job, key: EngineKey) -> Program:
        """Load the engine ``image``, whose bytes are known to be good."""

    def scratch(self, program: Program) -> tuple[int, ...] | None:
        """Bytes of scratch memory that a run of a loaded engine needs at most, per profile; None where it does not tell."""
        return None

    def take_network(self) -> Program | None:
        """The network of the last build as its compiler was handed it, to be computed without that compiler.

        None where the backend does not tell. The backend forgets it.

        Raises:
            BuildError: if it holds what is not known here.
        """
        return None

    def profiles(self, image: EngineImage, job: Job) -> tuple[Profile, ...] | None:
        """The optimization profiles that an engine says it has, in their order; one for a static engine.

        None where engines of this backend do not tell. This runs the engine's code.

        Raises:
            EngineError: if it is no engine of the network of ``job``.
        """
        return None


def export_network(
    network: nn.Module, x: Tensor, low: Sequence[int], high: Sequence[int], multiple: int
) -> torch.export.ExportedProgram:
    """Export ``network`` for inputs like ``x [1, C, H, W]`` of any height and width from ``low`` to ``high``.

    Both are ``(height, width)`` and go in steps of ``multiple``, which divides them.
    """

    def side(name: str, least: int, most: int) -> Any:
        # A side of one size gets a second one: conditions on a single symbol torch.export solves, and so loses sizes.
        steps = torch.export.Dim(name, min=least // multiple, max=max(most, least + multiple) // multiple)
        return steps if multiple == 1 else multiple * steps

    varies = tuple(low) != tuple(high)
    sides = ({2: side("height", low[0], high[0]), 3: side("width", low[1], high[1])},) if varies else None
    with torch.no_grad():
        # Stride comparisons of a one-channel tensor would otherwise end up as conditions on the sides.
        return torch.export.export(network, (x,), dynamic_shapes=sides, prefer_deferred_runtime_asserts_over_guards=True)


def default_device() -> torch.device:
    """The device that command-line work runs on: the current GPU where there is one."""
    if torch.cuda.is_available() and not os.environ.get("QWEN_VAE_ACCEL_CPU"):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")

"""Which TensorRT is installed: the data-centre product, or TensorRT-RTX. Decided from package versions alone; no GPU needed.

Both come with a build of Torch-TensorRT of their own, and both of those install one module, ``torch_tensorrt``. The
engines of one cannot be run by the other.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType

from qwen_vae_accel.backends.tensorrt.settings import Capability

# What TensorRT-RTX builds for and loads on (the members of its ComputeCapability); it refuses 9.0 and 10.x.
RTX_CAPABILITIES: tuple[Capability, ...] = ((7, 5), (8, 0), (8, 6), (8, 9), (12, 0), (12, 1))
# TensorRT 10.15 and later, which Torch-TensorRT 2.11 and later pin.
CLASSIC_MINIMUM: Capability = (7, 5)
BFLOAT16_MINIMUM: Capability = (8, 0)


@dataclass(frozen=True, slots=True)
class Flavour:
    """One TensorRT product.

    Attributes:
        name: as engines' identities and messages say it.
        extra: of this package, that installs it.
        compiler: distribution of its Torch-TensorRT.
        library: distribution of TensorRT itself.
        module: Python module of its bindings.
    """

    name: str
    extra: str
    compiler: str
    library: str
    module: str

    @property
    def is_rtx(self) -> bool:
        """Whether it is TensorRT-RTX."""
        return self.module == "tensorrt_rtx"

    def bindings(self) -> ModuleType:
        """TensorRT's Python module. Running an engine needs nothing of Torch-TensorRT.

        Raises:
            ImportError: if it is not installed, or its libraries do not load.
        """
        return importlib.import_module(self.module)


CLASSIC = Flavour("TensorRT", "tensorrt", "torch-tensorrt", "tensorrt", "tensorrt")
RTX = Flavour("TensorRT-RTX", "tensorrt-rtx", "torch-tensorrt-rtx", "tensorrt-rtx", "tensorrt_rtx")


def installed(packages: Mapping[str, str]) -> Flavour | None:
    """The flavour whose library is among ``packages``; the one Torch-TensorRT is there for, where both are."""
    present = [flavour for flavour in (CLASSIC, RTX) if flavour.library in packages]
    return next((flavour for flavour in present if flavour.compiler in packages), present[0] if present else None)


def run_reasons(packages: Mapping[str, str]) -> list[str]:
    """Why engines cannot be run with ``packages``."""
    if installed(packages) is not None:
        return []
    return [
        "TensorRT is not installed: pip install 'qwen-vae-accel[tensorrt]' (data-centre GPUs) "
        "or 'qwen-vae-accel[tensorrt-rtx]' (RTX GPUs)"
    ]


def build_reasons(packages: Mapping[str, str]) -> list[str]:
    """Why engines cannot be built with ``packages``, though they might be run."""
    reasons = run_reasons(packages)
    if CLASSIC.compiler in packages and RTX.compiler in packages:
        reasons.append(
            f"{CLASSIC.compiler} and {RTX.compiler} are both installed, but both are the module torch_tensorrt: "
            "uninstall both, then install one"
        )
    flavour = installed(packages)
    if flavour is not None and flavour.compiler not in packages:
        reasons.append(f"{flavour.compiler} is not installed: pip install 'qwen-vae-accel[{flavour.extra}]'")
    return reasons

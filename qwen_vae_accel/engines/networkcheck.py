"""The network that a compiler was handed against the exact model, where nothing here can run the engine made of it.

It proves the export, the conversion, the weights and the sizes. What the compiler makes of the network is not seen: the
engine itself is checked where it is first loaded, like any other.
"""

from __future__ import annotations

from pathlib import Path

import torch

from qwen_vae_accel.backends.base import Job, Program
from qwen_vae_accel.engines import selfcheck
from qwen_vae_accel.engines.manifest import EngineRecord, Verification, check_name
from qwen_vae_accel.errors import EngineRefusedError
from qwen_vae_accel.model import ModelSource
from qwen_vae_accel.plan import EngineKey
from qwen_vae_accel.sizes import Profile, Size

# In place of a machine, in the names of checks.
NETWORK = "network"
# Larger optima take a CPU minutes each; there a range is checked at its minimum.
_PIXELS = 512 * 512


def size_checked(profile: Profile) -> Size:
    """The size at which the values of a profile are checked: its optimum, or for a range with a large one its minimum."""
    small = profile.optimum.width * profile.optimum.height <= _PIXELS
    return profile.optimum if small or profile.minimum == profile.maximum else profile.minimum


def check(source: ModelSource, job: Job, key: EngineKey, network: Program, engine: Path) -> dict[str, Verification]:
    """Compute ``network`` for every profile of ``key``: values at one size, shapes at its minimum, optimum and maximum.

    Returns:
        The results by their names in the record of ``engine``; all have passed. Their ``machine`` says the size.

    Raises:
        EngineRefusedError: if the network is not the exact one, with the size and the difference.
    """
    found = {}
    for index, profile in enumerate(key.profiles):
        size = profile.optimum
        try:
            for size in dict.fromkeys((profile.minimum, profile.optimum, profile.maximum)):
                check_shape(job, network, size, index)
            size = size_checked(profile)
            result = selfcheck.check(source, job, network, size, index, _where(profile))
        except Exception as error:
            raise EngineRefusedError(str(engine), [f"its network does not run at {size}: {error}"]) from error
        if not result.passed:
            difference = f"its network is not the exact model's at {size}: {result.errors()}"
            raise EngineRefusedError(str(engine), [difference])
        found[check_name(NETWORK, profile)] = result
    return found


def _where(profile: Profile) -> str:
    size = size_checked(profile)
    return f"network checked at {size}" + ("" if size == profile.optimum else f", not at the optimum {profile.optimum}")


def check_shape(job: Job, network: Program, size: Size, profile: int) -> None:
    """Run ``network`` for images of ``size`` without values; raises ValueError if the output's shape is not the VAE's."""
    height, width = job.input_hw(size)
    output = network(torch.empty(1, job.in_channels, height, width, dtype=job.dtype, device="meta"), profile)
    scale = job.topology.scale
    encoded = [1, 2 * job.topology.z_dim, height // scale, width // scale]
    expected = encoded if job.method == "encode" else [1, job.topology.image_channels, height * scale, width * scale]
    if list(output.shape) != expected:
        raise ValueError(f"it gives {list(output.shape)}, expected {expected}")


def of_record(record: EngineRecord) -> dict[str, Verification]:
    """The results that a record holds, by profile."""
    names = {profile.name: check_name(NETWORK, profile) for profile in record.profiles}
    return {profile: record.verification[name] for profile, name in names.items() if name in record.verification}


def text(result: Verification) -> str:
    """``network checked at 512x512: 61.2 dB``."""
    return f"{result.machine}: {result.psnr_db:.1f} dB"

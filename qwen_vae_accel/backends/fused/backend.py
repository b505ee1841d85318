"""Backend ``fused``: the published networks in hand-written kernels. Any size and batch, nothing to build beforehand."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from qwen_vae_accel.backends.base import DirectBackend, Environment, Job, Program
from qwen_vae_accel.backends.fused.calibration import calibrated_peaks, measured_peaks
from qwen_vae_accel.errors import BackendUnavailableError
from qwen_vae_accel.kernels import FusedConfig, FusedDecoder, FusedEncoder, device_reasons, network_reasons
from qwen_vae_accel.kernels.float8 import block_layers, calibrated_layers, input_scales
from qwen_vae_accel.kernels.gpu import describe_gpu, runs_sm90
from qwen_vae_accel.kernels.limits import Plan, limit_bytes
from qwen_vae_accel.kernels.network import describe
from qwen_vae_accel.kernels.tuning.selection import Tuning
from qwen_vae_accel.kernels.tuning.stored import Machine, read_tuned
from qwen_vae_accel.model import ModelSource
from qwen_vae_accel.progress import progress_bar
from qwen_vae_accel.sizes import Size

logger = logging.getLogger(__name__)

# float16 ends at 65504. The calibration input is one sample of many: what it leaves is the margin for the others.
_FLOAT16_LIMIT = 65504 / 4


def _tuning(folder: Path | None, device: torch.device) -> Tuning:
    """The configurations that ``qwen-vae-accel tune`` found for this GPU in the engine directory, or those that ship."""
    tuned = None if folder is None else read_tuned(folder, Machine.of(device), describe_gpu(device))
    return Tuning() if tuned is None else tuned.tuning()


class FusedProgram:
    """The network as kernels; holds its weights packed for them."""

    def __init__(self, network: FusedDecoder | FusedEncoder) -> None:
        self.network = network

    @property
    def nbytes(self) -> int:
        """Bytes of GPU memory that the packed weights take."""
        return self.network.nbytes

    def __call__(self, x: Tensor, profile: int = 0) -> Tensor:
        return self.network(x.contiguous())

    def tiled(self, x: Tensor, rows: int) -> Tensor:
        """Run ``x [B, C, H, W]`` in bands that take no more than ``rows`` image rows in one piece; the result is the same."""
        return self.network(x.contiguous(), rows)


class FusedBackend(DirectBackend):
    """Triton kernels on NVIDIA GPUs of compute capability 8.0 and later."""

    name: ClassVar[str] = "fused"
    can_tile: ClassVar[bool] = True

    def reasons(self, environment: Environment, job: Job) -> list[str]:
        """Why the kernels cannot do ``job``: the GPU, the dtype, and every layer of its network that has no kernel."""
        device = torch.device(environment.device_type)
        reasons = device_reasons(device, job.dtype, environment.capability, float8=job.float8)
        try:
            reasons += network_reasons(describe(job.topology, job.method), sm90=runs_sm90(environment.capability))
        except ValueError as error:
            reasons.append(f"it does not know this {job.method}r: {error}")
        return reasons

    def program(self, source: ModelSource, job: Job) -> FusedProgram:
        """Pack the weights, and compile what the network needs.

        Raises:
            BackendUnavailableError: float16 or float8 cannot hold what these weights compute, or a kernel does not
                compile here.
        """
        if job.dtype == torch.float16:
            self._check_float16(source, job)
        kind = FusedEncoder if job.method == "encode" else FusedDecoder
        state = source.state(job.method)
        float8 = self._float8_scales(source, job, state) if job.float8 else {}
        config = FusedConfig(tuning=_tuning(source.folder, job.device), memory_limit=job.memory_limit)
        network = kind(state, dtype=job.dtype, device=job.device, config=config, float8=float8, share=job.share)
        self._compile(network, job)
        return FusedProgram(network)

    def plan(self, job: Job, size: Size) -> Plan:
        """Plan what a call takes on the GPU of ``job``, with the limit as it is now; see :meth:`DirectBackend.plan`."""
        network, meta = describe(job.topology, job.method), torch.device("meta")
        state = {name: torch.empty(shape, dtype=job.dtype, device=meta) for name, shape in network.parameters().items()}
        scales = dict.fromkeys([*block_layers(network), *calibrated_layers(network)], 1.0) if job.float8 else {}
        limit = None if job.memory_limit is None else limit_bytes(job.memory_limit, job.device)
        config = FusedConfig(gpu=describe_gpu(job.device), memory_limit=limit)
        kind = FusedEncoder if job.method == "encode" else FusedDecoder
        shape = (1, job.in_channels, *job.input_hw(size))
        plan = kind(state, dtype=job.dtype, device=meta, config=config, float8=scales).plan(shape)
        return replace(plan, held_bytes=math.prod(shape) * job.dtype.itemsize + plan.output_bytes)  # a graph's, on a GPU

    def bands(self, program: Program, shape: Sequence[int], rows: int) -> tuple[int, str]:
        """Tell what the program has planned for inputs of ``shape``."""
        assert isinstance(program, FusedProgram)
        plan = program.network.plan(tuple(shape), rows)
        return plan.bands, plan.reason

    def _compile(self, network: FusedDecoder | FusedEncoder, job: Job) -> None:
        """Compile ahead; what Triton or NVRTC cannot do here is a reason for the next backend, not the end of a request."""
        try:
            with progress_bar() as update:
                network.compile(lambda done, total: update(f"kernels of the {job.method}r", done, total))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            reason = f"a kernel does not compile here ({type(error).__name__}: {lines[0][:300]})"
            raise BackendUnavailableError(self.name, [reason]) from error

    def _float8_scales(self, source: ModelSource, job: Job, state: Mapping[str, Tensor]) -> dict[str, float]:
        try:
            return input_scales(state, calibrated_peaks(source, job))
        except ValueError as error:
            raise BackendUnavailableError(self.name, [str(error)]) from error

    def _check_float16(self, source: ModelSource, job: Job) -> None:
        """Measure the activations of these weights in float32; refuse float16 where its range would not hold them."""
        peaks = measured_peaks(source, job)
        logger.info("float16 range of %s: largest |x| by level %s", job.method, {k: round(v, 1) for k, v in peaks.items()})
        worst = max(peaks, key=lambda name: peaks[name])
        if not peaks[worst] < _FLOAT16_LIMIT:
            raise BackendUnavailableError(
                self.name,
                [f"activations reach {peaks[worst]:.0f} at {worst}; float16 holds 65504 and needs a margin of 4: use bfloat16"],
            )

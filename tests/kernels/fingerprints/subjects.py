"""What is fingerprinted: networks, GPUs and sizes, none of which needs a GPU or weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch

from qwen_vae_accel.kernels import FusedConfig, FusedDecoder, FusedEncoder
from qwen_vae_accel.kernels.float8 import block_layers, calibrated_layers
from qwen_vae_accel.kernels.gpu import Gpu
from qwen_vae_accel.kernels.network import QWEN_IMAGE, QWEN_IMAGE_21, Network, describe
from qwen_vae_accel.kernels.sm90 import conv3x3, driver, layers, nvrtc
from qwen_vae_accel.kernels.sm90.layers import Sm90Layers
from qwen_vae_accel.kernels.sm90.schedules import Room

META = torch.device("meta")
# "2.1": of Qwen-Image 2.1, on the one GPU that has its kernels.
NETWORKS = ("decode", "encode", "decode float8", "decode 2.1", "encode 2.1", "decode 2.1 float8")
GPUS = {
    "H200": Gpu(132, 232448, True, True),
    "H200 without NVRTC": Gpu(132, 232448, True, False),
    "A100": Gpu(108, 166912, False, False),
    "RTX 4090": Gpu(128, 101376, False, False),
}
CAPABILITIES = {"H200": 90, "H200 without NVRTC": 90, "A100": 80, "RTX 4090": 89}
# Batch, height and width of the image; the first VAE's encoder also takes sides that no latent has.
_SIZES = ((1, 512, 512), (1, 1024, 1024), (1, 928, 1664), (1, 1328, 1328), (2, 480, 848))
_FLOAT8_SCALE = 0.5


def sizes_of(name: str) -> tuple[tuple[int, int, int], ...]:
    """Those of one network; Qwen-Image 2.1's takes multiples of 16 alone."""
    return (*_SIZES, (3, 80, 96) if "2.1" in name else (3, 72, 91))


def gpus_of(name: str) -> list[str]:
    return ["H200"] if "2.1" in name else list(GPUS)


def network_of(name: str) -> Network:
    return describe(QWEN_IMAGE_21 if "2.1" in name else QWEN_IMAGE, name.split()[0])


def float8_layers(network: Network) -> dict[str, float]:
    return dict.fromkeys([*block_layers(network), *calibrated_layers(network)], _FLOAT8_SCALE)


def make(name: str, gpu: str, dtype: torch.dtype, state: dict[str, torch.Tensor] | None = None) -> FusedDecoder | FusedEncoder:
    """A network whose weights are ``state``, or on the ``meta`` device; its sm90 layers believe they are on a GPU."""
    network = network_of(name)
    kind = FusedDecoder if network.decodes else FusedEncoder
    state = state or {key: torch.empty(shape, device=META) for key, shape in network.parameters().items()}
    device = next(iter(state.values())).device
    config = FusedConfig(graphs=0, gpu=GPUS[gpu])
    float8 = float8_layers(network) if "float8" in name else None
    return kind(state, dtype=dtype, device=device, config=config, float8=float8)


def input_shape(name: str, size: tuple[int, int, int]) -> tuple[int, int, int, int]:
    network, (batch, height, width) = network_of(name), size
    return (batch, network.in_channels, *network.input_size(height, width))


@contextlib.contextmanager
def pretended_gpu() -> Iterator[None]:
    """Inside, layers of sm90 can be made and prepared on the ``meta`` device."""

    def real_reasons(capability, mode, channels, out, dtype):
        return unsupported((9, 0), mode, channels, out, dtype)

    unsupported = conv3x3.unsupported
    with contextlib.ExitStack() as stack:
        for target, name, value in (
            (torch.cuda, "current_device", lambda: 0),
            (conv3x3, "room_of", lambda device: Room(132)),
            (torch.cuda, "device", lambda device: contextlib.nullcontext()),
            (nvrtc, "library", nvrtc.library if nvrtc.library() else object),
            (driver, "library", object),
            (conv3x3, "unsupported", real_reasons),
            (layers, "unsupported", real_reasons),
            (Sm90Layers, "to_host", lambda self, weights: weights),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        yield

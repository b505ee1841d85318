"""What is fingerprinted: networks, GPUs and sizes, none of which needs a GPU or weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch

from qwen_vae_accel.kernels import FusedConfig, FusedDecoder, FusedEncoder
from qwen_vae_accel.kernels.float8 import block_layers, calibrated_layers
from qwen_vae_accel.kernels.gpu import Gpu
from qwen_vae_accel.kernels.network import published
from qwen_vae_accel.kernels.sm90 import conv3x3, driver, layers, nvrtc
from qwen_vae_accel.kernels.sm90.layers import Sm90Layers
from qwen_vae_accel.kernels.sm90.schedules import Room

META = torch.device("meta")
NETWORKS = ("decode", "encode", "decode float8")
GPUS = {
    "H200": Gpu(132, 232448, True, True),
    "H200 without NVRTC": Gpu(132, 232448, True, False),
    "A100": Gpu(108, 166912, False, False),
    "RTX 4090": Gpu(128, 101376, False, False),
}
CAPABILITIES = {"H200": 90, "H200 without NVRTC": 90, "A100": 80, "RTX 4090": 89}
# Batch, height and width of the image; the encoder also takes sides that no latent has.
SIZES = ((1, 512, 512), (1, 1024, 1024), (1, 928, 1664), (1, 1328, 1328), (2, 480, 848), (3, 72, 91))
_FLOAT8_SCALE = 0.5


def float8_layers() -> dict[str, float]:
    network = published("decode")
    return dict.fromkeys([*block_layers(network), *calibrated_layers(network)], _FLOAT8_SCALE)


def make(name: str, gpu: str, dtype: torch.dtype, state: dict[str, torch.Tensor] | None = None) -> FusedDecoder | FusedEncoder:
    """A network whose weights are ``state``, or on the ``meta`` device; its sm90 layers believe they are on a GPU."""
    method = name.split()[0]
    kind = FusedEncoder if method == "encode" else FusedDecoder
    state = state or {key: torch.empty(shape, device=META) for key, shape in published(method).parameters().items()}
    device = next(iter(state.values())).device
    config = FusedConfig(graphs=0, gpu=GPUS[gpu])
    return kind(state, dtype=dtype, device=device, config=config, float8=float8_layers() if "float8" in name else None)


def input_shape(name: str, size: tuple[int, int, int]) -> tuple[int, int, int, int]:
    batch, height, width = size
    return (batch, 3, height, width) if name == "encode" else (batch, 16, height // 8, width // 8)


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

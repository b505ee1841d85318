"""A VAE of ComfyUI whose images are decoded and encoded by qwen_vae_accel; the VAE that was given stays as it is."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any

from qwen_vae_accel import accelerate

logger = logging.getLogger(__name__)

# Values per pixel of an image in the dtype of the VAE that a decode and an encode take at most, and bytes that copies of the
# weights take: the largest on an H100 and an H200, of every backend that ComfyUI's device can have, at 512x512 and above
# (tests/comfyui holds them against benchmarks/results).
DECODE, ENCODE = 600, 450
COPIES = 200 * 2**20
_SCALE = 8


class AccelerateVAE:
    """The node."""

    DESCRIPTION = (
        "Decodes and encodes single images of the VAE of Qwen-Image and Wan 2.1 many times faster, with the same images, in a "
        "fraction of the memory. Video is left to ComfyUI."
    )
    CATEGORY = "latent"
    RETURN_TYPES = ("VAE",)
    FUNCTION = "accelerate"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The inputs, in the form that ComfyUI asks for."""
        backends = ["auto", "fused", "tensorrt", "inductor", "eager"]
        where = "Folder of engines, for tensorrt and inductor, as built by `qwen-vae-accel build`."
        return {
            "required": {"vae": ("VAE",)},
            "optional": {
                "backend": (backends, {"default": "auto", "tooltip": "auto takes the fastest that can run here."}),
                "engine_dir": ("STRING", {"default": "", "tooltip": where}),
            },
        }

    def accelerate(self, vae: Any, backend: str = "auto", engine_dir: str = "") -> tuple[Any]:
        """A copy of ``vae`` with its own methods, over the same weights.

        Raises:
            UnsupportedVAEError: if it is another VAE.
            BackendUnavailableError, ConfigError, EngineError: if ``backend`` or ``engine_dir`` cannot be used.
        """
        from comfy.patcher_extension import CallbacksMP

        # A shallow copy has the same layers, so ComfyUI loads, unloads and patches the weights of both.
        fast = copy.copy(vae)
        fast.first_stage_model = copy.copy(vae.first_stage_model)
        handle = accelerate(fast.first_stage_model, backend=backend, engine_dir=engine_dir.strip() or None)
        fast.patcher = vae.patcher.clone()

        def detached(patcher: Any, unpatch_all: bool = True) -> None:
            if unpatch_all:  # it is also detached, and keeps its memory, whenever it is loaded again
                handle.release()

        # Tiles of an image are blended before they are clamped, and here each one would be clamped before.
        fast.decode_tiled, fast.decode_tiled_3d = vae.decode_tiled, vae.decode_tiled_3d
        fast.patcher.add_callback(CallbacksMP.ON_DETACH, detached)
        fast.memory_used_decode = _estimate(vae.memory_used_decode, DECODE, _SCALE)
        fast.memory_used_encode = _estimate(vae.memory_used_encode, ENCODE, 1)
        return (fast,)


def _estimate(theirs: Callable[..., float], values: int, scale: int) -> Callable[..., float]:
    """ComfyUI's estimate of the bytes of one call, and for an image ours where that is less."""

    def estimate(shape: Sequence[int], dtype: Any) -> float:
        if len(shape) != 5 or shape[2] != 1:
            return theirs(shape, dtype)
        ours = values * shape[3] * shape[4] * scale**2 * dtype.itemsize + COPIES
        return min(theirs(shape, dtype), ours)

    return estimate

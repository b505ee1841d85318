"""The arithmetic of diffusers' post-processing on the device that holds the image, and one copy to the host.

diffusers copies the image to the host first and scales it there, in float32 numpy. Multiplication, rounding half to even
and the cast are the same operations on either side, so the bytes are the same; only a third of them travels.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# On the CPU a band of an image stays in cache through the chain of operations; a GPU is best left with the whole.
_CPU_BAND_ELEMENTS = 1 << 17


def to_pixels(image: Tensor, denormalize: Callable[[Tensor], Tensor]) -> np.ndarray | None:
    """``image [B, C, H, W]`` -> uint8 ``[B, H, W, C]`` on the host; None where a value is outside [0, 1] or NaN.

    Args:
        image: float32, bfloat16 or float16, on the CPU or a CUDA device, not empty.
        denormalize: ``[B, C, rows, W]`` -> the same in [0, 1], element by element, in the dtype of ``image``.
    """
    batch, channels, height, width = image.shape
    pixels = torch.empty((batch, height, width, channels), dtype=torch.uint8, device=image.device)
    rows = height if image.is_cuda else max(1, _CPU_BAND_ELEMENTS // (batch * channels * width))
    inside = []
    for band, out in zip(image.split(rows, dim=2), pixels.split(rows, dim=1), strict=True):
        values = denormalize(band)
        low, high = torch.aminmax(values)
        inside.append((low >= 0) & (high <= 1))  # false for NaN
        out.permute(0, 3, 1, 2).copy_(values.float().mul(255).round_())
    host = to_host(pixels)
    return host.numpy() if all(inside) else None


def to_array(image: Tensor) -> np.ndarray:
    """``image [B, C, H, W]`` -> float32 ``[B, H, W, C]`` on the host, with the strides that diffusers gives it."""
    return to_host(image.permute(0, 2, 3, 1).float()).numpy()


def to_host(x: Tensor) -> Tensor:
    """``x`` in host memory: one asynchronous copy into pinned memory from a GPU, ``x`` itself on the CPU."""
    if not x.is_cuda:
        return x
    host = torch.empty_like(x, device="cpu", pin_memory=True)
    host.copy_(x, non_blocking=True)
    torch.cuda.current_stream(x.device).synchronize()
    return host


def to_pil(pixels: np.ndarray) -> list[Image.Image]:
    """uint8 ``[B, H, W, C]`` -> images of mode L, RGB or RGBA for 1, 3 or 4 channels.

    L and RGBA images share the memory of ``pixels``. PIL keeps four bytes for a pixel of RGB and has to copy.
    """
    if pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    return [Image.fromarray(image) for image in pixels]

"""The arithmetic of diffusers' pre- and post-processing on the device that computes, and one copy from or to the host.

Out: diffusers copies the image to the host first and scales it there, in float32 numpy. Multiplication, rounding half to
even and the cast are the same operations on either side, so the bytes are the same; half of them travel, or a quarter.

In: diffusers divides by 255 in numpy, and sends float32. GPUs divide by a constant otherwise, so the results of all 256
bytes are looked up; a quarter of what diffusers sends travels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# A band stays in cache through the chain of operations, and is small enough that torch runs it on one thread: on a busy
# machine the barriers of many short parallel loops cost more than the loops.
_CPU_BAND_ELEMENTS = (1 << 15) - 1

Denormalize = Callable[[Tensor], Tensor]


def to_values(pixels: Sequence[np.ndarray], table: Tensor) -> Tensor:
    """Images of bytes -> ``[B, C, H, W]`` of what ``table`` says of each byte, on its device, strided as ``[B, H, W, C]``.

    Args:
        pixels: uint8, all ``[H, W, C]`` or all ``[H, W]`` (one channel), of the same shape. To a GPU they go by one
            asynchronous copy out of pinned memory.
        table: ``[256]``, on the CPU or a CUDA device.
    """
    shape = (len(pixels), *pixels[0].shape)
    host = torch.empty(shape, dtype=torch.uint8, device="cpu", pin_memory=table.is_cuda)
    np.stack(pixels, out=host.numpy())
    values = table.take(host.to(table.device, non_blocking=True).long())
    return values.permute(0, 3, 1, 2) if values.dim() == 4 else values.unsqueeze(1)


def to_pixels(image: Tensor, denormalize: Denormalize) -> np.ndarray | None:
    """``image [B, C, H, W]`` -> uint8 ``[B, H, W, C]`` on the host; None where a value is outside [0, 1] or NaN.

    Args:
        image: float32, bfloat16 or float16, on the CPU or a CUDA device, not empty.
        denormalize: ``[B, C, rows, W]`` -> the same in [0, 1], element by element, in the dtype of ``image``.
    """
    return on_device(image, denormalize) if image.is_cuda else in_bands(image, denormalize)


def on_device(image: Tensor, denormalize: Denormalize) -> np.ndarray | None:
    """Do the work of :func:`to_pixels` by torch, wherever ``image [B, C, H, W]`` is."""
    batch, channels, height, width = image.shape
    pixels = torch.empty((batch, height, width, channels), dtype=torch.uint8, device=image.device)
    values = denormalize(image)
    low, high = torch.aminmax(values)  # NaN if there is one
    pixels.permute(0, 3, 1, 2).copy_(values.float().mul(255).round_())
    host = to_host(pixels)
    return host.numpy() if bool((low >= 0) & (high <= 1)) else None


def in_bands(image: Tensor, denormalize: Denormalize) -> np.ndarray | None:
    """Do the work of :func:`to_pixels` on the CPU: ``image [B, C, H, W]`` in bands of rows, scaled by numpy."""
    batch, channels, height, width = image.shape
    pixels = np.empty((batch, height, width, channels), dtype=np.uint8)
    rows = max(1, _CPU_BAND_ELEMENTS // (batch * channels * width))
    for start in range(0, height, rows):
        values = denormalize(image[:, :, start : start + rows]).float().numpy()
        if not (values.min() >= 0 and values.max() <= 1):
            return None
        scaled = np.multiply(values, np.float32(255))
        np.rint(scaled, out=scaled)
        np.copyto(pixels[:, start : start + rows].transpose(0, 3, 1, 2), scaled, casting="unsafe")
    return pixels


def to_array(image: Tensor) -> np.ndarray:
    """``image [B, C, H, W]`` -> float32 ``[B, H, W, C]`` on the host, with the strides that diffusers gives it."""
    return to_host(image.permute(0, 2, 3, 1).float()).numpy()


def to_host(x: Tensor) -> Tensor:
    """Bring ``x``, of any shape, into host memory: one asynchronous copy into pinned memory from a GPU, ``x`` on the CPU."""
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

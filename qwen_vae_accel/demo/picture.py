"""Photos in, comparison pictures out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from qwen_vae_accel.errors import InvalidInputError
from qwen_vae_accel.files import open_regular
from qwen_vae_accel.sizes import STATIC_MULTIPLE, Size

_MARGIN, _CAPTION = 12, 48
_INK, _PAPER = (32, 32, 32), (255, 255, 255)


def open_photo(path: Path, area: int) -> Image.Image:
    """A photo as RGB, at most ``area`` pixels, cropped in the middle to sides that are multiples of 16.

    Raises:
        InvalidInputError: if it cannot be read or is too small.
    """
    try:
        with open_regular(path) as file, Image.open(file) as picture:
            photo = ImageOps.exif_transpose(picture).convert("RGB")
    except Exception as error:  # whatever Pillow makes of a file that anybody may have written
        raise InvalidInputError(f"cannot read the image {path}: {error}") from error
    scale = min(1.0, math.sqrt(area / (photo.width * photo.height)))
    size = Size(int(photo.width * scale), int(photo.height * scale)).floor(STATIC_MULTIPLE)
    if min(size.width, size.height) < STATIC_MULTIPLE:
        raise InvalidInputError(
            f"the image {path} is {photo.width}x{photo.height}; it must have at least {STATIC_MULTIPLE} pixels a side"
        )
    return ImageOps.fit(photo, (size.width, size.height), Image.Resampling.LANCZOS)


def to_tensor(photo: Image.Image, channels: int) -> Tensor:
    """``[1, channels, 1, H, W]`` float32 in [-1, 1]; a fourth channel is opaque alpha."""
    pixels = torch.from_numpy(np.asarray(photo, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)
    if channels == 4:
        pixels = torch.cat([pixels, torch.ones_like(pixels[:1])])
    return pixels[None, :, None]


def to_image(x: Tensor) -> Image.Image:
    """The RGB of ``[1, C, 1, H, W]`` in [-1, 1]."""
    pixels = (x[0, :3, 0].float().cpu() * 0.5 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy()
    return Image.fromarray((pixels * 255).round().astype(np.uint8))


def psnr(a: Tensor, b: Tensor) -> float:
    """PSNR in dB of values in [-1, 1]."""
    mse = (a.float().cpu() - b.float().cpu()).square().mean().item()
    return math.inf if mse == 0 else 10 * math.log10(4 / mse)


def amplified(a: Tensor, b: Tensor) -> tuple[Image.Image, float, int]:
    """Their difference, the largest of it, and the power of ten that it is shown times: grey is none.

    The factor makes three times the root mean square visible as up to full contrast; the few values above it saturate.
    """
    difference = a[0, :3, 0].float().cpu() - b[0, :3, 0].float().cpu()
    largest = difference.abs().max().item()
    spread = 3 * difference.square().mean().sqrt().item()
    factor = 10 ** max(0, math.floor(math.log10(1 / spread))) if spread > 0 else 1
    pixels = (difference * factor * 0.5 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy()
    return Image.fromarray((pixels * 255).round().astype(np.uint8)), largest, factor


def save_each(panels: Sequence[tuple[Image.Image, str, str]], names: Sequence[str], folder: Path) -> dict[str, dict[str, str]]:
    """Write panels one by one as ``NAME.png``; by name, the file's name with the panel's title and line."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for name, (panel, title, line) in zip(names, panels, strict=True):
        panel.save(folder / f"{name}.png")
        found[name] = {"file": f"{folder.name}/{name}.png", "title": title, "line": line}
    return found


def side_by_side(panels: Sequence[tuple[Image.Image, str, str]], path: Path) -> None:
    """Write panels in a row, each with a title and a line below it, as PNG."""
    width = max(panel.width for panel, _, _ in panels)
    height = max(panel.height for panel, _, _ in panels)
    size = 20
    while size > 9 and max(ImageFont.load_default(size).getlength(line) for _, _, line in panels) > width:
        size -= 1
    title_font, line_font = ImageFont.load_default(size + 2), ImageFont.load_default(size)
    sheet = Image.new("RGB", (_MARGIN + len(panels) * (width + _MARGIN), height + 2 * _MARGIN + _CAPTION), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for index, (panel, title, line) in enumerate(panels):
        x = _MARGIN + index * (width + _MARGIN)
        draw.text((x, _MARGIN // 2), title, fill=_INK, font=title_font)
        draw.text((x, _MARGIN // 2 + size + 8), line, fill=_INK, font=line_font)
        sheet.paste(panel, (x, _MARGIN + _CAPTION))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)

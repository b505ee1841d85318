"""What is shown of the demo's photo: times, quality, and the pictures behind a slider."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from qwen_vae_accel.demo.reload import FILE, PANELS
from qwen_vae_accel.errors import InvalidInputError, shown
from qwen_vae_accel.files import read_file
from qwen_vae_accel.page.sheet import Answer, Comparison, Picture, Sheet, Table

_PICTURES = ("PNG", "JPEG", "WEBP")
_LARGEST_PICTURE = 64 * 2**20


def make_sheet(document: Mapping[str, Any], folder: Path) -> Sheet:
    """What is shown of the demo's findings.

    Args:
        document: the findings, see :func:`qwen_vae_accel.demo.reload.perform`.
        folder: where they lie, and their pictures.

    Raises:
        InvalidInputError: if a picture cannot be read, has another size than the others, or lies elsewhere.
        KeyError, TypeError, ValueError: if ``document`` is damaged.
    """
    photo = document["photo"]
    pictures = {name: _picture(folder, name, panel) for name, panel in photo["panels"].items()}
    difference = pictures.pop("difference")
    compared = [pictures[name] for name in PANELS if name != "difference"]
    if len({(picture.width, picture.height) for picture in (*compared, difference)}) > 1:
        raise InvalidInputError(f"the pictures of {folder / FILE} differ in size; run the demo again")
    times = []
    for method in ("encode", "decode"):
        theirs, ours = (float(photo[side][f"{method}_ms"]) for side in ("diffusers", "accelerated"))
        times.append([method, f"{theirs:.1f}", f"{ours:.1f}", f"{theirs / ours:.2f}x"])
    quality = [f"{float(photo['psnr_db'][name]):.2f}" for name in ("diffusers", "accelerated", "between")]
    return Sheet(
        f"A photo through the VAE: {photo['image']}, {photo['size']}",
        Answer([(row[3], row[0]) for row in times], f"accelerated against diffusers, {document['backend']}"),
        [
            Comparison(compared, difference),
            f"Model {document['model']}, {document['dtype']} on {document['device']}, backend {document['backend']}.",
            Table("Milliseconds", ["", "diffusers", "accelerated", "speed-up"], times),
            Table("PSNR, dB", ["diffusers to photo", "accelerated to photo", "accelerated to diffusers"], [quality], words=0),
        ],
    )


def _beside(folder: Path, name: str) -> Path:
    """The file ``name`` in ``folder`` or below it: a result must not bring other files of this machine into a page."""
    path = Path(os.path.realpath(folder / name))
    if os.path.isabs(name) or ".." in Path(name).parts or not path.is_relative_to(os.path.realpath(folder)):
        raise InvalidInputError(f"the picture {shown(name)} does not lie in {folder}, beside its result: it is not shown")
    return path


def _picture(folder: Path, name: str, panel: Mapping[str, str]) -> Picture:
    path = _beside(folder, panel["file"])
    try:
        data = read_file(path, _LARGEST_PICTURE)
        with Image.open(BytesIO(data), formats=_PICTURES) as image:
            image.load()
            kind, (width, height) = image.get_format_mimetype(), image.size
    except Exception as error:  # whatever Pillow makes of a file that anybody may have written
        named = str(path) if len(str(path)) <= 1000 else shown(str(path))
        why = getattr(error, "strerror", None) or shown(error)
        why = "it is not there" if isinstance(error, FileNotFoundError) else why
        raise InvalidInputError(f"cannot read the picture {named}: {why}; run the demo again") from error
    uri = f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"
    return Picture(name, panel["title"], panel["line"], uri, width, height)

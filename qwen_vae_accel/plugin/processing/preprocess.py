"""In place of ``VaeImageProcessor.preprocess``, and out of it again: tensors of PIL images, made where the VAE computes.

Only in pipelines that do nothing with the tensor but send it to the VAE. Others multiply it with masks on the CPU.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from qwen_vae_accel.journal import Journal
from qwen_vae_accel.model.offload import execution_device
from qwen_vae_accel.plugin.processing.pixels import to_values
from qwen_vae_accel.plugin.processing.replacement import DEVICE, Replacement

# Read in diffusers 0.36 to 0.42: what preprocess returns gets a dimension, is moved to the device and cast, and encoded.
PIPELINES = (
    "QwenImageImg2ImgPipeline",
    "QwenImageEditPipeline",
    "QwenImageEditPlusPipeline",
    "QwenImageLayeredPipeline",
    "QwenImage21Pipeline",
)


class PreProcessing(Replacement):
    """The replacement of one processor's ``preprocess``.

    Args:
        processor, journal: see :class:`Replacement`.
        vae: the tensors are made on the device it computes on at the time of the call, which must be the CPU or a CUDA device.
    """

    METHOD = "preprocess"
    PARTS = ("pil_to_numpy", "numpy_to_pt", "normalize")

    def __init__(self, processor: Any, journal: Journal, vae: nn.Module) -> None:
        super().__init__(processor, journal)
        self._vae = weakref.ref(vae)
        self._tables: dict[tuple[torch.device, bool], Tensor] = {}

    @classmethod
    def install_in(cls, pipeline: Any, journal: Journal, vae: nn.Module) -> Replacement | None:
        """:meth:`install` for exactly diffusers' :data:`PIPELINES`; None for others. The report names subclasses of these."""
        kind = type(pipeline)
        known = [c for c in kind.__mro__ if c.__name__ in PIPELINES and c.__module__.startswith("diffusers.pipelines.")]
        if not known:
            return None
        if known[0] is not kind:
            journal.leave_alone(cls.METHOD, f"its pipeline is a {kind.__name__}, not a {known[0].__name__}")
            return None
        return cls.install(pipeline.image_processor, journal, vae=vae)

    def run(
        self,
        processor: Any,
        image: Any,
        height: int | None = None,
        width: int | None = None,
        resize_mode: str = "default",
        crops_coords: tuple[int, int, int, int] | None = None,
    ) -> Any:
        """Do the method's work; arguments, errors and results, but for their device, are those of diffusers."""
        original = functools.partial(self.original(processor), image, height, width, resize_mode, crops_coords)
        vae = self._vae()
        device = execution_device(vae) if vae is not None else torch.device("meta")
        reason = self._unusual(processor, image, resize_mode, crops_coords, device)
        if not reason:
            images = _prepared(processor, image if isinstance(image, list) else [image], height, width)
            pixels = [np.asarray(one) for one in images]
            if pixels[0].size and all(one.dtype == np.uint8 and one.shape == pixels[0].shape for one in pixels):
                try:
                    values = to_values(pixels, self._table(processor, device))
                except torch.OutOfMemoryError:
                    reason = f"out of memory on {device}"
                else:
                    self._journal.served(self.METHOD, DEVICE)
                    return values
            else:
                reason = "images without pixels, of different shapes, or with values other than bytes"
        return self.fall_back(original, reason)

    def _unusual(self, processor: Any, image: Any, resize_mode: str, crops_coords: Any, device: torch.device) -> str:
        """Why diffusers' own code is to take this call; empty if it need not."""
        if self.patched_since(processor):
            return "the image processor was patched"
        if processor.config.do_binarize:
            return "do_binarize"
        if resize_mode != "default" or crops_coords is not None:
            return f"resize_mode {resize_mode!r}" if resize_mode != "default" else "crops_coords"
        images = image if isinstance(image, list) else [image]
        if not images or not all(isinstance(one, Image.Image) for one in images):
            return "not PIL images"
        if device.type not in ("cpu", "cuda"):
            return f"a VAE on {device}"
        return ""

    def _table(self, processor: Any, device: torch.device) -> Tensor:
        """The value of each byte: float32 ``[256]`` on ``device``, computed once by the processor's own methods on the CPU."""
        normalize = bool(processor.config.do_normalize)
        table = self._tables.get((device, normalize))
        if table is None:
            every_byte = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
            values = processor.numpy_to_pt(processor.pil_to_numpy(every_byte))
            values = processor.normalize(values) if normalize else values
            table = self._tables[device, normalize] = values.flatten().to(device)
        return table


def _prepared(processor: Any, images: list[Any], height: int | None, width: int | None) -> list[Any]:
    """The images as diffusers has them before it takes their bytes, by the processor's own methods."""
    config = processor.config
    if config.do_resize:
        height, width = processor.get_default_height_width(images[0], height, width)
        images = [processor.resize(one, height, width) for one in images]
    if config.do_convert_rgb:
        return [processor.convert_to_rgb(one) for one in images]
    if config.do_convert_grayscale:
        return [processor.convert_to_grayscale(one) for one in images]
    return images

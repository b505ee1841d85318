"""In place of ``VaeImageProcessor.postprocess``, and out of it again.

Whatever a call asks for beyond ``"pil"`` and ``"np"`` of an ordinary image goes the original way, which also raises the
original errors.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from qwen_vae_accel.plugin.processing.pixels import to_array, to_pil, to_pixels
from qwen_vae_accel.plugin.processing.replacement import DEVICE, Replacement

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CHANNELS = (1, 3, 4)


def processors_of(pipeline: Any) -> list[Any]:
    """The image processors whose ``postprocess`` a pipeline, classic or modular, makes its images with."""
    from diffusers.image_processor import InpaintProcessor

    found: list[Any] = []
    for name in ("image_processor", "image_mask_processor"):
        processor = getattr(pipeline, name, None)
        if type(processor) is InpaintProcessor:
            processor = getattr(processor, "_image_processor", None)
        if processor is not None and not any(processor is other for other in found):
            found.append(processor)
    return found


class PostProcessing(Replacement):
    """The replacement of one processor's ``postprocess``."""

    METHOD = "postprocess"
    PARTS = ("_denormalize_conditionally", "denormalize", "pt_to_numpy", "numpy_to_pil")

    def run(self, processor: Any, image: Any, output_type: str = "pil", do_denormalize: list[bool] | None = None) -> Any:
        """Do the method's work; arguments, results and errors are those of diffusers."""
        original = functools.partial(self.original(processor), image, output_type, do_denormalize)
        if output_type in ("pt", "latent"):
            return original()
        reason = self._unusual(processor, image, output_type)
        if not reason:
            denormalize = functools.partial(processor._denormalize_conditionally, do_denormalize=do_denormalize)
            with torch.no_grad():
                if output_type == "np":
                    self._journal.served(self.METHOD, DEVICE)
                    return to_array(denormalize(image))
                pixels = to_pixels(image, denormalize)
            if pixels is not None:
                self._journal.served(self.METHOD, DEVICE)
                return to_pil(pixels)
            reason = "values outside [0, 1], or NaN: numpy decides what their cast to uint8 gives"
        return self.fall_back(original, reason)

    def _unusual(self, processor: Any, image: Any, output_type: str) -> str:
        """Why diffusers' own code is to take this call; empty if it need not."""
        if output_type not in ("pil", "np"):
            return f"output_type {output_type!r}"
        if self.patched_since(processor):
            return "the image processor was patched"
        if type(image) is not Tensor or image.dim() != 4 or image.layout != torch.strided or not image.numel():
            return "not a batch of images in a plain tensor"
        if image.dtype not in _DTYPES or image.device.type not in ("cpu", "cuda") or image.requires_grad:
            return f"a tensor of {image.dtype} on {image.device}" + (", with gradients" if image.requires_grad else "")
        if output_type == "pil" and (image.shape[1] not in _CHANNELS or (image.shape[1] == 1 and 1 in image.shape[2:])):
            return f"images of shape {tuple(image.shape[1:])}"
        return ""

"""In place of ``VaeImageProcessor.postprocess``, and out of it again.

Only an untouched instance of exactly that class is known well enough. Whatever a call asks for beyond ``"pil"`` and
``"np"`` of an ordinary image goes the original way, which also raises the original errors.
"""

from __future__ import annotations

import functools
import logging
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qwen_vae_accel.errors import HandleError
from qwen_vae_accel.processing.pixels import to_array, to_pil, to_pixels
from qwen_vae_accel.report import ORIGINAL, Journal

logger = logging.getLogger(__name__)

METHOD = "postprocess"
DEVICE = "device"
_STATE = "_qwen_vae_accel_postprocess"
# What postprocess is made of: if one of these is somebody's own, so is the result.
_PARTS = (METHOD, "_denormalize_conditionally", "denormalize", "pt_to_numpy", "numpy_to_pil")
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


def reasons(processor: Any) -> list[str]:
    """Why the ``postprocess`` of ``processor`` is left alone; empty if it can be replaced."""
    from diffusers.image_processor import VaeImageProcessor

    if type(processor) is not VaeImageProcessor:
        return [f"its image processor is a {type(processor).__name__}, not a VaeImageProcessor"]
    patched = [name for name in _PARTS if name in processor.__dict__ or not _is_diffusers_own(VaeImageProcessor, name)]
    return [f"its image processor has its own {name}" for name in patched]


def _is_diffusers_own(cls: type, name: str) -> bool:
    function = getattr(cls, name, None)
    own = getattr(function, "__module__", None) == cls.__module__ and not hasattr(function, "__wrapped__")
    return own and getattr(function, "__qualname__", None) == f"{cls.__name__}.{name}"


class PostProcessing:
    """The replacement of one processor's ``postprocess``.

    Args:
        processor: one for which :func:`reasons` finds none.
        journal: told of every call.
    """

    def __init__(self, processor: Any, journal: Journal) -> None:
        self._processor = weakref.ref(processor)
        self._journal = journal
        processor.__dict__[METHOD] = types.MethodType(_replacement(type(processor)), processor)
        processor.__dict__[_STATE] = self

    # A copy or a pickle of the processor is a plain one: its method finds no state of its own.

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()

    @classmethod
    def install(cls, processor: Any, journal: Journal) -> PostProcessing | None:
        """Replace ``postprocess``, or say in the log and the journal why it is left alone; None then, or if it was done."""
        state = processor.__dict__.get(_STATE) if hasattr(processor, "__dict__") else None
        if isinstance(state, cls) and state.of(processor):
            return None
        if hasattr(processor, "__dict__"):
            _remove_leftovers(processor)
        why = reasons(processor)
        for reason in why:
            journal.leave_alone(METHOD, reason)
            logger.warning("postprocess stays as it is: %s", reason)
        return None if why else cls(processor, journal)

    def of(self, processor: Any) -> bool:
        """Whether this is the replacement in ``processor``, not in one it was copied from."""
        return self._processor() is processor

    def check_removable(self) -> None:
        """Raise HandleError if something else patched ``postprocess`` since."""
        processor = self._processor()
        if processor is not None and not getattr(processor.__dict__.get(METHOD), "__qwen_vae_accel__", False):
            raise HandleError(
                "image_processor.postprocess was patched again after accelerate(); undo that first, "
                "or the other patch would be lost"
            )

    def remove(self) -> None:
        """Give the processor back its own method; nothing of this class is left in it."""
        processor = self._processor()
        if processor is not None:
            _remove(processor)

    def run(self, processor: Any, image: Any, output_type: str, do_denormalize: list[bool] | None) -> Any:
        """What the patched method does; arguments, results and errors are those of diffusers."""
        original = functools.partial(type(processor).postprocess, processor, image, output_type, do_denormalize)
        if output_type in ("pt", "latent"):
            return original()
        reason = _unusual(processor, image, output_type)
        if not reason:
            denormalize = functools.partial(processor._denormalize_conditionally, do_denormalize=do_denormalize)
            with torch.no_grad():
                if output_type == "np":
                    self._journal.call(METHOD, DEVICE)
                    return to_array(denormalize(image))
                pixels = to_pixels(image, denormalize)
            if pixels is not None:
                self._journal.call(METHOD, DEVICE)
                return to_pil(pixels)
            reason = "values outside [0, 1], or NaN: what their cast to uint8 gives is up to numpy"
        result = original()
        self._journal.call(METHOD, ORIGINAL)
        if self._journal.fallback(METHOD, ORIGINAL, reason):
            logger.warning("postprocess runs as diffusers wrote it: %s", reason)
        return result


def _remove_leftovers(processor: Any) -> None:
    """Take out what a copy or a pickle of a replaced processor carries; it has no state of its own."""
    method = processor.__dict__.get(METHOD)
    plain = getattr(method, "__func__", None) is getattr(type(processor), METHOD, METHOD)
    if getattr(method, "__qwen_vae_accel__", False) or (plain and _STATE in processor.__dict__):
        _remove(processor)


def _remove(processor: Any) -> None:
    processor.__dict__.pop(METHOD, None)
    processor.__dict__.pop(_STATE, None)


def _unusual(processor: Any, image: Any, output_type: str) -> str:
    """Why diffusers' own code is to take this call; empty if it need not."""
    if output_type not in ("pil", "np"):
        return f"output_type {output_type!r}"
    if any(name in processor.__dict__ for name in _PARTS[1:]):
        return "the image processor was patched"
    if type(image) is not Tensor or image.dim() != 4 or image.layout != torch.strided or not image.numel():
        return "not a batch of images in a plain tensor"
    if image.dtype not in _DTYPES or image.device.type not in ("cpu", "cuda") or image.requires_grad:
        return f"a tensor of {image.dtype} on {image.device}" + (", with gradients" if image.requires_grad else "")
    if output_type == "pil" and (image.shape[1] not in _CHANNELS or (image.shape[1] == 1 and 1 in image.shape[2:])):
        return f"images of shape {tuple(image.shape[1:])}"
    return ""


def _replacement(cls: Any) -> Callable[..., Any]:
    @functools.wraps(cls.postprocess)
    def postprocess(self: Any, image: Any, output_type: str = "pil", do_denormalize: list[bool] | None = None) -> Any:
        state = self.__dict__.get(_STATE)
        if not isinstance(state, PostProcessing) or not state.of(self):
            return cls.postprocess(self, image, output_type, do_denormalize)
        return state.run(self, image, output_type, do_denormalize)

    postprocess.__qwen_vae_accel__ = True  # type: ignore[attr-defined]
    return postprocess

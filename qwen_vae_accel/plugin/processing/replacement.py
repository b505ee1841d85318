"""One method of a ``VaeImageProcessor`` replaced in one instance, and put back.

Only an untouched instance of exactly that class is known well enough; every other is left alone, and the report says so.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from qwen_vae_accel.errors import HandleError
from qwen_vae_accel.journal import ORIGINAL, Journal
from qwen_vae_accel.model.custom import plain_class
from qwen_vae_accel.plugin.patch import Patch, owner_of

logger = logging.getLogger(__name__)

DEVICE = "device"


class Replacement:
    """The replacement of one method of one processor; :meth:`run` is what the method does then.

    Args:
        processor: one for which :meth:`reasons` finds none.
        journal: told of every call.

    Attributes:
        METHOD: the method's name.
        PARTS: the processor's other methods that the replacement does the work of: if one is somebody's own, so is the result.
    """

    METHOD: ClassVar[str]
    PARTS: ClassVar[tuple[str, ...]]

    def __init__(self, processor: Any, journal: Journal) -> None:
        self._processor = weakref.ref(processor)
        self._journal = journal
        self._before: Mapping[str, Any]
        PROCESSOR.install(processor, self, (self.METHOD,))

    @classmethod
    def install(cls, processor: Any, journal: Journal, **options: Any) -> Replacement | None:
        """Replace the method, or say in the log and the journal why it is left alone; None then, or if it was done."""
        if hasattr(processor, "__dict__") and owner_of(processor, cls.METHOD) is not None:
            return None
        why = cls.reasons(processor)
        for reason in why:
            journal.leave_alone(cls.METHOD, reason)
            logger.warning("%s stays as it is: %s", cls.METHOD, reason)
        return None if why else cls(processor, journal, **options)

    @classmethod
    def reasons(cls, processor: Any) -> list[str]:
        """Why the method of ``processor`` is left alone; empty if it can be replaced."""
        from diffusers.image_processor import VaeImageProcessor

        if plain_class(processor) is not VaeImageProcessor:
            return [f"its image processor is a {type(processor).__name__}, not a VaeImageProcessor"]
        patched = [
            name
            for name in (cls.METHOD, *cls.PARTS)
            if name in processor.__dict__ or not _is_diffusers_own(VaeImageProcessor, name)
        ]
        return [f"its image processor has its own {name}" for name in patched]

    def _is_of(self, processor: Any) -> bool:
        """Whether this is the replacement in ``processor``, not in one it was copied from."""
        return self._processor() is processor

    def check_removable(self) -> None:
        """Raise HandleError if something else patched the method since."""
        processor = self._processor()
        patched = PROCESSOR.patched_since(processor, (self.METHOD,)) if processor is not None else ""
        if patched:
            raise HandleError(f"{patched}; undo that first, or the other patch would be lost")

    def remove(self) -> None:
        """Give the processor back its own method; nothing of this class is left in it."""
        processor = self._processor()
        if processor is not None:
            PROCESSOR.remove(processor, (self.METHOD,), self._before)

    def run(self, processor: Any, *args: Any, **kwargs: Any) -> Any:
        """Do the method's work; arguments, results and errors are those of diffusers."""
        raise NotImplementedError

    def original(self, processor: Any) -> Callable[..., Any]:
        """Diffusers' own method of ``processor``, whose class anybody may have patched by now."""
        method: Callable[..., Any] = getattr(plain_class(processor), self.METHOD).__get__(processor)
        return method

    def patched_since(self, processor: Any) -> bool:
        """Whether one of :attr:`PARTS` became somebody's own after the replacement."""
        return any(name in processor.__dict__ for name in self.PARTS)

    def fall_back(self, original: Callable[[], Any], reason: str) -> Any:
        """The result of diffusers' own method, counted as a fallback for ``reason``."""
        result = original()
        self._journal.served(self.METHOD, ORIGINAL, reason)
        return result


def _is_diffusers_own(owner: type, name: str) -> bool:
    function = getattr(owner, name, None)
    own = getattr(function, "__module__", None) == owner.__module__ and not hasattr(function, "__wrapped__")
    return own and getattr(function, "__qualname__", None) == f"{owner.__name__}.{name}"


def _run(replacement: Replacement, *args: Any, **kwargs: Any) -> Any:
    return replacement.run(*args, **kwargs)


PROCESSOR = Patch("image_processor", {"preprocess": _run, "postprocess": _run})

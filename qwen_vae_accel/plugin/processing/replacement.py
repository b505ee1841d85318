"""One method of a ``VaeImageProcessor`` replaced in one instance, and put back.

Only an untouched instance of exactly that class is known well enough; every other is left alone, and the report says so.
"""

from __future__ import annotations

import functools
import logging
import types
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

from qwen_vae_accel.errors import HandleError
from qwen_vae_accel.journal import ORIGINAL, Journal

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
        processor.__dict__[self.METHOD] = types.MethodType(_method(type(self), type(processor)), processor)
        processor.__dict__[self._state()] = self

    # A copy or a pickle of the processor is a plain one: its method finds no state of its own.

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()

    @classmethod
    def install(cls, processor: Any, journal: Journal, **options: Any) -> Replacement | None:
        """Replace the method, or say in the log and the journal why it is left alone; None then, or if it was done."""
        state = processor.__dict__.get(cls._state()) if hasattr(processor, "__dict__") else None
        if isinstance(state, cls) and state.of(processor):
            return None
        if hasattr(processor, "__dict__"):
            cls._remove_leftovers(processor)
        why = cls.reasons(processor)
        for reason in why:
            journal.leave_alone(cls.METHOD, reason)
            logger.warning("%s stays as it is: %s", cls.METHOD, reason)
        return None if why else cls(processor, journal, **options)

    @classmethod
    def reasons(cls, processor: Any) -> list[str]:
        """Why the method of ``processor`` is left alone; empty if it can be replaced."""
        from diffusers.image_processor import VaeImageProcessor

        if type(processor) is not VaeImageProcessor:
            return [f"its image processor is a {type(processor).__name__}, not a VaeImageProcessor"]
        patched = [
            name
            for name in (cls.METHOD, *cls.PARTS)
            if name in processor.__dict__ or not _is_diffusers_own(VaeImageProcessor, name)
        ]
        return [f"its image processor has its own {name}" for name in patched]

    def of(self, processor: Any) -> bool:
        """Whether this is the replacement in ``processor``, not in one it was copied from."""
        return self._processor() is processor

    def check_removable(self) -> None:
        """Raise HandleError if something else patched the method since."""
        processor = self._processor()
        if processor is not None and not getattr(processor.__dict__.get(self.METHOD), "__qwen_vae_accel__", False):
            raise HandleError(
                f"image_processor.{self.METHOD} was patched again after accelerate(); undo that first, "
                "or the other patch would be lost"
            )

    def remove(self) -> None:
        """Give the processor back its own method; nothing of this class is left in it."""
        processor = self._processor()
        if processor is not None:
            self._remove(processor)

    def run(self, processor: Any, *args: Any, **kwargs: Any) -> Any:
        """What the replaced method does; arguments, results and errors are those of diffusers."""
        raise NotImplementedError

    def patched_since(self, processor: Any) -> bool:
        """Whether one of :attr:`PARTS` became somebody's own after the replacement."""
        return any(name in processor.__dict__ for name in self.PARTS)

    def fall_back(self, original: Callable[[], Any], reason: str) -> Any:
        """The result of diffusers' own method, counted as a fallback for ``reason``."""
        result = original()
        self._journal.served(self.METHOD, ORIGINAL, reason)
        return result

    @classmethod
    def _state(cls) -> str:
        return f"_qwen_vae_accel_{cls.METHOD}"

    @classmethod
    def _remove_leftovers(cls, processor: Any) -> None:
        """Take out what a copy or a pickle of a replaced processor carries; it has no state of its own."""
        method = processor.__dict__.get(cls.METHOD)
        plain = getattr(method, "__func__", None) is getattr(type(processor), cls.METHOD, cls.METHOD)
        if getattr(method, "__qwen_vae_accel__", False) or (plain and cls._state() in processor.__dict__):
            cls._remove(processor)

    @classmethod
    def _remove(cls, processor: Any) -> None:
        processor.__dict__.pop(cls.METHOD, None)
        processor.__dict__.pop(cls._state(), None)


def _is_diffusers_own(owner: type, name: str) -> bool:
    function = getattr(owner, name, None)
    own = getattr(function, "__module__", None) == owner.__module__ and not hasattr(function, "__wrapped__")
    return own and getattr(function, "__qualname__", None) == f"{owner.__name__}.{name}"


def _method(replacement: type[Replacement], owner: type) -> Callable[..., Any]:
    original = getattr(owner, replacement.METHOD)

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = self.__dict__.get(replacement._state())
        if not isinstance(state, replacement) or not state.of(self):
            return getattr(owner, replacement.METHOD)(self, *args, **kwargs)
        return state.run(self, *args, **kwargs)

    method.__qwen_vae_accel__ = True  # type: ignore[attr-defined]
    return method

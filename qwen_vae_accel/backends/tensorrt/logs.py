"""What TensorRT says went wrong, kept so that our errors can say it: TensorRT itself returns None, False or -1."""

from __future__ import annotations

import gc
import logging
import re
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

logger = logging.getLogger(__name__)

_KEPT = 8
_CONVERSION_LOGGER = "torch_tensorrt [TensorRT Conversion Context]"
_ACTIVATIONS = re.compile(r"Total Activation Memory: (\d+)")
_pauses: list[bool] = []  # one for each block that is inside; the first says whether the collector ran before
_pausing = threading.Lock()


@contextmanager
def collector_paused() -> Iterator[None]:
    """Around calls into TensorRT that may log: no cyclic garbage collection, in any thread.

    TensorRT holds a lock of its own while it logs, and takes the same one to destroy a builder or a runtime. A logger is
    Python code, so a collection may begin inside it; if that finds an old builder in a cycle, the thread waits for itself.
    """
    with _pausing:
        _pauses.append(gc.isenabled())
        gc.disable()
    try:
        yield
    finally:
        with _pausing:
            ran = _pauses.pop(0)
            if _pauses:
                _pauses[0] = ran
            elif ran:
                gc.enable()


def make_logger(trt: ModuleType) -> Any:
    """A ``tensorrt.ILogger`` that writes to Python's logging."""
    levels = {
        "INTERNAL_ERROR": logging.ERROR,
        "ERROR": logging.ERROR,
        "WARNING": logging.WARNING,
        "INFO": logging.DEBUG,
        "VERBOSE": logging.NOTSET,
    }

    class Logger(trt.ILogger):  # type: ignore[name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            level = levels.get(severity.name, logging.WARNING)
            if level:
                logger.log(level, "%s", message)

    return Logger()


def make_recorder(trt: ModuleType) -> Any:
    """A ``tensorrt.IErrorRecorder``; its ``take()`` gives the errors since the last call as one text, and forgets them."""

    class Recorder(trt.IErrorRecorder):  # type: ignore[name-defined]
        def __init__(self) -> None:
            trt.IErrorRecorder.__init__(self)
            self._lock = threading.Lock()
            self._errors: deque[tuple[Any, str]] = deque(maxlen=_KEPT)

        def take(self) -> str:
            with self._lock:
                texts = list(dict.fromkeys(text.strip() for _, text in self._errors))
                self._errors.clear()
            return "; ".join(texts) or "TensorRT gave no reason"

        # TensorRT calls these, from any thread.

        def report_error(self, code: Any, description: str) -> bool:
            with self._lock:
                self._errors.append((code, description))
            logger.debug("%s: %s", code, description)
            return True

        def num_errors(self) -> int:
            return len(self._errors)

        def get_error_code(self, index: int) -> Any:
            return self._errors[index][0]

        def get_error_desc(self, index: int) -> str:
            return self._errors[index][1]

        def has_overflowed(self) -> bool:
            return False

        def clear(self) -> None:
            with self._lock:
                self._errors.clear()

    return Recorder()


@contextmanager
def activation_memory() -> Iterator[list[int]]:
    """Bytes of scratch memory that TensorRT's builder plans inside the block, one per optimization profile, in their order.

    The builder says so in its log only, which Torch-TensorRT writes to a logger of Python's; what was not to be seen before
    is not seen now.
    """
    found: list[int] = []
    conversion = logging.getLogger(_CONVERSION_LOGGER)
    level, shown = conversion.level, conversion.getEffectiveLevel()

    def look(record: logging.LogRecord) -> bool:
        match = _ACTIVATIONS.search(record.getMessage())
        if match is not None:
            found.append(int(match[1]))
        return record.levelno >= shown

    conversion.addFilter(look)
    conversion.setLevel(min(shown, logging.INFO))
    try:
        yield found
    finally:
        conversion.setLevel(level)
        conversion.removeFilter(look)

"""What goes to people's terminals: names and messages are shown as they are, and a display that fails hinders no work.

Names, paths and reasons may hold rich's markup, terminal escapes or bytes that no text has: markup is not read, and what a
terminal would obey or could not show is written out, such as ``\\x1b``.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

_CONTROLS = [*range(0x20), *range(0x7F, 0xA0)]
# Marks that turn the direction of what follows, and separators of lines.
_MARKS = [0x061C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A)]
_VISIBLE = {code: f"\\x{code:02x}" for code in _CONTROLS} | {code: f"\\u{code:04x}" for code in _MARKS}
for _kept in "\n\t":
    del _VISIBLE[ord(_kept)]


def visible(text: str, encoding: str = "utf-8") -> str:
    """``text`` with control characters, and what ``encoding`` does not have, written out; lines and tabs stay."""
    return text.translate(_VISIBLE).encode(encoding, "backslashreplace").decode(encoding)


def plain(text: str, style: str = "") -> Text:
    """``text`` for rich, as it is shown on any console: visible, and without markup."""
    return Text(visible(text), style)


class Unfailing(io.TextIOBase):
    """A text stream that may be closed, full, or without a reader: then what is written is lost.

    Args:
        stream: gives the stream behind it at each use; None where there is none.
    """

    def __init__(self, stream: Callable[[], TextIO | None]) -> None:
        self._stream = stream

    def _ask(self, name: str, *arguments: object) -> Any:
        with suppress(OSError, ValueError):  # ValueError: it is closed
            stream = self._stream()
            return None if stream is None else getattr(stream, name)(*arguments)
        return None

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self._stream(), "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        return bool(self._ask("isatty"))

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        number = self._ask("fileno")
        if number is None:
            raise io.UnsupportedOperation("fileno")
        return int(number)

    def write(self, text: str) -> int:
        self._ask("write", text)
        return len(text)

    def flush(self) -> None:
        self._ask("flush")


class Terminal(Console):
    """A console that reads no markup and obeys nothing that is in a text."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """As rich's; here, so that what is measured is what is shown."""
        return super().render_str(visible(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=visible(segment.text, self.encoding))


def _standard_error() -> TextIO | None:
    return getattr(sys.stderr, "rich_proxied_file", sys.stderr)  # behind the stand-in of somebody's own live display


stderr = Terminal(file=Unfailing(_standard_error))

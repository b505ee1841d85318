"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import uuid
from pathlib import Path


def is_path(text: str) -> bool:
    """Whether a file system can be asked for ``text``: it is not blank, can be encoded and holds no NUL."""
    try:
        return bool(text.strip()) and b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def write_atomically(path: Path, data: str | bytes | memoryview) -> None:
    """Put ``data`` (text as UTF-8) into ``path``; its folder is made if need be, and what was there stays until then.

    What a killed writer leaves behind is a file ``.NAME.HEX`` beside it.

    Raises:
        OSError: the folder cannot be written, or the disk is full; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)

"""Files that are there whole or not at all, and reading that neither blocks nor fills the memory."""

from __future__ import annotations

import errno
import os
import stat
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


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
        OSError: the folder cannot be written, the disk is full, or ``path`` is a device, a pipe or a folder, which nothing
            replaces; nothing is left behind.
    """
    _require_replaceable(path, path.lstat)
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


def _require_replaceable(path: Path, look: Callable[[], os.stat_result]) -> None:
    try:
        mode = look().st_mode
    except FileNotFoundError:
        return
    if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
        raise OSError(errno.EEXIST, "it is no regular file, and is not replaced", str(path))


def write_output(path: Path, data: str | bytes | memoryview) -> None:
    """:func:`write_atomically` for a file that a user names: behind a link, the file that it leads to is replaced.

    Raises:
        OSError: as there; what a link leads to must be a regular file too.
    """
    _require_replaceable(path, path.stat)
    write_atomically(Path(os.path.realpath(path)), data)


def open_regular(path: str | Path) -> BinaryIO:
    """Open a file to read; never waits for another process.

    Raises:
        OSError: it cannot be opened, or is a pipe, a device or a folder.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "it is a folder, a pipe or a device, not a file", str(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_file(path: str | Path, limit: int) -> bytes:
    """All bytes of a regular file of at most ``limit`` bytes.

    Raises:
        OSError: as :func:`open_regular`, or it is larger.
        ValueError: ``path`` holds a NUL.
    """
    with open_regular(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"it has more than {limit >> 20} MiB", str(path))
    return data

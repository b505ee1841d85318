"""Files that are there whole or not at all, and reading that neither waits nor fills the memory."""

from __future__ import annotations

import errno
import io
import logging
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from qwen_vae_accel import owners

logger = logging.getLogger(__name__)

# What a file system answers that has no fsync for a folder or for any file; a full disk and a broken one answer otherwise.
_NO_FSYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF, errno.EACCES, errno.EPERM)
_told: set[int] = set()
# Opening a pipe must not wait for whoever writes into it.
_READ = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)


def is_path(text: str) -> bool:
    """Whether a file system can be asked for ``text``: it is not blank, can be encoded and holds no NUL."""
    try:
        return bool(text.strip()) and b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def open_regular(path: str | Path) -> io.FileIO:
    """Open ``path`` for reading, unbuffered.

    Raises:
        OSError: as ``open`` does, and if it is a folder, a pipe, a device or a socket.
    """
    file = io.FileIO(path, "r", opener=lambda name, flags: os.open(name, _READ))
    mode = os.fstat(file.fileno()).st_mode
    if stat.S_ISREG(mode):
        return file
    file.close()
    code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
    raise OSError(code, os.strerror(code) if stat.S_ISDIR(mode) else "Not a regular file", str(path))


def read_file(path: str | Path, limit: int | None = None) -> bytes:
    """All bytes of a regular file, read through one descriptor; of at most ``limit`` bytes if given.

    Raises:
        OSError: as :func:`open_regular`, or it is larger.
        ValueError: ``path`` holds a NUL.
    """
    with open_regular(path) as file:
        if limit is None:
            return file.readall()
        data = io.BufferedReader(file).read(limit + 1)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"it has more than {limit >> 20} MiB", str(path))
    return data


def write_atomically(path: Path, data: str | bytes | memoryview, unless: Callable[[], bool] = bool) -> bool:
    """Put ``data`` into ``path``; its folder is made if need be, and what was there stays until then.

    Text is written as UTF-8, lone surrogates escaped. What a killed writer leaves behind is a file beside it,
    ``.NAME.SIGNATURE`` (:mod:`qwen_vae_accel.owners`).

    Args:
        path: the file.
        data: its new content.
        unless: asked last of all; where it is true, what was there stays for good.

    Returns:
        Whether it was written.

    Raises:
        OSError: the folder cannot be written, the disk is full, or ``path`` is a device, a pipe or a folder, which nothing
            replaces; nothing is left behind.
    """
    _require_replaceable(path, path.lstat)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{owners.signature()}")
    try:
        with temporary.open("xb") as file:
            file.write(data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data)
            file.flush()
            _sync(file.fileno(), path.parent)
        if unless():
            return False
        temporary.replace(path)
        return True
    finally:
        temporary.unlink(missing_ok=True)


def _require_replaceable(path: Path, look: Callable[[], os.stat_result]) -> None:
    try:
        mode = look().st_mode
    except FileNotFoundError:
        return
    if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
        raise OSError(errno.EEXIST, "it is not a regular file, and is not replaced", str(path))


def write_output(path: Path, data: str | bytes | memoryview) -> None:
    """:func:`write_atomically` for a file that a user names: behind a link, the file that it leads to is replaced.

    Raises:
        OSError: as there; what a link leads to must be a regular file too.
    """
    _require_replaceable(path, path.stat)
    write_atomically(Path(os.path.realpath(path)), data)


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, written to the disk. Where the file system cannot, that is logged once.

    Raises:
        OSError: the disk is full or broken.
    """
    folder = path.is_dir()
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        if folder and error.errno in _NO_FSYNC:  # Windows opens no folders
            return _no_fsync(path)
        raise
    try:
        _sync(descriptor, path if folder else path.parent)
    finally:
        os.close(descriptor)


def _sync(descriptor: int, folder: Path) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FSYNC:
            raise
        _no_fsync(folder)


def _no_fsync(folder: Path) -> None:
    device = folder.stat().st_dev
    if device not in _told:
        _told.add(device)
        logger.warning("%s is on a file system without fsync: a power failure may lose what was written last", folder)


@contextmanager
def folder_below(root: Path, names: tuple[str, ...]) -> Iterator[int | None]:
    """A descriptor of the folder ``names`` below ``root``, for ``dir_fd``; no link leads out of ``root`` on the way.

    None where the operating system has no such descriptors.

    Raises:
        OSError: if one of them is missing, or is no folder but, say, a link.
    """
    if os.unlink not in os.supports_dir_fd:
        path = root
        for name in names:
            path = path / name
            if path.is_symlink() or not path.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, "is not a folder", str(path))
        yield None
        return
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for name in names:
            inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = inner
        yield descriptor
    finally:
        os.close(descriptor)


def remove_below(root: Path, name: str) -> int:
    """Delete the file ``name`` (with ``/``) below ``root``, never one that a link leads to; returns the bytes freed.

    Raises:
        OSError: if it cannot be deleted, or a folder on the way is a link. A file that is gone is none: 0 bytes.
    """
    *folders, last = name.split("/")
    try:
        with folder_below(root, tuple(folders)) as descriptor:
            path = last if descriptor is not None else root / name
            size = os.stat(path, dir_fd=descriptor, follow_symlinks=False).st_size
            os.unlink(path, dir_fd=descriptor)
            return size
    except FileNotFoundError:
        return 0

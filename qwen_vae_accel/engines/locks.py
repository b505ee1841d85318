"""Locks between processes: private files that name their holder, with a limit to waiting.

A lock is an open file with ``flock`` on it, so the operating system gives it back when its holder dies, and Python when the
file object goes: ``with take(...)`` leaves nothing behind, whichever instruction an interrupt strikes. Where a file system
has no ``flock``, the lock is a second file that exists for as long as it is held, and a stale one is recognised.
"""

from __future__ import annotations

import _thread
import contextlib
import errno
import io
import json
import logging
import os
import stat
import time
import weakref
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from qwen_vae_accel import owners
from qwen_vae_accel.errors import EngineError, LockedError
from qwen_vae_accel.visits import Living

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

#: Seconds of waiting after which a message names the lock and its holder; and again after each LIMIT.
SAY_AFTER = 5.0
#: Seconds without a sign of life of the holder after which waiting ends. Long work gives one every BEAT seconds.
LIMIT = 60.0
BEAT = 5.0

_NO_FLOCK = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK)
_BUSY = (errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK)
_OPEN = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)

_held: Living[io.FileIO] = Living()


class _Marker(io.FileIO):
    """The lock where there is no ``flock``: a file that exists for as long as it is held."""

    path: Path
    process: int = -1

    def close(self) -> None:
        # A forked child closes its copy of the file; the lock stays its parent's.
        if not self.closed and self.process == os.getpid() and _same(self, self.path):
            self.path.unlink(missing_ok=True)
        super().close()


def take(root: Path, name: str, *, beat: bool = False, wait: bool = True) -> io.FileIO:
    """Take the lock ``name`` of the engine directory ``root``; closing what is returned gives it back.

    Use it as ``with take(...):``, so that no variable keeps it.

    Args:
        root: the engine directory, made if need be.
        name: of what is locked, a path below it.
        beat: give a sign of life every few seconds, for work that takes longer.
        wait: for somebody else who has it; False: refuse at once.

    Raises:
        LockedError: if its holder gave no sign of life for a minute, or at once with ``wait=False``.
        EngineError: if the directory cannot be written.
    """
    watch = _Watch(root, name)
    while True:
        try:
            path, mode = _place(root, name)
            file = _try(path, mode, watch)
        except OSError as error:
            raise EngineError(f"cannot write in the engine directory {root}: {error}") from error
        if file is not None:
            try:
                if beat:
                    # Not threading.Thread: its start() is Python code, which an interrupt turns into a RuntimeError.
                    _thread.start_new_thread(_beat, (weakref.ref(file), path))
            except BaseException:
                file.close()
                raise
            return file
        if not wait:
            raise LockedError(f"{name} of {root} is in use by {watch.holder}")
        watch.sleep()


def is_held(root: Path, name: str) -> bool:
    """Whether somebody holds the lock ``name`` of ``root`` now."""
    if not _lock_path(root, name).exists():
        return False
    try:
        with take(root, name, wait=False):
            return False
    except EngineError:
        return True


def _lock_path(root: Path, name: str) -> Path:
    return root / ".locks" / f"{name.replace('/', '.')}.lock"


def _place(root: Path, name: str) -> tuple[Path, int]:
    """The lock file's path and mode: open to those who may write in the directory, and to nobody else.

    ``flock`` asks for no more than the right to read, so whoever may open the file could keep everybody else out.
    """
    path = _lock_path(root, name)
    folder = path.parent
    root.mkdir(parents=True, exist_ok=True)
    written_by = root.stat().st_mode
    mode = 0o600 | (0o060 if written_by & stat.S_IWGRP else 0) | (0o006 if written_by & stat.S_IWOTH else 0)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    try:
        status = folder.lstat()
    except FileNotFoundError:  # deleted again
        return _place(root, name)
    if not stat.S_ISDIR(status.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, "is not a folder", str(folder))
    wanted = mode | (mode >> 2 & 0o111)  # who may read may enter
    if stat.S_IMODE(status.st_mode) != wanted and hasattr(os, "geteuid") and status.st_uid == os.geteuid():
        with contextlib.suppress(OSError):
            folder.chmod(wanted)
    return path, mode


def _try(path: Path, mode: int, watch: _Watch) -> io.FileIO | None:
    """The lock, or None while somebody else has it; ``watch`` is told who."""
    file = _open(path, _OPEN, mode)
    if file is None:
        return None
    try:
        locked = _flock(file)
        if locked and _same(file, path):  # and not deleted, or another one by now, since it was opened
            _held.add(file)
            _sign(file)
            return file
        if locked is False:
            watch.see(file)
    except BaseException:
        file.close()
        raise
    file.close()
    return _mark(path.with_name(f"{path.name}.held"), mode, watch) if locked is None else None


def _open(path: Path, flags: int, mode: int, kind: type[io.FileIO] = io.FileIO) -> Any:
    """A file, or None where it went away meanwhile."""
    try:
        file = kind(path, "r+", opener=lambda name, _: os.open(name, flags, mode))
    except FileNotFoundError:
        return None
    with contextlib.suppress(OSError):
        if hasattr(os, "fchmod") and stat.S_IMODE(os.fstat(file.fileno()).st_mode) != mode:
            os.fchmod(file.fileno(), mode)  # a umask may take too much, and older releases gave too much
    return file


def _flock(file: io.FileIO) -> bool | None:
    """Whether the lock is ours now; None where the file system has no such locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _BUSY:
            return False
        if error.errno in _NO_FLOCK:
            return None
        raise
    return True


def _same(file: io.FileIO, path: Path) -> bool:
    """Whether ``path`` is still the file that is open."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path, follow_symlinks=False))
    except OSError:
        return False


# Who has it.


def _sign(file: io.FileIO) -> None:
    facts = {**owners.facts(), "since": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
        text = json.dumps(facts).encode()
        file.seek(0)
        file.write(text)
        file.truncate(len(text))


def _holder(file: io.FileIO) -> dict[str, Any]:
    try:
        file.seek(0)
        facts = json.loads(file.read(1000))
        return facts if isinstance(facts, dict) else {}
    except (OSError, ValueError):
        return {}


class _Watch:
    """One wait for one lock: looks for signs of life, says who has it, and ends."""

    def __init__(self, root: Path, name: str) -> None:
        self._what = f"{name} of the engine directory {root}"
        self._began = self._life = time.monotonic()
        self._said_at = self._began + SAY_AFTER
        self._mark: object = None
        self._pause = 0.005
        self.holder = "another process"

    def see(self, file: io.FileIO) -> None:
        """Look at the lock file of another holder."""
        status = os.fstat(file.fileno())
        mark = status.st_ino, status.st_mtime_ns, status.st_size
        if mark != self._mark:
            if self._mark is not None:
                self._life = time.monotonic()
            self._mark = mark
            facts = _holder(file)
            if facts:
                self.holder = f"process {facts.get('pid')} on {facts.get('host')} (since {facts.get('since')})"

    @property
    def silent(self) -> bool:
        """Whether the holder has given no sign of life for too long."""
        return time.monotonic() - self._life > LIMIT

    def sleep(self) -> None:
        """Wait a little, not for ever."""
        now = time.monotonic()
        if self.silent:
            raise LockedError(
                f"{self._what} is locked by {self.holder}, which has given no sign of life for {LIMIT:.0f} s. "
                "End that process, or use another directory"
            )
        if now >= self._said_at:
            logger.warning("waiting since %.0f s for %s: %s holds its lock", now - self._began, self._what, self.holder)
            self._said_at = now + LIMIT
        time.sleep(self._pause)
        self._pause = min(0.1, self._pause * 1.5)


def _beat(reference: weakref.ref[io.FileIO], path: Path) -> None:
    while True:
        time.sleep(BEAT)
        file = reference()
        if file is None or file.closed:
            return
        with contextlib.suppress(OSError):
            os.utime(file.path if isinstance(file, _Marker) else path)
        del file


# Where there is no flock.


def _mark(path: Path, mode: int, watch: _Watch) -> io.FileIO | None:
    while True:
        try:
            marker: _Marker = _open(path, _OPEN | os.O_EXCL, mode, _Marker)
        except FileExistsError:
            if _take_away(path, mode, watch):
                continue
            return None
        marker.path = path
        marker.process = os.getpid()
        _held.add(marker)
        _sign(marker)
        return marker


def _take_away(path: Path, mode: int, watch: _Watch) -> bool:
    """Watch a marker of somebody else; True once it is gone, as that of a dead process."""
    file = _open(path, _OPEN & ~os.O_CREAT, mode)
    if file is None:
        return True
    with file:
        watch.see(file)
        if not (owners.is_dead(_holder(file)) or watch.silent):
            return False
        logger.warning("the lock file %s was left behind by %s; it is taken away", path, watch.holder)
        # Of two who find it stale, the second must not take away what the first has put in its place.
        aside = path.with_name(f"{path.name}.{owners.signature()}")
        with contextlib.suppress(OSError):
            path.rename(aside)
            if not _same(file, aside):
                os.link(aside, path)
            aside.unlink()
    return True


def _forked() -> None:
    for file in _held:
        file.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)

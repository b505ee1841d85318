"""Which process a file belongs to, said in the file or in its name, so that others can tell what a dead one left behind."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import time
import uuid
from pathlib import Path
from typing import Any

#: Seconds after which a temporary file that nobody touched belongs to nobody, where its process cannot be looked at.
ABANDONED_AFTER = 3600.0

_SIGNATURE = re.compile(r"[.](\d+)-(\d*)-([0-9a-f]{8})-[0-9a-f]{16}(?=[.]|$)")


def facts() -> dict[str, Any]:
    """The current process, for :func:`is_dead`: its number, where that counts, and when it began."""
    process = os.getpid()
    return {"pid": process, **_place(), "started": _status(process)[1]}


def is_dead(holder: dict[str, Any]) -> bool:
    """Whether the process that :func:`facts` are of is known to be gone; False where it may live, here or elsewhere."""
    process, started, here = holder.get("pid"), holder.get("started"), _place()
    if not isinstance(process, int) or process <= 0 or holder.get("host") != here["host"]:
        return False
    if holder.get("boot") and here["boot"] and holder["boot"] != here["boot"]:
        return True
    same_numbers = holder.get("namespace", here["namespace"]) == here["namespace"]
    return same_numbers and not _lives(process, started if isinstance(started, str) else "")


def signature() -> str:
    """A part of a file's name that no other file has, without dots; it says which process writes the file."""
    process = os.getpid()
    return f"{process}-{_status(process)[1]}-{_place_hash()}-{uuid.uuid4().hex[:16]}"


def signed(name: str) -> str | None:
    """What stands before the :func:`signature` in the name of a file; None where there is none."""
    match = _SIGNATURE.search(name)
    return name[: match.start()] if match else None


def is_abandoned(path: Path) -> bool:
    """Whether nobody writes the temporary file ``path``: the process in its name is gone, or an hour has gone by untouched.

    The second alone counts for a process on another machine or in another container, and for a name without a signature.
    """
    match = _SIGNATURE.search(path.name)
    if match and match[3] == _place_hash() and not _lives(int(match[1]), match[2]):
        return True
    try:
        return abs(time.time() - path.lstat().st_mtime) > ABANDONED_AFTER
    except OSError:
        return False


def _place() -> dict[str, str]:
    """The machine, since it was started last, and the container: where a number stands for one process."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return {"host": platform.node(), "boot": _boot(), "namespace": namespace}


def _place_hash() -> str:
    return hashlib.sha256("\0".join(_place().values()).encode("utf-8", "backslashreplace")).hexdigest()[:8]


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _lives(process: int, started: str) -> bool:
    """Whether a process of this place lives that began at ``started`` (empty: whenever)."""
    try:
        if os.name == "posix":  # on Windows, signal 0 would end it
            os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        pass
    state, began = _status(process)
    return state not in ("Z", "X") and not (started and began and started != began)


def _status(process: int) -> tuple[str, str]:
    """The state of a process of this place, and when it began, in ticks since boot; empty where that is not known."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return fields[0], fields[19]
    except (OSError, IndexError):
        return "", ""

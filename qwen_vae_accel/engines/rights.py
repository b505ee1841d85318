"""Who else may change the engines of a directory: loading one runs the code in it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

try:
    import grp
    import pwd
except ImportError:  # Windows: rights are lists there, which nothing here reads
    grp = pwd = None  # type: ignore[assignment]


def writers(root: Path, *files: Path) -> list[str]:
    """List what lets others change ``files`` of the engine directory ``root``, its manifest or the directory: one text each.

    Others are all users but the current one and root. Folders with the sticky bit above the directory are fine: nobody
    replaces there what is not theirs. A group is no other where it is the private one of a user. Access lists are not read.
    """
    if pwd is None:
        return []
    found: dict[Path, str] = {}
    for path in _chain(root, files):
        try:
            status = path.lstat()
        except OSError:
            continue
        above = path != root and path != root.resolve() and path in (*root.parents, *root.resolve().parents)
        texts = _texts(status, above)
        if texts:
            found[path] = f"{path} {' and '.join(texts)}"
    return list(found.values())


def everything(root: Path) -> list[Path]:
    """The files and folders of an engine directory that decide what is run."""
    return sorted(path for path in root.rglob("*") if path.name != ".locks" and ".locks" not in path.relative_to(root).parts)


def _chain(root: Path, files: tuple[Path, ...]) -> Iterator[Path]:
    for path in dict.fromkeys((root / "manifest.json", root, *files)):
        try:
            real = path.resolve()
        except (OSError, RuntimeError):
            real = path
        for each in (path, real):
            yield each
            yield from each.parents


def _texts(status: os.stat_result, above: bool) -> list[str]:
    texts = []
    me = os.geteuid()
    if status.st_uid not in (0, me):
        texts.append(f"belongs to {_user(status.st_uid)}")
    if stat.S_ISLNK(status.st_mode) or (above and status.st_mode & stat.S_ISVTX):
        return texts
    if status.st_mode & stat.S_IWOTH:
        texts.append("can be written by everybody")
    elif status.st_mode & stat.S_IWGRP and not _is_private(status.st_gid, {0, me}):
        texts.append(f"can be written by the group {_group(status.st_gid)}")
    return texts


def _is_private(group: int, users: set[int]) -> bool:
    """Whether the group has no member but root and the current user, as those named after their one user have."""
    try:
        entry = grp.getgrgid(group)
        members = {pwd.getpwnam(name).pw_uid for name in entry.gr_mem}
        owner = pwd.getpwnam(entry.gr_name)
    except KeyError:
        return False
    return owner.pw_gid == group and owner.pw_uid in users and members <= users


def _user(number: int) -> str:
    try:
        return f"user {pwd.getpwuid(number).pw_name}"
    except KeyError:
        return f"user {number}"


def _group(number: int) -> str:
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)

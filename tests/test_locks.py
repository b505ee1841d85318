"""Locks between processes: private, given back whatever happens, and where there is no flock, not left for ever."""

from __future__ import annotations

import errno
import gc
import json
import os
import platform
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from qwen_vae_accel import owners
from qwen_vae_accel.engines import locks
from qwen_vae_accel.errors import EngineError, LockedError
from tests.processes import build

fcntl = pytest.importorskip("fcntl")


@pytest.fixture(params=["flock", "no flock"])
def kind(request, monkeypatch) -> str:
    """File systems with ``flock`` and without it."""
    if request.param == "no flock":
        refuse_flock(monkeypatch)
    return request.param


def refuse_flock(monkeypatch: pytest.MonkeyPatch, code: int = errno.ENOSYS) -> None:
    def flock(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.fixture
def impatient(monkeypatch) -> None:
    monkeypatch.setattr(locks, "SAY_AFTER", 0.1)
    monkeypatch.setattr(locks, "LIMIT", 0.5)


def marker(root: Path, name: str = "a") -> Path:
    return root / ".locks" / f"{name}.lock.held"


def refused(root: Path) -> bool:
    try:
        locks.take(root, "a", wait=False).close()
        return False
    except LockedError:
        return True


def test_a_lock_excludes_until_it_is_closed_or_forgotten(tmp_path, kind):
    with locks.take(tmp_path, "a"):
        assert refused(tmp_path)
        locks.take(tmp_path, "b", wait=False).close()
    assert not refused(tmp_path)
    lock = locks.take(tmp_path, "a")
    assert refused(tmp_path)
    del lock
    gc.collect()
    assert not refused(tmp_path)


def test_a_refusal_names_the_holder(tmp_path, kind):
    with (
        locks.take(tmp_path, "a"),
        pytest.raises(LockedError, match=f"a of {tmp_path} is in use by process {os.getpid()} on {platform.node()}"),
    ):
        locks.take(tmp_path, "a", wait=False)


def test_waiting_is_said_and_ends(tmp_path, impatient, caplog):
    with (
        locks.take(tmp_path, "a"),
        pytest.raises(LockedError, match=f"locked by process {os.getpid()} .* no sign of life"),
    ):
        locks.take(tmp_path, "a")
    assert "waiting since" in caplog.text and f"process {os.getpid()}" in caplog.text


def test_a_forked_child_keeps_no_lock_of_its_parent(tmp_path, kind):
    lock = locks.take(tmp_path, "a")
    asked, answer = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.write(answer[1], b"y" if refused(tmp_path) else b"n")
        os.read(asked[0], 1)
        os._exit(0)
    try:
        assert os.read(answer[0], 1) == b"y", "the parent's lock does not exclude its child"
        assert refused(tmp_path), "the child gave the parent's lock back"
        lock.close()
        assert not refused(tmp_path), "the child holds the parent's lock"
    finally:
        os.write(asked[1], b"x")
        os.waitpid(child, 0)


@pytest.mark.parametrize(("mode", "file", "folder"), [(0o755, 0o600, 0o700), (0o775, 0o660, 0o770), (0o777, 0o666, 0o777)])
@pytest.mark.parametrize("umask", [0o022, 0o077, 0])
def test_locks_are_open_to_those_who_may_write_and_to_nobody_else(tmp_path, mode, file, folder, umask):
    root = tmp_path / "engines"
    root.mkdir()
    root.chmod(mode)
    before = os.umask(umask)
    try:
        locks.take(root, "a").close()
    finally:
        os.umask(before)
    assert stat.S_IMODE((root / ".locks" / "a.lock").stat().st_mode) == file
    assert stat.S_IMODE((root / ".locks").stat().st_mode) == folder


def test_locks_of_older_releases_become_private(tmp_path):
    (tmp_path / ".locks").mkdir()
    (tmp_path / ".locks" / "a.lock").touch()
    (tmp_path / ".locks").chmod(0o755)
    (tmp_path / ".locks" / "a.lock").chmod(0o644)
    tmp_path.chmod(0o755)
    locks.take(tmp_path, "a").close()
    assert stat.S_IMODE((tmp_path / ".locks").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / ".locks" / "a.lock").stat().st_mode) == 0o600


@pytest.mark.parametrize("what", ["folder", "file"])
def test_a_link_in_the_place_of_a_lock_is_not_followed(tmp_path, what):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    root = tmp_path / "engines"
    root.mkdir()
    if what == "folder":
        (root / ".locks").symlink_to(elsewhere)
    else:
        (root / ".locks").mkdir()
        (root / ".locks" / "a.lock").symlink_to(elsewhere / "made")
    with pytest.raises(EngineError, match="cannot write in the engine directory"):
        locks.take(root, "a")
    assert not list(elsewhere.iterdir())


# Without flock.


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_directory_copied_to_a_file_system_without_flock_is_not_locked(tmp_path, monkeypatch, code):
    build(tmp_path / "old")
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    refuse_flock(monkeypatch, code)
    build(tmp_path / "new", "newer")
    assert not list((tmp_path / "new" / ".locks").glob("*.held*"))


def test_the_lock_of_a_killed_process_is_taken_away(tmp_path, monkeypatch, caplog):
    refuse_flock(monkeypatch)
    script = (
        "import errno, fcntl, os, sys, pathlib\n"
        "def flock(*_): raise OSError(errno.ENOSYS, 'no flock')\n"
        "fcntl.flock = flock\n"
        "from qwen_vae_accel.engines import locks\n"
        "lock = locks.take(pathlib.Path(sys.argv[1]), 'a')\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert done.returncode == -9 and marker(tmp_path).exists()
    with locks.take(tmp_path, "a", wait=False):
        assert refused(tmp_path)
    assert "left behind by process" in caplog.text
    assert not list((tmp_path / ".locks").glob("*.held*"))


def holder(**changes: object) -> dict[str, object]:
    return {**owners.facts(), "since": "2026-01-01T00:00:00+00:00", **changes}


@pytest.mark.parametrize(
    ("facts", "stale"),
    [
        pytest.param(holder(), False, id="a live process"),
        pytest.param(holder(host="another-machine"), False, id="another machine"),
        pytest.param(holder(boot="another boot"), True, id="before a reboot"),
        pytest.param(holder(started="1"), True, id="a process number used again"),
        pytest.param(holder(namespace="pid:[1]", started="1"), False, id="another container"),
        pytest.param(holder(pid=10**30), True, id="not a process number"),
        pytest.param({}, False, id="unreadable"),
    ],
)
def test_a_stale_lock_is_known_by_its_holder(tmp_path, monkeypatch, facts, stale):
    refuse_flock(monkeypatch)
    (tmp_path / ".locks").mkdir(mode=0o700)
    marker(tmp_path).write_text(json.dumps(facts))
    assert refused(tmp_path) is not stale


def test_a_lock_without_a_sign_of_life_is_taken_away(tmp_path, monkeypatch, impatient):
    refuse_flock(monkeypatch)
    (tmp_path / ".locks").mkdir(mode=0o700)
    marker(tmp_path).write_text(json.dumps(holder(host="another-machine")))
    with locks.take(tmp_path, "a"):
        assert refused(tmp_path)

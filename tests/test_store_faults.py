"""The engine directory when processes die or meet, disks fill up, and rights are missing."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import stat
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen_vae_accel import accelerate, files
from qwen_vae_accel.engines.manifest import NAME, Manifest
from qwen_vae_accel.engines.store import EngineStore
from qwen_vae_accel.errors import BuildError, EngineError, EngineMissingError, EngineRefusedError
from qwen_vae_accel.plan import EngineKey
from qwen_vae_accel.plugin.methods import handle_of
from tests import processes
from tests.processes import build, content, expected, maker

PATH = expected().path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A directory with the engine of the ``new`` weights."""
    folder = tmp_path / "engines"
    build(folder, "new")
    return folder


def find(root: Path, **changes: object) -> tuple[Path, object]:
    return EngineStore(root).find(expected(**changes))


# Processes.


@pytest.mark.parametrize(
    ("stage", "survivor"),
    [
        ("making", "old"),
        ("accepting", "old"),
        ("before 1", "old"),  # the manifest that announces the new file
        ("after 1", "old"),
        ("before 2", "old"),  # the file itself
        ("after 2", "new"),
        ("before 3", "new"),  # the manifest that forgets the old file
        ("after 3", "new"),
    ],
)
def test_a_killed_build_leaves_the_old_or_the_new_engine(tmp_path, stage, survivor):
    build(tmp_path, "old")
    process = processes.start(processes.build_and_die, tmp_path, stage)
    process.join(processes.PATIENCE)
    assert process.exitcode == -9
    assert find(tmp_path, weights=survivor)[0].read_bytes() == content(survivor)
    # Neither its lock nor what it left behind is in the way of the next one.
    build(tmp_path, "newer")
    find(tmp_path, weights="newer")
    assert not EngineStore(tmp_path).leftovers()
    assert {p.name for p in tmp_path.iterdir()} == {"512x512", "manifest.json", ".locks", ".tmp"}
    assert len(EngineStore(tmp_path).manifest().engines[PATH]) == 1


@pytest.mark.parametrize("stage", ["making", "before 1", "after 1", "before 2"])
def test_a_killed_first_build_leaves_nothing_usable(tmp_path, stage):
    process = processes.start(processes.build_and_die, tmp_path, stage)
    process.join(processes.PATIENCE)
    assert process.exitcode == -9
    with pytest.raises(EngineMissingError):
        find(tmp_path)
    build(tmp_path, "new")
    find(tmp_path)


@pytest.mark.parametrize("other", [PATH, "16_9/vae_decoder.fake"], ids=["the same engine", "another engine"])
@pytest.mark.parametrize("call", range(7))
def test_deleted_lock_files_let_two_build_at_once_and_neither_fails(tmp_path, monkeypatch, call, other):
    """While the first is inside ``make``, or at a flush to disk, a second one builds from beginning to end."""
    build(tmp_path, "old")
    flush, count = os.fsync, 0
    key = EngineKey("decode", other.partition("/")[0], expected().key.profiles)
    first, second = expected("first"), expected("second", key=key)

    def meanwhile() -> None:
        before = temporaries()
        shutil.rmtree(tmp_path / ".locks")
        EngineStore(tmp_path).build(second, maker(second))
        assert temporaries() == before

    def temporaries() -> set[str]:
        return {path.name for path in (*tmp_path.glob(".manifest.json.*"), *(tmp_path / ".tmp").iterdir())}

    def make(path: Path) -> object:
        made = maker(first)(path)
        if call == 0:
            meanwhile()
        return made

    def hooked(descriptor: int) -> None:
        nonlocal count
        count += 1
        flush(descriptor)
        if count == call:
            monkeypatch.undo()
            meanwhile()

    monkeypatch.setattr(os, "fsync", hooked)
    EngineStore(tmp_path).build(first, make)
    assert count >= call
    found = []
    for each in (first, second):
        with contextlib.suppress(EngineRefusedError):
            found.append(EngineStore(tmp_path).find(each))
    assert len(found) == (1 if other == PATH else 2), "the file in place has its record"


def test_two_processes_build_the_same_engine_once(tmp_path):
    inside, go, calling, done = (processes.CONTEXT.Event() for _ in range(4))
    builds = processes.CONTEXT.Value("i", 0)
    first = processes.start(processes.build_slowly, tmp_path, inside, go, done)
    assert inside.wait(processes.PATIENCE)
    second = processes.start(processes.build_second, tmp_path, calling, builds)
    assert calling.wait(processes.PATIENCE)
    second.join(0.3)
    assert second.is_alive() and not done.is_set(), "the second one did not wait"
    go.set()
    for process in (first, second):
        process.join(processes.PATIENCE)
        assert process.exitcode == 0
    assert builds.value == 0
    assert find(tmp_path)[0].read_bytes() == content("new")


def test_processes_that_build_different_engines_keep_each_others_records(tmp_path):
    names = [[f"{who}{i}" for i in range(8)] for who in "abc"]
    crowd = [processes.start(processes.build_many, tmp_path, mine) for mine in names]
    for process in crowd:
        process.join(processes.PATIENCE)
        assert process.exitcode == 0
    assert set(Manifest.read(tmp_path).engines) == {f"{name}/vae_decoder.fake" for mine in names for name in mine}


def test_two_processes_accelerate_into_one_directory(tmp_path):
    """The whole way: one builds, the other waits and loads; both images are right."""
    ready, go = processes.CONTEXT.Event(), processes.CONTEXT.Event()
    results: dict[str, dict] = {}

    def run(name: str, *events: object) -> None:
        results[name] = processes.call(processes.decode_once, tmp_path, {}, *events)

    first = threading.Thread(target=run, args=("first", ready, go))
    first.start()
    assert ready.wait(processes.PATIENCE)
    second = threading.Thread(target=run, args=("second",))
    second.start()
    go.set()
    for thread in (first, second):
        thread.join(processes.PATIENCE)
    # Both load it once to be used; the builder once more, to check what it has built.
    assert results["first"]["events"] == ["build", "load", "load"]
    assert results["second"]["events"] == ["load"]
    for result in results.values():
        assert result["right"]
        assert result["report"]["calls"]["decode"] == {"tensorrt": 1}


# A disk that is full, a directory that cannot be written or read.


def test_a_disk_that_is_full_while_the_engine_is_written(tmp_path):
    build(tmp_path, "old")
    before = (tmp_path / NAME).read_bytes()
    error = processes.call(processes.build_on_a_full_disk, tmp_path, 1000)
    assert error.startswith("BuildError: cannot write the engine")
    assert (tmp_path / NAME).read_bytes() == before
    assert find(tmp_path, weights="old")[0].read_bytes() == content("old")
    assert not EngineStore(tmp_path).leftovers()
    build(tmp_path, "new")


@pytest.mark.parametrize("call", range(1, 7))
def test_a_disk_that_is_full_at_any_write(tmp_path, monkeypatch, call):
    """Every flush to disk of a build in turn finds the disk full."""
    build(tmp_path, "old")
    flush, count = os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal count
        count += 1
        if count == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(BuildError, match="No space left"):
            build(tmp_path, "new")
    assert count >= call
    found = []
    for weights in ("old", "new"):
        try:
            found.append(find(tmp_path, weights=weights))
        except EngineRefusedError:
            continue
    assert len(found) == 1, "either the old or the new engine is there"
    assert not EngineStore(tmp_path).leftovers()
    build(tmp_path, "new")
    assert {p.name for p in tmp_path.iterdir()} == {"512x512", "manifest.json", ".locks", ".tmp"}


@pytest.mark.parametrize("error", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_maker_that_cannot_write(root, error):
    wanted = expected("newer")

    def make(path: Path):
        raise OSError(error, os.strerror(error))

    with pytest.raises(BuildError, match=os.strerror(error)):
        EngineStore(root).build(wanted, make)
    find(root)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter; pytest's own may not be."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    for path in (folder, *folder.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o755)
    shutil.rmtree(folder)


def test_a_directory_that_cannot_be_written(open_folder):
    digest = build(open_folder, "old")
    for path in open_folder.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    open_folder.chmod(0o555)
    assert processes.call(processes.find_unprivileged, open_folder, "old") == digest
    error = processes.call(processes.build_unprivileged, open_folder, "new")
    assert "cannot write" in error and str(open_folder) in error and "Permission denied" in error


def test_engines_of_a_read_only_directory_serve(open_folder):
    first = processes.call(processes.decode_once, open_folder, {"sizes": ["32x32"]})
    assert first["events"] == ["build", "load", "load"]
    document = json.loads((open_folder / NAME).read_text())
    document["engines"]["32x32/vae_decoder.fake"][0]["verification"] = {}
    (open_folder / NAME).write_text(json.dumps(document))
    for path in open_folder.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    open_folder.chmod(0o555)
    again = processes.call(processes.decode_once_unprivileged, open_folder, {"sizes": ["32x32"]})
    assert again["events"] == ["load"]
    assert again["right"]
    assert again["report"]["calls"]["decode"] == {"tensorrt": 1}
    assert len(again["report"]["self_checks"]) == 1
    # One that is missing cannot be built there; the image comes all the same, and the report says why.
    other = processes.call(processes.decode_once_unprivileged, open_folder, {})
    assert other["right"]
    missing = processes.call(processes.decode_once_unprivileged, open_folder, {"sizes": ["32x32"], "multi_profile": True})
    assert missing["report"]["calls"]["decode"] == {"eager": 1}
    assert "cannot write" in missing["report"]["fallbacks"][0]["reason"]


def test_unreadable_files(open_folder):
    build(open_folder, "old")
    (open_folder / PATH).chmod(0)
    assert "cannot read the engine" in processes.call(processes.find_unprivileged, open_folder, "old")
    (open_folder / PATH).chmod(0o644)
    (open_folder / NAME).chmod(0)
    assert "cannot read the manifest" in processes.call(processes.find_unprivileged, open_folder, "old")
    (open_folder / NAME).chmod(0o644)
    (open_folder / "512x512").chmod(0)
    assert "EngineError" in processes.call(processes.find_unprivileged, open_folder, "old")
    (open_folder / "512x512").chmod(0o755)
    inner = open_folder / "locked" / "engines"
    inner.mkdir(parents=True)
    inner.parent.chmod(0)
    assert "EngineError" in processes.call(processes.find_unprivileged, inner, "old")


def test_engine_dir_that_is_a_file(micro, fake, tmp_path):
    file = tmp_path / "engines"
    file.write_text("not a folder")
    with pytest.raises(EngineError, match="is a file"):
        EngineStore(file)
    with pytest.raises(EngineError, match="is a file"):
        accelerate(micro, backend="tensorrt", engine_dir=file)
    with pytest.raises(EngineError):
        EngineStore(file / "below").build(expected(), maker(expected()))
    assert file.read_text() == "not a folder"
    assert handle_of(micro) is None


@pytest.mark.parametrize("on_miss", ["error", "fallback"])
def test_engine_dir_that_is_missing(micro, fake, tmp_path, on_miss):
    with pytest.raises(EngineError, match="does not exist.*qwen-vae-accel build"):
        accelerate(micro, backend="tensorrt", engine_dir=tmp_path / "none", on_miss=on_miss)
    assert handle_of(micro) is None
    assert not (tmp_path / "none").exists()


def test_engine_dir_of_nobodys_home():
    with pytest.raises(EngineError):
        EngineStore("~no-such-user-here/engines")


def test_an_engine_path_that_is_a_folder(root):
    (root / PATH).unlink()
    (root / PATH).mkdir()
    with pytest.raises(EngineError):
        find(root)
    with pytest.raises(EngineError):
        build(root, "new")


# What is optional.


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EACCES])
@pytest.mark.parametrize("what", ["folders", "everything"])
def test_a_file_system_without_fsync_is_said_once_and_used(tmp_path, monkeypatch, caplog, code, what):
    flush = os.fsync

    def refuse(descriptor: int) -> None:
        if what == "everything" or stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    monkeypatch.setattr(files, "_told", set())
    for weights in ("old", "new"):
        build(tmp_path, weights)
    assert find(tmp_path)[0].read_bytes() == content("new")
    assert len([record for record in caplog.records if "without fsync" in record.getMessage()]) == 1

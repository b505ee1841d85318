"""Whose a temporary file is: known from its name, and where that cannot be looked up, from its age."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

import pytest

from qwen_vae_accel import files, owners
from tests.processes import dead_signature


def made(folder: Path, signature: str, age: float = 0.0) -> Path:
    path = folder / f".file.{signature}.fake"
    path.touch()
    os.utime(path, (time.time() - age,) * 2)
    return path


def elsewhere(monkeypatch: pytest.MonkeyPatch, **changes: str) -> str:
    """The signature of a process with this one's number, made where ``changes`` are so."""
    place = owners._place()
    with monkeypatch.context() as patch:
        patch.setattr(owners, "_place", lambda: {**place, **changes})
        return owners.signature()


def test_the_file_of_a_process_is_abandoned_when_it_is_gone(tmp_path):
    assert not owners.is_abandoned(made(tmp_path, owners.signature()))
    assert owners.is_abandoned(made(tmp_path, dead_signature()))


def test_a_number_that_was_used_again_is_another_process(tmp_path):
    number, _, rest = owners.signature().split("-", 2)
    assert owners.is_abandoned(made(tmp_path, f"{number}-1-{rest}"))
    assert owners.is_abandoned(made(tmp_path, f"{10**30}-1-{rest}"))


@pytest.mark.skipif(not hasattr(os, "fork") or platform.system() != "Linux", reason="reads /proc")
def test_a_process_that_ended_and_was_not_waited_for_is_gone(tmp_path):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, owners.signature().encode())
        os._exit(0)
    try:
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        assert owners.is_abandoned(made(tmp_path, os.read(reader, 200).decode()))
    finally:
        os.waitpid(child, 0)


@pytest.mark.parametrize("where", ["host", "boot", "namespace", None])
def test_where_nobody_can_look_age_counts(tmp_path, monkeypatch, where):
    """On another machine, before a reboot, in another container, and in names of other origin."""
    signature = "a" * 32 if where is None else elsewhere(monkeypatch, **{where: "another"})
    assert not owners.is_abandoned(made(tmp_path, signature, owners.ABANDONED_AFTER - 60))
    assert owners.is_abandoned(made(tmp_path, signature, owners.ABANDONED_AFTER + 60))
    assert owners.is_abandoned(made(tmp_path, signature, -owners.ABANDONED_AFTER - 60)), "a clock that was wrong"


def test_a_signature_is_found_in_a_name():
    signature = owners.signature()
    assert owners.signed(f".manifest.json.{signature}") == ".manifest.json"
    assert owners.signed(f"1.vae_decoder.fake.{signature}.fake") == "1.vae_decoder.fake"
    assert owners.signed("1.vae_decoder.fake") is None and owners.signed(f"x.{signature}y") is None


def test_what_is_written_atomically_is_signed(tmp_path, monkeypatch):
    names = []
    monkeypatch.setattr(files, "_sync", lambda *_: names.extend(path.name for path in tmp_path.iterdir()))
    files.write_atomically(tmp_path / "file", "text")
    assert [owners.signed(name) for name in names] == [".file"] and [path.name for path in tmp_path.iterdir()] == ["file"]

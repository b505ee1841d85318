"""Who else may write where engines lie: it is seen, said once at a load, and ends ``verify`` with 1."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path

import pytest

from qwen_vae_accel.engines import rights
from qwen_vae_accel.engines.store import EngineStore
from tests.helpers import decoded, latents, open_engines
from tests.processes import build, expected

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="modes of Unix")
pytest_plugins = ["tests.fixtures_cli"]
PATH = expected().path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "above" / "engines"
    build(folder)
    for path in (folder.parent, folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return folder


def found(root: Path) -> list[str]:
    return rights.writers(root, *rights.everything(root))


def test_a_directory_of_ones_own_has_no_other_writers(root):
    assert found(root) == []


@pytest.mark.parametrize("place", ["..", ".", "manifest.json", "512x512", PATH])
def test_others_who_may_write_are_found_wherever_they_may(root, place):
    path = (root / place).resolve()
    path.chmod(path.stat().st_mode | 0o002)
    assert found(root) == [f"{path} can be written by everybody"]


def test_the_sticky_bit_helps_above_the_directory_alone(root):
    root.parent.chmod(0o1777)
    assert found(root) == []
    root.chmod(0o1777)
    assert found(root) == [f"{root} can be written by everybody"]


def test_a_link_in_a_folder_of_everybody_is_found(root, tmp_path):
    public = tmp_path / "public"
    public.mkdir()
    (public / "link").symlink_to(root)
    public.chmod(0o777)
    assert found(public / "link") == [f"{public} can be written by everybody"]


@pytest.mark.parametrize(
    ("name", "members", "primary", "private"),
    [("me", [], True, True), ("me", ["me"], True, True), ("me", ["you"], True, False), ("me", [], False, False)],
)
def test_a_group_that_is_one_users_own_is_nobody_else(root, monkeypatch, name, members, primary, private):
    users = {"me": os.geteuid(), "you": os.geteuid() + 1}
    group = root.stat().st_gid if primary else root.stat().st_gid + 1

    def getpwnam(user: str) -> object:
        return types.SimpleNamespace(pw_uid=users[user], pw_gid=group)

    def getgrgid(_: int) -> object:
        return types.SimpleNamespace(gr_name=name, gr_mem=members)

    monkeypatch.setattr(rights, "grp", types.SimpleNamespace(getgrgid=getgrgid))
    monkeypatch.setattr(rights, "pwd", types.SimpleNamespace(getpwnam=getpwnam))
    root.chmod(0o775)
    assert found(root) == ([] if private else [f"{root} can be written by the group {name}"])


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files away")
def test_files_of_another_user_are_found(root):
    os.chown(root / PATH, 12345, -1)
    assert found(root) == [f"{root / PATH} belongs to user 12345"]


def test_other_writers_are_said_once_at_load(micro, fake, engines, caplog, no_grad):
    engines.chmod(0o777)
    open_engines(micro, engines, max_resident=1)
    for size in ("32x32", "48x32", "32x32"):
        decoded(micro, latents(size))
    said = [record for record in caplog.records if "can be written by everybody" in record.getMessage()]
    assert len(said) == 1 and said[0].levelname == "WARNING" and str(engines) in said[0].getMessage()


def test_nothing_is_said_of_a_directory_of_ones_own(root, caplog):
    EngineStore(root).load(expected())
    assert not caplog.records


def test_verify_ends_with_1_where_others_may_write(cli, micro_folder, fake, engines):
    keep = {"32x32/vae_decoder.fake"}
    for name in EngineStore(engines).manifest().engines.keys() - keep:
        EngineStore(engines).remove(name)
    arguments = ("verify", "--vae", micro_folder, "--engine-dir", engines)
    good = cli(*arguments, "--json")
    assert good.code == 0 and good.document["writers"] == []
    engines.chmod(0o777)
    bad = cli(*arguments, "--json")
    assert bad.code == 1 and all(entry["good"] for entry in bad.document["engines"])
    assert bad.document["writers"] == [f"{engines} can be written by everybody"]
    assert "others may change what is run from here" in cli(*arguments).stdout

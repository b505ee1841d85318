"""``prune`` beside live builds, and where links lead out of the directory: it deletes what can go, and nothing else."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from qwen_vae_accel import owners
from qwen_vae_accel.backends import registry
from qwen_vae_accel.backends.eager import EagerBackend
from qwen_vae_accel.engines import locks
from qwen_vae_accel.engines.inspect import Inspector
from qwen_vae_accel.engines.manifest import NAME
from qwen_vae_accel.engines.store import EngineStore
from qwen_vae_accel.errors import EngineError, EngineMissingError
from tests.helpers import FakeBackend
from tests.processes import IDENTITY, dead_signature, expected, maker

PATH = expected().path
OLD = {"device_name": "another GPU"}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory whose one engine would not be run here; the fake backend's are :func:`expected` ones."""
    fake = FakeBackend()
    fake.facts = dict(IDENTITY)
    monkeypatch.setattr(registry, "_BACKENDS", (fake, EagerBackend()))
    build(tmp_path / "engines", identity=OLD)
    return tmp_path / "engines"


def build(root: Path, **changes: object) -> None:
    wanted = expected("w", **changes)
    EngineStore(root).build(wanted, maker(wanted))


def inspector(root: Path) -> Inspector:
    return Inspector(root, torch.device("cpu"))


def test_an_engine_that_became_current_since_the_look_is_kept(root):
    look = inspector(root)
    (removal,) = look.prunable()
    build(root)
    assert "built again" in look.remove(removal)
    EngineStore(root).find(expected("w"))
    (unplanned,) = look.prunable(planned=set())
    assert look.remove(unplanned) == ""
    with pytest.raises(EngineMissingError):
        EngineStore(root).find(expected("w"))


def test_an_engine_whose_build_is_under_way_is_kept(root):
    look = inspector(root)
    (removal,) = look.prunable()
    with locks.take(root, PATH):
        assert look.remove(removal) == "a build of it is under way"
    assert (root / PATH).exists()
    assert look.remove(removal) == "" and not (root / PATH).exists() and not (root / "512x512").exists()


PLACES = [".tmp/512x512.vae_decoder.fake.{}.fake", ".manifest.json.{}"]
OTHERS = [".tmp/.512x512.vae_decoder.fake.{}.fake.{}", ".timing/.GPU.bin.{}", ".tuning_GPU.json.{}"]


@pytest.mark.parametrize("place", PLACES)
def test_a_temporary_file_whose_lock_is_held_is_kept(root, place):
    """Its lock was free at the look, and is not at the deed."""
    file = root / place.format(dead_signature())
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"half")
    look = inspector(root)
    (removal,) = [removal for removal in look.prunable() if removal.engine is None]
    assert removal.path == file and removal.size == 4
    with locks.take(root, NAME if file.parent == root else PATH):
        assert not [removal for removal in look.prunable() if removal.engine is None]
        assert look.remove(removal) == "a build of it is under way"
        assert file.exists()
    assert look.remove(removal) == "" and not file.exists()
    assert look.remove(removal) == "", "gone already"


@pytest.mark.parametrize("place", PLACES + OTHERS)
def test_a_temporary_file_goes_with_its_writer_whoever_holds_locks(root, place):
    """Locks may have been deleted, and not every file has one."""
    look = inspector(root)
    dead, live = (root / place.replace("{}", signature) for signature in (dead_signature(), owners.signature()))
    for file in (dead, live):
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"half")
    (removal,) = [removal for removal in look.prunable() if removal.engine is None]
    assert removal.path == dead and look.remove(removal) == "" and not dead.exists()
    assert look.remove(dataclasses.replace(removal, path=live)) == "a build of it is under way" and live.exists()


def test_a_build_removes_what_a_killed_one_left_and_nothing_of_a_live_one(root):
    places = [*PLACES, OTHERS[0]]
    dead, live = (
        [root / place.replace("{}", signature) for place in places] for signature in (dead_signature(), owners.signature())
    )
    for file in (*dead, *live):
        file.write_bytes(b"half")
    build(root)
    assert not any(file.exists() for file in dead) and all(file.exists() for file in live)


def test_the_folder_of_an_engine_stays_for_the_other_network(root):
    (root / "512x512" / "vae_encoder.fake").write_bytes(b"unknown")
    look = inspector(root)
    for removal in look.prunable():
        assert look.remove(removal) == ""
    assert [path.name for path in (root / "512x512").iterdir()] == ["vae_encoder.fake"]


# Links.


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "vae_decoder.fake").write_text("mine")
    return folder


def add_record(root: Path, name: str) -> None:
    document = json.loads((root / NAME).read_text())
    document["engines"][name] = document["engines"][PATH]
    (root / NAME).write_text(json.dumps(document))


@pytest.mark.parametrize("name", ["evil/vae_decoder.fake", "a/evil/vae_decoder.fake"])
def test_a_record_whose_folder_is_a_link_deletes_nothing_outside(root, outside, name):
    link = (root / name).parent
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(outside)
    add_record(root, name)
    look = inspector(root)
    (removal,) = [removal for removal in look.prunable() if removal.engine == name]
    with pytest.raises(EngineError, match="not deleted, because a link leads out of the engine directory; only its record is"):
        look.remove(removal)
    assert (outside / "vae_decoder.fake").read_text() == "mine"
    assert name not in EngineStore(root).manifest().engines


def test_an_engine_that_is_a_link_goes_and_what_it_leads_to_stays(root, outside):
    (root / PATH).unlink()
    (root / PATH).symlink_to(outside / "vae_decoder.fake")
    look = inspector(root)
    (removal,) = look.prunable()
    assert look.remove(removal) == ""
    assert not os.path.lexists(root / PATH) and (outside / "vae_decoder.fake").exists()


def test_a_folder_of_temporary_files_that_is_a_link_is_left_alone(root, outside):
    mine = outside / f"512x512.vae_decoder.fake.{dead_signature()}.fake"
    mine.write_text("mine")
    shutil.rmtree(root / ".tmp")
    (root / ".tmp").symlink_to(outside)
    look = inspector(root)
    (removal,) = [removal for removal in look.prunable() if removal.engine is None]
    with pytest.raises(EngineError, match="cannot delete"):
        look.remove(removal)
    build(root)
    assert mine.read_text() == "mine" and (outside / "vae_decoder.fake").exists()


def test_a_dead_link_among_the_temporary_files_goes(root):
    link = root / ".tmp" / f"x.{dead_signature()}.fake"
    link.symlink_to(root / "nowhere")
    look = inspector(root)
    (removal,) = [removal for removal in look.prunable() if removal.engine is None]
    assert look.remove(removal) == "" and not os.path.lexists(link)


def test_a_folder_among_the_temporary_files_is_a_typed_error(root):
    (root / ".tmp" / f"folder.{dead_signature()}").mkdir()
    look = inspector(root)
    (removal,) = [removal for removal in look.prunable() if removal.engine is None]
    with pytest.raises(EngineError, match="cannot delete"):
        look.remove(removal)

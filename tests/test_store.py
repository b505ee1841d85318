"""The engine directory under damage, death, crowds and missing rights: only what is known to be good is ever handed out."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
import threading
from pathlib import Path

import pytest
import torch
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_vae_accel.cli.app import app
from qwen_vae_accel.config import AccelConfig
from qwen_vae_accel.engines.manifest import NAME, Verification
from qwen_vae_accel.engines.store import EngineStore, hash_file
from qwen_vae_accel.errors import EngineError, EngineMissingError, EngineRefusedError
from qwen_vae_accel.plan import EngineKey, Plan
from qwen_vae_accel.sizes import Profile, Size
from tests import processes
from tests.processes import OtherBackend, build, content, expected, maker

PATH = expected().path
CHECK = Verification(True, 1e-6, 3e-6, 2e-6, 6e-6, 100.0, "m", "2026-01-01T00:00:00+00:00")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A directory with the engine of the ``new`` weights."""
    folder = tmp_path / "engines"
    build(folder, "new")
    return folder


def find(root: Path, **changes: object) -> tuple[Path, object]:
    return EngineStore(root).find(expected(**changes))


def refusal(root: Path, **changes: object) -> list[str]:
    with pytest.raises(EngineRefusedError) as caught:
        find(root, **changes)
    assert all(difference in str(caught.value) for difference in caught.value.differences)
    return list(caught.value.differences)


# Layout and life.


def test_layout(root):
    assert (root / "512x512" / "vae_decoder.fake").read_bytes() == content("new")
    document = json.loads((root / "manifest.json").read_text())
    (record,) = document["engines"]["512x512/vae_decoder.fake"]
    assert document["version"] == 1
    assert record["sha256"] == hash_file(root / PATH)
    assert record["size"] == len(content("new"))
    keys = {"backend", "method", "name", "profiles", "dtype", "weights", "identity", "environment", "built_at"}
    assert keys | {"build_seconds", "verification", "origin"} <= set(record)
    assert not EngineStore(root).leftovers()
    assert {p.name for p in root.iterdir()} == {"512x512", "manifest.json", ".locks", ".tmp"}


def test_multi_profile_engines_have_the_guides_names(tmp_path):
    profiles = (Profile("a", Size(64, 64), Size(128, 128), Size(256, 256)),)
    for method, name in (("encode", "vae_encoder_multi_profile.fake"), ("decode", "vae_decoder_multi_profile.fake")):
        wanted = expected(key=EngineKey(method, "multi_profile", profiles))
        assert wanted.path == name
        path, record = EngineStore(tmp_path).build(wanted, maker(wanted))
        assert path == tmp_path / name
        assert record.key == wanted.key


def test_making_a_store_touches_nothing(tmp_path):
    EngineStore(tmp_path / "none")
    assert not list(tmp_path.iterdir())
    with pytest.raises(EngineMissingError, match="there is no engine"):
        find(tmp_path / "none")
    assert not list(tmp_path.iterdir())


def test_a_usable_engine_is_not_built_again(root):
    before = (root / PATH).stat()
    wanted = expected("new")

    def make(path: Path):
        raise AssertionError("built again")

    EngineStore(root).build(wanted, make)
    assert (root / PATH).stat() == before


def test_an_engine_of_other_weights_replaces_the_old_one(root):
    build(root, "newer")
    find(root, weights="newer")
    assert len(EngineStore(root).manifest().engines[PATH]) == 1
    assert refusal(root, weights="new")


def test_remove(root):
    store = EngineStore(root)
    assert store.remove(PATH) == len(content("new"))
    with pytest.raises(EngineMissingError):
        find(root)
    assert not store.manifest().engines
    assert not (root / "512x512").exists()
    assert store.remove(PATH) == 0


def test_results_of_self_checks_are_kept(root):
    store = EngineStore(root)
    _, record = store.find(expected())
    store.record_verification(PATH, record.sha256, "m/512x512", CHECK)
    store.record_verification(PATH, "another file", "m/other", CHECK)
    store.record_verification("no/such.fake", record.sha256, "m/other", CHECK)
    assert EngineStore(root).find(expected())[1].verification == {"m/512x512": CHECK}


def test_scratch_memory_is_kept_when_it_becomes_known(root):
    store = EngineStore(root)
    _, record = store.find(expected())
    assert record.scratch is None
    for told, kept in ((None, None), ((1 << 40,), (1 << 40,)), (None, (1 << 40,)), ((7,), (7,))):
        store.record_verification(PATH, record.sha256, "m/512x512", CHECK, told)
        assert EngineStore(root).find(expected())[1].scratch == kept


def test_a_manifest_from_before_scratch_memory_was_kept_still_loads(root):
    document = json.loads((root / NAME).read_text())
    del document["engines"][PATH][0]["scratch"]
    (root / NAME).write_text(json.dumps(document))
    assert find(root)[1].scratch is None


# Damage.


@pytest.mark.parametrize("length", [0, 1, 7, len(content("new")) // 2, len(content("new")) - 1])
def test_truncated(root, length):
    (root / PATH).write_bytes(content("new")[:length])
    (difference,) = refusal(root)
    assert "damaged" in difference and str(length) in difference


def test_appended(root):
    with (root / PATH).open("ab") as file:
        file.write(b"\0")
    assert "damaged" in refusal(root)[0]


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, len(content("new")) - 1), bit=st.integers(0, 7))
def test_bit_flips(root, position, bit):
    data = bytearray(content("new"))
    data[position] ^= 1 << bit
    (root / PATH).write_bytes(data)
    assert "damaged" in refusal(root)[0]


def test_a_damaged_engine_is_built_again(root):
    (root / PATH).write_bytes(b"rubbish")
    build(root, "new")
    assert find(root)[0].read_bytes() == content("new")


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_a_damaged_manifest_never_passes_for_another(root, data):
    """Whatever one byte of it becomes: the engine is the one that was built, or there is a typed error."""
    original = build(root, "new")
    path = root / NAME
    text = path.read_bytes()
    position = data.draw(st.integers(0, len(text) - 1))
    path.write_bytes(text[:position] + bytes([data.draw(st.integers(0, 255))]) + text[position + 1 :])
    try:
        found, record = find(root)
        assert record.sha256 == original == hash_file(found)
    except EngineError:
        pass
    finally:
        path.write_bytes(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("\x00\x01", "not JSON"),
        ("[]", "no table of engines"),
        ('{"version": 1}', "no table of engines"),
        ('{"version": 1, "engines": []}', "no table of engines"),
        ('{"version": 2, "engines": {}}', "version 2"),
        ('{"engines": {}}', "version None"),
        ('{"version": 1, "engines": {"a": 3}}', "malformed"),
        ('{"version": 1, "engines": {"a": [3]}}', "malformed"),
        ('{"version": 1, "engines": {"a": [{}]}}', "malformed"),
        ('{"version": 1, "engines": {"a": [{"sha256": 1}]}}', "malformed"),
        ("[" * 100_000, "not JSON"),
        ('{"version": ' + "1" * 5000 + "}", "not JSON"),
    ],
)
def test_manifests_that_cannot_be_read_are_errors_and_kept(root, text, message):
    (root / NAME).write_text(text)
    store = EngineStore(root)
    wanted = expected("newer")
    for action in (
        lambda: store.find(expected()),
        lambda: store.build(wanted, maker(wanted)),
        lambda: store.remove(PATH),
        lambda: store.unknown_files((".fake",)),
    ):
        with pytest.raises(EngineError, match=message):
            action()
    assert (root / NAME).read_text() == text, "nothing is lost"
    assert (root / PATH).read_bytes() == content("new")


@pytest.mark.parametrize(
    "change",
    [
        {"unknown": 1},
        {"method": "transcode"},
        {"profiles": []},
        {"profiles": [{"name": "a"}]},
        {"profiles": [{"name": "a", "min": "1x", "opt": "8x8", "max": "8x8"}]},
        {"identity": "GPU"},
        {"verification": {"m": {"passed": True}}},
        {"verification": {"m": {**dataclasses.asdict(CHECK), "relative_limit": "small"}}},
        {"size": "many"},
        {"name": 1},
        {"dtype": None},
        {"origin": ["built"]},
        {"built_at": 2026},
        {"build_seconds": "x"},
        {"build_seconds": None},
        {"build_seconds": 10**400},
        {"identity": {"device_name": 1}},
        {"environment": "GPU"},
        {"profiles": [{"name": 1, "min": "8x8", "opt": "8x8", "max": "8x8"}]},
        {"verification": {"m": {**dataclasses.asdict(CHECK), "passed": "no"}}},
        {"verification": {"m": {**dataclasses.asdict(CHECK), "psnr_db": 10**400}}},
        {"scratch": 5},
        {"scratch": [1, 2]},
        {"scratch": ["much"]},
        {"scratch": [1.5]},
        {"scratch": "1"},
    ],
)
def test_malformed_records(root, change):
    document = json.loads((root / NAME).read_text())
    document["engines"][PATH][0].update(change)
    (root / NAME).write_text(json.dumps(document))
    with pytest.raises(EngineError, match="malformed"):
        find(root)


@pytest.mark.parametrize("name", ["../victim.txt", "/victim", "a/../../victim", "a/..", "", ".", "a\0b"])
def test_a_record_of_a_path_outside_is_malformed(root, name):
    """What the manifest names, ``prune`` may delete."""
    document = json.loads((root / NAME).read_text())
    document["engines"][name] = document["engines"][PATH]
    (root / NAME).write_text(json.dumps(document))
    with pytest.raises(EngineError, match="malformed.*not a path below the engine directory"):
        find(root)


def test_the_hint_of_a_damaged_manifest_is_a_command_that_works(tmp_path):
    root = tmp_path / "my engines"
    build(root, "new")
    (root / NAME).write_text("{")
    with pytest.raises(EngineError) as caught:
        find(root)
    name, *options = shlex.split(str(caught.value).partition("qwen-vae-accel ")[2])
    assert options == ["--trust", "--engine-dir", str(root), "--vae", "PATH"]
    typer.main.get_command(app).commands[name].make_context(name, options)
    assert shlex.split(expected().build_command(root))[-4:] == ["--engine-dir", str(root), "--vae", "PATH"]


def test_a_relative_directory_stays_where_it_was(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    store = EngineStore("engines")
    monkeypatch.chdir(tmp_path / "elsewhere")
    wanted = expected()
    assert store.build(wanted, maker(wanted))[0] == tmp_path / "engines" / PATH
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_manifest_that_is_not_text_or_is_a_folder(root):
    (root / NAME).write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(EngineError, match="cannot read the manifest"):
        find(root)
    (root / NAME).unlink()
    (root / NAME).mkdir()
    with pytest.raises(EngineError, match="cannot read the manifest"):
        find(root)


# Every size that a plan can ask for must come back out of the manifest.


@pytest.mark.parametrize("shape", [Size(8, 8), Size(4, 4), Size(8200, 16), Size(16, 100_000)])
def test_records_of_any_size_can_be_read_back(tmp_path, shape):
    wanted = expected(key=EngineKey("decode", str(shape), (Profile.static(str(shape), shape),)))
    EngineStore(tmp_path).build(wanted, maker(wanted))
    assert EngineStore(tmp_path).find(wanted)[1].key == wanted.key


# Foreign engines.


@pytest.mark.parametrize(
    ("change", "differences"),
    [
        ({"identity": {"device_name": "GPU B", "package:torch": "2.13.0"}}, ["device_name: built for GPU A, here GPU B"]),
        (
            {"identity": {"device_name": "GPU B", "package:torch": "2.14.0"}},
            ["device_name: built for GPU A, here GPU B", "package:torch: built for 2.13.0, here 2.14.0"],
        ),
        ({"identity": {"device_name": "GPU A"}}, ["package:torch: built for 2.13.0, here nothing"]),
        (
            {"identity": {"device_name": "GPU A", "package:torch": "2.13.0", "cuda": "13.0"}},
            ["cuda: built for nothing, here 13.0"],
        ),
        ({"weights": "other"}, ["weights: built from new..., the VAE has other..."]),
        ({"dtype": torch.float16}, ["dtype: built for bfloat16, wanted float16"]),
        ({"kind": OtherBackend}, ["backend: built for tensorrt, wanted inductor"]),
        (
            {"key": EngineKey("decode", "512x512", (Profile.static("512x512", Size(512, 520)),))},
            ["sizes: built for 512x512 [512x512..512x512..512x512], wanted 512x512 [512x520..512x520..512x520]"],
        ),
        (
            {"dtype": torch.float16, "weights": "other", "identity": {"device_name": "GPU B", "package:torch": "2.13.0"}},
            [
                "dtype: built for bfloat16, wanted float16",
                "weights: built from new..., the VAE has other...",
                "device_name: built for GPU A, here GPU B",
            ],
        ),
    ],
)
def test_foreign_engines_are_refused_with_every_difference(root, change, differences):
    assert refusal(root, **change) == differences


@pytest.mark.parametrize(
    ("sizes", "multi"),
    [
        (["16_9"], False),
        (["4_3"], False),
        (["4_3=1472x1104"], False),
        (["16_9_1080p=960x544:1920x1088:1920x1632"], True),
        (["520x264"], False),
        (None, True),
        (["64x64:96x80:200x104", "16x16:64x64:96x96"], True),
    ],
)
@pytest.mark.parametrize("method", ["encode", "decode"])
def test_a_refusal_names_the_command_that_rebuilds_that_engine(tmp_path, sizes, multi, method):
    key = Plan.make(sizes, multi).engines(method)[0]
    wanted = expected(key=key)
    EngineStore(tmp_path).build(wanted, maker(wanted))
    with pytest.raises(EngineRefusedError) as caught:
        EngineStore(tmp_path).find(expected("newer", key=key))
    command = str(caught.value).partition("Rebuild it here: qwen-vae-accel build ")[2].split()
    assert ("--multi-profile" in command) is multi
    options = dict(zip(*[iter(word for word in command if word != "--multi-profile")] * 2, strict=True))
    assert options["--engine-dir"] == str(tmp_path) and options["--backend"] == "tensorrt"
    config = AccelConfig(sizes=tuple(options["--sizes"].split(",")), multi_profile=multi, dtype=options["--dtype"])
    assert options["--method"] == method
    assert config.plan().engines(method) == (key,)


def test_the_encoder_in_the_decoders_place(root):
    wanted = expected(key=EngineKey("encode", "512x512", expected().key.profiles))
    EngineStore(root).build(wanted, maker(wanted))
    document = json.loads((root / NAME).read_text())
    shutil.copy(root / wanted.path, root / PATH)
    document["engines"][PATH] = document["engines"][wanted.path]
    (root / NAME).write_text(json.dumps(document))
    assert refusal(root) == ["network: built for encode, wanted decode"]


def test_a_file_without_a_record_is_refused_with_the_command_that_adopts_it(root):
    (root / NAME).unlink()
    with pytest.raises(EngineRefusedError, match=r"qwen-vae-accel adopt --trust --engine-dir") as caught:
        find(root)
    assert "the manifest has no record of it" in caught.value.differences[0]
    assert EngineStore(root).unknown_files((".fake",)) == [PATH]
    store = EngineStore(root)
    made = dataclasses.replace(processes.record(expected()), sha256=hash_file(root / PATH), size=1, origin="adopted")
    store.add(PATH, made)
    assert find(root)[1].origin == "adopted"
    assert not store.unknown_files((".fake",))


def test_a_manifest_does_not_vouch_for_a_path_outside(root, tmp_path):
    """A folder of engines can be moved and its links point anywhere: it is the bytes that count."""
    outside = tmp_path / "outside.fake"
    outside.write_bytes(b"malice")
    (root / PATH).unlink()
    (root / PATH).symlink_to(outside)
    assert "damaged" in refusal(root)[0]


# Threads.


def test_threads_build_one_engine_once(tmp_path):
    store, wanted = EngineStore(tmp_path), expected()
    made, results, barrier = [], [], threading.Barrier(8)

    def make(path: Path):
        made.append(path)
        return maker(wanted)(path)

    def run() -> None:
        barrier.wait()
        results.append(store.build(wanted, make)[1].sha256)

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and len(results) == 8 and len(set(results)) == 1

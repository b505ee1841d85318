"""Engines that are missing or must not be run, and what happens then."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest

from qwen_vae_accel import accelerate
from qwen_vae_accel.backends import registry
from qwen_vae_accel.backends.eager import EagerBackend
from qwen_vae_accel.engines.manifest import NAME
from qwen_vae_accel.errors import BackendUnavailableError, BuildError, ConfigError, EngineError, EngineMissingError
from tests.helpers import SIZES, Reference, decoded, latents, open_engines

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.mark.parametrize("on_miss", ["fallback", "error"])
def test_a_missing_engine_is_looked_up_once(micro, fake, engines, monkeypatch, on_miss):
    (engines / "32x32" / "vae_decoder.fake").unlink()
    handle = open_engines(micro, engines, on_miss=on_miss)
    store = handle._dispatcher.runtime.store
    lookups = []
    load = store.load
    monkeypatch.setattr(store, "load", lambda wanted: lookups.append(wanted.path) or load(wanted))
    for _ in range(3):
        if on_miss == "error":
            with pytest.raises(EngineMissingError, match="there is no engine"):
                decoded(micro, latents("32x32"))
        else:
            decoded(micro, latents("32x32"))
    assert lookups == ["32x32/vae_decoder.fake"]
    # Other engines are none the worse.
    decoded(micro, latents("48x32"))
    report = handle.report().as_dict()
    assert report["calls"]["decode"] == ({"tensorrt": 1} if on_miss == "error" else {"tensorrt": 1, "eager": 3})
    if on_miss == "fallback":
        (fallback,) = report["fallbacks"]
        assert fallback["count"] == 3 and fallback["backend"] == "eager" and "there is no engine" in fallback["reason"]


def test_an_engine_that_appears_is_taken_at_the_next_warmup(micro, fake, engines):
    path = engines / "32x32" / "vae_decoder.fake"
    data = path.read_bytes()
    path.unlink()
    handle = open_engines(micro, engines, on_miss="fallback", sizes=["32x32"])
    decoded(micro, latents("32x32"))
    path.write_bytes(data)
    handle.warmup(progress=False)
    decoded(micro, latents("32x32"))
    assert handle.report().as_dict()["calls"]["decode"] == {"eager": 1, "tensorrt": 1}


def test_an_engine_that_somebody_builds_is_taken(micro, fake, engines, tmp_path):
    """Another process builds into the directory, and its manifest changes."""
    complete = tmp_path / "complete"
    shutil.copytree(engines, complete)
    (engines / "32x32" / "vae_decoder.fake").unlink()
    manifest = json.loads((engines / NAME).read_text())
    del manifest["engines"]["32x32/vae_decoder.fake"]
    (engines / NAME).write_text(json.dumps(manifest))
    handle = open_engines(micro, engines, on_miss="fallback", sizes=["32x32"])
    decoded(micro, latents("32x32"))
    decoded(micro, latents("32x32"))
    shutil.copytree(complete, engines, dirs_exist_ok=True)
    decoded(micro, latents("32x32"))
    assert handle.report().as_dict()["calls"]["decode"] == {"eager": 2, "tensorrt": 1}


@pytest.mark.parametrize("on_miss", ["fallback", "error", "build"])
@pytest.mark.parametrize("size", ["40x40", "4096x8"])
def test_sizes_outside_the_plan(micro, fake, engines, size, on_miss):
    exact = Reference(micro, "decode", latents(size))
    handle = open_engines(micro, engines, on_miss=on_miss)
    if on_miss == "error":
        with pytest.raises(EngineMissingError, match=f"{size} is not a static size of the plan"):
            decoded(micro, latents(size))
        return
    exact.check(decoded(micro, latents(size)))
    report = handle.report().as_dict()
    assert report["calls"]["decode"] == {"eager": 1}
    assert f"{size} is not a static size" in report["fallbacks"][0]["reason"]
    assert not fake.events


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def forget(path: Path) -> None:
    (path.parent.parent / NAME).unlink()


def foreign(path: Path) -> None:
    manifest = path.parent.parent / NAME
    manifest.write_text(manifest.read_text().replace('"device_name": "fake"', '"device_name": "another GPU"'))


def other_weights(path: Path) -> None:
    manifest = path.parent.parent / NAME
    document = json.loads(manifest.read_text())
    for records in document["engines"].values():
        records[0]["weights"] = "0" * 64
    manifest.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (damage, "damaged"),
        (forget, "manifest has no record of it"),
        (foreign, "device_name: built for another GPU, here fake"),
        (other_weights, "weights: built from 000000000000"),
    ],
)
def test_a_bad_engine_is_never_loaded(micro, fake, engines, spoil, reason):
    path = engines / "32x32" / "vae_decoder.fake"
    spoil(path)
    exact = Reference(micro, "decode", latents("32x32"))
    with open_engines(micro, engines, on_miss="error"), pytest.raises(EngineMissingError, match=reason):
        decoded(micro, latents("32x32"))
    with open_engines(micro, engines, on_miss="fallback") as handle:
        exact.check(decoded(micro, latents("32x32")))
        assert reason in handle.report().as_dict()["fallbacks"][0]["reason"]
    assert not fake.events, "it was loaded, built, or run"
    with open_engines(micro, engines, on_miss="build") as handle:
        exact.check(decoded(micro, latents("32x32")))
        assert handle.report().as_dict()["calls"]["decode"] == {"tensorrt": 1}
    assert [kind for kind, _ in fake.events][:2] == ["build", "load"]


def test_a_manifest_that_is_not_json_is_never_overwritten(micro, fake, engines):
    (engines / NAME).write_text("{broken")
    exact = Reference(micro, "decode", latents("32x32"))
    handle = open_engines(micro, engines, on_miss="build")
    exact.check(decoded(micro, latents("32x32")))
    assert "is not JSON" in handle.report().as_dict()["fallbacks"][0]["reason"]
    assert (engines / NAME).read_text() == "{broken"
    with pytest.raises(EngineError, match="is not JSON"):
        handle.warmup(progress=False)


def test_the_engine_of_another_backend_is_not_ours(micro, fake, engines):
    """A file of the right name that another backend made."""
    manifest = engines / NAME
    manifest.write_text(manifest.read_text().replace('"backend": "tensorrt"', '"backend": "inductor"'))
    open_engines(micro, engines)
    with pytest.raises(EngineMissingError, match="backend: built for inductor, wanted tensorrt"):
        decoded(micro, latents("32x32"))


def test_a_failed_load_falls_back_once(micro, fake, engines):
    fake.fail_load = RuntimeError("version mismatch")
    handle = open_engines(micro, engines, on_miss="fallback")
    exact = Reference(micro, "decode", latents("32x32"))
    for _ in range(2):
        exact.check(decoded(micro, latents("32x32")))
    assert fake.count("load") == 1
    assert "cannot load it: version mismatch" in handle.report().as_dict()["fallbacks"][0]["reason"]
    assert handle.report().as_dict()["engines"] == []


def test_a_failed_build_falls_back_once_and_loses_nothing(micro, fake, engines):
    fake.fail_build = RuntimeError("no kernel for this GPU")
    before = {path: path.read_bytes() for path in engines.rglob("*.fake")}
    handle = accelerate(micro, backend="tensorrt", engine_dir=engines, sizes=["96x32"])
    for _ in range(3):
        decoded(micro, latents("96x32"))
    assert fake.count("build") == 1
    assert "failed to build 96x32/vae_decoder.fake: no kernel" in handle.report().as_dict()["fallbacks"][0]["reason"]
    assert {path: path.read_bytes() for path in engines.rglob("*.fake")} == before
    with pytest.raises(BuildError, match="no kernel"):
        handle.warmup(progress=False)
    fake.fail_build = None
    handle.warmup(progress=False)
    decoded(micro, latents("96x32"))
    assert handle.report().as_dict()["calls"]["decode"] == {"eager": 3, "tensorrt": 1}


def test_accelerate_alone_compiles_serializes_and_later_reloads(micro, fake, tmp_path):
    folder = tmp_path / "new" / "engines"
    with accelerate(micro, backend="tensorrt", engine_dir=folder) as handle:
        decoded(micro, latents("64x64"))
        assert [b["engine"] for b in handle.report().as_dict()["builds"]] == ["64x64/vae_decoder.fake"]
    with accelerate(micro, backend="tensorrt", engine_dir=folder) as handle:
        decoded(micro, latents("64x64"))
        report = handle.report().as_dict()
    assert report["builds"] == [] and report["loads"] == 1 and report["calls"]["decode"] == {"tensorrt": 1}


def test_auto_takes_engines_where_they_are_and_falls_back_elsewhere(micro, fake, engines, caplog):
    with caplog.at_level(logging.INFO, "qwen_vae_accel"):
        handle = accelerate(micro, backend="auto", engine_dir=engines, sizes=SIZES)
    assert "takes 'eager' where no engine serves" in caplog.text
    decoded(micro, latents("32x32"))
    (engines / "48x32" / "vae_decoder.fake").unlink()
    decoded(micro, latents("48x32"))
    assert handle.report().as_dict()["calls"]["decode"] == {"tensorrt": 1, "eager": 1}
    assert not fake.count("build"), "auto builds nothing unless it is told to"


def test_a_backend_that_cannot_run_here(micro, fake, engines):
    fake.unavailable = ["no GPU", "not installed"]
    with pytest.raises(BackendUnavailableError) as caught:
        accelerate(micro, backend="tensorrt", engine_dir=engines)
    assert caught.value.reasons == ("no GPU", "not installed")
    assert "no GPU" in str(caught.value) and "not installed" in str(caught.value)
    assert "decode" not in vars(micro)
    handle = accelerate(micro, backend="auto", engine_dir=engines, sizes=SIZES)
    decoded(micro, latents("32x32"))
    (fallback,) = handle.report().as_dict()["fallbacks"]
    assert "no GPU" in fallback["reason"] and fallback["backend"] == "eager"


def test_a_named_engine_backend_needs_a_folder(micro, fake):
    with pytest.raises(ConfigError, match="engine_dir"):
        accelerate(micro, backend="tensorrt")


@pytest.mark.parametrize("name", ["tensorrt", "fused"])
def test_a_backend_that_this_release_does_not_have(micro, monkeypatch, name, tmp_path):
    monkeypatch.setattr(registry, "_BACKENDS", (EagerBackend(),))
    with pytest.raises(BackendUnavailableError, match="this release does not have it"):
        accelerate(micro, backend=name, engine_dir=tmp_path)

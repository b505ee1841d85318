"""The lazy runtime, with an engine backend of milliseconds: what is loaded when, and what makes room."""

from __future__ import annotations

import copy
import gc
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from qwen_vae_accel import accelerate
from qwen_vae_accel.engines.manifest import NAME
from qwen_vae_accel.engines.store import hash_file
from qwen_vae_accel.errors import EngineError
from qwen_vae_accel.sizes import GUIDE_STATIC
from tests.helpers import SIZES, Reference, decoded, distance, image, latents, moments, open_engines

pytestmark = pytest.mark.usefixtures("no_grad")


# Lazy.


def test_nothing_is_read_before_the_first_request(micro, fake, engines, monkeypatch):
    reads: list[str] = []
    opened = os.open

    def spy(path, *args, **kwargs):
        reads.append(str(path))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", spy)
    handle = open_engines(micro, engines)
    assert not [path for path in reads if str(engines) in path]
    assert not fake.events and not handle.report().as_dict()["engines"]
    decoded(micro, latents("48x32"))
    assert {Path(path).name for path in reads if str(engines) in path} >= {"vae_decoder.fake", NAME}
    assert {p for p in reads if p.endswith(".fake")} == {str(engines / "48x32" / "vae_decoder.fake")}


def test_a_request_loads_only_the_engine_it_needs(micro, fake, engines):
    handle = open_engines(micro, engines)
    z = latents("48x32")
    decoded(micro, z)
    decoded(micro, z)
    assert fake.engines("load") == ["48x32/vae_decoder"]
    moments(micro, image("48x32"))
    decoded(micro, latents("32x32"))
    assert fake.engines("load") == ["48x32/vae_decoder", "48x32/vae_encoder", "32x32/vae_decoder"]
    report = handle.report().as_dict()
    assert report["calls"] == {"encode": {"tensorrt": 1}, "decode": {"tensorrt": 3}}
    assert report["loads"] == 3 and report["evictions"] == 0 and not report["fallbacks"]
    assert sorted(report["engines"]) == ["32x32/vae_decoder.fake", "48x32/vae_decoder.fake", "48x32/vae_encoder.fake"]
    assert all(load["ms"] > 0 and load["nbytes"] > 0 and load["backend"] == "tensorrt" for load in report["load_ms"])


def test_text_to_image_never_touches_an_encoder(micro, fake, tmp_path):
    handle = accelerate(micro, backend="tensorrt", engine_dir=tmp_path, sizes=SIZES[:2], task="t2i")
    handle.warmup(progress=False)
    for size in SIZES[:2]:
        decoded(micro, latents(size))
    assert not [name for _, name in fake.events if "encoder" in name]
    assert not list(tmp_path.rglob("vae_encoder*"))


def test_warmup_loads_the_plan(micro, fake, engines):
    handle = open_engines(micro, engines, sizes=SIZES[:2])
    report = handle.warmup(progress=False).as_dict()
    assert report["loads"] == 4 and not report["builds"]
    assert sorted(report["engines"]) == sorted(f"{s}/vae_{m}coder.fake" for s in SIZES[:2] for m in ("en", "de"))
    decoded(micro, latents(SIZES[0]))
    assert handle.report().as_dict()["loads"] == 4


def test_results_are_those_of_the_engine(micro, fake, engines):
    x, z = image("64x32"), latents("64x32")
    exact = Reference(micro, "encode", x), Reference(micro, "decode", z)
    handle = open_engines(micro, engines)
    exact[0].check(moments(micro, x))
    exact[1].check(decoded(micro, z))
    assert len(fake.calls) == 2
    assert handle.report().as_dict()["calls"] == {"encode": {"tensorrt": 1}, "decode": {"tensorrt": 1}}


def test_batches_run_one_after_another_and_none_is_lost(micro, fake, engines):
    z = torch.cat([latents("64x32", seed=seed) for seed in range(3)])
    exact = Reference(micro, "decode", z)
    open_engines(micro, engines)
    exact.check(decoded(micro, z))
    assert [shape for shape, _ in fake.calls] == [(1, 4, 4, 8)] * 3


def test_multi_profile_engines_run_the_chosen_profile(micro, fake, tmp_path):
    sizes = ["16x16:32x32:40x40", "16x16:64x64:96x96"]
    accelerate(micro, backend="tensorrt", engine_dir=tmp_path, sizes=sizes, multi_profile=True)
    for size in ("32x32", "64x64", "24x40", "96x16", "40x40"):
        decoded(micro, latents(size))
    del fake.calls[: 1 + 1]  # the self-checks of the build and of profile 64x64 come before their first request
    assert [p.name for p in tmp_path.glob("vae_*")] == ["vae_decoder_multi_profile.fake"]
    assert len(fake.engines("build")) == 1
    runs = [(shape[2:], profile) for shape, profile in fake.calls]
    assert runs[-3:] == [((5, 3), 0), ((2, 12), 1), ((5, 5), 0)]


def test_static_engines_of_the_guide_have_its_names(micro, fake, tmp_path):
    document = {"task": "t2i", "vae_type": "tensorrt", "trt_vae_config": {"trt_engine_path": str(tmp_path)}}
    handle = accelerate(micro, document)
    decoded(micro, latents("928x16"))
    assert (tmp_path / "928x16" / "vae_decoder.fake").is_file()
    plan = handle.config.plan()
    assert [key.stem for key in plan.engines("decode")] == [f"{name}/vae_decoder" for name in GUIDE_STATIC]


# Making room.


def test_the_least_recently_used_size_goes_first(micro, fake, engines):
    handle = open_engines(micro, engines, max_resident=2)
    for size in ("32x32", "48x32", "32x32", "64x32", "32x32", "48x32"):
        decoded(micro, latents(size))
    assert fake.engines("load") == [f"{s}/vae_decoder" for s in ("32x32", "48x32", "64x32", "48x32")]
    assert fake.engines("free") == ["48x32/vae_decoder", "64x32/vae_decoder"]
    report = handle.report().as_dict()
    assert report["evictions"] == 2 and report["loads"] == 4
    assert report["engines"] == ["32x32/vae_decoder.fake", "48x32/vae_decoder.fake"]


def test_encoder_and_decoder_of_a_size_count_as_one(micro, fake, engines):
    open_engines(micro, engines, max_resident=1)
    for _ in range(3):
        moments(micro, image("32x32"))
        decoded(micro, latents("32x32"))
    assert fake.engines("load") == ["32x32/vae_encoder", "32x32/vae_decoder"]
    moments(micro, image("48x32"))
    assert sorted(fake.engines("free")) == ["32x32/vae_decoder", "32x32/vae_encoder"]


def test_memory_is_returned_before_the_next_load(micro, fake, engines):
    """One size at a time, as the guide: the program of the old one is gone when the new one is loaded."""
    open_engines(micro, engines, max_resident=1)
    for size in (*SIZES, *SIZES):
        decoded(micro, latents(size))
    order = [kind for kind, _ in fake.events]
    assert order == ["load"] + ["free", "load"] * (2 * len(SIZES) - 1)


def test_the_budget_in_bytes(micro, fake, engines):
    fake.nbytes = 300
    for path in engines.rglob("*.fake"):
        assert path.stat().st_size > 1000
    largest = max(path.stat().st_size for path in engines.rglob("*.fake"))
    # Two loaded engines (300 bytes each by their own word) and one on its way (as large as its file) fit.
    handle = open_engines(micro, engines, vram_budget=largest + 2 * 300)
    for size in SIZES[:3]:
        decoded(micro, latents(size))
    assert not fake.engines("free")
    decoded(micro, latents(SIZES[3]))
    assert fake.engines("free") == [f"{SIZES[0]}/vae_decoder"]
    assert len(handle.report().as_dict()["engines"]) == 3


def test_an_engine_larger_than_the_budget_runs_alone(micro, fake, engines):
    handle = open_engines(micro, engines, vram_budget=1)
    for size in SIZES[:2]:
        decoded(micro, latents(size))
    moments(micro, image(SIZES[1]))
    assert handle.report().as_dict()["engines"] == [f"{SIZES[1]}/vae_encoder.fake"]
    assert [kind for kind, _ in fake.events] == ["load", "free", "load", "free", "load"]


def test_restore_releases_every_engine(micro, fake, engines):
    handle = open_engines(micro, engines)
    for size in SIZES:
        decoded(micro, latents(size))
    handle.restore()
    gc.collect()
    assert sorted(fake.engines("free")) == sorted(fake.engines("load"))
    assert handle.report().as_dict()["engines"] == []


def test_new_weights_release_the_engine_of_the_old(micro, fake, tmp_path):
    handle = accelerate(micro, backend="tensorrt", engine_dir=tmp_path, sizes=["32x32"])
    before = decoded(micro, latents("32x32"))
    micro.load_state_dict({name: value * 1.1 for name, value in micro.state_dict().items()})
    output = decoded(micro, latents("32x32"))
    assert distance(output, before, "decode") > 0.01
    report = handle.report().as_dict()
    assert len(report["builds"]) == 2 and len(report["engines"]) == 1
    assert report["calls"]["decode"] == {"tensorrt": 2}
    handle.restore()
    Reference(micro, "decode", latents("32x32")).check(output)


# What is run is what was checked.


def other_engine(vae, folder: Path, size: str = "32x32") -> Path:
    """An engine of ``size`` over other weights, built by another service."""
    other = copy.deepcopy(vae)
    for name, parameter in other.named_parameters():
        if "decoder" in name:
            parameter.mul_(1.3)
    with accelerate(other, backend="tensorrt", engine_dir=folder, sizes=[size]) as handle:
        handle.warmup(progress=False)
    return folder / size / "vae_decoder.fake"


@pytest.mark.parametrize("verify", [True, False])
def test_a_file_that_is_replaced_while_it_is_loaded_is_not_run(micro, fake, tmp_path, verify):
    z = latents("32x32")
    exact = Reference(micro, "decode", z)
    theirs = other_engine(micro, tmp_path / "theirs")
    mine = tmp_path / "mine" / "32x32" / "vae_decoder.fake"
    options = {"backend": "tensorrt", "engine_dir": tmp_path / "mine", "sizes": ["32x32", "48x32"], "max_resident": 1}
    handle = accelerate(micro, verify=verify, **options)
    for size in ("32x32", "48x32"):
        decoded(micro, latents(size))

    def publish() -> None:
        fake.on_load = None
        shutil.copy(theirs, mine.with_name("new"))
        mine.with_name("new").replace(mine)

    fake.on_load = publish
    exact.check(decoded(micro, z))
    assert handle.report().as_dict()["calls"]["decode"] == {"tensorrt": 3}


def replace_by_a_wrong_one(engines: Path, verification: dict) -> None:
    """A deployment brings an engine of the same weights that computes something else."""
    file = engines / "32x32" / "vae_decoder.fake"
    network = torch.load(file, weights_only=False)
    network.conv_out.bias.data.add_(0.5)
    torch.save(network, file)
    document = json.loads((engines / NAME).read_text())
    (record,) = document["engines"]["32x32/vae_decoder.fake"]
    record |= {"sha256": hash_file(file), "size": file.stat().st_size, "verification": verification}
    (engines / NAME).write_text(json.dumps(document))


@pytest.mark.parametrize("recorded", [False, True], ids=["not checked yet", "a recorded failure"])
def test_the_successor_of_a_checked_engine_is_checked(micro, fake, engines, recorded):
    z = latents("32x32")
    exact = Reference(micro, "decode", z)
    handle = open_engines(micro, engines, max_resident=1, on_miss="fallback")
    decoded(micro, z)
    decoded(micro, latents("48x32"))
    (record,) = handle._dispatcher.runtime.store.manifest().engines["32x32/vae_decoder.fake"]
    failed = {name: {**check.to_json(), "passed": False} for name, check in record.verification.items()}
    replace_by_a_wrong_one(engines, failed if recorded else {})
    exact.check(decoded(micro, z))
    report = handle.report().as_dict()
    assert report["calls"]["decode"] == {"tensorrt": 2, "eager": 1}
    assert "self-check failed" in report["fallbacks"][0]["reason"]
    assert len(report["self_checks"]) == (0 if recorded else 1)


def test_the_same_bytes_are_checked_once_where_nothing_can_be_recorded(micro, fake, engines, monkeypatch):
    handle = open_engines(micro, engines, max_resident=1)
    monkeypatch.setattr("platform.node", lambda: "another-host")
    monkeypatch.setattr(handle._dispatcher.runtime.store, "record_verification", lambda *args: None)
    for size in ("32x32", "48x32", "32x32", "48x32"):
        decoded(micro, latents(size))
    report = handle.report().as_dict()
    assert report["loads"] == 4 and len(report["self_checks"]) == 2


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes of Unix")
@pytest.mark.parametrize("name", ["32x32/vae_decoder.fake", NAME])
def test_a_pipe_in_the_place_of_a_file_is_an_error_and_no_wait(micro, fake, engines, name):
    (engines / name).unlink()
    os.mkfifo(engines / name)
    open_engines(micro, engines)
    with pytest.raises(EngineError, match="Not a regular file"):
        decoded(micro, latents("32x32"))

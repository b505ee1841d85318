"""Engines against the exact model: a wrong one is refused, and the record says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qwen_vae_accel import accelerate
from qwen_vae_accel.backends.base import Job
from qwen_vae_accel.backends.samples import sample_input
from qwen_vae_accel.engines import selfcheck
from qwen_vae_accel.engines.manifest import NAME
from qwen_vae_accel.errors import EngineMissingError, UnsupportedVAEError
from qwen_vae_accel.model import ModelSource
from qwen_vae_accel.sizes import Size
from tests.conftest import random_vae
from tests.helpers import CPU, FakeProgram, Reference, decoded, latents, open_engines

pytestmark = pytest.mark.usefixtures("no_grad")


def checks(folder: Path, size: str = "32x32") -> dict:
    return json.loads((folder / NAME).read_text())["engines"][f"{size}/vae_decoder.fake"][0]["verification"]


@pytest.mark.numeric
def test_the_result_of_the_self_check_is_kept(micro, fake, engines):
    (result,) = checks(engines).values()
    assert result["passed"] and result["relative_error"] < result["relative_limit"] and float(result["psnr_db"]) > 80
    assert next(iter(checks(engines))).endswith("/32x32")
    handle = open_engines(micro, engines)
    decoded(micro, latents("32x32"))
    assert handle.report().as_dict()["self_checks"] == [], "one machine checks an engine once"
    assert len(fake.calls) == 1


def test_another_machine_checks_for_itself_once(micro, fake, engines, monkeypatch):
    monkeypatch.setattr("platform.node", lambda: "another-host")
    with open_engines(micro, engines) as handle:
        for _ in range(2):
            decoded(micro, latents("32x32"))
        (check,) = handle.report().as_dict()["self_checks"]
        assert check["engine"] == "32x32/vae_decoder.fake" and check["ms"] > 0
    assert len(checks(engines)) == 2
    with open_engines(micro, engines) as handle:
        decoded(micro, latents("32x32"))
        assert handle.report().as_dict()["self_checks"] == []


@pytest.mark.parametrize("passed", [True, False])
def test_a_result_by_the_criterion_of_an_earlier_release_counts_for_nothing(micro, fake, engines, passed):
    path = engines / NAME
    document = json.loads(path.read_text())
    for (record,) in document["engines"].values():
        for result in record["verification"].values():
            for name in ("relative_limit", "line_error", "line_limit"):
                del result[name]
            result |= {"passed": passed, "tolerance": 2e-3}
    path.write_text(json.dumps(document))
    with open_engines(micro, engines) as handle:
        decoded(micro, latents("32x32"))
        assert len(handle.report().as_dict()["self_checks"]) == 1
        assert handle.report().as_dict()["calls"]["decode"] == {"tensorrt": 1}
    (result,) = checks(engines).values()
    assert result["passed"] and result["line_error"] < result["line_limit"]


@pytest.mark.numeric
@pytest.mark.parametrize("fault", [lambda x: x.roll(1, 3), lambda x: x + 2e-5 * torch.sign(x), lambda x: x.flip(1)])
def test_a_small_fault_is_refused_too(micro, fake, tmp_path, monkeypatch, fault):
    """Within the 2e-3 that a fixed limit for TF32 would have to allow, or in the wrong place only."""
    right = FakeProgram.__call__
    monkeypatch.setattr(FakeProgram, "__call__", lambda *args: fault(right(*args)))
    handle = accelerate(micro, backend="tensorrt", engine_dir=tmp_path, sizes=["32x32"])
    decoded(micro, latents("32x32"))
    (fallback,) = handle.report().as_dict()["fallbacks"]
    assert "self-check failed at 32x32" in fallback["reason"] and "worst row, column or channel" in fallback["reason"]


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", ["encode", "decode"])
@pytest.mark.parametrize("name", ["micro", "2.1", "wan 2.1"])
def test_the_yardstick_is_diffusers_own_error(name, method, dtype):
    """Of this VAE in this dtype, on a small image; what diffusers makes of a larger one is no further away than half more."""
    vae = random_vae(name)
    source = ModelSource(vae)
    job = Job(method, source.topology, dtype, CPU)
    own = selfcheck.published_error(source, job)
    x = sample_input(job, Size(96, 128), source.config)
    larger = Reference(vae, method, x, dtype).yardstick
    assert own.within(larger.allowed(1.5)) and larger.within(own.allowed(1.5))


def test_a_vae_that_diffusers_computes_otherwise_has_no_yardstick(micro, monkeypatch):
    """As one with another activation, were it ever taken for the known one."""
    network = selfcheck.published_network
    monkeypatch.setattr(selfcheck, "published_network", lambda *job: lambda x: network(*job)(x.flip(2)))
    source = ModelSource(micro)
    monkeypatch.setattr(selfcheck, "_yardsticks", {})
    with pytest.raises(UnsupportedVAEError, match="away from the exact network: more than rounding"):
        selfcheck.published_error(source, Job("decode", source.topology, torch.float32, CPU))


def test_a_vae_of_a_class_that_is_not_diffusers_is_none_of_ours(micro):
    class Holder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = micro.encoder, micro.decoder
            self.quant_conv, self.post_quant_conv = micro.quant_conv, micro.post_quant_conv

        encode = decode = None

    with pytest.raises(UnsupportedVAEError, match="not one of diffusers'"):
        ModelSource(Holder())


@pytest.mark.parametrize("method", ["encode", "decode"])
def test_inputs_of_self_checks_are_made_on_the_cpu(micro, method):
    """Whatever ``torch.set_default_device`` was given."""
    source = ModelSource(micro)
    job, size = Job(method, source.topology, torch.float32, CPU), Size(48, 32)
    made = sample_input(job, size, source.config)
    with torch.device("meta"):
        assert torch.equal(sample_input(job, size, source.config), made)


@pytest.mark.parametrize("error", [0.1, float("nan"), float("inf")])
def test_a_wrong_engine_is_not_published(micro, fake, tmp_path, error):
    fake.error = error
    exact = Reference(micro, "decode", latents("32x32"))
    handle = accelerate(micro, backend="tensorrt", engine_dir=tmp_path, sizes=["32x32"])
    exact.check(decoded(micro, latents("32x32")))
    assert "self-check failed at 32x32" in handle.report().as_dict()["fallbacks"][0]["reason"]
    assert not list(tmp_path.rglob("*.fake"))
    assert not (tmp_path / NAME).exists() or not json.loads((tmp_path / NAME).read_text())["engines"]


@pytest.mark.parametrize("error", [0.1, float("nan")])
def test_an_engine_that_is_wrong_on_this_machine_is_refused_and_the_record_says_so(micro, fake, engines, monkeypatch, error):
    exact = Reference(micro, "decode", latents("32x32"))
    monkeypatch.setattr("platform.node", lambda: "another-host")
    fake.error = error
    with open_engines(micro, engines, on_miss="fallback") as handle:
        for _ in range(2):
            exact.check(decoded(micro, latents("32x32")))
        report = handle.report().as_dict()
        assert report["calls"]["decode"] == {"eager": 2}
        assert len(report["self_checks"]) == 1
        assert report["engines"] == [], "a refused engine takes no memory"
        assert "self-check failed" in report["fallbacks"][0]["reason"]
    assert sorted(check["passed"] for check in checks(engines).values()) == [False, True]
    # Nor does a later process run it, whatever it would compute there.
    fake.error = 0.0
    fake.calls.clear()
    with open_engines(micro, engines, on_miss="error"), pytest.raises(EngineMissingError, match="self-check failed"):
        decoded(micro, latents("32x32"))
    assert not fake.calls
    # To build it again is what on_miss="build" is for.
    with open_engines(micro, engines, on_miss="build") as handle:
        exact.check(decoded(micro, latents("32x32")))
        assert handle.report().as_dict()["calls"]["decode"] == {"tensorrt": 1}


def test_an_engine_of_the_wrong_shape_is_refused(micro, fake, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.helpers.FakeProgram.__call__", lambda self, x, profile=0: torch.zeros(1, 3, 8, 8))
    handle = accelerate(micro, backend="tensorrt", engine_dir=tmp_path, sizes=["32x32"])
    assert decoded(micro, latents("32x32")).shape == (1, 3, 1, 32, 32)
    assert "self-check failed" in handle.report().as_dict()["fallbacks"][0]["reason"]


def test_an_engine_that_crashes_in_its_self_check_is_refused(micro, fake, tmp_path):
    exact = Reference(micro, "decode", latents("32x32"))

    def crash() -> None:
        raise RuntimeError("illegal memory access")

    fake.on_run = crash
    handle = accelerate(micro, backend="tensorrt", engine_dir=tmp_path, sizes=["32x32"])
    exact.check(decoded(micro, latents("32x32")))
    assert "illegal memory access" in handle.report().as_dict()["fallbacks"][0]["reason"]


def test_verify_can_be_left_out(micro, fake, tmp_path):
    fake.error = 0.1
    handle = accelerate(micro, backend="tensorrt", engine_dir=tmp_path, sizes=["32x32"], verify=False)
    decoded(micro, latents("32x32"))
    assert len(fake.calls) == 1
    assert checks(tmp_path) == {}
    assert handle.report().as_dict()["calls"]["decode"] == {"tensorrt": 1}


def test_every_profile_is_checked_before_its_first_request(micro, fake, tmp_path):
    sizes = ["16x16:32x32:40x40", "16x16:64x64:96x96"]
    handle = accelerate(micro, backend="tensorrt", engine_dir=tmp_path, sizes=sizes, multi_profile=True)
    decoded(micro, latents("32x32"))
    assert len(fake.calls) == 2  # the check of the build, and the request
    decoded(micro, latents("64x64"))
    decoded(micro, latents("64x64"))
    assert [profile for _, profile in fake.calls] == [0, 0, 1, 1, 1]
    assert len(handle.report().as_dict()["self_checks"]) == 1

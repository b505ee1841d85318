"""The engine lifecycle with real files: AOTInductor packages, static and for a range of sizes."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from qwen_vae_accel import accelerate
from qwen_vae_accel.engines.manifest import NAME
from qwen_vae_accel.errors import EngineMissingError
from tests.helpers import Reference, decoded, moments, picture, randn

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.mark.slow
def test_real_engines_static(tiny, inductor_dir):
    z = randn(1, 16, 1, 8, 8)
    exact = Reference(tiny, "decode", z)
    config = {"backend": "inductor", "engine_dir": inductor_dir / "static", "sizes": ["64x64"], "on_miss": "error"}
    with accelerate(tiny, **config) as handle:
        image = decoded(tiny, z)
        report = handle.report().as_dict()
        batch = decoded(tiny, torch.cat([z, z.flip(4)]))
    exact.check(image)
    assert torch.equal(batch[:1], image) and not torch.equal(batch[1:], image)
    assert report["calls"]["decode"] == {"inductor": 1} and report["loads"] == 1 and report["builds"] == []
    assert report["self_checks"] == [], "it was checked when it was built"
    assert (inductor_dir / "static" / "64x64" / "vae_decoder.pt2").is_file()
    document = json.loads((inductor_dir / "static" / NAME).read_text())
    (record,) = document["engines"]["64x64/vae_decoder.pt2"]
    assert record["identity"]["package:torch"] == torch.__version__
    (check,) = record["verification"].values()
    assert check["passed"] and check["relative_error"] <= check["relative_limit"] < 1e-4


@pytest.mark.slow
def test_real_engines_dynamic(tiny, inductor_dir):
    config = {"backend": "inductor", "engine_dir": inductor_dir / "dynamic", "on_miss": "error", "multi_profile": True}
    handle = accelerate(tiny, sizes=["48x48:64x64:96x128"], task="i2i", **config)
    for height, width in ((64, 64), (49, 77)):
        x = picture(1, 3, 1, height, width)
        Reference(tiny, "encode", x).check(moments(tiny, x))
    for height, width in ((8, 8), (6, 6), (16, 12), (7, 11)):
        z = randn(1, 16, 1, height, width)
        Reference(tiny, "decode", z).check(decoded(tiny, z))
    with pytest.raises(EngineMissingError, match="lies in no optimization profile"):
        decoded(tiny, randn(1, 16, 1, 17, 8))
    report = handle.report().as_dict()
    assert report["calls"] == {"encode": {"inductor": 2}, "decode": {"inductor": 4}} and report["loads"] == 2


@pytest.mark.slow
def test_real_engines_of_ranges_with_a_fixed_side_and_of_the_least_size(micro, tmp_path):
    config = {"backend": "inductor", "on_miss": "build", "task": "i2i", "multi_profile": True}
    for sizes, shapes in ((["64x64:64x128:64x256"], ((64, 64), (256, 64))), (["16x16"], ((16, 16), (23, 24)))):
        with accelerate(micro, sizes=sizes, engine_dir=tmp_path / sizes[0][:5], **config) as handle:
            for height, width in shapes:
                x, z = picture(1, 3, 1, height, width), randn(1, 4, 1, height // 8, width // 8)
                Reference(micro, "encode", x).check(moments(micro, x))
                Reference(micro, "decode", z).check(decoded(micro, z))
            report = handle.report().as_dict()
        assert report["calls"] == {"encode": {"inductor": 2}, "decode": {"inductor": 2}}


@pytest.mark.slow
def test_real_engines_are_refused_when_damaged(tiny, inductor_dir, tmp_path):
    folder = tmp_path / "engines"
    shutil.copytree(inductor_dir / "static", folder)
    path = folder / "64x64" / "vae_decoder.pt2"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    accelerate(tiny, backend="inductor", engine_dir=folder, sizes=["64x64"], on_miss="error")
    with pytest.raises(EngineMissingError, match="damaged"):
        decoded(tiny, randn(1, 16, 1, 8, 8))

"""The demo: its parts, and once all of it with real engines in a new process."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from qwen_vae_accel import accelerate
from qwen_vae_accel.demo.picture import amplified, open_photo, psnr, side_by_side, to_image, to_tensor
from qwen_vae_accel.demo.tiny_pipeline import tiny_pipeline
from qwen_vae_accel.errors import InvalidInputError
from tests.conftest import random_vae
from tests.contract import decoder_input
from tests.helpers import DATA, Reference, picture

if TYPE_CHECKING:
    from tests.fixtures_cli import Cli

pytest_plugins = ["tests.fixtures_cli"]


@pytest.fixture
def small_photo(tmp_path: Path) -> Path:
    """A photo that is quick to run."""
    path = tmp_path / "small.png"
    with Image.open(DATA / "photos" / "coffee.png") as photo:
        photo.resize((70, 50)).save(path)
    return path


def test_photos_are_scaled_and_cropped(tmp_path: Path) -> None:
    path = DATA / "photos" / "coffee.png"
    assert open_photo(path, 1024 * 1024).size == (592, 400)
    assert open_photo(path, 100 * 100).size == (112, 80)
    Image.new("RGBA", (40, 15)).save(tmp_path / "flat.png")
    (tmp_path / "text.png").write_text("no image")
    for bad in ("flat.png", "text.png", "missing.png"):
        with pytest.raises(InvalidInputError, match=bad):
            open_photo(tmp_path / bad, 10**6)


def test_pictures_are_faithful(tmp_path: Path) -> None:
    photo = open_photo(DATA / "photos" / "coffee.png", 64 * 64)
    x = to_tensor(photo, 3)
    assert np.array_equal(np.asarray(to_image(x)), np.asarray(photo))
    assert to_tensor(photo, 4).shape == (1, 4, 1, photo.height, photo.width)
    assert psnr(x, x) == math.inf
    assert psnr(x, x + 0.02) == pytest.approx(40.0, abs=1e-3)
    image, largest, factor = amplified(x + 1e-5, x)
    assert factor == 10000
    assert largest == pytest.approx(1e-5, rel=0.1)
    assert np.asarray(image).mean() == pytest.approx(255 * 0.55, abs=2)
    side_by_side([(photo, "a", "b"), (image, "c", "d" * 200)], tmp_path / "deep" / "sheet.png")
    with Image.open(tmp_path / "deep" / "sheet.png") as sheet:
        assert sheet.width > 2 * photo.width


@pytest.mark.numeric
def test_the_tiny_pipeline_makes_the_same_image_accelerated(micro: nn.Module) -> None:
    pipeline = tiny_pipeline(micro)

    def generate() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        size = {"width": 48, "height": 32}
        return pipeline(
            prompt="a cup", **size, num_inference_steps=2, true_cfg_scale=1.0, generator=generator, output_type="pt"
        ).images

    plain = generate()
    reference = Reference(micro, "decode", decoder_input(pipeline, generate))
    with accelerate(pipeline, backend="eager") as handle:
        ours = generate()
        assert handle.report().as_dict()["calls"]["decode"] == {"eager": 1}
    assert plain.shape == (1, 3, 32, 48)
    reference.check(ours * 2 - 1)
    assert torch.equal(generate(), plain)


def test_psnr_of_noise_is_low() -> None:
    assert psnr(picture(1, 3, 1, 8, 8), picture(1, 3, 1, 8, 8, seed=1)) < 10


@pytest.mark.slow
def test_the_whole_demo(cli: Cli, small_photo: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = cli("demo", "--image", small_photo, "--output", output, "--backend", "inductor", "--device", "cpu", "--json")
    assert result.code == 0
    found = result.document
    engines = {f"64x48/vae_{network}.pt2" for network in ("encoder", "decoder")}
    assert {entry["path"]: entry["status"] for entry in found["builds"]} == dict.fromkeys(engines, "built")
    assert set(found["load_engine_ms"]) == engines
    # The new process loaded the engines and built nothing.
    assert found["report"]["builds"] == []
    assert found["report"]["fallbacks"] == []
    assert set(found["report"]["calls"]["decode"]) == {"inductor"}
    photo = found["photo"]
    assert float(photo["psnr_db"]["between"]) > 110
    assert photo["psnr_db"]["accelerated"] == pytest.approx(photo["psnr_db"]["diffusers"], abs=0.01)
    assert float(found["pipeline"]["psnr_db"]) > 110
    for name in ("photo.png", "pipeline.png"):
        with Image.open(output / name) as sheet:
            assert sheet.width > 150
    for panel in photo["panels"].values():
        with Image.open(output / panel["file"]) as image:
            assert image.size == (64, 48)


def test_the_demo_is_not_for_qwen_image_21(cli: Cli, small_photo: Path, tmp_path: Path) -> None:
    random_vae("2.1").save_pretrained(tmp_path / "vae")
    result = cli("demo", "--model", tmp_path, "--image", small_photo, "--backend", "inductor", "-o", tmp_path / "out", "--json")
    assert result.code == 1
    assert result.document["error"]["type"] == "UnsupportedVAEError"
    assert "this VAE has 16; accelerate() serves it" in result.document["error"]["message"]

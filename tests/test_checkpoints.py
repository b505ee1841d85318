"""One file of weights without a configuration, in diffusers' names and in those of the original programs."""

from __future__ import annotations

import pickle
from typing import Any

import diffusers
import pytest
import torch
from diffusers import AutoencoderKLQwenImage, AutoencoderKLWan
from safetensors.torch import save_file
from torch import Tensor

from qwen_vae_accel import accelerate
from qwen_vae_accel.checkpoints import vae_from_weights
from qwen_vae_accel.errors import UnsupportedVAEError
from qwen_vae_accel.loading import load_vae
from qwen_vae_accel.model import ModelSource
from tests.helpers import CPU, Reference, decoded, moments, photo, picture, randn
from tests.programs import original, small

pytest_plugins = ["tests.fixtures_cli"]
pytestmark = pytest.mark.usefixtures("no_grad")


def written(tmp_path: Any, weights: dict[str, Tensor]) -> Any:
    file = tmp_path / "vae.safetensors"
    save_file({name: value.contiguous() for name, value in weights.items()}, file)
    return file


@pytest.mark.parametrize("names", [original, dict], ids=["original", "diffusers"])
@pytest.mark.parametrize("kind", ["trained", "wan 2.1", "layered"])
def test_a_file_is_the_vae_that_it_was_saved_from(tiny, tmp_path, kind, names):
    if kind == "wan 2.1":
        vae = small(AutoencoderKLWan)
    else:
        vae = tiny if kind == "trained" else small(AutoencoderKLQwenImage, input_channels=4)
    x = photo(width=64, height=48) if kind != "layered" else picture(1, 4, 1, 48, 64)
    z = randn(1, vae.config.z_dim, 1, 6, 8)
    references = Reference(vae, "encode", x), Reference(vae, "decode", z)
    loaded = load_vae(written(tmp_path, names(vae.state_dict())), CPU)
    assert ModelSource(loaded).fingerprint("decode", torch.float32) == ModelSource(vae).fingerprint("decode", torch.float32)
    with accelerate(loaded, backend="eager") as handle:
        references[0].check(moments(loaded, x))
        references[1].check(decoded(loaded, z))
        assert handle.report().as_dict()["calls"] == {"encode": {"eager": 1}, "decode": {"eager": 1}}
    assert torch.equal(decoded(loaded, z), decoded(vae, z)), "diffusers computes the same with it, bit for bit"


def test_a_file_of_qwen_image_21(tmp_path):
    cls = getattr(diffusers, "AutoencoderKLQwenImage21", None)
    if cls is None:
        pytest.skip(f"diffusers {diffusers.__version__} has no AutoencoderKLQwenImage21")
    vae = small(cls, decoder_base_dim=12)
    loaded = load_vae(written(tmp_path, vae.state_dict()), CPU)
    z = randn(1, 4, 1, 2, 3)
    reference = Reference(vae, "decode", z)
    accelerate(loaded, backend="eager")
    reference.check(decoded(loaded, z))


def test_names_of_the_published_width_are_all_known():
    with torch.device("meta"):
        weights = original(AutoencoderKLQwenImage().state_dict())
    assert vae_from_weights(weights, "the file").config.base_dim == 96
    assert len(weights) == 194 and "decoder.upsamples.4.shortcut.weight" in weights


def test_a_file_is_read_in_its_dtype_and_shares_no_names(tiny, tmp_path):
    file = written(tmp_path, original(tiny.bfloat16().state_dict()))
    assert next(load_vae(file, CPU).parameters()).dtype is torch.bfloat16
    assert next(load_vae(file, CPU, torch.float32).parameters()).dtype is torch.float32


def test_commands_take_a_file(cli, fake, tiny, tmp_path):
    file = written(tmp_path, original(tiny.state_dict()))
    command = ("--engine-dir", tmp_path / "e", "--backend", "tensorrt", "--sizes", "32x32", "--method", "decode")
    assert cli("build", "--vae", file, *command).code == 0
    reference = Reference(tiny, "decode", z := randn(1, 16, 1, 4, 4))
    with accelerate(tiny, backend="tensorrt", engine_dir=tmp_path / "e", sizes=["32x32"], on_miss="error"):
        reference.check(decoded(tiny, z))  # the folder's VAE has the same weights
    assert fake.count("build") == 1


# Files that are none.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {"a.b": w["conv1.bias"], **{f"c{i}": w["conv1.bias"] for i in range(4)}}, r"'a.b', 'c0', 'c1' and 2 more"),
        (
            lambda w: {f"vae.{name}": value for name, value in w.items()},
            "other names than a VAE of the family: 'vae.conv1.bias'",
        ),
        (
            lambda w: {**w, "decoder.head.9.weight": w["conv1.bias"]},
            "AutoencoderKLQwenImage does not know: 'decoder.head.9.weight'",
        ),
        (lambda w: {k: v for k, v in w.items() if not k.startswith("conv2")}, "its shapes make no"),
        (lambda w: {k: v for k, v in w.items() if "head" not in k}, "it lacks: .*norm_out.gamma"),
        (
            lambda w: {**w, "conv1.bias": w["conv1.bias"][:2]},
            r"of other shapes than the published VAE's: 'quant_conv.bias \(2,\)'",
        ),
        (lambda w: {**w, "decoder.upsamples.x.residual": w["conv1.bias"]}, "diffusers cannot convert its names"),
        (
            lambda w: {**w, "decoder.upsamples.0.upsamples.0.residual.0.gamma": w["conv1.bias"]},
            "takes several of its names for one",
        ),
        (lambda w: {k: v.to(torch.float8_e4m3fn) for k, v in w.items()}, "it holds float8_e4m3fn, none of float32"),
        (lambda w: {}, "other names than a VAE of the family: it has none"),
    ],
)
def test_weights_of_something_else(tiny, tmp_path, change, message):
    weights = {name: value.clone() for name, value in change(dict(sorted(original(tiny.state_dict()).items()))).items()}
    with pytest.raises(UnsupportedVAEError, match=message):
        load_vae(written(tmp_path, weights), CPU)


class Trap:
    """Would leave a file behind if it were unpickled."""

    def __init__(self, path: Any) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


def test_a_pickle_is_never_loaded(tiny, tmp_path):
    for name in ("vae.pth", "vae.safetensors"):
        file, sprung = tmp_path / name, tmp_path / "sprung"
        file.write_bytes(pickle.dumps(Trap(sprung)))
        with pytest.raises(UnsupportedVAEError, match="no safetensors file.*such as pickles, are not read"):
            load_vae(file, CPU)
        torch.save(tiny.state_dict(), file)
        with pytest.raises(UnsupportedVAEError, match="no safetensors file"):
            load_vae(file, CPU)
        assert not sprung.exists()


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.999])
def test_a_truncated_file_is_refused(cli, tiny, tmp_path, keep):
    file = written(tmp_path, original(tiny.state_dict()))
    data = file.read_bytes()
    file.write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
    result = cli("build", "--vae", file, "--engine-dir", tmp_path / "e", "--backend", "inductor", "--sizes", "32x32", "--json")
    assert result.code == 1 and "no safetensors file, or a damaged one" in result.document["error"]["message"]
    assert not (tmp_path / "e").exists()

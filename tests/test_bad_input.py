"""Bad input: a typed error that says what is wrong, with nothing computed and nothing lost."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn

from qwen_vae_accel import accelerate
from qwen_vae_accel.demo.tiny_pipeline import tiny_pipeline
from qwen_vae_accel.errors import ConfigError, InvalidInputError, UnsupportedVAEError
from tests.contract import X, Z, assert_same, calls, fast, references
from tests.helpers import decoded, moments, picture, randn


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (None, "neither a VAE"),
        ("a path", "neither a VAE"),
        (object(), "neither a VAE"),
        (nn.Linear(2, 2), "neither a VAE"),
        (AutoencoderKL(block_out_channels=(8,), norm_num_groups=1), "AutoencoderKL"),
    ],
)
def test_targets_that_are_no_vae(target, message):
    with pytest.raises(UnsupportedVAEError, match=message):
        accelerate(target)


def test_a_pipeline_without_its_vae(micro):
    pipe = tiny_pipeline(micro)
    pipe.vae = None
    with pytest.raises(UnsupportedVAEError, match="vae is None"):
        accelerate(pipe)


@pytest.mark.parametrize("config", [{"tsak": "t2i"}, {"dtype": "int4"}, {"sizes": ["-8x8"]}, "missing.json", 7])
def test_a_bad_config_leaves_the_vae_alone(micro, config):
    keys = set(vars(micro))
    with pytest.raises(ConfigError):
        accelerate(micro, config)
    with pytest.raises(ConfigError, match="did you mean 'backend'"):
        accelerate(micro, bakend="eager")
    assert set(vars(micro)) == keys


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize(
    ("method", "bad", "message"),
    [
        ("encode", X[:, :, 0], r"\[B, C, T, H, W\].*\(1, 3, 48, 64\)"),
        ("decode", Z[:, :, 0], r"\[B, C, T, h, w\].*\(1, 4, 6, 8\)"),
        ("decode", Z[0, 0, 0, 0, 0], "shape"),
        ("encode", picture(1, 4, 1, 48, 64), "3 channels"),
        ("decode", X, "4 channels"),
        ("encode", X.mul(100).to(torch.uint8), "floating point.*uint8"),
        ("decode", Z.long(), "floating point.*int64"),
        ("decode", Z.to(torch.complex64), "floating point.*complex64"),
        ("encode", X.to("meta"), "on meta, but the VAE is on cpu"),
        ("decode", Z.to("meta"), "on meta, but the VAE is on cpu"),
        ("encode", picture(1, 3, 1, 7, 64), "at least 8 pixels"),
        ("encode", picture(1, 3, 1, 64, 0), "at least 8 pixels"),
        ("decode", randn(1, 4, 1, 0, 8), "at least 1 pixels"),
        ("decode", randn(0, 4, 1, 6, 8), "at least"),
        ("encode", randn(1, 3, 0, 48, 64), "at least"),
        ("encode", None, "NoneType"),
        ("decode", [[1.0]], "list"),
        ("encode", "image.png", "str"),
    ],
)
def test_bad_tensors(micro, method, bad, message):
    before = references(micro)
    handle = accelerate(micro)
    with pytest.raises(InvalidInputError, match=message):
        getattr(micro, method)(bad)
    assert calls(handle) == fast(), "nothing was computed"
    assert_same(micro, before)


@pytest.mark.usefixtures("no_grad")
def test_what_is_not_finite_stays_so(micro):
    """No guarantee is made for NaN, but it must not be turned into a picture."""
    accelerate(micro)
    assert decoded(micro, torch.full_like(Z, torch.nan)).isnan().all()
    assert moments(micro, torch.full_like(X, torch.nan)).isnan().all()


def test_wrong_arguments_are_type_errors(micro):
    accelerate(micro)
    with pytest.raises(TypeError):
        micro.decode()
    with pytest.raises(TypeError):
        micro.decode(Z, nonsense=True)

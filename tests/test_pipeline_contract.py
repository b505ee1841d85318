"""What pipelines expect of the VAE, with inputs as they give them: nothing but speed differs from diffusers."""

from __future__ import annotations

import inspect

import pytest
import torch
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput

from qwen_vae_accel import accelerate
from qwen_vae_accel.accuracy import measure
from tests.conftest import random_vae
from tests.contract import X, Z, assert_same, calls, fast, outputs, references
from tests.helpers import Reference, decoded, moments, photo, picture, randn

#
# Names, signatures, return types.


@pytest.mark.parametrize("method", ["encode", "decode", "to", "_apply"])
def test_names_signatures_and_documentation_stay(micro, method):
    plain = getattr(random_vae(), method)
    accelerate(micro)
    ours = getattr(micro, method)
    assert inspect.signature(ours) == inspect.signature(plain)
    assert ours.__name__ == plain.__name__ and ours.__doc__ == plain.__doc__
    assert ours.__self__ is micro


def test_the_vae_stays_a_module_with_its_attributes(micro):
    names = [name for name, _ in micro.named_parameters()], list(micro.state_dict()), [n for n, _ in micro.named_modules()]
    accelerate(micro)
    assert names == ([n for n, _ in micro.named_parameters()], list(micro.state_dict()), [n for n, _ in micro.named_modules()])
    plain = type(random_vae())
    assert isinstance(micro, plain)
    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        assert getattr(type(micro), name) == getattr(plain, name)
    assert micro.dtype == torch.float32 and micro.device == torch.device("cpu")
    for name in ("latents_mean", "latents_std", "z_dim"):
        assert micro.config[name] is not None
    assert micro.temperal_downsample == [False, True, True]


@pytest.mark.usefixtures("no_grad")
def test_return_types(micro):
    handle = accelerate(micro)
    encoded = micro.encode(X)
    assert type(encoded) is AutoencoderKLOutput and type(encoded.latent_dist) is DiagonalGaussianDistribution
    (posterior,) = micro.encode(X, return_dict=False)
    assert type(posterior) is DiagonalGaussianDistribution
    assert torch.equal(posterior.parameters, encoded.latent_dist.parameters)
    image = micro.decode(Z)
    assert type(image) is DecoderOutput and image.sample.shape == (1, 3, 1, 48, 64)
    result = micro.decode(Z, return_dict=False)
    assert type(result) is tuple and len(result) == 1 and torch.equal(result[0], image.sample)
    assert torch.equal(micro.decode(z=Z).sample, image.sample)
    assert torch.equal(micro.encode(x=X).latent_dist.parameters, posterior.parameters)
    assert calls(handle) == fast(encode=3, decode=3)


@pytest.mark.numeric
@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_images_are_those_of_diffusers(tiny, batch):
    x = torch.cat([photo(name, 64, 48) for name in ("coffee", "astronaut", "chelsea", "coffee")[:batch]])
    z = moments(tiny, x)[:, :16]
    before = references(tiny, x, z)
    handle = accelerate(tiny)
    assert_same(tiny, before, x, z)
    assert calls(handle) == fast(encode=1, decode=1)


@pytest.mark.numeric
@pytest.mark.usefixtures("no_grad")
def test_the_whole_posterior_is_there(micro):
    before = Reference(micro, "encode", X)
    accelerate(micro)
    ours = micro.encode(X).latent_dist
    before.check(ours.parameters)
    theirs = type(ours)(ours.parameters)  # what diffusers makes of the same moments
    for name in ("mean", "logvar", "std", "var"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert torch.equal(ours.mode(), theirs.mode()) and torch.equal(ours.kl(), theirs.kl())
    assert torch.equal(*(p.sample(torch.Generator().manual_seed(3)) for p in (ours, theirs)))


@pytest.mark.numeric
@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("name", ["rgba", "two halvings", "other widths", "wan 2.1"])
def test_other_vaes_of_the_family(name):
    vae = random_vae(name)
    x = picture(2, vae.config.get("input_channels", 3), 1, 40, 32)
    z = moments(vae, x).chunk(2, dim=1)[0]
    before = references(vae, x, z)
    handle = accelerate(vae)
    assert_same(vae, before, x, z)
    assert calls(handle) == fast(encode=1, decode=1)


# Slicing, tiling.


@pytest.mark.numeric
@pytest.mark.usefixtures("no_grad")
def test_slicing(micro):
    x, z = picture(3, 3, 1, 48, 64), randn(3, 4, 1, 6, 8)
    before = references(micro, x, z)
    handle = accelerate(micro)
    micro.enable_slicing()
    assert_same(micro, before, x, z)
    assert calls(handle) == fast(encode=3, decode=3)


@pytest.mark.numeric
@pytest.mark.usefixtures("no_grad")
def test_tiling_is_exact_and_clamped(tiny):
    """diffusers blends tiles and does not clamp; ours is the image of the untiled VAE."""
    x = photo(width=72, height=136)
    z = 1.5 * moments(tiny, x)[:, :16]
    before = references(tiny, x, z)
    handle = accelerate(tiny)
    tiny.enable_tiling(tile_sample_min_height=64, tile_sample_min_width=64)
    assert_same(tiny, before, x, z)
    assert decoded(tiny, 10 * z).abs().max() == 1
    assert calls(handle) == fast(encode=1, decode=2)


@pytest.mark.usefixtures("no_grad")
def test_tiling_bounds_the_largest_activation(micro):
    """In bands: no intermediate of the full height at full width exists but input and output."""
    seen: list[int] = []
    handle = accelerate(micro)
    network = handle._source.model("decode", torch.float32, torch.device("cpu"))
    network.up_blocks[-1].register_forward_hook(lambda module, args, out: seen.append(out.shape[2]))
    z = randn(1, 4, 1, 64, 4)
    decoded(micro, z)
    micro.enable_tiling(tile_sample_min_height=64, tile_sample_min_width=64)
    decoded(micro, z)
    assert seen[0] == 512 and len(seen) > 4 and max(seen[1:]) < 256


# Inputs as pipelines give them.


@pytest.mark.numeric
@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("vae_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inputs_of_another_dtype(micro, dtype, vae_dtype):
    """Edit pipelines cast images to the dtype of the prompt; results come in the VAE's."""
    micro.to(vae_dtype)
    before = references(micro, X.to(dtype), Z.to(dtype))
    handle = accelerate(micro)
    assert_same(micro, before, X.to(dtype), Z.to(dtype))
    assert {output.dtype for output in outputs(micro, X.to(dtype), Z.to(dtype))} == {vae_dtype}
    assert calls(handle) == fast(encode=2, decode=2)


@pytest.mark.numeric
@pytest.mark.usefixtures("no_grad")
def test_encode_and_decode_in_dtypes_of_their_own(tiny):
    x = photo(width=96, height=64)
    tiny.to(torch.bfloat16)  # the checkpoint's own dtype
    x = x.bfloat16()
    exact = Reference(tiny, "encode", x)
    accelerate(tiny, encode_dtype="float32", decode_dtype="bfloat16")
    after = moments(tiny, x)
    assert after.dtype == torch.bfloat16
    # What is left is the rounding of the result.
    assert exact.error(after).within(measure(exact.exact.bfloat16(), exact.exact).allowed(1.01))
    assert decoded(tiny, after[:, :16]).dtype == torch.bfloat16


@pytest.mark.numeric
@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.transpose(3, 4).contiguous().transpose(3, 4),
        lambda t: t.repeat(2, 1, 1, 1, 1)[::2],
        lambda t: t.repeat(1, 1, 3, 1, 1)[:, :, 1:2],
        lambda t: t.contiguous(memory_format=torch.channels_last_3d),
        lambda t: t.expand(2, -1, -1, -1, -1)[1:],
    ],
)
def test_inputs_in_any_memory_layout(micro, change):
    before = references(micro)
    x, z = change(X.clone()), change(Z.clone())
    kept = x.clone(), z.clone()
    handle = accelerate(micro)
    assert_same(micro, before, x, z)
    assert torch.equal(x, kept[0]) and torch.equal(z, kept[1]), "inputs are only read"
    assert calls(handle) == fast(encode=1, decode=1)


@pytest.mark.usefixtures("no_grad")
def test_results_are_the_callers_own(micro):
    accelerate(micro)
    first = decoded(micro, Z)
    kept = first.clone()
    decoded(micro, -Z)
    assert torch.equal(first, kept)
    first.zero_()
    assert torch.equal(decoded(micro, Z), kept)


@pytest.mark.numeric
@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 15), (17, 8), (1140 // 8, 1472 // 8)])
def test_sizes_that_are_no_multiple(micro, height, width):
    x = picture(1, 3, 1, height, width)
    before = Reference(micro, "encode", x)
    handle = accelerate(micro)
    before.check(moments(micro, x))
    assert before.exact.shape[2:] == (height // 8, width // 8)
    assert calls(handle) == fast(encode=1)

"""Hosts other than diffusers' pipelines: objects that hold a VAE, with configurations of their own.

``LightX2VVAE`` stands in for LightX2V's ``AutoencoderKLQwenImageVAE``, written after what its source does with the VAE.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import QwenImageLayeredPipeline, QwenImagePipeline
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor, nn

from qwen_vae_accel import accelerate
from qwen_vae_accel.accuracy import measure
from qwen_vae_accel.errors import HandleError, UnsupportedVAEError
from tests.helpers import exact_vae, photo, picture, randn

LAYERS = 3
SCALE = 8


class LightX2VVAE:
    """Takes and gives packed latents, as its transformer has them; normalises them, and moves the VAE to offload it."""

    def __init__(self, config: dict[str, Any], vae: nn.Module, device: str = "cpu") -> None:
        self.config = config
        self.is_layered = config.get("layered", False)
        self.layers = config.get("layers", 4)
        self.cpu_offload = config.get("vae_cpu_offload", config.get("cpu_offload", False))
        self.accelerator = device
        self.dtype = next(vae.parameters()).dtype
        self.model: Any = vae.to("cpu" if self.cpu_offload else device)
        self.image_processor = VaeImageProcessor(vae_scale_factor=2 * SCALE)

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (
            torch.tensor(self.model.config[f"latents_{name}"]).view(1, -1, 1, 1, 1).to(like) for name in ("mean", "std")
        )
        return mean, std

    def _come(self) -> None:
        if self.cpu_offload:
            self.model.to(self.accelerator)

    def _go(self) -> None:
        if self.cpu_offload:
            self.model.to(torch.device("cpu"))

    @torch.no_grad()
    def decode(self, latents: Tensor, input_info: Any) -> Any:
        self._come()
        size = input_info.auto_height, input_info.auto_width
        if self.is_layered:
            latents = QwenImageLayeredPipeline._unpack_latents(latents, *size, self.layers, SCALE)[:, :, 1:]
            latents = latents.transpose(1, 2).flatten(0, 1).unsqueeze(2)
        else:
            latents = QwenImagePipeline._unpack_latents(latents, *size, SCALE)
        latents = latents.to(self.dtype)
        mean, std = self._statistics(latents)
        image = self.model.decode(latents * std + mean, return_dict=False)[0]
        images = self.image_processor.postprocess(
            image.squeeze(2), output_type="pt" if input_info.return_result_tensor else "pil"
        )
        self._go()
        return images

    @torch.no_grad()
    def encode_vae_image(self, image: Tensor) -> Tensor:
        self._come()
        latents = self.model.encode(image.to(self.model.device)).latent_dist.mode()
        mean, std = self._statistics(latents)
        latents = (latents - mean) / std
        _, channels, _, height, width = latents.shape
        if self.is_layered:
            packed = QwenImageLayeredPipeline._pack_latents(latents.transpose(1, 2), 1, channels, height, width, 1)
        else:
            packed = QwenImagePipeline._pack_latents(latents, 1, channels, height, width)
        self._go()
        return packed


class LightX2VTensorRTVAE:
    """Its other kind of VAE, which runs engines of its own and holds a VAE only after one of them was missing."""

    def __init__(self) -> None:
        self._pytorch_vae = None
        self.config = {"vae_type": "tensorrt"}

    def decode(self, latents: Tensor, input_info: Any) -> Any: ...


def configuration(**more: Any) -> dict[str, Any]:
    """As the host hands it to its VAE: everything that it knows."""
    host = {"model_cls": "qwen_image", "model_path": "/models/Qwen-Image", "infer_steps": 50, "attn_type": "flash_attn3"}
    return {**host, "task": "i2i", "vae_scale_factor": SCALE, "in_channels": 64, "lora_configs": None, **more}


def request(height: int, width: int, tensor: bool = True) -> SimpleNamespace:
    return SimpleNamespace(auto_height=height, auto_width=width, return_result_tensor=tensor)


def packed(vae: nn.Module, height: int, width: int, images: int) -> Tensor:
    """What the transformer makes: for layers one image more, the whole, which is not decoded."""
    return randn(1, images * (height // 16) * (width // 16), 4 * vae.config.z_dim, seed=images)


def outputs(host: LightX2VVAE, height: int = 48, width: int = 64) -> tuple[Tensor, Tensor]:
    """A decoded and an encoded image as ``[B, C, H, W]``."""
    latents = packed(host.model, height, width, host.layers + 1 if host.is_layered else 1)
    decoded = host.decode(latents.to(host.accelerator, host.dtype), request(height, width))
    encoded = host.encode_vae_image(photo(width=width, height=height).to(host.accelerator, host.dtype))
    return decoded.cpu(), encoded.cpu().unflatten(1, (height // 16, width // 16)).permute(0, 3, 1, 2)


KINDS = [
    pytest.param({"layered": layered, "layers": LAYERS, "cpu_offload": offload}, id=f"layered={layered}, cpu_offload={offload}")
    for layered in (False, True)
    for offload in (False, True)
]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_guides_host_makes_the_same_images(tiny, kind, device):
    config = configuration(**kind)
    exact = outputs(LightX2VVAE(config, exact_vae(tiny)))
    theirs = outputs(LightX2VVAE(config, copy.deepcopy(tiny), device))
    host = LightX2VVAE(config, tiny, device)
    handle = accelerate(host, config)
    for ours, diffusers, truth in zip(outputs(host), theirs, exact, strict=True):
        assert measure(ours, truth).within(measure(diffusers, truth).allowed())
    report = handle.report().as_dict()
    assert len(outputs(host)[0]) == (LAYERS if kind["layered"] else 1)
    assert [sum(report["calls"][method].values()) for method in ("decode", "encode")] == [1, 1]
    assert "diffusers" not in {*report["calls"]["decode"], *report["calls"]["encode"]} and report["fallbacks"] == []
    assert handle.config.task == "i2i" and handle.config.backend == "auto"


def test_its_pictures_are_made_on_the_device(tiny):
    host = LightX2VVAE(configuration(), tiny)
    latents = packed(tiny, 48, 64, 1)
    with accelerate(host, host.config) as handle:
        (ours,) = host.decode(latents, request(48, 64, tensor=False))
        assert handle.report().as_dict()["calls"]["postprocess"] == {"device": 1}
    (theirs,) = host.decode(latents, request(48, 64, tensor=False))
    assert ours.size == theirs.size == (64, 48)
    assert max(abs(a - b) for a, b in zip(ours.tobytes(), theirs.tobytes(), strict=True)) <= 1


def test_its_configuration_names_the_engines(micro, fake, engines):
    """With the host's own keys, and its engines' directory."""
    config = configuration(vae_type="tensorrt", trt_vae_config={"trt_engine_path": str(engines), "multi_profile": False})
    host = LightX2VVAE(config, micro)
    with accelerate(host, host.config) as handle:
        host.decode(packed(micro, 32, 64, 1), request(32, 64))
        host.encode_vae_image(picture(1, 3, 1, 32, 64))
        assert handle.report().as_dict()["engines"] == ["64x32/vae_decoder.fake", "64x32/vae_encoder.fake"]
    assert fake.count("build") == 0


def test_offloading_by_the_host_loses_no_engine(micro, fake, engines):
    config = configuration(cpu_offload=True, vae_type="tensorrt", trt_vae_config={"trt_engine_path": str(engines)})
    host = LightX2VVAE(config, micro)
    accelerate(host, host.config)
    for _ in range(3):
        host.decode(packed(micro, 32, 64, 1), request(32, 64))
    assert fake.engines("load") == ["64x32/vae_decoder"]


def test_a_host_is_accelerated_once_and_restored(micro):
    host = LightX2VVAE(configuration(), micro)
    kind, keys = type(micro), set(vars(micro))
    handle = accelerate(host, host.config)
    assert accelerate(host, host.config) is handle and accelerate(micro, host.config) is handle
    assert handle.vae is micro
    handle.restore()
    assert type(micro) is kind and set(vars(micro)) == keys
    assert "postprocess" not in vars(host.image_processor)


def test_a_host_that_loads_its_vae_anew_is_noticed(micro):
    host = LightX2VVAE(configuration(), micro)
    handle = accelerate(host, host.config)
    assert handle.report().as_dict()["note"] == ""
    host.model = copy.deepcopy(micro)
    with pytest.raises(HandleError, match="was replaced after accelerate"):
        handle.warmup(progress=False)


# Objects without a VAE inside.


def host_with(model: Any, vae: nn.Module) -> LightX2VVAE:
    host = LightX2VVAE(configuration(), vae)
    host.model = model
    return host


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (None, "LightX2VVAE:\n  - its model is None: load the VAE first"),
        (nn.Linear(2, 2), "its model is no VAE, but a Linear"),
        ("path/to/vae", "its model is no VAE, but a str"),
    ],
)
def test_a_host_without_a_vae_inside(micro, model, message):
    with pytest.raises(UnsupportedVAEError, match=message):
        accelerate(host_with(model, micro))


def test_an_object_that_holds_nothing_is_told_who_does():
    for target in (LightX2VTensorRTVAE(), object()):
        with pytest.raises(
            UnsupportedVAEError,
            match=r"a diffusers pipeline \(.vae\), LightX2V's AutoencoderKLQwenImageVAE .* \(.model\), ComfyUI's VAE",
        ):
            accelerate(target, {"vae_type": "baseline"})

"""Modules as other programs have them, written after how they are called: over the weights of a VAE, under their own names.

They compute with diffusers' layers, without its clamp.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tests.helpers import spread_gammas

# From diffusers' names to the original ones, the inverse of what diffusers' conversion does, one after another.
_RENAMED = (
    (r"^quant_conv", "conv1"),
    (r"^post_quant_conv", "conv2"),
    (r"coder\.conv_in", "coder.conv1"),
    (r"mid_block\.attentions\.0", "middle.1"),
    (r"mid_block\.resnets\.(\d)", lambda m: f"middle.{2 * int(m[1])}"),
    (r"norm_out", "head.0"),
    (r"conv_out", "head.2"),
    (r"down_blocks", "downsamples"),
    (r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"upsamples.{4 * int(m[1]) + int(m[2])}"),
    (r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"upsamples.{4 * int(m[1]) + 3}"),
    (r"conv_shortcut", "shortcut"),
    (r"(middle|samples)\.(\d+)\.norm1", r"\1.\2.residual.0"),
    (r"(middle|samples)\.(\d+)\.conv1", r"\1.\2.residual.2"),
    (r"(middle|samples)\.(\d+)\.norm2", r"\1.\2.residual.3"),
    (r"(middle|samples)\.(\d+)\.conv2", r"\1.\2.residual.6"),
)


def original(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under the original names."""

    def rename(name: str) -> str:
        for pattern, name_there in _RENAMED:
            name = re.sub(pattern, name_there, name)
        return name

    return {rename(name): value for name, value in state.items()}


def small(cls: Any, **config: Any) -> nn.Module:
    """A VAE of the published depth, and narrow."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return spread_gammas(cls(base_dim=8, z_dim=4, latents_mean=[0.0] * 4, latents_std=[1.0] * 4, **config)).eval()


class _Networks(nn.Module):
    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae: Any = vae

    def forward(self, method: str, x: Tensor) -> Tensor:
        if method == "encode":
            return self.vae.quant_conv(self.vae.encoder(x))
        return self.vae.decoder(self.vae.post_quant_conv(x))


class Program(nn.Module):
    """The weights of ``vae`` in modules of their own; :meth:`run` computes with them as they are now."""

    def __init__(self, vae: nn.Module, renamed: Any = original) -> None:
        super().__init__()
        self.z_dim = vae.config.z_dim
        networks = _Networks(copy.deepcopy(vae))
        names = list(renamed(dict(vae.named_parameters())))
        for name, (_, value) in zip(names, vae.named_parameters(), strict=True):
            owner: nn.Module = self
            *path, last = name.split(".")
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner._modules[part]  # type: ignore[assignment]
            owner.register_parameter(last, nn.Parameter(value.detach().clone(), requires_grad=False))
        self.__dict__["networks"] = (
            networks,
            {f"vae.{n}": there for (n, _), there in zip(vae.named_parameters(), names, strict=True)},
        )
        self.calls: list[str] = []

    def cast(self, weight: Tensor, x: Tensor) -> Tensor:
        """The weight that a layer computes with for an input."""
        return weight

    def run(self, method: str, x: Tensor) -> Tensor:
        networks, names = self.__dict__["networks"]
        self.calls.append(method)
        weights = {name: self.cast(self.get_parameter(there), x) for name, there in names.items()}
        frames = [functional_call(networks, weights, (method, frame)) for frame in x.split(1, dim=2)]
        return torch.cat(frames, dim=2)


class ComfyVAE(Program):
    """ComfyUI's ``WanVAE``."""

    def encode(self, x: Tensor) -> Tensor:
        return self.run("encode", x).chunk(2, dim=1)[0]

    def decode(self, z: Tensor) -> Tensor:
        return self.run("decode", z)


class WanVAE(Program):
    """The original program's ``WanVAE_``, which LightX2V and DiffSynth have too."""

    def encode(self, x: Tensor, scale: Any, return_mu: bool = False) -> Any:
        mu, log_var = self.run("encode", x).chunk(2, dim=1)
        mean, inverse = (s.view(1, -1, 1, 1, 1) if isinstance(s, Tensor) else s for s in scale)
        mu = (mu - mean) * inverse
        return (mu, log_var) if return_mu else mu

    def decode(self, z: Tensor, scale: Any) -> Tensor:
        mean, inverse = (s.view(1, -1, 1, 1, 1) if isinstance(s, Tensor) else s for s in scale)
        return self.run("decode", z / inverse + mean)


class DiffSynthVAE(Program):
    """DiffSynth's ``QwenImageVAE``: diffusers' names, no frame axis, statistics of its own, tiles on demand."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__(vae, dict)
        self.mean, std = (torch.tensor(vae.config[f"latents_{name}"]).view(1, -1, 1, 1, 1) for name in ("mean", "std"))
        self.std = 1 / std

    def encode(self, x: Tensor, tiled: bool = False, tile_size: int = 128, tile_stride: int = 64, **kwargs: Any) -> Tensor:
        if tiled:  # of one tile
            return self.encode(x)
        mu = self.run("encode", x.unsqueeze(2)).chunk(2, dim=1)[0]
        return ((mu - self.mean.to(mu)) * self.std.to(mu)).squeeze(2)

    def decode(self, x: Tensor, tiled: bool = False, tile_size: int = 128, tile_stride: int = 64, **kwargs: Any) -> Tensor:
        if tiled:
            return self.decode(x)
        x = x.unsqueeze(2)
        return self.run("decode", x / self.std.to(x) + self.mean.to(x)).squeeze(2)

"""diffusers' own computation of a VAE, from a copy: untouched by hooks, patches, offloading or where the weights rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qwen_vae_accel.errors import UnsupportedVAEError
from qwen_vae_accel.model.offload import values


def published_network(vae: nn.Module, method: str, dtype: torch.dtype, device: torch.device) -> Callable[[Tensor], Tensor]:
    """``encode`` or ``decode`` of a plain VAE of the same diffusers class, config and weights.

    It shares the memory of the weights where dtype and device are theirs; the other network's are not copied.

    Returns:
        A function from ``[B, C, H, W]`` in ``dtype`` on ``device`` to moments or images ``[B, C', H', W']``.

    Raises:
        UnsupportedVAEError: if no class of diffusers is behind ``vae``.
    """
    config = getattr(vae, "config", None)
    cls: Any = next((cls for cls in type(vae).__mro__ if cls.__module__.startswith("diffusers.models.autoencoders.")), None)
    if cls is None or not isinstance(config, Mapping):
        raise UnsupportedVAEError(type(vae).__name__, ["it is not of a class of diffusers with a config"])
    with torch.device("meta"):
        plain: Any = cls.from_config(dict(config)).eval()
    with torch.no_grad():
        state = {name: value.detach().to(device, dtype) for name, value in values(vae, method).items()}
        plain.load_state_dict(state, strict=False, assign=True)

    def encode(x: Tensor) -> Tensor:
        return plain.encode(x.unsqueeze(2)).latent_dist.parameters[:, :, 0]

    def decode(z: Tensor) -> Tensor:
        return plain.decode(z.unsqueeze(2), return_dict=False)[0][:, :, 0]

    return encode if method == "encode" else decode

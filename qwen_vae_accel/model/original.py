"""diffusers' own computation of a VAE, from a copy: untouched by hooks, patches, offloading or where the weights rest."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qwen_vae_accel.model.offload import values
from qwen_vae_accel.model.published import published_twin


def published_network(vae: nn.Module, method: str, dtype: torch.dtype, device: torch.device) -> Callable[[Tensor], Tensor]:
    """``encode`` or ``decode`` of a plain VAE of the same diffusers class, config and weights.

    It shares the memory of the weights where dtype and device are theirs; the other network's are not copied.

    Returns:
        A function from ``[B, C, H, W]`` in ``dtype`` on ``device`` to moments or images ``[B, C', H', W']``.

    Raises:
        UnsupportedVAEError: if ``vae`` is none of the published VAEs.
    """
    plain: Any = copy.deepcopy(published_twin(vae).vae)
    with torch.no_grad():
        state = {name: value.detach().to(device, dtype) for name, value in values(vae, method).items()}
        plain.load_state_dict(state, strict=False, assign=True)

    def encode(x: Tensor) -> Tensor:
        return plain.encode(x.unsqueeze(2)).latent_dist.parameters[:, :, 0]

    def decode(z: Tensor) -> Tensor:
        return plain.decode(z.unsqueeze(2), return_dict=False)[0][:, :, 0]

    return encode if method == "encode" else decode

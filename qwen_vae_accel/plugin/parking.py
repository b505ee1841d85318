"""Keep a VAE's own weights out of GPU memory while programs that hold copies of them do its work.

A third of the 3-D weights act on an image, and compiled engines and the fused kernels hold those packed their own way: the
VAE's parameters are then read by nothing but the original methods.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import _disable_current_modes

from qwen_vae_accel.model.offload import is_hooked

logger = logging.getLogger(__name__)


class Parking:
    """Moves the values of a VAE's parameters to the CPU and back; the parameters stay the same objects.

    The first one stays, so that ``vae.device`` says where the VAE computes. A VAE with offloading hooks is left alone:
    they look after its memory.
    """

    def __init__(self, vae: nn.Module) -> None:
        self._vae = vae
        self._parked: list[Tensor] = []

    @property
    def home(self) -> torch.device | None:
        """The device that the parked parameters were on, and compute on; None while none are parked."""
        return next(self._vae.parameters()).device if self._parked else None

    @property
    def nbytes(self) -> int:
        """Bytes of GPU memory that the parked values would take."""
        return sum(parameter.nbytes for parameter in self._parked)

    def park(self) -> None:
        """Move the values to the CPU; nothing on a VAE that is there already, or is parked."""
        parameters = list(self._vae.parameters())
        device = parameters[0].device
        if self._parked or device.type != "cuda" or any(map(is_hooked, self._vae.modules())):
            return
        # Parameters that share memory are left where they are: moved one by one, they would no longer share it.
        owners = [parameter.untyped_storage().data_ptr() for parameter in parameters]
        moving = [p for p, owner in zip(parameters, owners, strict=True) if owners.count(owner) == 1][1:]
        self._parked = [parameter for parameter in moving if parameter.device == device]
        for parameter in self._parked:
            _move(parameter, torch.device("cpu"))
        logger.info("%.0f MB of the VAE's own weights moved to the CPU", self.nbytes / 1e6)

    def unpark(self) -> None:
        """Bring the values back to where the first parameter is."""
        parked, self._parked = self._parked, []
        device = next(self._vae.parameters()).device
        # The call that needs them may be one under a mode or a transform, which must not see this.
        with _disable_current_modes(), temporarily_clear_interpreter_stack():
            for parameter in parked:
                _move(parameter, device)


def _move(parameter: Tensor, device: torch.device) -> None:
    with torch.inference_mode(parameter.is_inference()), torch.no_grad():
        parameter.data = parameter.detach().to(device)

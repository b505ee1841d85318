"""Hand-written kernels for the published Qwen-Image VAE. Importing this needs neither Triton nor a GPU.

| file | what |
|---|---|
| ``fused.py`` | ``FusedDecoder``, ``FusedEncoder``: what others call |
| ``network.py``, ``program.py``, ``graphs.py`` | the order of kernels, the buffer plan, CUDA graphs |
| ``layout.py``, ``weights.py``, ``tuning.py`` | matrices between kernels, packing, tile configurations |
| ``autotune.py``, ``candidates.py``, ``choice.py``, ``tuned.py`` | measuring configurations on a GPU, and keeping them |
| ``conv3x3.py`` and the rest | one kernel per file, its plain-PyTorch reference beside it |
"""

from qwen_vae_accel.kernels.fused import FusedConfig, FusedDecoder, FusedEncoder, KernelTime
from qwen_vae_accel.kernels.network import device_reasons, state_reasons

__all__ = ["FusedConfig", "FusedDecoder", "FusedEncoder", "KernelTime", "device_reasons", "state_reasons"]

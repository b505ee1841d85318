"""Hand-written kernels for the published Qwen-Image VAE. Importing this needs neither Triton nor a GPU.

| file | what it is |
|---|---|
| ``network.py`` | the networks as data: the one description that all others read |
| ``fused.py`` | ``FusedDecoder``, ``FusedEncoder``: what others call |
| ``reasons.py``, ``gpu.py`` | why a network or a GPU is not served; what to know of a GPU |
| ``weights.py``, ``float8.py``, ``layout.py`` | packed weights, float8's scales, the matrices between kernels |
| ``builder.py``, ``order.py``, ``launches.py`` | the order of kernels for one input shape |
| ``bands.py``, ``limits.py``, ``planning.py`` | bands of rows, limits of memory, and the lists by size that follow |
| ``memory.py``, ``overlap.py`` | where matrices lie, and which kernels run beside each other |
| ``graphs.py``, ``segments.py`` | CUDA graphs, and memory for what stays |
| ``compiling.py``, ``timing.py`` | compiling ahead, in parallel; timing work on the GPU |
| ``triton/`` | one kernel per file, its plain-PyTorch reference beside it |
| ``sm90/`` | the CUDA C++ kernels of compute capability 9.0 |
| ``tuning/`` | tile configurations: keys, tables, choice, measuring and keeping them |
"""

from qwen_vae_accel.kernels.fused import FusedConfig, FusedDecoder, FusedEncoder, KernelTime
from qwen_vae_accel.kernels.limits import Plan
from qwen_vae_accel.kernels.reasons import device_reasons, network_reasons, state_reasons

__all__ = [
    "FusedConfig",
    "FusedDecoder",
    "FusedEncoder",
    "KernelTime",
    "Plan",
    "device_reasons",
    "network_reasons",
    "state_reasons",
]

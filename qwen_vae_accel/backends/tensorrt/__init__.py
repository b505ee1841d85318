"""Backend ``tensorrt``: engines built through Torch-TensorRT, run by a thin checked runtime of our own.

From a network to an image: ``flavour`` (which TensorRT is here), ``network`` (the exact networks as TensorRT wants them),
``build`` (export, conversion, serialized engine), ``engine`` (what an engine file says of itself), ``runtime`` (running it),
``backend`` (all of it as an engine backend), ``crossbuild`` (building on a machine without a GPU).
"""

from qwen_vae_accel.backends.tensorrt.backend import TensorRTBackend
from qwen_vae_accel.backends.tensorrt.settings import BuildSettings, parse_capabilities

__all__ = ["BuildSettings", "TensorRTBackend", "parse_capabilities"]

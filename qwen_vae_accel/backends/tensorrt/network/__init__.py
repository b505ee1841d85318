"""The network that TensorRT is handed, computed by PyTorch: what it says, on any machine, with no GPU."""

from qwen_vae_accel.backends.tensorrt.network.network import Network, NetworkProgram
from qwen_vae_accel.backends.tensorrt.network.reading import NetworkError

__all__ = ["Network", "NetworkError", "NetworkProgram"]

"""The exact single-image form of the Qwen-Image VAE: plain 2-D networks over the VAE's own weights."""

from qwen_vae_accel.model.image_vae import ImageDecoder, ImageEncoder
from qwen_vae_accel.model.published import inspect_vae
from qwen_vae_accel.model.source import ModelSource
from qwen_vae_accel.model.topology import Topology

__all__ = ["ImageDecoder", "ImageEncoder", "ModelSource", "Topology", "inspect_vae"]

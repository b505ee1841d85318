"""Exact tiling: bands of rows through the local part of a network, the part around the attention in one piece.

A band is computed with a halo as wide as the network's receptive field reaches, and the halo's results are thrown
away; bands at the image's edge end where the image ends, so they meet the same zero padding. The result is that of the
whole image up to rounding, without seams, and the large activations exist for one band at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwen_vae_accel.model.image_vae import ImageDecoder, ImageEncoder
from qwen_vae_accel.model.layers import Downsample


def _decoder_halo(decoder: ImageDecoder) -> int:
    """Rows at latent size that an output row can see on either side, through ``decoder.local``."""
    reach, rate = 0.0, 1
    for block in decoder.blocks():
        reach += 2 * len(block.resnets) / rate
        if block.upsamplers:
            reach += 1 / rate
            rate *= 2
    return int(reach + 1 / rate) + 1


def _encoder_halo(encoder: ImageEncoder) -> tuple[int, int]:
    """Rows of the image that a feature row can see on either side, and image rows per feature row."""
    reach, rate = 1, 1
    for step in encoder.steps():
        if isinstance(step, Downsample):
            reach, rate = reach + rate, rate * 2
        else:
            reach += 2 * rate
    return reach, rate


def _bands(rows: int, band: int) -> list[tuple[int, int]]:
    count = max(1, round(rows / band))
    edges = [rows * i // count for i in range(count + 1)]
    return list(zip(edges[:-1], edges[1:], strict=True))


def decode_banded(decoder: ImageDecoder, z: Tensor, tile_pixels: int) -> Tensor:
    """``decoder(z)`` in bands of about ``tile_pixels`` image rows.

    Args:
        z: ``[B, z_dim, h, w]``.
        tile_pixels: image rows per band; memory grows with it.
    """
    features = decoder.mixing(z)
    rows = features.shape[2]
    scale = 2 ** sum(len(block.upsamplers) for block in decoder.blocks())
    halo = _decoder_halo(decoder)
    image = None
    for start, stop in _bands(rows, max(1, tile_pixels // scale)):
        low, high = max(0, start - halo), min(rows, stop + halo)
        band = decoder.local(features[:, :, low:high])[:, :, (start - low) * scale : (stop - low) * scale]
        if image is None:
            image = band.new_empty(band.shape[0], band.shape[1], rows * scale, band.shape[3])
        image[:, :, start * scale : stop * scale] = band
    assert image is not None
    return image


def encode_banded(encoder: ImageEncoder, x: Tensor, tile_pixels: int) -> Tensor:
    """``encoder(x)`` in bands of about ``tile_pixels`` image rows.

    Args:
        x: ``[B, C, H, W]``.
        tile_pixels: image rows per band; memory grows with it.
    """
    reach, rate = _encoder_halo(encoder)
    halo = -(-reach // rate)
    height = x.shape[2]
    rows = height // rate
    bands = []
    for start, stop in _bands(rows, max(1, tile_pixels // rate)):
        low = max(0, start - halo)
        # Below the last feature row the image may have rows that no feature row is centred on, but that one sees.
        high = height if stop + halo >= rows else (stop + halo) * rate
        bands.append(encoder.local(x[:, :, low * rate : high])[:, :, start - low : stop - low])
    return encoder.mixing(torch.cat(bands, dim=2))


def run_banded(network: ImageEncoder | ImageDecoder, x: Tensor, tile_pixels: int) -> Tensor:
    """Run ``network`` over ``x [B, C, H, W]`` by :func:`encode_banded` or :func:`decode_banded`, whichever it is for."""
    if isinstance(network, ImageEncoder):
        return encode_banded(network, x, tile_pixels)
    return decode_banded(network, x, tile_pixels)

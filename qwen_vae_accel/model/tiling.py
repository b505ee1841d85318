"""Exact tiling: bands of rows through the local part of a network, the part around the attention in one piece.

A band is computed with a halo as wide as the network's receptive field reaches, and the halo's results are thrown
away; bands at the image's edge end where the image ends, so they meet the same zero padding. The result is that of the
whole image up to rounding, without seams, and the large activations exist for one band at a time.
"""

from __future__ import annotations

from torch import Tensor

from qwen_vae_accel.model.image_vae import ImageDecoder, ImageEncoder
from qwen_vae_accel.model.layers import Downsample
from qwen_vae_accel.share import Share, divides


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


def _bands(rows: range, band: int | None) -> list[tuple[int, int]]:
    count = 1 if band is None else max(1, round(len(rows) / band))
    edges = [rows.start + len(rows) * i // count for i in range(count + 1)]
    return [(start, stop) for start, stop in zip(edges[:-1], edges[1:], strict=True) if stop > start]


def _mine(rows: int, share: Share | None) -> range:
    return range(rows) if share is None else share.rows(rows)


def decode_banded(decoder: ImageDecoder, z: Tensor, tile_pixels: int | None, share: Share | None = None) -> Tensor:
    """``decoder(z)`` in bands of about ``tile_pixels`` image rows.

    Args:
        decoder: the network.
        z: ``[B, z_dim, h, w]``.
        tile_pixels: image rows per band; memory grows with it. None: one band.
        share: of several processes that decode together and all get the whole image; None: alone.
    """
    features = decoder.mixing(z)
    rows = features.shape[2]
    share = divides(share, rows)
    scale = 2 ** sum(len(block.upsamplers) for block in decoder.blocks())
    halo = _decoder_halo(decoder)
    image = None
    for start, stop in _bands(_mine(rows, share), None if tile_pixels is None else max(1, tile_pixels // scale)):
        low, high = max(0, start - halo), min(rows, stop + halo)
        band = decoder.local(features[:, :, low:high])[:, :, (start - low) * scale : (stop - low) * scale]
        if image is None:
            image = band.new_empty(band.shape[0], band.shape[1], rows * scale, band.shape[3])
        image[:, :, start * scale : stop * scale] = band
    assert image is not None
    if share is not None:
        share.exchange_image(image, scale)
    return image


def encode_banded(encoder: ImageEncoder, x: Tensor, tile_pixels: int | None, share: Share | None = None) -> Tensor:
    """``encoder(x)`` in bands of about ``tile_pixels`` image rows.

    Args:
        encoder: the network.
        x: ``[B, C, H, W]``.
        tile_pixels: image rows per band; memory grows with it. None: one band.
        share: of several processes that encode together and all get the whole result; None: alone.
    """
    reach, rate = _encoder_halo(encoder)
    halo = -(-reach // rate)
    height = x.shape[2]
    rows = height // rate
    share = divides(share, rows)
    features = None
    for start, stop in _bands(_mine(rows, share), None if tile_pixels is None else max(1, tile_pixels // rate)):
        low = max(0, start - halo)
        # Below the last feature row the image may have rows that no feature row is centred on, but that one sees.
        high = height if stop + halo >= rows else (stop + halo) * rate
        band = encoder.local(x[:, :, low * rate : high])[:, :, start - low : stop - low]
        if features is None:
            features = band.new_empty(band.shape[0], band.shape[1], rows, band.shape[3])
        features[:, :, start:stop] = band
    assert features is not None
    if share is not None:
        share.exchange_image(features)
    return encoder.mixing(features)


def run_banded(network: ImageEncoder | ImageDecoder, x: Tensor, tile_pixels: int | None, share: Share | None = None) -> Tensor:
    """Run ``network`` over ``x [B, C, H, W]`` by :func:`encode_banded` or :func:`decode_banded`, whichever it is for."""
    if isinstance(network, ImageEncoder):
        return encode_banded(network, x, tile_pixels, share)
    return decode_banded(network, x, tile_pixels, share)

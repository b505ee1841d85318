"""Published figures that may stand beside ours: the TensorRT guide's, measured by its authors on an H100 in bfloat16.

The guide is "Qwen Image VAE TensorRT Acceleration Guide" of ModelTC/LightX2V. Its own eager runs on the H100 are within 4 % of
ours on an H200, so the figures are comparable; they are theirs all the same.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwen_vae_accel.sizes import Size

LABEL = "TensorRT guide, H100"


@dataclass(frozen=True, slots=True)
class GuideLatency:
    """Milliseconds of one size, and the kind of engine they were measured with."""

    decode: float
    encode: float
    engine: str


LATENCIES = {
    Size(768, 1024): GuideLatency(26.86, 17.33, "static"),
    Size(1664, 928): GuideLatency(49.66, 32.70, "static"),
    Size(1328, 1328): GuideLatency(61.52, 41.95, "static"),
    Size(512, 512): GuideLatency(12.78, 8.53, "multi-profile"),
    Size(1024, 1024): GuideLatency(44.93, 27.56, "multi-profile"),
}


def milliseconds(task: str, size: Size) -> float | None:
    """The published time, if there is one."""
    figures = LATENCIES.get(size)
    return None if figures is None else figures.decode if task == "decode" else figures.encode


@dataclass(frozen=True, slots=True)
class GuideRequest:
    """The guide's end-to-end milliseconds of one size, PyTorch and TensorRT; decode includes post-processing to PIL.

    Attributes:
        first_load: what the first request of the size took on top, with engines on disk.
    """

    decode: tuple[float, float]
    encode: tuple[float, float] | None = None
    first_load: float | None = None


# Qwen-Image-2512, 5 steps, static engines. The guide's 1472x1140 is 1472x1136 in the pipeline.
_T2I = {
    Size(1664, 928): GuideRequest((189.3, 88.4), first_load=343.9),
    Size(928, 1664): GuideRequest((179.6, 85.6), first_load=226.4),
    Size(1328, 1328): GuideRequest((157.6, 106.2), first_load=304.1),
    Size(1472, 1136): GuideRequest((148.7, 94.7), first_load=238.0),
    Size(768, 1024): GuideRequest((70.4, 46.1), first_load=178.2),
}
# qwen-image-edit, 4 steps, multi-profile engines; by the size of the input image, which is scaled before it is encoded.
_I2I = {
    Size(512, 512): GuideRequest((138.4, 134.0), (48.5, 28.8)),
    Size(1024, 1024): GuideRequest((152.7, 133.3), (48.2, 28.4)),
    Size(848, 480): GuideRequest((140.4, 134.4), (48.7, 29.6)),
    Size(1280, 720): GuideRequest((139.0, 134.2), (48.6, 30.1)),
    Size(1024, 768): GuideRequest((152.8, 134.8), (49.2, 29.8)),
}
REQUESTS = {"t2i": _T2I, "i2i": _I2I}
# What the guide says in words, by the names of our summary.
SUMMARY = {
    "t2i decode + post-processing": "1.8x",
    "i2i decode + post-processing": "1.08x",
    "i2i encode": "1.66x",
    "post-processing alone, 1328x1328": "80-90 ms",
    "first request of a new size, extra": "178-344 ms",
    "t2i extra memory at rest": "about 5 GB per engine pair",
    "i2i extra memory at rest": "1.0-1.2 GB",
}

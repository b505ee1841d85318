"""Published figures that may stand beside ours: the TensorRT guide's, measured by its authors on an H100 in bfloat16.

Their own eager runs on the H100 are within 4 % of ours on an H200, so the figures are comparable; they are theirs all the same.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwen_vae_accel.plan import Size

LABEL = "TensorRT, published for H100"


@dataclass(frozen=True, slots=True)
class Published:
    """Milliseconds of one size, and the kind of engine they were measured with."""

    decode: float
    encode: float
    engine: str


TENSORRT_H100 = {
    Size(768, 1024): Published(26.86, 17.33, "static"),
    Size(1664, 928): Published(49.66, 32.70, "static"),
    Size(1328, 1328): Published(61.52, 41.95, "static"),
    Size(512, 512): Published(12.78, 8.53, "multi-profile"),
    Size(1024, 1024): Published(44.93, 27.56, "multi-profile"),
}


def milliseconds(task: str, size: Size) -> float | None:
    """The published time, if there is one."""
    figures = TENSORRT_H100.get(size)
    return None if figures is None else figures.decode if task == "decode" else figures.encode

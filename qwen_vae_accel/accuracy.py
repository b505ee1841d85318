"""How exact is exact enough: the one criterion of the tests and of the self-checks of engines.

Two computations that both round differ by the errors of both, and by how much depends on the machine: no fixed limit
between them means the same everywhere. So each is compared with the same computation in float64, and an output is right
if it is no further from that than :data:`FACTOR` times diffusers' own output in the same dtype on the same machine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# The order of sums is not diffusers': that makes up to 1.7 times its error (an AMD EPYC, every topology and dtype). The mildest
# fault planted in bfloat16, the dtype that hides most, makes 5.5 times its error.
FACTOR = 3.0

# Most that diffusers' own rounding can be, as a relative error: float32 with TF32 convolutions, and half types on random
# weights, take a third of it. Beyond it the two do not compute the same thing, and a yardstick would measure nothing.
ROUNDING = {torch.float64: 1e-6, torch.float32: 5e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True, slots=True)
class Error:
    """How far an output is from the exact one, or may be; in units of the exact output's root mean square.

    Attributes:
        relative: root mean square of the error of the whole output, ``||output - exact|| / ||exact||``.
        line: root mean square of the error of its worst row, column or channel: what is wrong in one place only is lost in
            the average over all, but not here. Unlike that of a single pixel it hardly depends on the image's size.
    """

    relative: float
    line: float

    def within(self, limit: Error) -> bool:
        """Whether neither number is above that of ``limit``."""
        return self.relative <= limit.relative and self.line <= limit.line

    def times(self, other: Error) -> float:
        """How many times ``other`` it is, by the worse of the two numbers."""
        return max(mine / theirs if theirs else math.inf if mine else 0.0 for mine, theirs in self._pairs(other))

    def allowed(self, factor: float = FACTOR) -> Error:
        """The most that another output may be off, where this is diffusers' own error."""
        return Error(factor * self.relative, factor * self.line)

    def _pairs(self, other: Error) -> tuple[tuple[float, float], tuple[float, float]]:
        return (self.relative, other.relative), (self.line, other.line)


NOT_COMPARABLE = Error(math.inf, math.inf)


def measure(output: Tensor, exact: Tensor) -> Error:
    """How far ``output`` is from ``exact``.

    Args:
        output: ``[B, C, H, W]`` of any floating dtype.
        exact: the same computation in float64.

    Returns:
        The error; infinite where a number of ``output`` is not finite, or its shape is another one.
    """
    if output.shape != exact.shape:
        return NOT_COMPARABLE
    squares = (output.double() - exact.double()).square()
    unit = exact.double().square().mean().clamp_min(1e-60)
    lines = torch.stack([squares.mean(dim).max() for dim in ((1, 3), (1, 2), (2, 3))])
    relative, line = (torch.stack((squares.mean(), lines.max())) / unit).sqrt().tolist()
    return Error(relative, line) if math.isfinite(relative) else NOT_COMPARABLE

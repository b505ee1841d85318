"""What the tests of NaN and infinity share: where they are put, and how results are compared.

A network's result is the same as diffusers' if NaN, Inf and -Inf stand at the same places: one of them anywhere in an input
spreads over its image through the attention, and into no other image of the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

NAN, INF = float("nan"), float("inf")
VALUES = [NAN, INF, -INF]


def kinds(x: Tensor) -> Tensor:
    """0 for numbers, 1 for NaN, 2 for Inf, 3 for -Inf."""
    x = x.detach().float().cpu()
    return x.isnan() * 1 + (x == INF) * 2 + (x == -INF) * 3


def assert_same_kinds(actual: Tensor, expected: Tensor) -> None:
    ours, theirs = kinds(actual), kinds(expected)
    assert ours.shape == theirs.shape
    assert torch.equal(ours, theirs), f"{(ours != theirs).sum()} of {ours.numel()} values are of another kind"


def with_value(x: Tensor, value: float, image: int = 1) -> Tensor:
    """``x`` ``[B, C, ..., H, W]`` with ``value`` at one place inside one image."""
    x = x.clone()
    x[image, 0, ..., x.shape[-2] // 2, x.shape[-1] // 3] = value
    return x

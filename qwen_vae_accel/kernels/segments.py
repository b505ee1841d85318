"""Memory for what stays: weights and the buffers of CUDA graphs, in segments of their own.

torch's allocator splits large free blocks for small requests. A weight of a megabyte that lands in a block freed by some
decode before keeps that block's whole gigabyte from being given back, and its neighbours from being of use to others.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class OwnSegments:
    """Allocations on ``device`` apart from all others, given back to the driver after this object and they are gone."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        apart = device.type == "cuda" and torch.cuda.get_allocator_backend() == "native"
        self._pool = torch.cuda.MemPool() if apart else None

    @contextmanager
    def allocations(self) -> Iterator[None]:
        """What this thread allocates inside is what stays."""
        if self._pool is None:
            yield
            return
        with torch.cuda.use_mem_pool(self._pool, self._device):
            yield

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy there; a tensor on another device stays as it is."""
        if tensor.device.type != self._device.type:
            return tensor
        with self.allocations():
            return tensor.clone()

"""Memory for what stays: weights and the buffers of CUDA graphs, in segments of their own.

torch's allocator splits large free blocks for small requests. A weight of a megabyte that lands in a block freed by some
decode before keeps that block's whole gigabyte from being given back, and its neighbours from being of use to others.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")

# Held while something is allocated apart or captured: torch's allocator does either for one thread at a time.
APART = threading.RLock()

# By device, for as long as the process lives: destroying a pool while any thread captures a graph aborts the process (the
# allocator asserts it in a destructor).
_pools: dict[int, torch.cuda.MemPool] = {}


class OwnSegments:
    """Allocations on ``device`` apart from all others. What is freed there is not given back: it serves later ones."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: torch.cuda.MemPool | None = None
        if device.type == "cuda" and torch.cuda.get_allocator_backend() == "native":
            with torch.cuda.device(device), APART:  # a pool belongs to the device that is current when it is made
                index = torch.cuda.current_device()
                if index not in _pools:
                    _pools[index] = torch.cuda.MemPool()
                self._pool = _pools[index]

    def allocate(self, make: Callable[[], T]) -> T:
        """What ``make`` returns; what it allocates is what stays.

        Raises:
            torch.OutOfMemoryError: there is no room for it, here or elsewhere.
        """
        if self._pool is None:
            return make()
        try:
            return self._apart(self._pool, make)
        except torch.OutOfMemoryError:
            # Here the allocator does not give back what it has cached for others, as it does before it gives up elsewhere.
            torch.cuda.empty_cache()
        try:
            return self._apart(self._pool, make)
        except torch.OutOfMemoryError:
            return make()

    def _apart(self, pool: torch.cuda.MemPool, make: Callable[[], T]) -> T:
        with APART, torch.cuda.use_mem_pool(pool, self._device):
            return make()

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy there; a tensor on another device stays as it is."""
        return self.allocate(tensor.clone) if tensor.device.type == self._device.type else tensor

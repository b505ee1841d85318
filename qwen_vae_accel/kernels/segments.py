"""Memory for what stays: weights and the buffers of CUDA graphs, in segments of their own.

torch's allocator splits large free blocks for small requests. A weight of a megabyte that lands in a block freed by some
decode before keeps that block's whole gigabyte from being given back, and its neighbours from being of use to others.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")

# Held while something is allocated apart or captured: torch's allocator does either for one thread at a time.
APART = threading.RLock()

# Pools of networks that are gone, by device. Destroying a pool while any thread captures a graph aborts the process
# (the allocator asserts it in a destructor), so the next network takes over a pool with what memory it has.
_left: dict[int, list[torch.cuda.MemPool]] = {}


class OwnSegments:
    """Allocations on ``device`` apart from all others. What is freed there serves this object, and later ones."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: torch.cuda.MemPool | None = None
        if device.type == "cuda" and torch.cuda.get_allocator_backend() == "native":
            with torch.cuda.device(device), APART:  # a pool belongs to the device that is current when it is made
                left = _left.setdefault(torch.cuda.current_device(), [])
                self._pool = left.pop() if left else torch.cuda.MemPool()
                weakref.finalize(self, left.append, self._pool)

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

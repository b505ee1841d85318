"""The lists of launches of a network, by size: in one piece or in bands, made at the first call of a size and kept."""

from __future__ import annotations

import logging
import math
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from qwen_vae_accel.kernels.bands import Bands, Listed, choose_bands
from qwen_vae_accel.kernels.launches import LaunchList
from qwen_vae_accel.kernels.limits import SOFT_COST, SOFT_LIMIT, Limit, Plan, free_bytes, limit_bytes, mib
from qwen_vae_accel.kernels.network import Network

logger = logging.getLogger(__name__)

_KEPT = 64  # lists, least recently used dropped first; one is a few kB of host memory, or some hundred with many bands
_CHOICES = 4  # until all bands fit together
_ROUNDING = 2 << 20  # of large blocks, by torch's allocator

Shape = tuple[int, ...]
# Lists the launches for inputs of a shape in given bands; with True one band of one image in place of all.
Lister = Callable[[Shape, Bands | None, bool], Listed]


class Listing(NamedTuple):
    """Launches, and what they take."""

    launches: LaunchList
    plan: Plan


@dataclass(slots=True)
class Listings:
    """Lists of one network; safe to use from several threads.

    Attributes:
        name: of the network, for messages.
        network: what it is.
        dtype: of input and output.
        device: where the memory is.
        memory_limit: of ``FusedConfig``.
        graphs: whether CUDA graphs are made, which hold copies of input and output.
        listed: lists the launches.
    """

    name: str
    network: Network
    dtype: torch.dtype
    device: torch.device
    memory_limit: int | float | None
    graphs: bool
    listed: Lister
    _kept: OrderedDict[tuple[Shape, int], Listing] = field(default_factory=OrderedDict)
    _told: set[tuple[Shape, int]] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def get(self, shape: Shape, rows: int = 0) -> Listing:
        """Give the list for inputs of ``shape``; with ``rows`` it takes no more than an image of so many rows in one piece."""
        with self._lock:
            found = self._kept.pop((shape, rows), None)
            if found is None:
                limit = self.limit(shape, rows)
                found = self.make(shape, limit)
                if limit.asked and not found.plan.fits:
                    self._tell(
                        (shape, rows),
                        f"memory_limit {mib(limit.nbytes)} is too little for {self.name} at input {list(shape)}: "
                        f"it takes {mib(found.plan.scratch_bytes)}, the least at a sensible cost",
                    )
            while len(self._kept) >= _KEPT:
                self._kept.popitem(last=False)
            self._kept[shape, rows] = found
        return found

    def limit_memory(self, memory_limit: int | float | None) -> None:
        """Use another limit from now on; every size is listed again."""
        with self._lock:
            self.memory_limit = memory_limit
            self._kept.clear()
            self._told.clear()

    def shrink(self, shape: Shape, rows: int, failed: Listing, share: float) -> bool:
        """List again, from now on, with less scratch memory than ``failed``, for which there was no room.

        Returns whether that may fit: into ``share`` of what is free, beside the output.
        """
        with self._lock:
            known = self._kept.get((shape, rows))
            if known is not None and known.plan.scratch_bytes < failed.plan.scratch_bytes:
                return True  # another thread has
            need = failed.plan.scratch_bytes
            room = share * (free_bytes(self.device) - failed.plan.output_bytes) - _ROUNDING
            limit = Limit(min(int(room), need - 1), f"there was no room for {mib(need)} of scratch memory")
            found = self.make(shape, limit)
            if not found.plan.fits:
                return False
            self._kept[shape, rows] = found
            self._tell(
                (shape, rows),
                f"no room for {mib(need)} of scratch memory at input {list(shape)}: from now on {self.name} runs there in "
                f"{found.plan.bands} bands of rows and takes {mib(found.plan.scratch_bytes)}",
            )
        return True

    def _tell(self, size: tuple[Shape, int], text: str) -> None:
        if size not in self._told:
            self._told.add(size)
            logger.warning("%s", text)

    def limit(self, shape: Shape, rows: int = 0) -> Limit:
        """Find the limit of a call: the user's, or else the soft one; with ``rows`` also what so many rows take."""
        if self.memory_limit is None:
            reason = f"in one piece it would take more than {mib(SOFT_LIMIT)} of scratch memory"
            limit = Limit(SOFT_LIMIT, reason, most_cost=SOFT_COST)
        else:
            nbytes = limit_bytes(self.memory_limit, self.device)
            limit = Limit(nbytes, f"in one piece it would take more than memory_limit, {mib(nbytes)}", asked=True)
        if rows:
            scale = self.network.scale
            lines = max(1, rows // scale) * (1 if self.network.decodes else scale)
            part = (1, shape[1], min(lines, shape[2]), shape[3])
            nbytes = self.listed(part, None, False).launches.scratch_bytes
            if nbytes < limit.nbytes:
                limit = Limit(nbytes, f"use_tiling is on, and {rows} rows take {mib(nbytes)} of scratch memory")
        return limit

    def make(self, shape: Shape, limit: Limit, listed: Lister | None = None) -> Listing:
        """List the launches for inputs of ``shape`` within ``limit``, by another lister if one is given; kept nowhere."""
        listed = listed or self.listed
        whole = listed(shape, None, False)
        launches, count, level, reason = whole.launches, 1, None, ""
        if launches.scratch_bytes > limit.nbytes:
            network = self.network
            rows = shape[2] * (network.scale if network.decodes else 1)
            levels, nbytes = len(network.levels) - 1, limit.nbytes
            for _ in range(_CHOICES):
                choice = choose_bands(
                    nbytes, limit.most_cost, levels, shape[0], rows, whole, lambda bands: listed(shape, bands, True)
                )
                bands = choice.bands
                if bands is None:
                    break
                launches = listed(shape, bands, False).launches
                count, level, reason = bands.count, bands.level, limit.reason
                if not choice.fits or launches.scratch_bytes <= limit.nbytes:
                    break
                # All bands together take a little more than the one that was looked at.
                nbytes = limit.nbytes - (launches.scratch_bytes - listed(shape, bands, True).launches.scratch_bytes)
        output = math.prod(launches.output_shape) * self.dtype.itemsize
        held = math.prod(shape) * self.dtype.itemsize + output if self.graphs else 0
        flops = launches.flops, whole.launches.flops
        return Listing(launches, Plan(shape, count, level, reason, limit.nbytes, launches.scratch_bytes, output, held, *flops))

"""How much scratch memory a call may take, and what follows for one size.

The limit is for what a call allocates beside its output: the matrices between kernels. Weights are held anyway; the output is
the caller's; a CUDA graph holds a copy of its input and output. All three are counted in a :class:`Plan`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

# Without a limit of the user's: what takes more runs in bands, which costs about 2 % on an H100.
SOFT_LIMIT = 4_000_000_000
# Operations over those of one piece that a limit is worth: the soft one, and any other.
SOFT_COST, MOST_COST = 1.25, 3.0


class Limit(NamedTuple):
    """Bytes of scratch memory, and whose wish that is, in words.

    Attributes:
        nbytes: of scratch memory.
        reason: why a call that would take more runs in bands.
        asked: whether the user is to be told where nothing fits.
        most_cost: times the operations of one piece that it is worth.
    """

    nbytes: int
    reason: str
    asked: bool = False
    most_cost: float = MOST_COST


@dataclass(frozen=True, slots=True)
class Plan:
    """What a call takes, decided before it runs.

    Attributes:
        shape: ``[B, C, H, W]`` of the input.
        bands: of every image, 1 for one piece.
        level: the resampling with which bands begin (decoder) or end (encoder), in the order in which they run; None: no bands.
        reason: why it runs in bands; empty for one piece.
        limit_bytes: of scratch memory.
        scratch_bytes: that a call takes for matrices between kernels.
        output_bytes: of the tensor that a call returns.
        held_bytes: of the copies of input and output that a CUDA graph of this size holds; 0 without graphs.
        flops: operations.
        whole_flops: operations in one piece.
    """

    shape: tuple[int, ...]
    bands: int
    level: int | None
    reason: str
    limit_bytes: int
    scratch_bytes: int
    output_bytes: int
    held_bytes: int
    flops: int
    whole_flops: int

    @property
    def fits(self) -> bool:
        """Whether the scratch memory is within the limit."""
        return self.scratch_bytes <= self.limit_bytes

    @property
    def call_bytes(self) -> int:
        """Bytes that a call allocates: scratch memory and output."""
        return self.scratch_bytes + self.output_bytes

    @property
    def peak_bytes(self) -> int:
        """Bytes above the weights while a call runs: what it allocates, and what a graph holds."""
        return self.call_bytes + self.held_bytes

    @property
    def cost(self) -> float:
        """Operations over those of one piece."""
        return self.flops / self.whole_flops


def mib(nbytes: float) -> str:
    """``nbytes`` in words."""
    return f"{nbytes / 2**20:.0f} MiB"


def free_bytes(device: torch.device) -> int:
    """Bytes that could still be allocated on ``device``: what is free there, and what torch's allocator holds unused.

    Raises:
        ValueError: it is not a CUDA device.
    """
    if device.type != "cuda":
        raise ValueError(f"the free memory of a {device.type} device is not known")
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    if torch.cuda.get_allocator_backend() == "native":
        free = min(free, int(total * torch.cuda.get_per_process_memory_fraction(device)) - reserved)
    return max(0, free) + reserved - torch.cuda.memory_allocated(device)


def limit_bytes(limit: float, device: torch.device) -> int:
    """Bytes that ``limit`` is now: a whole number of bytes, or a share of what is free on ``device``."""
    return limit if isinstance(limit, int) else int(limit * free_bytes(device))

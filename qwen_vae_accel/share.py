"""One image over the GPUs of several processes.

Every process is given the same input and returns the whole result. Levels of few pixels are computed by all of them, since
that is faster than to exchange borders; the rows of the others are divided as for bands (kernels/bands.py, model/tiling.py),
whose borders are computed twice. In ``fused`` every process computes the attention for the queries of its rows. What one has
computed and others read is broadcast: the attention's result, and the rows at the end.

A pixel's numbers do not depend on who computes it, so the result is that of one GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Share:
    """What one process of several computes.

    Attributes:
        group: the processes.
        rank: number of this one among them.
        size: how many they are.
    """

    group: dist.ProcessGroup
    rank: int
    size: int

    @classmethod
    def of_group(cls, group: dist.ProcessGroup) -> Share | None:
        """The share of this process in ``group``; None where it is alone.

        Raises:
            ValueError: this process is not in the group.
        """
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        if rank < 0:
            raise ValueError("this process is not in the process group that it was given")
        return cls(group, rank, size) if size > 1 else None

    def rows(self, count: int, rank: int | None = None) -> range:
        """The rows of ``count`` that a process computes; default: this one."""
        rank = self.rank if rank is None else rank
        return range(count * rank // self.size, count * (rank + 1) // self.size)

    def exchange(self, count: int, lines: Tensor) -> None:
        """Fill the first ``count`` of ``lines [>= count, ...]``, contiguous, with what each process has computed of them."""
        for rank in range(self.size):
            rows = self.rows(count, rank)
            dist.broadcast(lines[rows.start : rows.stop], src=dist.get_global_rank(self.group, rank), group=self.group)

    def exchange_image(self, image: Tensor, scale: int = 1) -> None:
        """Fill the rows of ``image [B, C, H, W]`` that other processes have computed; ``scale`` of them are divided as one."""
        for rank in range(self.size):
            divided = self.rows(image.shape[2] // scale, rank)
            own = image[:, :, divided.start * scale : divided.stop * scale]
            part = own.contiguous()
            dist.broadcast(part, src=dist.get_global_rank(self.group, rank), group=self.group)
            if rank != self.rank:
                own.copy_(part)


def divides(share: Share | None, rows: int) -> Share | None:
    """``share`` where every process gets some of ``rows``; else None: each computes all of them."""
    return share if share is not None and rows >= share.size else None

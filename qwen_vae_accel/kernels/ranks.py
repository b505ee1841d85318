"""One image over the GPUs of several processes.

Every process is given the same input and returns the whole result. Levels of few pixels are computed by all of them, since
that is faster than to exchange borders; the rows of a wide level are divided like bands (bands.py), whose borders are computed
twice. Of the attention every process computes the queries of its rows. What one has computed and others read is broadcast, row
by row of the matrices: the attention's result, and the rows at the end.

A pixel's numbers do not depend on who computes it, so the result is that of one GPU.
"""

from __future__ import annotations

from collections.abc import Callable
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

    def exchange(self, count: int, rows_of: Callable[[range], Tensor]) -> None:
        """Fill the rows of all processes with what each has computed.

        Args:
            count: rows in all.
            rows_of: gives the contiguous tensor that holds a range of rows.
        """
        for rank in range(self.size):
            rows = self.rows(count, rank)
            if rows:
                dist.broadcast(rows_of(rows), src=dist.get_global_rank(self.group, rank), group=self.group)

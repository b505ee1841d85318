"""One image over the GPUs of several processes.

Every process is given the same input and returns the whole result. Levels of few pixels are computed by all of them, since
that is faster than to exchange borders; the rows of the others are divided as for bands (kernels/bands.py, model/tiling.py),
whose borders are computed twice. In ``fused`` every process computes the attention for the queries of its rows. What one has
computed and others read is broadcast: the attention's result, and the rows at the end.

A pixel's numbers do not depend on who computes it, so the result is that of one GPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor

from qwen_vae_accel.errors import ConfigError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup as ProcessGroup
else:  # a build without torch.distributed can import this module
    ProcessGroup = getattr(dist, "ProcessGroup", object)


# What an exchange takes, as a rule of thumb for GPUs of one host with NVLink; measured with two (docs/memory-and-scale.md).
_EXCHANGE_MS = 0.5
_BYTES_PER_MS = 150e6


def exchange_ms(exchanged: Sequence[int]) -> float:
    """An estimate of the time of exchanges of so many bytes each."""
    return len(exchanged) * _EXCHANGE_MS + sum(exchanged) / _BYTES_PER_MS


@dataclass(frozen=True, slots=True)
class Share:
    """What one process of several computes.

    Attributes:
        group: the processes.
        rank: number of this one among them.
        size: how many they are.
    """

    group: ProcessGroup
    rank: int
    size: int

    @classmethod
    def of_group(cls, group: ProcessGroup) -> Share | None:
        """The share of this process in ``group``; None where it is alone.

        Raises:
            ConfigError: ``group`` is no process group, or this process is not in it.
        """
        if not isinstance(group, ProcessGroup):
            raise ConfigError(f"process_group is a {type(group).__name__}; give a torch.distributed.ProcessGroup")
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        if rank < 0:
            raise ConfigError("this process is not in the process group that it was given; call accelerate in its members only")
        return cls(group, rank, size) if size > 1 else None

    def rows(self, count: int, rank: int | None = None) -> range:
        """The rows of ``count`` that a process computes; default: this one."""
        rank = self.rank if rank is None else rank
        return range(count * rank // self.size, count * (rank + 1) // self.size)

    def check_alike(self, facts: Mapping[str, str]) -> None:
        """Compare ``facts`` among the processes; all of them must call this.

        Raises:
            ConfigError: a process has others, which would compute something else or wait for ever.
        """
        found: list[Mapping[str, str]] = [{}] * self.size
        dist.all_gather_object(found, dict(facts), group=self.group)
        for name, value in found[0].items():
            for rank, theirs in enumerate(found):
                if theirs.get(name) != value:
                    raise ConfigError(
                        f"the processes of a group differ in {name}: rank 0 has {value}, rank {rank} {theirs.get(name)}"
                    )

    def exchange(self, count: int, lines: Tensor) -> None:
        """Fill the first ``count`` of ``lines [>= count, ...]``, contiguous, with what each process has computed of them."""
        for rank in range(self.size):
            rows = self.rows(count, rank)
            self._broadcast(lines[rows.start : rows.stop], rank)

    def exchange_image(self, image: Tensor, scale: int = 1) -> None:
        """Fill the rows of ``image [B, C, H, W]`` that other processes have computed; ``scale`` of them are divided as one."""
        for rank in range(self.size):
            divided = self.rows(image.shape[2] // scale, rank)
            own = image[:, :, divided.start * scale : divided.stop * scale]
            part = own.contiguous()
            self._broadcast(part, rank)
            if rank != self.rank:
                own.copy_(part)

    def _broadcast(self, part: Tensor, rank: int) -> None:
        """From the process of that ``rank`` in the group to all others."""
        dist.broadcast(part, src=dist.get_global_rank(self.group, rank), group=self.group)


def divides(share: Share | None, rows: int) -> Share | None:
    """``share`` where every process gets some of ``rows``; else None: each computes all of them."""
    return share if share is not None and rows >= share.size else None

"""Values of a network's parameters at fixed places: whether they are what they were, where no counter tells.

PyTorch counts in-place operations on a tensor, but not those on its ``.data``, its storage or a NumPy array that shares its
memory, and none of some fused optimizers or in inference mode. Almost all such writes touch whole tensors. So each look
compares ``PLACES`` values of every parameter, one in each of as many equal runs, with those of before, and the next look
others: ``TURNS`` sets take turns. One gather reads them all, from whatever tensors they are in, by their addresses.
"""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import _disable_current_modes

PLACES = 8
TURNS = 64
_UNITS: dict[int, Any] = {1: np.uint8, 2: np.int16, 4: np.int32}


class _Memory:
    """Device memory from ``address`` on, in the form in which PyTorch takes it without a copy."""

    def __init__(self, address: int, length: int, unit: int) -> None:
        kind = np.dtype(_UNITS[unit]).str
        self.__cuda_array_interface__ = {"shape": (length,), "typestr": kind, "data": (address, False), "version": 2}


@dataclass(slots=True)
class _Group:
    """Parameters of one device and item size, as one long array in which most of the memory is none of ours.

    ``places[turn]`` are the indexes that are read, ``taken[turn]`` what they held.
    """

    members: list[int]
    device: torch.device
    span: Any  # [length]: an array on the CPU, a tensor on a GPU
    places: Any  # [TURNS, parameters * PLACES], or more where an element is read in parts; on a GPU a list of its rows
    taken: Any  # as places, on the CPU
    idle: list[_Reading] = field(default_factory=list)

    @classmethod
    def of(cls, members: list[int], tensors: Sequence[Tensor]) -> _Group:
        size, device = tensors[0].element_size(), tensors[0].device
        first = min(map(Tensor.data_ptr, tensors))
        last = max(tensor.data_ptr() + _reach(tensor) * size for tensor in tensors)
        starts = [tensor.data_ptr() - first for tensor in tensors]
        unit = math.gcd(size, *starts)  # files that are mapped into memory may begin anywhere
        length = (last - first) // unit
        turns = np.arange(TURNS)[:, None] + np.arange(PLACES) * TURNS  # [TURNS, PLACES], all different
        parts = size // unit  # of an element; all of them are read
        places = [
            _offsets(tensor, turns * tensor.numel() // (TURNS * PLACES))[..., None] * parts + np.arange(parts) + start // unit
            for tensor, start in zip(tensors, starts, strict=True)
        ]
        indexes = np.stack(places, 1).reshape(TURNS, -1)
        if device.type == "cpu":
            memory: Any = (ctypes.c_ubyte * (length * unit)).from_address(first)
            span = np.frombuffer(memory, _UNITS[unit])
            return cls(members, device, span, indexes, span.take(indexes))
        with _undisturbed():
            on_device = torch.as_tensor(_Memory(first, length, unit), device=device)
            there = torch.from_numpy(indexes).to(device)
            return cls(members, device, on_device, list(there), on_device[there].cpu().numpy())

    def same(self, turn: int) -> bool:
        """Whether the values of ``turn`` are those of before, on the CPU."""
        return bool(self.span.take(self.places[turn]).tobytes() == self.taken[turn].tobytes())

    def compare(self, turn: int) -> Callable[[], bool]:
        """Begin the comparison on the current stream; the result waits for what the stream had to do before, and no more."""
        reading = self.idle.pop() if self.idle else _Reading.of(self)
        # Into memory that is there: allocating it takes as long as the rest, and the network waits meanwhile.
        torch.index_select(self.span, 0, self.places[turn], out=reading.values)
        reading.copy.copy_(reading.values, non_blocking=True)
        reading.done.record(torch.cuda.current_stream(self.device))

        def result() -> bool:
            reading.done.synchronize()
            same = bool(reading.array.tobytes() == self.taken[turn].tobytes())
            self.idle.append(reading)
            return same

        return result


@dataclass(slots=True)
class _Reading:
    """Memory of one comparison on a GPU, used again when its result was taken."""

    values: Tensor  # [parameters * PLACES] or more, as in _Group.taken,
    copy: Tensor  # and in pinned memory,
    array: Any  # which this one shares
    done: torch.cuda.Event

    @classmethod
    def of(cls, group: _Group) -> _Reading:
        with _undisturbed(), torch.cuda.device(group.device):
            values = torch.empty(group.taken.shape[1], dtype=group.span.dtype, device=group.device)
            copy = torch.empty_like(values, device="cpu", pin_memory=True)
            return cls(values, copy, copy.numpy(), torch.cuda.Event())


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Without the modes and transforms that the caller works under, which must not see this."""
    with _disable_current_modes(), temporarily_clear_interpreter_stack(), torch.inference_mode(False), torch.no_grad():
        yield


def _reach(tensor: Tensor) -> int:
    """Elements from the first to the last, by the strides."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _offsets(tensor: Tensor, places: Any) -> Any:
    """The offsets in memory of the elements that are ``places``-th in reading order, counted from the first."""
    if tensor.is_contiguous():
        return places
    indexes = np.unravel_index(places, tuple(tensor.shape))
    return sum(index * stride for index, stride in zip(indexes, tensor.stride(), strict=True))


class Sample:
    """Values of plain tensors as they are now.

    Tensors on ``meta`` or without elements have none, and those on devices other than CPU and CUDA are not read.

    Args:
        tensors: float32, half or float8 tensors of any strides. They must stay where they are: see that they do before each
            comparison.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        kinds: dict[tuple[torch.device, int], list[int]] = {}
        for index, tensor in enumerate(tensors):
            if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
                continue  # nothing can be read back now
            if tensor.device.type in ("cpu", "cuda") and tensor.numel() and tensor.element_size() in _UNITS:
                kinds.setdefault((tensor.device, tensor.element_size()), []).append(index)
        groups = [_Group.of(members, [tensors[i] for i in members]) for members in kinds.values()]
        self._on_cpu = [group for group in groups if group.device.type == "cpu"]
        self._on_gpu = [group for group in groups if group.device.type == "cuda"]
        self._turns = itertools.cycle(range(TURNS))

    def same(self) -> bool:
        """Whether the values on the CPU whose turn it is are those of before."""
        turn = next(self._turns)
        return all(group.same(turn) for group in self._on_cpu)

    def compare(self) -> Callable[[], bool] | None:
        """Begin to compare values on GPUs; call the result late. None where there are none, or a stream is captured."""
        if not self._on_gpu or torch.cuda.is_current_stream_capturing():
            return None
        turn = next(self._turns)
        results = [group.compare(turn) for group in self._on_gpu]
        return lambda: all(result() for result in results)

    def settled(self) -> bool:
        """:meth:`same` and :meth:`compare`, with the wait."""
        with _undisturbed():
            result = self.compare()
        return self.same() and (result is None or result())

    def equals(self, other: Sample) -> bool:
        """Whether both hold the same values, whatever devices they were read from."""
        ours, theirs = self._by_tensor(), other._by_tensor()
        return ours.keys() == theirs.keys() and all(np.array_equal(ours[key], theirs[key]) for key in ours)

    def _by_tensor(self) -> dict[int, Any]:
        found = {}
        for group in (*self._on_cpu, *self._on_gpu):
            parts = group.taken.reshape(TURNS, len(group.members), -1)
            found.update({member: parts[:, i] for i, member in enumerate(group.members)})
        return found

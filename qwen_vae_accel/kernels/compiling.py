"""Compile the kernels of a network in parallel before its first run.

A kernel compiles at its first launch, one after another, and most take seconds. So launches are first listed without being
made: inside :func:`collecting`, over tensors on the ``meta`` device, each launch site leaves a task that compiles its
kernel. The tasks, without repetitions, then run in threads (Triton's passes, ptxas and NVRTC let go of the interpreter).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch

from qwen_vae_accel import caches

Tasks = dict[Hashable, Callable[[], object]]
Progress = Callable[[int, int], None]

_tasks: ContextVar[Tasks | None] = ContextVar("tasks", default=None)
_MOST_THREADS = 16


@contextmanager
def collecting() -> Iterator[Tasks]:
    """Inside, launches of this thread are listed, not made."""
    tasks: Tasks = {}
    token = _tasks.set(tasks)
    try:
        yield tasks
    finally:
        _tasks.reset(token)


def listed() -> Tasks | None:
    """The list that launches of this thread go to now; None where they are made."""
    return _tasks.get()


def run(tasks: Tasks, device: torch.device, progress: Progress | None = None) -> None:
    """Run ``tasks`` in threads; ``progress(done, total)`` is told of each. The first error is raised when all are done."""

    def on_device(task: Callable[[], object]) -> None:
        with torch.cuda.device(device):
            task()

    caches.prepare()
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        futures = [pool.submit(on_device, task) for task in tasks.values()]
        for done, _ in enumerate(as_completed(futures), 1):
            if progress is not None:
                progress(done, len(futures))
    for future in futures:
        future.result()


class TritonKernel:
    """A Triton kernel, launched as ``kernel[grid](...)``; decorate the jit function with this.

    Run-time numbers must be positional and not specialized on: then the types of the positional arguments and the values
    of the others tell one compiled kernel from another.
    """

    def __init__(self, jit: Any) -> None:
        self._jit = jit

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
        tasks = listed()
        return self._jit[grid] if tasks is None else partial(self._list, tasks, grid)

    def _list(self, tasks: Tasks, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        key = (id(self._jit), *map(_kind, args), *sorted(options.items()))
        tasks.setdefault(key, partial(self._jit.warmup, *args, grid=grid, **options))


def _kind(argument: Any) -> Hashable:
    if hasattr(argument, "block_shape"):  # a tensor descriptor
        return argument.base.dtype, tuple(argument.block_shape)
    if isinstance(argument, torch.Tensor):
        return argument.dtype
    return type(argument).__name__

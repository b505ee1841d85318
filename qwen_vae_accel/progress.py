"""The one progress bar: on standard error, gone when done unless asked to stay."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from qwen_vae_accel.terminal import stderr

# Called with what is being done, steps done and steps in all.
Update = Callable[[str, int, int], None]


@contextmanager
def progress_bar(*, transient: bool = True, disable: bool = False) -> Iterator[Update]:
    """A bar, drawn only on a terminal. Whatever its display meets, the work inside never hears of it.

    Inside another bar, where rich cannot nest them, none.
    """
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # The process's own standard streams are left alone: other threads write to them.
    bar = Progress(*columns, console=stderr, transient=transient, disable=disable, redirect_stdout=False, redirect_stderr=False)
    task = bar.add_task("", total=None)

    def update(text: str, done: int, total: int) -> None:
        with suppress(Exception):
            bar.update(task, description=text, completed=done, total=total)

    try:
        bar.start()
    except Exception:  # rich's LiveError among them: then the other bar must not be stopped with this one
        bar.disable = True
    try:
        yield update
    finally:
        with suppress(Exception):
            bar.stop()

"""The one progress bar: on standard error, gone when done unless asked to stay."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.errors import LiveError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

# Called with what is being done, steps done and steps in all.
Update = Callable[[str, int, int], None]


@contextmanager
def progress_bar(console: Console | None = None, *, transient: bool = True, disable: bool = False) -> Iterator[Update]:
    """A bar, drawn only on a terminal. Inside another bar of the same console, where rich cannot nest them, none."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bar = Progress(*columns, console=console or _STDERR, transient=transient, disable=disable)
    task = bar.add_task("", total=None)

    def update(text: str, done: int, total: int) -> None:
        bar.update(task, description=text, completed=done, total=total)

    try:
        bar.start()
    except LiveError:
        bar.disable = True
    try:
        yield update
    finally:
        bar.stop()


_STDERR = Console(stderr=True)

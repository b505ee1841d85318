"""A sheet on a terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table as RichTable

from qwen_vae_accel.page.sheet import Sheet, Table
from qwen_vae_accel.terminal import plain


def to_terminal(sheet: Sheet) -> RenderableType:
    """Tables, then paragraphs, then the answer: the end is what a terminal still shows."""
    tables = [to_rich(block) for block in sheet.blocks if isinstance(block, Table)]
    return Group(*tables, *(plain(line) for line in (*sheet.blocks, str(sheet.answer)) if line and isinstance(line, str)))


def to_rich(table: Table) -> RichTable:
    """A table for rich; its texts are shown as they are by :class:`~qwen_vae_accel.terminal.Terminal`."""
    shown = RichTable(title=table.title, title_justify="left")
    for index, column in enumerate(table.columns):
        shown.add_column(column, justify="left" if index < table.words else "right", overflow="fold")
    for row in table.rows:
        shown.add_row(*row)
    return shown

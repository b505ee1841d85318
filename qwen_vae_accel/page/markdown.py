"""A sheet as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from qwen_vae_accel.page.sheet import Sheet, Table


def to_markdown(sheet: Sheet) -> str:
    """The document, in GitHub's dialect; charts and pictures are files of their own, and are left out."""
    versions = [f"{name.removeprefix('package:')} {v}" for name, v in sheet.facts.items() if name.startswith("package:")]
    parts = [f"# {sheet.title}", f"{', '.join([sheet.created, *versions])}.", f"`{sheet.command}`", str(sheet.answer)]
    for block in sheet.blocks:
        if isinstance(block, Table):
            parts += [f"## {block.title}", _table(block)]
        elif isinstance(block, str):
            parts.append(block)
    return "\n\n".join(filter(None, parts)) + "\n"


def _table(table: Table) -> str:
    rows = [[" ".join(cell.replace("|", "\\|").split()) for cell in row] for row in (table.columns, *table.rows)]
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.ljust(width) if index < table.words else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return f"| {' | '.join(padded)} |"

    rule = ["-" * width if index < table.words else "-" * (width - 1) + ":" for index, width in enumerate(widths)]
    return "\n".join([line(rows[0]), line(rule), *map(line, rows[1:])])

"""Sheets as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from importlib import resources

from qwen_vae_accel.page import charts
from qwen_vae_accel.page.extra import optional_package
from qwen_vae_accel.page.sheet import Chart, Drawing, Sheet


def drawn(sheet: Sheet) -> Sheet:
    """The sheet with its charts drawn: what :func:`to_html` takes.

    Raises:
        ConfigError: if matplotlib is not installed.
        Exception: whatever matplotlib makes of values that cannot be drawn.
    """

    def draw(chart: Chart) -> Drawing:
        return Drawing(chart.title, [charts.svg(panel, f"{chart.title}, {sheet.title}") for panel in chart.panels])

    return replace(sheet, blocks=[draw(block) if isinstance(block, Chart) else block for block in sheet.blocks])


def to_html(sheets: Sequence[Sheet], title: str, version: str) -> str:
    """One document that needs no other file and no network.

    Args:
        sheets: see :func:`drawn`.
        title: of the page.
        version: of this package.

    Raises:
        ConfigError: if jinja2 is not installed.
    """
    jinja2 = optional_package("jinja2")
    template = resources.files(__package__).joinpath("page.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return str(environment.from_string(template).render(sheets=sheets, title=title, made=made, version=version))

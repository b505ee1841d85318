"""Matplotlib figures as inline SVG that takes its ink from the page, in light and in dark."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from html import escape
from io import StringIO
from typing import Any

from qwen_vae_accel.bench.report import optional_package

# A colour that no chart uses, replaced by the page's own.
_INK = "#010203"
_INKED = ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color")
# Below the first its words cannot be read, and the page lets it scroll in its box; above the second nothing is won.
_PIXELS_PER_INCH = (58, 88)


def to_svg(draw: Callable[[], Any], label: str) -> str:
    """The figure that ``draw`` makes as an ``<svg>`` element with ``label`` as its name; "" if it makes none."""
    optional_package("matplotlib")
    from matplotlib import rc_context

    settings: dict[str, Any] = dict.fromkeys(_INKED, _INK)
    # Names within an SVG are the page's names: another salt for every chart. Labels are texts, not formulas.
    salt = hashlib.sha256(label.encode()).hexdigest()
    settings |= {"svg.fonttype": "none", "svg.hashsalt": salt, "text.parse_math": False, "font.family": "sans-serif"}
    with rc_context(settings):
        figure = draw()
        if figure is None:
            return ""
        text = StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    least, most = (round(figure.get_figwidth() * pixels) for pixels in _PIXELS_PER_INCH)
    style = f"min-width: {least}px; max-width: {most}px"
    opening = f'<svg role="img" aria-label="{escape(label, quote=True)}" style="{style}"'
    return svg.replace("<svg", opening, 1)

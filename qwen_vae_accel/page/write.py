"""The page itself."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import resources

from qwen_vae_accel import __version__
from qwen_vae_accel.bench.report import optional_package
from qwen_vae_accel.page.results import Section


def render(sections: Sequence[Section], title: str) -> str:
    """One HTML document that needs no other file and no network.

    Raises:
        ConfigError: if jinja2 is not installed.
    """
    jinja2 = optional_package("jinja2")
    template = resources.files(__package__).joinpath("page.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made = datetime.now(timezone.utc).isoformat(timespec="seconds")
    page = environment.from_string(template).render(sections=sections, title=title, made=made, version=__version__)
    return str(page)

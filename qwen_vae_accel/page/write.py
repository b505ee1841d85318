"""The page itself."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import resources
from pathlib import Path

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


def write(path: Path, text: str) -> None:
    """Put ``text`` into ``path`` whole or not at all; what was there stays until then."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        # A temporary file is its owner's alone; the page is as readable as any new file.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise

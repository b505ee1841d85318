"""What all results have in common: the head of their JSON, and the files they are written to."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from qwen_vae_accel.documents import dump_json
from qwen_vae_accel.files import write_output
from qwen_vae_accel.page import charts
from qwen_vae_accel.page.extra import optional_package
from qwen_vae_accel.page.markdown import to_markdown
from qwen_vae_accel.page.sheet import Chart, Sheet

SCHEMA = 1

Document = dict[str, Any]


def make_document(kind: str, command: str, facts: Mapping[str, Any], settings: Mapping[str, Any], **found: Any) -> Document:
    """The JSON document of one run.

    Args:
        kind: which program made it.
        command: the command line.
        facts: see :func:`qwen_vae_accel.bench.machine.machine`.
        settings: what was asked for.
        found: what was measured, JSON values.
    """
    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    head = {"schema": SCHEMA, "kind": kind, "created": created, "command": command}
    return {**head, "machine": dict(facts), "settings": dict(settings), **found}


def head_of(document: Mapping[str, Any]) -> dict[str, Any]:
    """What every sheet of a result takes from its document."""
    return {"created": str(document["created"]), "command": str(document["command"]), "facts": document["machine"]}


def write_json(document: Document, folder: Path, name: str) -> Path:
    """``name.json`` in ``folder``, replaced as a whole."""
    path = folder / f"{name}.json"
    write_output(path, dump_json(document))
    return path


def write(document: Document, sheet: Sheet, folder: Path, name: str) -> list[Path]:
    """``name.json``, ``name.md`` and a PNG of every chart in ``folder``."""
    paths = [write_json(document, folder, name), folder / f"{name}.md"]
    write_output(paths[1], to_markdown(sheet))
    for chart in sheet.blocks:
        if isinstance(chart, Chart):
            paths.append(folder / f"{name}{chart.suffix}.png")
            write_output(paths[-1], charts.png(chart, sheet.title))
    return paths


def require_packages() -> None:
    """Fail before the long part if a package that :func:`write` needs is missing.

    Raises:
        ConfigError: if it is.
    """
    optional_package("matplotlib")


def short_ms(milliseconds: float) -> str:
    """Three digits of a time."""
    digits = 0 if abs(milliseconds) >= 100 else 1 if abs(milliseconds) >= 10 else 2
    return f"{milliseconds:.{digits}f}"

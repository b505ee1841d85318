"""Reads stored results and says what is shown of each."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwen_vae_accel.bench import result, vae_sheet
from qwen_vae_accel.bench.serve import request_sheet
from qwen_vae_accel.demo import photo_sheet
from qwen_vae_accel.demo import reload as demo
from qwen_vae_accel.documents import read_json
from qwen_vae_accel.errors import InvalidInputError, shown
from qwen_vae_accel.page.extra import optional_package
from qwen_vae_accel.page.html import drawn
from qwen_vae_accel.page.sheet import Sheet

_SCHEMAS = {vae_sheet.KIND: result.SCHEMA, request_sheet.KIND: result.SCHEMA, demo.KIND: demo.SCHEMA}
_SHEETS: dict[str, Callable[[Mapping[str, Any], Path], Sheet]] = {
    vae_sheet.KIND: lambda document, path: vae_sheet.make_sheet(document),
    request_sheet.KIND: lambda document, path: request_sheet.make_sheet(document),
    demo.KIND: lambda document, path: photo_sheet.make_sheet(document, path.parent),
}
_LARGEST_RESULT = 2**20
_MOST_ROWS = 500


def read(path: Path) -> Sheet:
    """The sheet of a result, with its charts drawn for HTML.

    Args:
        path: the JSON of ``bench`` or ``serve-bench``, or the output folder of the demo.

    Raises:
        InvalidInputError: if the file cannot be read, is no such result, has another version of the schema, or names a
            picture that is not there or does not lie beside it.
        ConfigError: if matplotlib is not installed.
    """
    source = path.name
    if os.path.isdir(path):
        path = path / demo.FILE
        source = f"{path.parent.name}/{path.name}"
    document = _document(path)
    optional_package("matplotlib")
    try:
        return drawn(replace(_SHEETS[document["kind"]](document, path), source=source))
    except InvalidInputError:
        raise
    except Exception as error:  # whatever our tables and matplotlib make of values that anybody may have written
        why = f"{type(error).__name__}: {error}"
        raise InvalidInputError(f"{path} is a damaged result of {document['kind']} ({why[:300]}); measure again") from error


def read_all(paths: Iterable[Path]) -> list[Sheet]:
    """The sheets of all results, in their order; each result once."""
    return [read(path) for path in dict.fromkeys(paths)]


def _document(path: Path) -> dict[str, Any]:
    known = "the JSON of `bench` or `serve-bench`, or the demo's output folder"
    try:
        document = read_json(path, _LARGEST_RESULT)
    except OSError as error:
        raise InvalidInputError(f"cannot read {path}: {error.strerror or error}; give {known}") from error
    except ValueError as error:  # neither UTF-8 nor JSON
        raise InvalidInputError(f"{path} is no JSON: {error}; give {known}") from error
    if not isinstance(document, dict) or "schema" not in document:
        raise InvalidInputError(f"{path} is no result of this program; give {known}")
    # Results of bench had no kind at first.
    document.setdefault("kind", vae_sheet.KIND if "rows" in document else None)
    kind = document["kind"]
    if not isinstance(kind, str) or kind not in _SCHEMAS:
        raise InvalidInputError(f"{path} is a result of kind {shown(kind)}; known are {', '.join(_SCHEMAS)}")
    if document["schema"] != _SCHEMAS[kind]:
        raise InvalidInputError(
            f"{path} has version {shown(document['schema'])} of the {kind} schema, this program reads {_SCHEMAS[kind]}: "
            f"measure again, or use the version of this program that wrote it"
        )
    rows = document.get("rows", document.get("requests"))
    if isinstance(rows, list) and len(rows) > _MOST_ROWS:
        raise InvalidInputError(f"{path} has {len(rows)} rows; a page shows at most {_MOST_ROWS} of a result")
    return document

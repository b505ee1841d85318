"""JSON that anybody may have written, read within bounds; and JSON that every parser takes, written.

Every JSON file of the package is read here: engine manifests, configurations, stored results, calibrations, tuned kernels.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_vae_accel.files import read_file

LARGEST_FILE = 16 * 2**20
_LARGEST_NUMBER = 2**63 - 1
_DIGITS = len(str(_LARGEST_NUMBER)) + 1
_DEPTH = 32


def read_json(path: Path, limit: int = LARGEST_FILE) -> Any:
    """The document of a file of at most ``limit`` bytes, see :func:`parse_json`.

    Raises:
        OSError: the file cannot be read, is larger, or is no regular file (a pipe would block).
        ValueError: it is no UTF-8, or no JSON within the bounds.
    """
    return parse_json(read_file(path, limit))


def parse_json(data: str | bytes) -> Any:
    """The document in ``data``, UTF-8 with or without a byte order mark.

    Raises:
        ValueError: it is not JSON (NaN and Infinity are none), names a key twice, is nested more than 32 deep, or has a number
            beyond 64 bits or text that is not Unicode. Bytes of file names, as Python escapes them, are let through.
    """
    text = data.decode("utf-8") if isinstance(data, bytes) else data
    try:
        document = json.loads(
            text.removeprefix("\ufeff"),
            parse_int=_integer,
            parse_float=_float,
            parse_constant=_constant,
            object_pairs_hook=_object,
        )
    except RecursionError:
        raise ValueError(f"it is nested more than {_DEPTH} levels deep") from None
    _check(document, 0)
    return document


def _integer(text: str) -> int:
    if len(text) > _DIGITS or abs(int(text)) > _LARGEST_NUMBER:
        raise ValueError(f"the number {text[:12]}... of {len(text)} characters has more than 64 bits")
    return int(text)


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:24]} is too large")
    return value


def _constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        doubled = next(name for name in found if names.count(name) > 1)
        raise ValueError(f"the key {doubled[:100]!r} occurs twice")
    return found


def _check(value: Any, depth: int) -> None:
    if isinstance(value, str):
        value.encode("utf-8", "surrogateescape")
    elif isinstance(value, (dict, list)):
        if depth == _DEPTH:
            raise ValueError(f"it is nested more than {_DEPTH} levels deep")
        for part in value:
            _check(part, depth + 1)
        for part in value.values() if isinstance(value, dict) else ():
            _check(part, depth + 1)


def dump_json(value: Any) -> str:
    """The text of ``value`` with a final line break, in ASCII: strict JSON whatever the values are.

    Numbers that are not finite become their names, integers beyond 64 bits a text, lone surrogates are escaped, and what is
    no JSON value becomes its ``str``.
    """
    return json.dumps(_strict(value), indent=1, allow_nan=False) + "\n"


def _strict(value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value) if abs(value) <= _LARGEST_NUMBER else f"a number of {value.bit_length()} bits"
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, Mapping):
        return {_text(name): _strict(part) for name, part in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_strict(part) for part in value]
    return _text(value)


def _text(value: object) -> str:
    return str(value).encode("utf-8", "backslashreplace").decode()

"""JSON and files that anybody may have written: read within bounds, written strictly, replaced only where they are files."""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from qwen_vae_accel import AccelConfig, accelerate
from qwen_vae_accel.documents import dump_json, parse_json, read_json
from qwen_vae_accel.errors import ConfigError, shown
from qwen_vae_accel.files import write_atomically, write_output

NO_JSON: dict[str, str | bytes] = {
    "nothing": "",
    "half": '{"a": ',
    "two": "{}{}",
    "binary": b"\x89PNG\xff\x00",
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "deeper than the parser": "[" * 100_000,
    "deep": "[" * 40 + "]" * 40,
    "deep in keys": '{"a": ' * 40 + "1" + "}" * 40,
    "NaN": "[NaN]",
    "Infinity": "[-Infinity]",
    "400 digits": "[" + "1" * 400 + "]",
    "5000 digits": "[" + "1" * 5000 + "]",
    "65 bits": f"[{2**63}]",
    "a float beyond floats": "[1e999]",
    "a key twice": '{"a": 1, "a": 2}',
    "a lone surrogate": '["\\ud800"]',
    "a lone surrogate as a key": '{"\\udfff": 1}',
}


@pytest.mark.parametrize("name", NO_JSON)
def test_what_is_no_json_within_bounds_is_a_value_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        parse_json(NO_JSON[name])
    file = tmp_path / "file.json"
    data = NO_JSON[name]
    file.write_bytes(data.encode() if isinstance(data, str) else data)
    with pytest.raises(ConfigError, match="is not JSON"):
        AccelConfig.from_json(file)


def test_plain_documents_are_read() -> None:
    document = {"a": [1, -(2**63) + 1, 0.5, "é\n", None, True, {}], "dir\udcff": "bytes \udc80 of a file name"}
    assert parse_json(json.dumps(document)) == document
    assert parse_json("\ufeff[1]") == parse_json(b"\xef\xbb\xbf[1]") == [1]
    assert parse_json("[" * 32 + "]" * 32)


def _special(kind: str, path: Path) -> None:
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link to a device":
        path.symlink_to("/dev/zero")
    elif kind == "link to itself":
        path.symlink_to(path)
    elif kind == "a gigabyte":
        path.touch()
        os.truncate(path, 2**30)


@pytest.mark.timeout(20)  # a pipe without a writer blocks whoever opens it
@pytest.mark.parametrize("kind", ["missing", "pipe", "folder", "link to a device", "link to itself", "a gigabyte"])
def test_what_is_no_file_of_ours_is_refused_at_once(kind: str, micro: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    _special(kind, path)
    with pytest.raises(OSError):
        read_json(path)
    with pytest.raises(ConfigError, match="cannot read the config"):
        accelerate(micro, path)
    assert not hasattr(micro, "_qwen_vae_accel")


@pytest.mark.parametrize("path", ["x" * 300, "a/" * 5000, "bad\0path", "\ud800", "/proc/self/mem"])
def test_paths_that_no_file_system_takes_are_config_errors(path: str) -> None:
    with pytest.raises(ConfigError):
        AccelConfig.from_json(path)


class Nasty:
    def __repr__(self) -> str:
        raise RuntimeError("no")


HUGE = 10**5000  # Python refuses to print it


@pytest.mark.parametrize(
    "fields",
    [
        {"vram_budget": HUGE},
        {"vram_budget": -HUGE},
        {"vram_budget": 2**63},
        {"vram_budget": "9" * 5000 + "GiB"},
        {"max_resident": HUGE},
        {"task": HUGE},
        {"task": "t" * 10**6},
        {"task": Nasty()},
        {"backend": [HUGE]},
        {"dtype": Nasty()},
        {"dtype": "x" * 10**6},
        {"verify": HUGE},
        {"sizes": [HUGE]},
        {"sizes": ["9" * 10**6 + "x16"]},
        {"sizes": ["x" * 10**6]},
        {"sizes": Nasty()},
        {"sizes": [f"{side}x16\ud800" for side in (16, 32)]},
        {"engine_dir": HUGE},
        {"engine_dir": "~no-such-user-here/engines"},
        {"engine_dir": "\ud800"},
        {"version": HUGE},
        {"k" * 10**6: 1},
        {HUGE: 1},
        {"vae_type": HUGE, "trt_vae_config": {}},
        {"trt_vae_config": {"trt_engine_path": "e", HUGE: 1}},
    ],
    ids=lambda fields: str(next(iter(fields)))[:20] if HUGE not in fields else "huge key",
)
def test_no_value_escapes_as_another_error_and_messages_stay_short(fields: dict[Any, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        AccelConfig.from_dict(fields)
    assert len(str(caught.value)) < 600


def test_a_home_that_nobody_knows_is_a_config_error(micro: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    import pwd

    def nobody(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    with pytest.raises(ConfigError, match="no such home folder"):
        accelerate(micro, engine_dir="~/engines")


def test_many_sizes_are_looked_through_in_a_moment() -> None:
    sizes = [f"{width}x{height}" for width in range(16, 4096, 16) for height in range(16, 2048, 16)]
    assert len(AccelConfig(sizes=sizes).plan().profiles) == len(sizes)


def test_documents_are_written_strictly() -> None:
    value = {
        "nan": math.nan,
        "inf": [-math.inf],
        "huge": HUGE,
        "bytes": "dir\udcff",
        "key\ud800": Path("a"),
        1: (True, None, "\x1b[2J", 2**63 - 1),
    }
    text = dump_json(value)
    assert text.isascii() and text.endswith("\n")
    assert parse_json(text) == {
        "nan": "nan",
        "inf": ["-inf"],
        "huge": f"a number of {HUGE.bit_length()} bits",
        "bytes": "dir\\udcff",
        "key\\ud800": "a",
        "1": [True, None, "\x1b[2J", 2**63 - 1],
    }


def test_messages_show_anything() -> None:
    assert shown("a'b") == '"a\'b"'
    assert shown(HUGE) == "a int that cannot be shown"
    assert shown(Nasty()) == "a Nasty that cannot be shown"
    assert len(shown("x" * 10**6)) < 250


# Replacing files.


def device(path: Path) -> None:
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("only root makes device nodes")


@pytest.mark.parametrize("make", [os.mkfifo, device, Path.mkdir])
@pytest.mark.parametrize("linked", [False, True])
def test_only_files_are_replaced(make: Any, linked: bool, tmp_path: Path) -> None:
    target = path = tmp_path / "target"
    make(target)
    kind = stat.S_IFMT(target.lstat().st_mode)
    if linked:
        path = tmp_path / "link"
        path.symlink_to(target)
    with pytest.raises(OSError, match="not a regular file"):
        write_output(path, "page")
    if not linked:
        with pytest.raises(OSError, match="not a regular file"):
            write_atomically(path, "page")
    assert stat.S_IFMT(target.lstat().st_mode) == kind
    assert path.is_symlink() == linked
    assert {entry.name for entry in tmp_path.iterdir()} == {"target", path.name}


def test_a_user_reaches_the_file_behind_a_link_and_a_directory_of_ours_stays_itself(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("before")
    link.symlink_to(target)
    write_output(link, "page")
    assert link.is_symlink() and target.read_text() == "page"
    write_atomically(link, "ours")  # such as a manifest, which must not write outside its directory
    assert not link.is_symlink() and target.read_text() == "page"

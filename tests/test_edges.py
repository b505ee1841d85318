"""The edge of the command line: every input ends in a documented exit code and, with --json, in strict JSON."""

from __future__ import annotations

import copy
import json
import logging
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from qwen_vae_accel import AccelConfig, caches
from qwen_vae_accel.backends import inductor
from qwen_vae_accel.bench import result as results
from qwen_vae_accel.bench.stored import read
from qwen_vae_accel.bench.vae_sheet import make_sheet
from qwen_vae_accel.cli import engines as commands
from qwen_vae_accel.documents import parse_json
from qwen_vae_accel.engines.manifest import NAME
from qwen_vae_accel.errors import AccelError, InvalidInputError, UnsupportedVAEError
from qwen_vae_accel.kernels.sm90 import nvrtc
from qwen_vae_accel.loading import load_vae
from qwen_vae_accel.page.sheet import Table
from tests.helpers import CPU, ROOT, TINY_VAE, FakeBackend
from tests.processes import dead_signature

if TYPE_CHECKING:
    from tests.fixtures_cli import Cli, Result

pytest_plugins = ["tests.fixtures_cli"]

DECODER = "32x32/vae_decoder.fake"
BENCH = ROOT / "benchmarks" / "results" / "cpu_512_fp32.json"
SERVE = ROOT / "benchmarks" / "results" / "h200_serve.json"
NAMES = "[/] [red]x[/red] \x1b[2J\x1b]0;taken\x07\u202e"


def strict(result: Result) -> Any:
    """Standard output as JSON that any parser takes."""
    assert result.stdout.isascii()
    return parse_json(result.stdout)


def edited(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def record(document: dict[str, Any]) -> dict[str, Any]:
    return document["engines"][DECODER][0]


# Engine directories.

MANIFESTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "build_seconds NaN": lambda d: record(d).update(build_seconds=float("nan")),
    "build_seconds a text that is NaN": lambda d: record(d).update(build_seconds="nan"),
    "scratch beyond 64 bits": lambda d: record(d).update(scratch=[10**400]),
    "scratch negative": lambda d: record(d).update(scratch=[-1]),
    "size infinite": lambda d: record(d).update(size=float("inf")),
    "profile named with markup": lambda d: record(d)["profiles"][0].update(name=NAMES),
    "profile of thousands of digits": lambda d: record(d)["profiles"][0].update(max="9" * 4000 + "x8"),
    "backend with markup": lambda d: record(d).update(backend=NAMES),
    "backend a lone surrogate": lambda d: record(d).update(backend="\ud800"),
    "backend with a byte": lambda d: record(d).update(backend="\udc80"),
    "dtype with markup": lambda d: record(d).update(dtype=NAMES),
    "folder with markup": lambda d: d["engines"].update({f"[red]{'[/]'[:1]}\x1b[2J/vae_decoder.fake": [record(d)]}),
    "verification infinite": lambda d: record(d)["verification"].update(m={"psnr_db": 1e999}),
    "records of another kind": lambda d: d["engines"].update({DECODER: "abc"}),
    "deep": lambda d: d.update(more=json.loads("[" * 60 + "]" * 60)),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_that_anybody_may_have_written(cli: Cli, engines: Path, micro_folder: Path, name: str) -> None:
    edited(engines / NAME, lambda d: d.update(engines={DECODER: d["engines"][DECODER]}))
    edited(engines / NAME, MANIFESTS[name])
    for command in (["list"], ["prune"], ["verify", "--vae", micro_folder]):
        told = cli(*command, "--engine-dir", engines)
        assert told.code in (0, 1)
        assert "Traceback" not in told.stderr
        assert not set("\x1b\x07\u202e") & set(told.stdout + told.stderr)
        result = cli(*command, "--engine-dir", engines, "--json")
        assert result.code == told.code
        strict(result)


@pytest.mark.parametrize("name", ["manifest.json", ".locks/vae_decoder.fake", "tuning_h100.json", "a/b.json"])
def test_prune_deletes_nothing_that_only_calls_itself_an_engine(cli: Cli, engines: Path, name: str) -> None:
    (engines / "tuning_h100.json").write_text("{}")
    edited(engines / NAME, lambda d: d["engines"].update({name: [record(d)]}))
    files = {path for path in engines.rglob("*") if path.is_file()}
    result = cli("prune", "--engine-dir", engines, "--yes", "--json")
    assert result.code == 1
    assert "is not the path of an engine" in strict(result)["error"]["message"]
    assert {path for path in engines.rglob("*") if path.is_file()} == files


def test_markup_and_escapes_in_names_are_shown(cli: Cli, engines: Path) -> None:
    edited(engines / NAME, lambda d: record(d)["profiles"][0].update(name="[/]\x1b[2J", min="8x8"))
    edited(engines / NAME, lambda d: record(d).update(backend="[bold]b"))
    printed = cli("list", "--engine-dir", engines).stdout
    assert "[/]\\x1b[2J" in printed and "[bold]b" in printed
    document = strict(cli("list", "--engine-dir", engines, "--json"))
    entry = next(entry for entry in document["engines"] if entry["path"] == DECODER)
    assert entry["profiles"][0]["name"] == "[/]\x1b[2J", "JSON holds the name itself"


@pytest.mark.timeout(60)
@pytest.mark.parametrize("what", [DECODER, NAME])
def test_a_pipe_in_the_place_of_a_file_blocks_nobody(cli: Cli, engines: Path, what: str) -> None:
    (engines / what).unlink()
    os.mkfifo(engines / what)
    for command in ("list", "prune"):
        assert cli(command, "--engine-dir", engines).code in (0, 1)
        strict(cli(command, "--engine-dir", engines, "--json"))


def test_a_dangling_link_among_the_leftovers_is_one(cli: Cli, engines: Path) -> None:
    folder = engines / ".tmp"
    folder.mkdir(exist_ok=True)
    link = folder / f"1.vae_decoder.fake.{dead_signature()}.fake"
    link.symlink_to("/nonexistent")
    assert str(link) in [file["path"] for file in strict(cli("prune", "--engine-dir", engines, "--json"))["files"]]
    assert cli("prune", "--engine-dir", engines, "--yes").code == 0
    assert not link.is_symlink()


# Paths.

PATHS = ["x" * 300, "a/" * 3000, "~no-such-user-here", "\udcff", "/proc/self/mem", "/dev/null/x", "[/]\x1b[2J"]
CAN_BE_MADE = ("~no-such-user-here", "\udcff", "[/]\x1b[2J")


@pytest.mark.parametrize("path", PATHS, ids=lambda path: ascii(path)[:20])
def test_no_path_ends_in_a_traceback(cli: Cli, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments in (
        ("config", "--vae", path),
        ("config", "--config", path),
        ("list", "--engine-dir", path),
        ("verify", "--vae", path, "--engine-dir", tmp_path),
        ("report", path, "-o", tmp_path / "page.html"),
        ("report", BENCH, "-o", Path(path) / "page.html"),
        ("demo", "--image", path, "-o", tmp_path / "demo"),
        ("demo", "--model", path, "-o", tmp_path / "demo"),
        ("bench", "--vae", path, "-o", tmp_path),
        ("serve-bench", "--model", path),
        ("tune", "--engine-dir", path),
    ):
        if arguments[:2] == ("report", BENCH) and path in CAN_BE_MADE:
            continue
        told = cli(*arguments)
        assert told.code in (1, 2), arguments
        assert "Traceback" not in told.stderr, arguments
        assert "\x1b" not in told.stderr, arguments
        result = cli(*arguments, "--json")
        assert result.code == told.code
        assert set(strict(result)["error"]) == {"type", "message", "reasons"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("list", "--engine-dr", "x"), "No such option"),
        (("list", "--engine-dr\x1b[2J"), "No such option"),
        (("list",), "Missing option"),
        (("lst\x1b[2J",), "No such command"),
        (("bench", "--iters", "1" * 5000), "Invalid value"),
        (("bench", "--iters", "2"), "Invalid value"),
        (("bench", "--seconds", "nan"), "--seconds"),
        (("bench", "--device", "cuda:" + "9" * 30), "device"),
        (("bench", "--device", "cpu\udcff"), "device"),
        (("bench", "--sizes", "9" * 5000 + "x16"), "sides"),
        (("demo", "--area", "1" * 400), "Invalid value"),
        (("serve-bench", "--repeats", "1" * 400), "Invalid value"),
        (("build", "--vae", "x", "--engine-dir", "e", "--setting", "query_limit=" + "1" * 5000), "whole number"),
        (("build", "--vae", "x", "--engine-dir", "e", "--setting", "query_limit=\u00b2"), "whole number"),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_invalid_command_lines(cli: Cli, arguments: tuple[str, ...], message: str) -> None:
    result = cli(*arguments)
    assert result.code == 2
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr and "\x1b" not in result.stderr and result.stdout == ""
    result = cli(*arguments, "--json")
    assert result.code == 2
    assert message in strict(result)["error"]["message"]


def test_weights_of_other_names_are_no_vae(cli: Cli, micro_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "vae"
    folder.mkdir()
    for file in (micro_folder / "vae").iterdir():
        if file.suffix == ".safetensors":
            renamed = {name.replace("conv_in", "conv1"): value for name, value in load_file(file).items()}
            save_file(renamed, folder / file.name, {"format": "pt"})
        else:
            (folder / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UnsupportedVAEError, match=r"lacks decoder.conv_in.bias.*\n.*it has decoder.conv1.bias"):
        load_vae(folder, CPU)
    result = cli("verify", "--backend", "eager", "--sizes", "64x64", "--vae", folder, "--json")
    assert result.code == 1
    assert strict(result)["error"]["type"] == "UnsupportedVAEError"


@pytest.mark.timeout(120)
def test_a_folder_of_odd_files_is_no_vae(tmp_path: Path) -> None:
    for data in (b"\xef\xbb\xbf[]", b'{"_class_name": NaN}', b'{"_class_name": ' + b"1" * 9000 + b"}", b""):
        folder = tmp_path / str(len(data))
        folder.mkdir()
        (folder / "config.json").write_bytes(data)
        with pytest.raises(UnsupportedVAEError, match="config.json"):
            load_vae(folder, CPU)
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "config.json").write_bytes((TINY_VAE / "config.json").read_bytes())
    os.mkfifo(weights / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UnsupportedVAEError):
        load_vae(weights, CPU)


# Folders that torch's C++ cannot name.


def test_a_folder_that_is_not_utf8_is_refused_before_torch_aborts(cli: Cli, micro_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"dir\xff")
    folder.mkdir()
    with pytest.raises(RuntimeError, match=r"names in UTF-8.*\\udcff"):
        inductor._spelled(folder / "engine.pt2")
    place = ("--vae", micro_folder, "--engine-dir", folder)
    build = ("build", *place, "--backend", "inductor", "--sizes", "16x16", "--method", "decode")
    result = cli(*build, "--json")
    assert result.code == 1
    assert "name another folder" in strict(result)["engines"][0]["reason"]
    told = cli(*build)
    assert told.code == 1 and "Traceback" not in told.stderr


# Homes.


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A user id without an entry in the password database, and no HOME."""
    import pwd

    def nobody(uid: object) -> None:
        raise KeyError(uid)

    for name in ("HOME", "XDG_CACHE_HOME", "TRITON_CACHE_DIR", "TRITON_HOME", "TORCHINDUCTOR_CACHE_DIR",
                 "LOGNAME", "USER", "LNAME", "USERNAME"):  # fmt: skip
        monkeypatch.setenv(name, "")  # so that what is set meanwhile is undone
        monkeypatch.delenv(name)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    caches.home.cache_clear()
    yield
    caches.home.cache_clear()


def test_kernels_compile_without_a_home(
    homeless: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(nvrtc, "version", lambda: "13.0")
    monkeypatch.setattr(nvrtc, "_compile", lambda source, options: b"machine code")
    for source in ("one", "two"):
        assert nvrtc.compile_cubin(source, {}) == b"machine code"
    assert [entry.message.split(",")[0] for entry in caplog.records] == ["this user has no home folder (no HOME"]


@pytest.mark.parametrize("home", [None, "/proc/nobody", "/dev/null"])
def test_triton_and_inductor_get_a_folder_where_theirs_cannot_be(
    home: str | None, homeless: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if home is not None:
        monkeypatch.setenv("HOME", home)
    monkeypatch.chdir(tmp_path)
    caches.prepare()
    folder = Path(os.environ["TRITON_CACHE_DIR"])
    assert folder.is_dir() and folder.stat().st_mode & 0o077 == 0
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"].endswith(f"torchinductor_uid_{os.getuid()}")
    caches.prepare()
    assert Path(os.environ["TRITON_CACHE_DIR"]) == folder
    assert list(tmp_path.iterdir()) == [], "nothing is made in a folder named ~"


def test_a_home_that_can_be_written_is_used(homeless: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    caches.prepare()
    assert "TRITON_CACHE_DIR" not in os.environ
    assert caches.cubin_folder() == tmp_path / ".cache" / "qwen_vae_accel" / "cubin"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert caches.cubin_folder() == tmp_path / "xdg" / "qwen_vae_accel" / "cubin"


# Failures that nobody expected.


@pytest.mark.parametrize(
    ("error", "code", "traceback"),
    [
        (KeyError("x"), 1, True),
        (SystemExit(3), 1, True),
        (KeyboardInterrupt(), 130, False),
        (PermissionError(13, "Permission denied", "/x"), 1, False),
        (BrokenPipeError(32, "Broken pipe"), 1, False),
        (RecursionError("too deep"), 1, False),
        (OverflowError("too large"), 1, False),
        (UnicodeEncodeError("utf-8", "\ud800", 0, 1, "no"), 1, False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_every_failure_has_its_exit_code_and_document(
    cli: Cli, engines: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, traceback: bool
) -> None:
    def fail(self: object) -> None:
        raise error

    monkeypatch.setattr(commands.Inspector, "survey", fail)
    result = cli("list", "--engine-dir", engines, "--json")
    assert result.code == code
    assert strict(result)["error"]["type"] == type(error).__name__
    assert ("Traceback" in result.stderr) == traceback
    assert type(error).__name__ in cli("list", "--engine-dir", engines).stderr


def test_what_others_print_is_not_in_the_document(cli: Cli, engines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    survey = commands.Inspector.survey

    def chatty(self: Any) -> Any:
        print("from a library")
        print("another", file=sys.stderr)
        return survey(self)

    monkeypatch.setattr(commands.Inspector, "survey", chatty)
    result = cli("list", "--engine-dir", engines, "--json")
    assert "engines" in strict(result)
    assert "from a library" in result.stderr and "another" in result.stderr


# Standard streams, of real processes: one that has imported everything forks for each case.

STREAMS = """
import json, os, sys
from qwen_vae_accel.cli.app import main

engines, vae, named = sys.argv[1:]


REAL = ("stdout full []", "both pipe")


def closed(number):
    os.close(number)
    setattr(sys, {1: "stdout", 2: "stderr"}[number], None)


def onto(number, descriptor):
    os.dup2(descriptor, number)


def full(number):
    onto(number, os.open("/dev/full", os.O_WRONLY))


def pipe(number):
    reader, writer = os.pipe()
    os.close(reader)
    onto(number, writer)


def command(name, arguments, *spoils):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writer, 2)
        for spoil, number in spoils:
            spoil(number)
        sys.argv = ["qwen-vae-accel", *arguments]
        try:
            main()
        except SystemExit as end:
            if name in REAL:
                raise
            for stream in filter(None, (sys.stdout, sys.stderr)):
                stream.flush()  # the interpreter's own last step that can fail; the others take seconds
            os._exit(end.code)
    os.close(writer)
    with os.fdopen(reader, "rb") as errors:
        told = errors.read().decode("ascii", "backslashreplace")
    status = os.waitpid(child, 0)[1]
    print(json.dumps([name, os.waitstatus_to_exitcode(status), told]), flush=True)


listing = ["list", "--engine-dir", engines, "--device", "cpu"]
sys.argv = ["qwen-vae-accel", *listing]
try:
    main()  # once here, so that no child imports again what this needs
except SystemExit:
    pass
for spoil in (closed, full, pipe):
    for more in ([], ["--json"]):
        command(f"stdout {spoil.__name__} {more}", [*listing, *more], (spoil, 1))
    command(f"stderr {spoil.__name__}", [*listing, "--verbose"], (spoil, 2))
    command(f"both {spoil.__name__}", listing, (spoil, 1), (spoil, 2))
    command(f"help {spoil.__name__}", ["--help"], (spoil, 1))
command("missing", ["list", "--engine-dir", named + "x"])
command("named", ["list", "--engine-dir", named])
place = ["--vae", vae, "--engine-dir", named]
command("build", ["build", *place, "--backend", "inductor", "--sizes", "16x16", "--method", "decode"])
"""


def test_real_streams_that_are_closed_full_or_without_a_reader_in_a_locale_of_ascii(
    _engines: Path, micro_folder: Path, tmp_path: Path
) -> None:
    named = tmp_path / "é"
    named.mkdir()
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", STREAMS, _engines, micro_folder, named]
    done = subprocess.run(command, env=environment, capture_output=True, check=False, timeout=250)
    lines = [line for line in done.stdout.decode("ascii", "backslashreplace").splitlines() if line.startswith("[")]
    found = {name: (code, told) for name, code, told in map(json.loads, lines)}
    assert len(found) == 18, done.stderr.decode(errors="replace")[-2000:]
    for name, (code, told) in found.items():
        assert "Traceback" not in told and "Exception ignored" not in told, (name, told)
        # The fake engines are none in a process without their backend, so a listing finds them bad.
        allowed = {"help": (0, 1), "named": (0,)}.get(name.split()[0], (1,))
        assert code in allowed, (name, code, told)
    for kind in ("[]", "['--json']"):
        assert "cannot write to standard output: No space left" in found[f"stdout full {kind}"][1]
        assert "cannot write to standard output" in found[f"stdout closed {kind}"][1]
    assert "there is no engine directory" in found["missing"][1]
    assert "name another folder, or set PYTHONUTF8=1" in " ".join(found["build"][1].split())


# Results and pages.


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """The output of a demo, as small as can be."""
    folder = tmp_path / "demo"
    (folder / "panels").mkdir(parents=True)
    panels = {}
    for name in ("photo", "diffusers", "accelerated", "difference"):
        Image.new("RGB", (16, 16)).save(folder / "panels" / f"{name}.png")
        panels[name] = {"file": f"panels/{name}.png", "title": name, "line": "a line"}
    times = {"encode_ms": 2.0, "decode_ms": 3.0}
    photo = {"image": "a.png", "size": "16x16", "diffusers": times, "accelerated": times, "panels": panels}
    photo["psnr_db"] = {"diffusers": 1.0, "accelerated": "inf", "between": 2.0}
    document = {"schema": 1, "kind": "demo", "model": "m", "device": "cpu", "dtype": "float32", "backend": "b", "photo": photo}
    (folder / "demo.json").write_text(json.dumps(document))
    return folder


SECRETS: dict[str, Callable[[Path, Path], str]] = {
    "absolute": lambda folder, secret: str(secret),
    "upwards": lambda folder, secret: f"../{secret.name}",
    "down and upwards": lambda folder, secret: f"panels/../../{secret.name}",
    "upwards and back": lambda folder, secret: f"../{folder.name}/panels/photo.png",
    "a link": lambda folder, secret: _linked(folder / "panels" / "a.png", secret),
    "through a linked folder": lambda folder, secret: _linked(folder / "out", secret.parent) + f"/{secret.name}",
}


def _linked(link: Path, target: Path) -> str:
    link.symlink_to(target)
    return str(link.relative_to(next(parent for parent in link.parents if parent.name == "demo")))


@pytest.mark.parametrize("name", SECRETS)
def test_a_result_cannot_bring_other_pictures_into_a_page(cli: Cli, demo: Path, tmp_path: Path, name: str) -> None:
    page = tmp_path / "page.html"
    assert cli("report", demo, "-o", page).code == 0
    page.unlink()
    secret = tmp_path / "secret.png"
    Image.new("RGB", (16, 16), "red").save(secret)
    file = SECRETS[name](demo, secret)
    edited(demo / "demo.json", lambda d: d["photo"]["panels"]["photo"].update(file=file))
    result = cli("report", demo, "-o", page, "--json")
    assert result.code == 2
    assert "beside its result" in strict(result)["error"]["message"]
    assert not page.exists()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["TIFF", "EPS", "pipe", "text", "large"])
def test_only_pictures_of_a_size_are_shown(cli: Cli, demo: Path, tmp_path: Path, kind: str) -> None:
    file = demo / "panels" / "photo.png"
    file.unlink()
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "text":
        file.write_text("secret")
    elif kind == "large":
        file.touch()
        os.truncate(file, 2**30)
    else:
        Image.new("RGB", (16, 16)).save(file, kind)
    result = cli("report", demo, "-o", tmp_path / "page.html", "--json")
    assert result.code == 2
    assert "cannot read the picture" in strict(result)["error"]["message"]


@pytest.mark.timeout(60)
def test_a_page_replaces_a_file_and_nothing_else(cli: Cli, demo: Path, tmp_path: Path) -> None:
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    for output in (pipe, link):
        result = cli("report", demo, "-o", output, "--json")
        assert result.code == 2
        assert "it is not a regular file, and is not replaced" in strict(result)["error"]["message"]
    assert pipe.is_fifo() and link.is_symlink()
    (tmp_path / "bench.md").symlink_to(pipe)
    document = json.loads(BENCH.read_text())
    with pytest.raises(OSError, match="not a regular file"):
        results.write(document, make_sheet(document), tmp_path, "bench")


def test_a_page_of_bytes_that_are_no_text(cli: Cli, demo: Path, tmp_path: Path) -> None:
    folder = demo.rename(tmp_path / os.fsdecode(b"demo\xff"))
    edited(folder / "demo.json", lambda d: d.update(model="\udc80"))
    page = tmp_path / "page.html"
    assert cli("report", folder, "-o", page, "--title", "t\udcff").code == 0
    assert "t\\udcff" in page.read_text(encoding="utf-8")


# Anything at all.

NASTY: list[Any] = [
    None, True, -1, 0, 2**62, 10**30, 10**400, 1e308, -1e-308, float("nan"), float("inf"),
    "", "[/]", "\x1b[2J", "\ud800", "\udcff",
    "9" * 5000, "9999999999x1", "nan", "x" * 3000, "../../etc/passwd", "/dev/zero", [], {}, [[]], [None], {"a": {}}, {"": 1},
    ["8x8"] * 50, "\0", "é", "$\\frac{", "<script>", 0.5,
]  # fmt: skip


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, part in parts:
        yield from _places(part, (*path, name))


def mutated(document: Any, dice: random.Random) -> bytes:
    """``document`` with one to three places spoiled, or its text."""
    document = copy.deepcopy(document)
    for _ in range(dice.randint(1, 3)):
        *path, last = dice.choice([place for place in _places(document) if place])
        owner = document
        for name in path:
            owner = owner[name]
        action = dice.random()
        if action < 0.15:
            del owner[last]
        elif action < 0.25 and isinstance(owner, dict):
            owner[dice.choice([text for text in NASTY if isinstance(text, str)])] = owner[last]
        else:
            owner[last] = copy.deepcopy(dice.choice(NASTY))
    data = bytearray(json.dumps(document).encode())
    if dice.random() < 0.15:
        place = dice.randrange(len(data))
        data[place : place + dice.randint(0, 4)] = dice.randbytes(dice.randint(0, 4))
    return bytes(data)


def rounds(seconds: float) -> Iterator[random.Random]:
    """Dice of one seed after another, for so many seconds; QVA_SOAK_SECONDS makes it longer."""
    end = time.monotonic() + float(os.environ.get("QVA_SOAK_SECONDS", seconds))
    seed = 0
    while seed < 3 or time.monotonic() < end:
        yield random.Random(seed)
        seed += 1
    logging.getLogger(__name__).warning("%d tries", seed)


@pytest.mark.timeout(0)
def test_no_configuration_escapes(tmp_path: Path) -> None:
    plain = AccelConfig(engine_dir="e", sizes=("16_9", "512x640"), vram_budget="4GiB", on_miss="build", max_resident=1)
    guide = {"task": "t2i", "vae_type": "tensorrt", "trt_vae_config": {"trt_engine_path": "e", "multi_profile": True}}
    for dice in rounds(2):
        file = tmp_path / "config.json"
        file.write_bytes(mutated(dice.choice([plain.as_dict(), guide]), dice))
        try:
            config = AccelConfig.from_json(file)
        except AccelError as error:
            assert len(str(error)) < 1000
        else:
            assert AccelConfig.from_json(config.to_json()) == config


@pytest.mark.timeout(0)
def test_no_manifest_escapes(cli: Cli, engines: Path, fake: FakeBackend) -> None:
    document = json.loads((engines / NAME).read_text())
    document["engines"] = {DECODER: document["engines"][DECODER]}
    for dice in rounds(3):
        (engines / NAME).write_bytes(mutated(document, dice))
        command = dice.choice(["list", "prune"])
        result = cli(command, "--engine-dir", engines, "--json")
        strict(result)
        assert result.code in (0, 1) and "Traceback" not in result.stderr
        told = cli(command, "--engine-dir", engines)
        assert told.code == result.code and "Traceback" not in told.stderr and "\x1b" not in told.stdout + told.stderr


@pytest.mark.timeout(0)
@pytest.mark.parametrize("kind", ["bench", "serve", "demo"])
def test_no_result_escapes(demo: Path, kind: str) -> None:
    file = {"bench": BENCH, "serve": SERVE, "demo": demo / "demo.json"}[kind]
    document = json.loads(file.read_text())
    for dice in rounds(2):
        (demo / "demo.json").write_bytes(mutated(document, dice))
        try:
            sheet = read(demo / "demo.json")
        except InvalidInputError as error:
            assert len(str(error)) < 3000
        else:
            tables = [block for block in sheet.blocks if isinstance(block, Table)]
            assert all(isinstance(cell, str) for table in tables for row in (table.columns, *table.rows) for cell in row)

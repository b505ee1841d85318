"""Terminals and progress bars: nothing in a name is obeyed, and a display that fails reaches no work."""

from __future__ import annotations

import io
import logging
import os
import sys
import threading
import time
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.logging import RichHandler
from rich.table import Table
from torch import nn

from qwen_vae_accel import accelerate
from qwen_vae_accel.journal import EngineLoad, Journal
from qwen_vae_accel.progress import progress_bar
from qwen_vae_accel.terminal import Terminal, Unfailing, plain, stderr, visible
from tests.helpers import SIZES

EVIL = "[/] [bold]a[/bold] :smile: \x1b[2J\x9b31m\r\x07\u202eb\udcff\ud800"
SHOWN = "[/] [bold]a[/bold] :smile: \\x1b[2J\\x9b31m\\x0d\\x07\\u202eb\\udcff\\ud800"


def test_text_is_written_out_where_a_terminal_would_obey_it() -> None:
    assert visible(EVIL) == SHOWN
    assert visible("two\nlines\té") == "two\nlines\té"
    assert visible("é…", "ascii") == "\\xe9\\u2026"


@pytest.mark.parametrize("wrap", [str, plain])
@pytest.mark.parametrize("terminal", [False, True])
def test_no_name_is_obeyed_wherever_it_is_printed(wrap: Any, terminal: bool) -> None:
    file = io.StringIO()
    console = Terminal(file=file, force_terminal=terminal, color_system=None, width=300)
    table = Table(title=wrap(EVIL), caption=wrap(EVIL))
    table.add_column(wrap(EVIL))
    table.add_row(wrap(EVIL))
    console.print(table)
    console.print(wrap(EVIL))
    handler = RichHandler(console=console, show_path=False, markup=False)
    handler.emit(logging.LogRecord("a", logging.WARNING, "", 0, "%s", (EVIL,), None))
    printed = file.getvalue()
    assert printed.count(SHOWN) == 5
    assert printed.count(SHOWN.replace("\\x0d\\x07", "")) == 1, "rich's own handler drops some"
    assert not any(character in printed for character in "\x1b\x9b\r\x07\u202e\udcff\ud800")


def test_a_report_shows_names_on_anybodys_console(caplog: pytest.LogCaptureFixture) -> None:
    from rich.console import Console

    journal = Journal()
    journal.served("decode", EVIL, EVIL)
    journal.load(EngineLoad(EVIL, EVIL, 1.0, 1))
    journal.leave_alone(EVIL, EVIL)
    report = journal.report(EVIL, [EVIL], EVIL)
    file = io.StringIO()
    Console(file=file, width=400).print(report)
    for text in (file.getvalue(), str(report), caplog.text * 3):
        assert text.count("[/]") > 5
        assert not any(character in text for character in "\x1b\x9b\u202e\udcff\ud800")


# Displays that fail.


class Broken(io.TextIOBase):
    """A terminal, or none, whose every use fails."""

    def __init__(self, error: type[Exception], terminal: bool) -> None:
        self.error, self.terminal, self.writes = error, terminal, 0

    def isatty(self) -> bool:
        return self.terminal

    def write(self, text: str) -> int:
        self.writes += 1
        raise self.error("broken")

    def flush(self) -> None:
        raise self.error("broken")

    def fileno(self) -> int:
        raise self.error("broken")


@contextmanager
def broken_terminal(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> Iterator[Broken]:
    """Standard error is a terminal that fails; no thread may die of it."""
    stream = Broken(error, True)
    deaths: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(threading, "excepthook", deaths.append)
        patch.setenv("TERM", "xterm")
        patch.setattr(sys, "stderr", stream)
        patch.setattr(stderr, "is_interactive", True)  # which rich looks up once, when the process starts
        yield stream
    assert deaths == []
    assert stream.writes > 2, "it was written to"


ERRORS = pytest.mark.parametrize("error", [BrokenPipeError, OSError, ValueError])


@ERRORS
def test_a_bar_on_a_broken_terminal_hinders_nothing(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    with broken_terminal(error, monkeypatch):
        output, errors = sys.stdout, sys.stderr
        with progress_bar() as update:
            assert (sys.stdout, sys.stderr) == (output, errors), "other threads' streams stay theirs"
            update("[/]", 1, 2)
            time.sleep(0.3)  # rich's own thread draws ten times a second
            with progress_bar() as inner:
                inner("another", 1, 2)
            stderr.print("a line beside it")


@ERRORS
def test_a_warmup_with_a_broken_terminal(
    error: type[Exception], engines: Path, micro: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    with broken_terminal(error, monkeypatch), accelerate(micro, backend="tensorrt", engine_dir=engines, sizes=SIZES) as handle:
        assert handle.warmup().as_dict()["loads"] == len(SIZES)


@pytest.mark.parametrize("stream", [None, Broken(OSError, False)])
def test_a_bar_without_a_standard_error(stream: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    for one in (stream, closed):
        monkeypatch.setattr(sys, "stderr", one)
        with progress_bar(transient=False) as update:
            update("step", 1, 1)


def test_a_display_that_fails_in_other_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyError("rich")

    monkeypatch.setattr("rich.progress.Progress.start", fail)
    monkeypatch.setattr("rich.progress.Progress.update", fail)
    monkeypatch.setattr("rich.progress.Progress.stop", fail)
    with progress_bar() as update:
        update("step", 1, 1)
    with pytest.raises(ZeroDivisionError, match="the work's own"), progress_bar():
        raise ZeroDivisionError("the work's own")


def test_a_bar_is_drawn_on_a_terminal_and_gone_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = os.openpty()
    tty.setraw(theirs)
    monkeypatch.setenv("TERM", "xterm")
    stream = os.fdopen(theirs, "w", closefd=False)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(stderr, "is_interactive", True)
    with progress_bar() as update:
        update("[/] step", 1, 2)
        drawn = b""
        while b"1/2" not in drawn:  # the test's time limit ends it
            drawn += os.read(ours, 10_000)
        os.close(ours)  # from now on every write is EIO
        time.sleep(0.4)
        update("step", 2, 2)
    monkeypatch.undo()
    os.close(theirs)
    assert b"[/] step" in drawn


def test_a_lost_stream_says_what_it_is() -> None:
    nothing = Unfailing(lambda: None)
    assert nothing.write("abc") == 3 and not nothing.isatty() and nothing.encoding == "utf-8"
    nothing.flush()
    with pytest.raises(io.UnsupportedOperation):
        nothing.fileno()
    text = io.StringIO()
    Unfailing(lambda: text).write("abc")
    assert text.getvalue() == "abc"

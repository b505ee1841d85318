"""Finds a Chromium or Chrome for the tests of pages; as a program (``make browser``) it installs one where there is none."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
HOW = "install chromium or Google Chrome (as root on Debian: apt-get install chromium), or run: playwright install chromium"
# For a browser that has nothing to fetch and may run as root.
ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def find() -> str | None:
    """The path of a browser that starts; None where there is none. Not to be called within ``sync_playwright()``."""
    installed = next((path for name in _NAMES if (path := shutil.which(name)) and _starts(path)), None)
    return installed or _own()


def _own() -> str | None:
    """The browser that ``playwright install`` put somewhere."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = playwright.chromium.executable_path
    return path if _starts(path) else None


def _starts(path: str) -> bool:
    # Some distributions ship a file of that name that only says how to install it.
    try:
        return subprocess.run([path, "--version"], capture_output=True, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _can_apt() -> bool:
    return hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("apt-get") is not None


def _try(*command: str) -> None:
    print("+", *command, file=sys.stderr, flush=True)
    try:
        subprocess.run(command, timeout=600, stdout=2, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"})
    except (OSError, subprocess.TimeoutExpired) as error:
        print(error, file=sys.stderr)


def install() -> str | None:
    """A browser that was there, or one from the system's packages (as root), or playwright's own; None if none can be had."""
    if (path := find()) is None and _can_apt():
        _try("apt-get", "update", "-qq")
        _try("apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium")
        path = find()
    if path is None:
        _try(sys.executable, "-m", "playwright", "install", "chromium")
        path = find()
    return path


if __name__ == "__main__":
    print(install() or f"no browser; the tests of pages will not run here: {HOW}")

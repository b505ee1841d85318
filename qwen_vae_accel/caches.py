"""Folders for compiled code: ours, and those of Triton and inductor where their own choice cannot be used.

A container may run under a user id without an entry in the password database, without HOME, or with a home that cannot be
written. A cache is a convenience: without one the work goes on, which is said once.
"""

from __future__ import annotations

import atexit
import functools
import getpass
import logging
import os
import shutil
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)


@functools.cache
def home() -> Path | None:
    """The user's home; None, logged once, where nobody knows one."""
    folder = os.path.expanduser("~")  # leaves the tilde where there is none
    if os.path.isabs(folder):
        return Path(folder)
    logger.warning("this user has no home folder (no HOME, no passwd entry), so compiled kernels are not kept on disk")
    return None


def cubin_folder() -> Path | None:
    """Where compiled CUDA C++ is kept: below XDG_CACHE_HOME, or .cache in the home; None where there is neither."""
    named = os.environ.get("XDG_CACHE_HOME")
    if named:
        return Path(named) / "qwen_vae_accel" / "cubin"
    folder = home()
    return None if folder is None else folder / ".cache" / "qwen_vae_accel" / "cubin"


def prepare() -> None:
    """Before something is compiled: see that Triton and inductor have a folder that they can write.

    Theirs are below the home and named after the user. Where that cannot be, Triton gets a temporary folder for the life
    of this process, and inductor one named after the user's number, through their own variables of the environment.
    """
    if not os.environ.get("TRITON_CACHE_DIR") and not _triton_has_one():
        folder = tempfile.mkdtemp(prefix="qwen-vae-accel-triton-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ["TRITON_CACHE_DIR"] = folder
        logger.warning("Triton's cache below the home folder cannot be written: this process compiles into %s", folder)
    if not os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
        try:
            getpass.getuser()
        except (KeyError, ImportError, OSError):  # which of them depends on the release of Python
            name = f"torchinductor_uid_{os.getuid()}"
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(tempfile.gettempdir(), name)


def _triton_has_one() -> bool:
    root = os.environ.get("TRITON_HOME") or home()
    if root is None:
        return False
    folder = Path(root) / ".triton" / "cache"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False

"""AOTInductor packages, unpacked: each content once per process, in a private folder that goes with the process.

The library in a package cannot be unloaded: compilers mark symbols of it as unique to the process. So a package that is
loaded again must find the library where it was, or each load maps another copy for good. Its weights are another matter:
they are copied out of the library at a load, and given back when the program goes.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import logging
import os
import shutil
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from qwen_vae_accel.backends.base import EngineImage
from qwen_vae_accel.visits import fork_safe_lock

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

_PREFIX = "qwen-vae-accel-"
_MODEL = ("data", "aotinductor", "model")
_lock = fork_safe_lock()
_folder: _Folder | None = None


@dataclass(frozen=True, slots=True)
class Unpacked:
    """The files of one package that its code needs.

    Attributes:
        library: the shared library; the machine code for a GPU lies beside it.
        sizes: of each file by its name.
    """

    library: Path
    sizes: dict[str, int]

    def stands(self) -> bool:
        """Whether all of it is still there: who tidies up a folder for temporary files may not know of us."""
        try:
            return all((self.library.parent / name).stat().st_size == size for name, size in self.sizes.items())
        except OSError:
            return False


class _Folder:
    """This process's folder. A lock on it says that it is in use, to other processes of ours and to systemd-tmpfiles."""

    def __init__(self) -> None:
        _remove_abandoned()
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=_PREFIX))  # for nobody but this user
            self._descriptor = _try_lock(self.path)
            if self.path.exists():  # not taken for abandoned before it was locked
                break
        self.process = os.getpid()
        self.packages: dict[str, Unpacked] = {}

    def remove(self) -> None:
        """Delete it, unless this is a forked child of the process whose it is."""
        if self.process == os.getpid():
            shutil.rmtree(self.path, ignore_errors=True)


def unpack(image: EngineImage) -> Unpacked:
    """The files of the package ``image``, the same ones whenever it is asked for.

    Raises:
        ValueError: if it is not a package with a compiled library.
        OSError: if there is no room for temporary files.
    """
    global _folder
    with _lock:
        if _folder is None or _folder.process != os.getpid():
            _folder = _Folder()
            atexit.register(_folder.remove)
        known = _folder.packages.get(image.sha256)
        if known is None or not known.stands():
            known = _folder.packages[image.sha256] = _extract(image, _folder.path)
        return known


def _extract(image: EngineImage, into: Path) -> Unpacked:
    try:
        archive = zipfile.ZipFile(io.BytesIO(image.data))
    except zipfile.BadZipFile as error:
        raise ValueError(f"it is not a package: {error}") from error
    folder = Path(tempfile.mkdtemp(prefix=f"{image.sha256[:16]}-", dir=into))
    sizes = {}
    try:
        for entry in archive.infolist():
            path = PurePosixPath(entry.filename)
            # <name of the package>/data/aotinductor/model/<file>, of older releases without the first
            if path.parts[-4:-1] != _MODEL or len(path.parts) > 5 or path.suffix == ".cpp":
                continue
            with archive.open(entry) as source, (folder / path.name).open("xb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
            sizes[path.name] = entry.file_size
        libraries = [name for name in sizes if name.endswith(".so")]
        if len(libraries) != 1:
            raise ValueError(f"the package holds {len(libraries)} compiled libraries of a model named 'model', not one")
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return Unpacked(folder / libraries[0], sizes)


def _try_lock(folder: Path) -> int | None:
    """A descriptor of ``folder`` with the only lock on it; None where another process has it."""
    if fcntl is None:
        return None
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _remove_abandoned() -> None:
    """Delete the folders of processes of this user that were killed."""
    if fcntl is None:
        return
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            if folder.lstat().st_uid != os.geteuid():
                continue
            descriptor = _try_lock(folder)
            if descriptor is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(descriptor)
                logger.info("removed %s, which a killed process left behind", folder)

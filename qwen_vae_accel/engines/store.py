"""The engine directory: the guide's layout, a manifest, atomic writes, locks that work across processes.

Layout: ``<name>/vae_encoder<suffix>`` and ``<name>/vae_decoder<suffix>`` for static sizes,
``vae_encoder_multi_profile<suffix>`` for multi-profile engines, ``manifest.json``, and two folders of our own, ``.locks``
and ``.tmp``. Loading a file runs code from it: only files whose hash the manifest holds are ever loaded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from qwen_vae_accel import owners
from qwen_vae_accel.backends.base import EngineImage
from qwen_vae_accel.engines import locks, rights
from qwen_vae_accel.engines.manifest import NAME, EngineRecord, Manifest, Verification, adopt_command
from qwen_vae_accel.engines.wanted import Wanted
from qwen_vae_accel.errors import BuildError, EngineError, EngineMissingError, EngineRefusedError, LockedError
from qwen_vae_accel.files import open_regular, remove_below, sync, write_atomically

logger = logging.getLogger(__name__)

_ATTEMPTS = 20
_T = TypeVar("_T")


def hash_file(path: Path) -> str:
    """sha256 of a regular file, hex."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class EngineStore:
    """One engine directory. Making this object touches nothing on disk.

    Args:
        root: the directory; made at the first build.
    """

    def __init__(self, root: str | Path) -> None:
        self._writers_told = False
        try:
            self.root = Path(root).expanduser().absolute()
            is_file = self.root.exists() and not self.root.is_dir()
        except (OSError, RuntimeError, ValueError) as error:  # no rights on a parent, nobody's home, not a path
            raise EngineError(f"engine_dir {str(root)!r} cannot be used: {error}") from error
        if is_file:
            raise EngineError(f"engine_dir {self.root} is a file; name a folder")

    # Reading.

    def manifest(self) -> Manifest:
        """The records, as they are on disk now."""
        return Manifest.read(self.root)

    def known(self) -> Manifest:
        """The records, or none where they cannot be read, which :meth:`find` and :meth:`load` then say."""
        try:
            return self.manifest()
        except EngineError:
            return Manifest()

    def stamp(self) -> tuple[int, int, int] | None:
        """Number, time of writing and size of the manifest's file, which change with every write; None where there is none."""
        return _stamp(self.root / NAME)

    def size(self, name: str) -> int:
        """Bytes of the file ``name`` below the directory; 0 where it cannot be looked at."""
        try:
            return (self.root / name).stat().st_size
        except OSError:
            return 0

    def find(self, wanted: Wanted) -> tuple[Path, EngineRecord]:
        """The file and record of a usable engine. What is to be loaded is read with :meth:`load`.

        Raises:
            EngineMissingError: if there is no such file.
            EngineRefusedError: if there is one that must not be run, with every difference.
            EngineError: if the directory or its manifest cannot be read.
        """
        _, record = self._usable(wanted, lambda path: (hash_file(path), None))
        return self.root / wanted.path, record

    def load(self, wanted: Wanted) -> tuple[EngineImage, EngineRecord]:
        """The bytes and record of a usable engine: the bytes are those that were hashed, whatever becomes of the file.

        Raises:
            EngineMissingError, EngineRefusedError, EngineError: as :meth:`find`.
        """

        def read(path: Path) -> tuple[str, EngineImage]:
            image = EngineImage.read(path)
            return image.sha256, image

        image, record = self._usable(wanted, read)
        if not self._writers_told:
            self._writers_told = True
            for text in rights.writers(self.root, image.path):
                logger.warning("others may change what is run from %s: %s", self.root, text)
        return image, record

    def _usable(self, wanted: Wanted, read: Callable[[Path], tuple[str, _T]]) -> tuple[_T, EngineRecord]:
        """The result of ``read`` for a usable engine, without its hash, and the record."""
        path = self.root / wanted.path
        for _ in range(_ATTEMPTS):
            stamp = self.stamp()
            records = self._records(path, wanted)
            digest, found = _read(path, read)
            record = next((r for r in records if r.sha256 == digest), None)
            if record is not None or self.stamp() == stamp:  # else a build was between the two
                break
        if record is None:
            known = records[-1]
            raise EngineRefusedError(
                str(path),
                [
                    f"damaged: {self.size(wanted.path)} bytes with sha256 {digest[:12]}..., "
                    f"built with {known.size} and {known.sha256[:12]}..."
                ],
            )
        differences = wanted.differences(record)
        if differences:
            raise EngineRefusedError(str(path), differences, f"Rebuild it here: {wanted.build_command(self.root)}")
        return found, record

    def _records(self, path: Path, wanted: Wanted) -> list[EngineRecord]:
        try:
            path.stat()
        except FileNotFoundError:
            raise EngineMissingError(f"there is no engine {path}") from None
        except OSError as error:
            raise EngineError(f"cannot read the engine {path}: {error}") from error
        records = self.manifest().engines.get(wanted.path, [])
        if not records:
            raise EngineRefusedError(
                str(path),
                ["the manifest has no record of it, so it is not known what it was made from, and loading it runs its code"],
                f"If you trust whoever made it: {adopt_command(self.root)}",
            )
        return records

    # Writing.

    def _edit(self, change: Callable[[Manifest], object]) -> None:
        """Have ``change`` edit the manifest; the caller holds its lock."""
        self._remove_abandoned(NAME)
        for _ in range(_ATTEMPTS):
            before = self.stamp()
            manifest = self.manifest()
            change(manifest)
            # Whoever deletes the file of a lock lets a second holder in: then what one of them wrote must not be lost.
            unless = functools.partial(self._has_changed, before)
            if write_atomically(self.root / NAME, manifest.dumps(), unless):
                return sync(self.root)
        raise EngineError(f"other processes keep writing the manifest of {self.root}")

    def _has_changed(self, before: tuple[int, int, int] | None) -> bool:
        return self.stamp() != before

    def build(
        self,
        wanted: Wanted,
        make: Callable[[Path], EngineRecord],
        accept: Callable[[EngineImage, EngineRecord], EngineRecord] | None = None,
        stands: Callable[[EngineRecord], bool] | None = None,
    ) -> tuple[Path, EngineRecord]:
        """Have ``make`` write an engine and publish it; whoever comes second finds the first one's and waits.

        Args:
            wanted: the engine. If a usable one is there by the time the lock is ours, it is returned.
            make: writes the given path and returns its record, with any hash and size.
            accept: looks at what was written before it is published; its record is published, its exception stops it.
            stands: whether an engine that is there already may stay; None: it may.

        Raises:
            BuildError: if making or writing it failed. What was there before is there still.
        """
        with locks.take(self.root, wanted.path, beat=True):
            try:
                path, record = self.find(wanted)
                if stands is None or stands(record):
                    return path, record
            except (EngineMissingError, EngineRefusedError):
                pass
            folder = self.root / ".tmp"
            try:
                folder.mkdir(exist_ok=True)
                self._remove_abandoned(wanted.path)
                temporary = folder / f"{_flat(wanted.path)}.{owners.signature()}{wanted.backend.suffix}"
                try:
                    record = make(temporary)
                    record = self._accept(temporary, record, accept)
                    return self._publish(wanted.path, temporary, record), record
                finally:
                    temporary.unlink(missing_ok=True)
            except OSError as error:
                raise BuildError(f"cannot write the engine {self.root / wanted.path}: {error}") from error

    @staticmethod
    def _accept(
        file: Path, record: EngineRecord, accept: Callable[[EngineImage, EngineRecord], EngineRecord] | None
    ) -> EngineRecord:
        if accept is None:
            return dataclasses.replace(record, sha256=hash_file(file), size=file.stat().st_size)
        image = EngineImage.read(file)
        return accept(image, dataclasses.replace(record, sha256=image.sha256, size=len(image.data)))

    def _publish(self, name: str, temporary: Path, record: EngineRecord) -> Path:
        final = self.root / name
        sync(temporary)
        superseded: set[str] = set()

        def announce(manifest: Manifest) -> None:
            records = manifest.engines.setdefault(name, [])
            records[:] = [*(r for r in records if r.sha256 != record.sha256), record]
            superseded.update(r.sha256 for r in records[:-1])

        def forget(manifest: Manifest) -> None:
            # Where a second holder of the lock has put its own file in place since, it is the one to forget.
            if _stamp(final) == ours:
                records = manifest.engines.get(name, [])
                manifest.engines[name] = [*(r for r in records if r.sha256 not in {*superseded, record.sha256}), record]

        # Announce, replace, forget: whichever file is in place at any moment, a record describes it.
        with locks.take(self.root, NAME):
            self._edit(announce)
            final.parent.mkdir(parents=True, exist_ok=True)
            ours = _stamp(temporary)
            temporary.replace(final)
            sync(final.parent)
            self._edit(forget)
        return final

    def record_verification(
        self, name: str, sha256: str, check: str, result: Verification, scratch: tuple[int, ...] | None = None
    ) -> None:
        """Keep the result of a self-check, and the scratch memory that the loaded engine says it needs.

        In a directory that cannot be written it is logged and lost.
        """

        def change(manifest: Manifest) -> None:
            records = manifest.engines.get(name, [])
            for index, record in enumerate(records):
                if record.sha256 == sha256:
                    record.verification[check] = result
                    records[index] = dataclasses.replace(record, scratch=scratch or record.scratch)

        try:
            with locks.take(self.root, NAME):
                self._edit(change)
        except (EngineError, OSError) as error:
            logger.warning("the self-check of %s is not recorded: %s", name, error)

    def add(self, name: str, record: EngineRecord) -> None:
        """Write the record of a file that is already in place (adoption)."""
        with locks.take(self.root, NAME):
            self._edit(lambda manifest: manifest.engines.update({name: [record]}))

    def remove(self, name: str) -> int:
        """Delete an engine and its records; returns the bytes freed.

        Raises:
            EngineError: as :meth:`delete`, or if somebody builds it and gives no sign of life.
        """
        with locks.take(self.root, name):
            return self.delete(name)

    def delete(self, name: str) -> int:
        """Delete an engine as :meth:`remove` does; the caller holds the engine's lock.

        Raises:
            EngineError: if the file cannot be deleted, or lies outside the directory: then only its records are gone.
        """
        path = self.root / name
        outside = None
        with locks.take(self.root, NAME):
            self.manifest()  # one that cannot be read is an error before anything is lost
            try:
                freed = remove_below(self.root, name)
            except OSError as error:
                if error.errno not in (errno.ENOTDIR, errno.ELOOP):
                    raise EngineError(f"cannot delete {path}: {error}") from error
                outside, freed = error, 0
            self._edit(lambda manifest: manifest.engines.pop(name, None))
            if outside is None and path.parent != self.root:
                with contextlib.suppress(OSError):  # the other network's engine is in there
                    path.parent.rmdir()
        if outside is not None:
            raise EngineError(f"{path} is not deleted, because a link leads out of the engine directory; only its record is")
        return freed

    def remove_leftover(self, path: Path) -> int:
        """Delete what a killed build left behind, unless its builder lives; returns the bytes freed.

        Raises:
            LockedError: if a build may be writing it.
            EngineError: if it cannot be deleted.
        """
        with locks.take(self.root, _guard(path), wait=False):
            if not owners.is_abandoned(path):
                raise LockedError(f"{path} may be in use: the process in its name lives, or it was written within the hour")
            try:
                return remove_below(self.root, path.relative_to(self.root).as_posix())
            except OSError as error:
                raise EngineError(f"cannot delete {path}: {error}") from error

    def _remove_abandoned(self, name: str) -> None:
        """Delete what killed builds left behind of ``name``; the caller holds its lock.

        Not all that is there: whoever deletes the file of a lock lets a second holder in.
        """
        for path in self.leftovers():
            if _guard(path) == _flat(name) and owners.is_abandoned(path):
                with contextlib.suppress(OSError):
                    remove_below(self.root, path.relative_to(self.root).as_posix())

    def unknown_files(self, suffixes: tuple[str, ...]) -> list[str]:
        """Engine files in the guide's layout that have no record, relative to the directory."""
        known = self.manifest().engines
        found = []
        for path in sorted(self.root.glob("**/vae_*coder*")):
            name = path.relative_to(self.root).as_posix()
            if path.suffix in suffixes and name not in known and not name.startswith("."):
                found.append(name)
        return found

    def leftovers(self) -> list[Path]:
        """Files that killed builds left behind, and those that live ones are writing."""
        own = [path for folder in (self.root, self.root / ".timing") for path in folder.glob(".*") if owners.signed(path.name)]
        return sorted([*(self.root / ".tmp").glob("*"), *own])

    def is_being_written(self, leftover: Path) -> bool:
        """Whether a live build may be writing one of :meth:`leftovers` now."""
        return not owners.is_abandoned(leftover) or locks.is_held(self.root, _guard(leftover))


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def _flat(name: str) -> str:
    """What the name of an engine's temporary file and of its lock begin with."""
    return name.replace("/", ".")


def _guard(leftover: Path) -> str:
    """The name of the lock under which a temporary file was written."""
    return (owners.signed(leftover.name) or leftover.name).lstrip(".")


def _read(path: Path, read: Callable[[Path], _T]) -> _T:
    try:
        return read(path)
    except FileNotFoundError:
        raise EngineMissingError(f"there is no engine {path}") from None
    except OSError as error:
        raise EngineError(f"cannot read the engine {path}: {error}") from error

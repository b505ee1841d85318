"""Other processes for the tests of the engine directory: what runs in them, and how they are started.

They are forked from a server that has imported everything and computed nothing, so one starts in milliseconds.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from qwen_vae_accel import accelerate, owners
from qwen_vae_accel.backends import registry
from qwen_vae_accel.backends.base import Environment
from qwen_vae_accel.backends.eager import EagerBackend
from qwen_vae_accel.engines.manifest import EngineRecord
from qwen_vae_accel.engines.store import EngineStore
from qwen_vae_accel.engines.wanted import Wanted
from qwen_vae_accel.plan import EngineKey
from qwen_vae_accel.sizes import Profile, Size
from tests.conftest import random_vae
from tests.helpers import FakeBackend, Reference, decoded, randn

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.processes"])
# How long the attacks of test_attacks.py last; ``make soak`` sets more.
SECONDS = float(os.environ.get("SOAK_SECONDS", "2"))
PATIENCE = 60 + 2 * SECONDS


def start(function: Callable[..., Any], *args: Any) -> Any:
    """A process that runs ``function(*args)``."""
    process = CONTEXT.Process(target=function, args=args, daemon=True)
    process.start()
    return process


def call(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)`` in another process."""
    receiver, sender = CONTEXT.Pipe(duplex=False)
    process = start(_answer, sender, function, *args)
    sender.close()
    try:
        assert receiver.poll(PATIENCE), "the other process does not answer"
        ok, value = receiver.recv()
    except EOFError:
        raise AssertionError("the other process died") from None
    finally:
        process.join(PATIENCE)
    if not ok:
        raise AssertionError(f"in the other process: {value}")
    return value


def _answer(sender: Any, function: Callable[..., Any], *args: Any) -> None:
    try:
        sender.send((True, function(*args)))
    except BaseException as error:
        sender.send((False, repr(error)))
        raise


def dead_signature() -> str:
    """What a process that is no more has put into the names of its files."""
    return str(call(owners.signature))


# Store level: an "engine" is a few bytes.


IDENTITY = {"device_name": "GPU A", "package:torch": "2.13.0"}


class OtherBackend(FakeBackend):
    """The fake backend by another name."""

    name = "inductor"


def expected(
    weights: str = "new", identity: Mapping[str, str] = IDENTITY, kind: type[FakeBackend] = FakeBackend, **changes: Any
) -> Wanted:
    """An engine that is wanted of a backend whose files are tied to ``identity``."""
    backend = kind()
    backend.facts = dict(identity)
    profile = Profile.static("512x512", Size(512, 512))
    values: dict[str, Any] = {
        "key": EngineKey("decode", "512x512", (profile,)),
        "backend": backend,
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "weights": weights,
        "environment": Environment("cpu", "a CPU"),
    }
    return Wanted(**{**values, **changes})


def content(weights: str) -> bytes:
    """The bytes of a store-level engine."""
    return f"engine of {weights} ".encode() * 100


def record(wanted: Wanted) -> EngineRecord:
    """What a backend would write of a file it made for ``wanted``."""
    return wanted.record(sha256="", size=0, build_seconds=1.0)


def maker(wanted: Wanted) -> Callable[[Path], EngineRecord]:
    """The ``make`` of :meth:`EngineStore.build`."""

    def make(path: Path) -> EngineRecord:
        path.write_bytes(content(wanted.weights))
        return record(wanted)

    return make


def build(root: Path, weights: str = "new") -> str:
    """Build a store-level engine; returns its hash."""
    wanted = expected(weights)
    return EngineStore(root).build(wanted, maker(wanted))[1].sha256


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def build_and_die(root: Path, stage: str) -> None:
    """Be killed at ``stage``: while making or accepting, or before or after the n-th rename (``"before 2"``)."""
    wanted = expected("new")

    def make(path: Path) -> EngineRecord:
        if stage == "making":
            path.write_bytes(content("new")[:100])
            _die()
        return maker(wanted)(path)

    def accept(path: Path, made: EngineRecord) -> EngineRecord:
        if stage == "accepting":
            _die()
        return made

    when, _, number = stage.partition(" ")
    renames = 0
    replace = Path.replace

    def counted(self: Path, target: Path) -> Path:
        nonlocal renames
        renames += 1
        if when == "before" and renames == int(number):
            _die()
        result = replace(self, target)
        if when == "after" and renames == int(number):
            _die()
        return result

    Path.replace = counted  # type: ignore[method-assign]
    EngineStore(root).build(wanted, make, accept)


def build_slowly(root: Path, inside: Any, go: Any, done: Any) -> None:
    """Build; say when inside, and wait there for ``go``."""
    wanted = expected("new")

    def make(path: Path) -> EngineRecord:
        inside.set()
        assert go.wait(PATIENCE)
        return maker(wanted)(path)

    EngineStore(root).build(wanted, make)
    done.set()


def build_second(root: Path, calling: Any, builds: Any) -> None:
    """Build the same; count what is made here."""
    wanted = expected("new")

    def make(path: Path) -> EngineRecord:
        builds.value += 1
        return maker(wanted)(path)

    calling.set()
    EngineStore(root).build(wanted, make)


def build_many(root: Path, names: list[str]) -> None:
    """Build engines of several sizes, each with a manifest entry."""
    for name in names:
        key = EngineKey("decode", name, expected().key.profiles)
        wanted = expected("new", key=key)
        EngineStore(root).build(wanted, maker(wanted))


def build_on_a_full_disk(root: Path, limit: int) -> str:
    """Build where no file may grow beyond ``limit`` bytes; returns the error."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        build(root)
    except Exception as error:
        assert isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EFBIG
        return f"{type(error).__name__}: {error}"
    return "built"


def drop_privileges() -> None:
    """Be a user whom permissions bind."""
    if os.geteuid() == 0:
        os.setgid(65534)
        os.setuid(65534)


def build_unprivileged(root: Path, weights: str) -> str:
    """Build as somebody who may not write; returns the error."""
    drop_privileges()
    try:
        return build(root, weights)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def find_unprivileged(root: Path, weights: str) -> str:
    """Look for an engine as somebody who may not write; returns its hash or the error."""
    drop_privileges()
    try:
        return EngineStore(root).find(expected(weights))[1].sha256
    except Exception as error:
        return f"{type(error).__name__}: {error}"


# Whole: an accelerated VAE and the fake backend.


def decode_once(root: Path, options: dict[str, Any], ready: Any = None, go: Any = None) -> dict[str, Any]:
    """Accelerate, decode one image; returns the report, the fake's events and whether the image is right."""
    fake = FakeBackend()
    registry._BACKENDS = (fake, EagerBackend())
    torch.set_num_threads(1)
    vae = random_vae()
    z = randn(1, 4, 1, 4, 4)
    if ready is not None:
        fake.on_build = lambda: (ready.set(), go.wait(PATIENCE))
    with torch.no_grad():
        exact = Reference(vae, "decode", z)
        handle = accelerate(vae, backend="tensorrt", engine_dir=root, **options)
        image = decoded(vae, z)
    return {
        "report": handle.report().as_dict(),
        "events": [kind for kind, _ in fake.events if kind != "free"],
        "right": exact.holds(image),
    }


def decode_once_unprivileged(root: Path, options: dict[str, Any]) -> dict[str, Any]:
    """The same as somebody whom permissions bind."""
    drop_privileges()
    return decode_once(root, options)

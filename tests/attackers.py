"""Processes that attack an engine directory or are attacked in it; they count what happened. See test_attacks.py."""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from qwen_vae_accel import accelerate
from qwen_vae_accel.backends import registry
from qwen_vae_accel.backends.eager import EagerBackend
from qwen_vae_accel.engines.inspect import Inspector
from qwen_vae_accel.engines.store import EngineStore, hash_file
from qwen_vae_accel.engines.wanted import Wanted
from qwen_vae_accel.errors import AccelError, EngineMissingError, EngineRefusedError
from qwen_vae_accel.plan import EngineKey
from qwen_vae_accel.sizes import Profile, Size
from tests.conftest import random_vae
from tests.helpers import FakeBackend, decoded, latents
from tests.processes import IDENTITY, drop_privileges, expected, maker

SIZES = ("32x32", "48x32")


def _fake() -> FakeBackend:
    fake = FakeBackend()
    fake.facts = dict(IDENTITY)
    registry._BACKENDS = (fake, EagerBackend())
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    return fake


def wanted(name: str, weights: str) -> Wanted:
    """A store-level engine in the folder ``name``."""
    return expected(weights, key=EngineKey("decode", name, (Profile.static(name, Size(512, 512)),)))


# Interrupts.


def interrupted_calls(root: Path, seed: int, seconds: float) -> dict[str, int]:
    """KeyboardInterrupt at random microseconds of calls; counts calls, interrupts, and what they left behind."""
    fake = _fake()
    load = fake.load

    def instant(*args: Any) -> Any:
        program = load(*args)
        program._network = lambda x: x.new_zeros(1, 3, x.shape[2] * 8, x.shape[3] * 8)
        return program

    fake.load = instant  # type: ignore[method-assign]
    options = {"backend": "tensorrt", "engine_dir": root, "sizes": SIZES, "max_resident": 1, "verify": False}
    vae, z = random_vae(), latents("32x32")
    handle = accelerate(vae, **options)
    decoded(vae, z)
    begin = time.perf_counter()
    for _ in range(100):
        decoded(vae, z)
    usual = (time.perf_counter() - begin) / 100
    armed = False

    def interrupt(*_: object) -> None:
        if armed:
            raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, interrupt)
    chance, counts, end = random.Random(seed), Counter[str](), time.monotonic() + seconds
    while time.monotonic() < end:
        counts["calls"] += 1
        try:
            armed = True
            signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-6, 1.3 * usual))
            decoded(vae, z)
            armed = False
        except KeyboardInterrupt as error:
            armed = False
            counts["interrupts"] += 1
            kept = error  # as an interactive session keeps it: the frames of the call stay alive
        signal.setitimer(signal.ITIMER_REAL, 0)
        for text in _left(handle):
            counts[f"left: {text}"] += 1
    del kept
    handle.restore()
    return dict(counts)


def _left(handle: Any) -> list[str]:
    runtime = handle._dispatcher.runtime
    found = ["a caller"] if handle._callers else []
    residency = runtime._residency
    found += ["a user" for resident in residency._residents.values() if resident.users]
    found += ["a waiting thread"] if residency._waiting else []
    locks = {
        "residency": residency._lock,
        "checking": runtime._checking,
        "dispatcher": handle._dispatcher._lock,
        "source": handle._source._lock,
        "journal": handle._journal._lock,
        "original": handle._one_original,
    }

    def look() -> None:  # a lock that this thread holds it could take again
        for name, lock in locks.items():
            if lock.acquire(blocking=False):
                lock.release()
            else:
                found.append(f"the lock of {name}")

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    return found


def interrupted_builds(root: Path, seed: int, seconds: float) -> dict[str, int]:
    """KeyboardInterrupt at random microseconds of builds; afterwards each lock must be free and one build must do."""
    armed = False

    def interrupt(*_: object) -> None:
        if armed:
            raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, interrupt)
    store = EngineStore(root)
    begin = time.perf_counter()
    store.build(wanted("a", "first"), maker(wanted("a", "first")))
    usual = time.perf_counter() - begin
    chance, counts, end = random.Random(seed), Counter[str](), time.monotonic() + seconds
    while time.monotonic() < end:
        counts["builds"] += 1
        engine = wanted("a", f"w{counts['builds']}")
        kept: BaseException | None = None
        try:
            armed = True
            signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-6, 1.2 * usual))
            store.build(engine, maker(engine))
            armed = False
        except KeyboardInterrupt as error:
            armed = False
            counts["interrupts"] += 1
            kept = error
        signal.setitimer(signal.ITIMER_REAL, 0)
        for path in (root / ".locks").glob("*.lock"):
            descriptor = os.open(path, os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                counts["left: a lock"] += 1
            os.close(descriptor)
        del kept
    last = wanted("a", "last")
    store.build(last, maker(last))
    store.find(last)
    return dict(counts)


# Races.


def serve(root: Path, factor: float, seconds: float) -> dict[str, Any]:
    """A service with weights of its own in a directory that it shares: every call loads, as one size may stay."""
    _fake()
    vae = random_vae()
    for name, parameter in vae.named_parameters():
        if "decoder" in name:
            parameter.mul_(factor)
    exact = {size: decoded(vae, latents(size)) for size in SIZES}
    handle = accelerate(vae, backend="tensorrt", engine_dir=root, sizes=SIZES, max_resident=1)
    counts, end = Counter[str](), time.monotonic() + seconds
    while time.monotonic() < end:
        for size in SIZES:
            image = decoded(vae, latents(size))
            counts["calls"] += 1
            counts["wrong"] += bool((image - exact[size]).abs().max() > 1e-3)
    return {**counts, "loads": handle.report().as_dict()["loads"]}


def build_and_look(root: Path, who: str, seconds: float) -> dict[str, int]:
    """Build engines that others replace and prune; the only errors may be typed ones."""
    counts, end = Counter[str](), time.monotonic() + seconds
    while time.monotonic() < end:
        engine = wanted("abc"[counts["built"] % 3], f"{who}{counts['built']}")
        EngineStore(root).build(engine, maker(engine))
        counts["built"] += 1
        try:
            EngineStore(root).find(engine)
            counts["found"] += 1
        except EngineMissingError:
            counts["missing"] += 1
        except EngineRefusedError as error:
            counts["refused: " + error.differences[0].partition(":")[0]] += 1
    return dict(counts)


def prune_again_and_again(root: Path, seconds: float) -> dict[str, int]:
    """What ``prune --yes`` does; the only errors may be typed ones."""
    _fake()
    counts, end = Counter[str](), time.monotonic() + seconds
    inspector = Inspector(root, torch.device("cpu"))
    while time.monotonic() < end:
        for removal in inspector.prunable():
            counts["kept" if inspector.remove(removal) else "removed"] += 1
        counts["rounds"] += 1
    return dict(counts)


def build_own(root: Path, name: str, seconds: float) -> dict[str, int]:
    """Build an engine that nobody else builds; each must be there afterwards."""
    counts, end = Counter[str](), time.monotonic() + seconds
    while time.monotonic() < end:
        engine = wanted(name, f"w{counts['built']}")
        EngineStore(root).build(engine, maker(engine))
        counts["built"] += 1
        try:
            EngineStore(root).find(engine)
        except AccelError:
            counts["lost"] += 1
    return dict(counts)


def kill_builders(root: Path, seed: int, seconds: float) -> dict[str, int]:
    """Kill processes that build at random moments; whatever they did, one engine is whole and the next build works."""
    chance, counts, end = random.Random(seed), Counter[str](), time.monotonic() + seconds
    store = EngineStore(root)
    start = wanted("a", "start")
    store.build(start, maker(start))
    while time.monotonic() < end:
        child = os.fork()
        if child == 0:
            try:
                build_own(root, "a", 60)
            finally:
                os._exit(1)
        time.sleep(chance.uniform(0.001, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        counts["kills"] += 1
        records = store.manifest().engines["a/vae_decoder.fake"]
        whole = [record for record in records if record.sha256 == hash_file(root / "a" / "vae_decoder.fake")]
        counts["lost"] += len(whole) != 1
        if counts["kills"] % 10 == 0:
            again = wanted("a", f"again {counts['kills']}")
            store.build(again, maker(again))
            store.find(again)
            counts["left behind"] += len(store.leftovers())
    return dict(counts)


def delete_locks(root: Path, seconds: float) -> int:
    """Delete the folder of the locks, over and over."""
    count, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        shutil.rmtree(root / ".locks", ignore_errors=True)
        count += 1
        time.sleep(0.003)
    return count


# Locks.


def hold_as_a_reader(root: Path, trying: Any) -> str:
    """Try to lock what the owner locks, as somebody who may only read; returns the error."""
    drop_privileges()
    descriptors = []
    try:
        for path in (root / ".locks" / "manifest.json.lock", root / ".locks"):
            descriptors.append(os.open(path, os.O_RDONLY))
            fcntl.flock(descriptors[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return type(error).__name__
    finally:
        trying.set()
    time.sleep(60)
    return "held"


def build_and_stop(root: Path, inside: Any) -> None:
    """Be stopped (SIGSTOP) in the middle of a build."""
    engine = wanted("a", "w")

    def make(path: Path) -> Any:
        inside.set()
        os.kill(os.getpid(), signal.SIGSTOP)
        return maker(engine)(path)

    EngineStore(root).build(engine, make)

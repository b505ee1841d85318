"""The engine directory and the runtime under attack: natural races, signals and stopped processes, seconds of each.

``make soak`` runs the same for longer (``SOAK_SECONDS``); docs/reliability.md has what was counted.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qwen_vae_accel.engines import locks
from qwen_vae_accel.engines.store import EngineStore
from qwen_vae_accel.errors import LockedError
from tests import attackers, processes
from tests.processes import SECONDS, build, maker

unix = pytest.mark.skipif(sys.platform == "win32", reason="signals and rights of Unix")
pytestmark = [unix, pytest.mark.timeout(300 + 4 * SECONDS)]


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter and read."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def together(*work: tuple[Any, ...]) -> list[Any]:
    """Run functions in a process each, at the same time; their results in order."""
    results: dict[int, Any] = {}
    errors: list[BaseException] = []

    def run(index: int, function: Any, *args: Any) -> None:
        try:
            results[index] = processes.call(function, *args)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index, *each)) for index, each in enumerate(work)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    print("\n", *results.values(), sep="\n")
    return [results[index] for index in range(len(work))]


def test_interrupts_leave_no_lock_caller_or_user_behind(tmp_path):
    (counts,) = together((attackers.interrupted_calls, tmp_path, 7, SECONDS))
    assert counts["interrupts"] > 20 * SECONDS
    assert not [name for name in counts if name.startswith("left")], counts


def test_interrupts_of_builds_leave_no_lock_behind(tmp_path):
    (counts,) = together((attackers.interrupted_builds, tmp_path, 7, SECONDS))
    assert counts["interrupts"] > 5 * SECONDS
    assert not [name for name in counts if name.startswith("left")], counts


def test_builders_killed_at_random_moments_lose_and_leave_nothing(tmp_path):
    (counts,) = together((attackers.kill_builders, tmp_path, 7, SECONDS))
    assert counts["kills"] > 5 * SECONDS and not counts["lost"] and not counts.get("left behind")


def test_two_services_of_different_weights_in_one_directory_give_no_wrong_image(tmp_path):
    for counts in together(*((attackers.serve, tmp_path, factor, SECONDS) for factor in (1.0, 1.3))):
        assert counts["wrong"] == 0 and counts["loads"] > 1


def test_prune_beside_builds_deletes_nothing_live_and_raises_nothing_raw(tmp_path):
    tmp_path.mkdir(exist_ok=True)
    first, second, pruned = together(
        (attackers.build_and_look, tmp_path, "x", SECONDS),
        (attackers.build_and_look, tmp_path, "y", SECONDS),
        (attackers.prune_again_and_again, tmp_path, SECONDS),
    )
    for counts in (first, second):
        assert counts["found"] and "missing" not in counts and not [name for name in counts if "damaged" in name]
    assert pruned["rounds"]
    store = EngineStore(tmp_path)
    assert not store.leftovers() and not store.unknown_files((".fake",))


def test_deleted_lock_files_lose_no_engine(tmp_path):
    *builders, deleted = together(
        (attackers.build_own, tmp_path, "a", SECONDS),
        (attackers.build_own, tmp_path, "b", SECONDS),
        (attackers.delete_locks, tmp_path, SECONDS),
    )
    assert deleted and all(counts["built"] and "lost" not in counts for counts in builders)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can be somebody else")
def test_who_may_only_read_cannot_hold_a_lock(open_folder):
    build(open_folder, "old")
    trying = processes.CONTEXT.Event()
    other = threading.Thread(target=lambda: errors.append(processes.call(attackers.hold_as_a_reader, open_folder, trying)))
    errors: list[str] = []
    other.start()
    assert trying.wait(processes.PATIENCE)
    build(open_folder, "new")
    other.join(processes.PATIENCE)
    assert errors == ["PermissionError"]


def test_a_stopped_builder_is_named_and_not_waited_for_without_end(tmp_path, monkeypatch, caplog):
    inside = processes.CONTEXT.Event()
    builder = processes.start(attackers.build_and_stop, tmp_path, inside)
    assert inside.wait(processes.PATIENCE)
    monkeypatch.setattr(locks, "SAY_AFTER", 0.2)
    monkeypatch.setattr(locks, "LIMIT", 1.0)
    engine = attackers.wanted("a", "w")
    try:
        with pytest.raises(LockedError, match=f"locked by process {builder.pid} on .*no sign of life"):
            EngineStore(tmp_path).build(engine, maker(engine))
        assert f"process {builder.pid}" in caplog.text and "waiting" in caplog.text
    finally:
        os.kill(builder.pid, signal.SIGCONT)
        builder.join(processes.PATIENCE)
    assert EngineStore(tmp_path).find(engine)


def test_a_builder_that_lives_is_waited_for(tmp_path, monkeypatch):
    """Longer than the limit, as it gives signs of life."""
    monkeypatch.setattr(locks, "BEAT", 0.05)
    monkeypatch.setattr(locks, "LIMIT", 0.5)
    inside, go = threading.Event(), threading.Event()
    engine = attackers.wanted("a", "w")
    made = []

    def make(path: Path) -> Any:
        made.append(path)
        inside.set()
        assert go.wait(processes.PATIENCE)
        return maker(engine)(path)

    first = threading.Thread(target=lambda: EngineStore(tmp_path).build(engine, make))
    first.start()
    assert inside.wait(processes.PATIENCE)
    threading.Timer(1.5, go.set).start()
    EngineStore(tmp_path).build(engine, make)
    first.join(processes.PATIENCE)
    assert len(made) == 1

"""Many threads: each engine is loaded once, every image is right, and nobody waits forever."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time

import pytest
import torch

from qwen_vae_accel import accelerate
from qwen_vae_accel.backends import registry
from qwen_vae_accel.backends.eager import EagerBackend
from tests import processes
from tests.conftest import random_vae
from tests.helpers import SIZES, FakeBackend, Reference, decoded, image, latents, moments, open_engines, randn

pytestmark = pytest.mark.usefixtures("no_grad")


def run_threads(*functions) -> None:
    errors: list[BaseException] = []

    def guarded(function) -> None:
        try:
            with torch.no_grad():
                function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(function,), daemon=True) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "deadlock"
    if errors:
        raise errors[0]


def repeat(function, times: int):
    def run() -> None:
        for _ in range(times):
            function()

    return run


@pytest.mark.parametrize("max_resident", [None, 1, 2])
def test_threads_on_same_and_different_sizes(micro, fake, engines, max_resident):
    inputs = {size: latents(size) for size in SIZES[:3]}
    exact = {size: Reference(micro, "decode", z) for size, z in inputs.items()}
    x = image("32x32")
    exact_moments = Reference(micro, "encode", x)
    handle = open_engines(micro, engines, max_resident=max_resident)

    def decode(size: str):
        def run() -> None:
            exact[size].check(decoded(micro, inputs[size]))

        return repeat(run, 12)

    def encode() -> None:
        exact_moments.check(moments(micro, x))

    run_threads(*(decode(size) for size in inputs for _ in range(2)), repeat(encode, 12))
    report = handle.report().as_dict()
    assert report["calls"] == {"encode": {"tensorrt": 12}, "decode": {"tensorrt": 72}}
    assert report["loads"] == fake.count("load")
    if max_resident is None:
        assert sorted(fake.engines("load")) == sorted({*(f"{s}/vae_decoder" for s in inputs), "32x32/vae_encoder"})
    else:
        # Never two at once beyond the limit, never one that is loaded already.
        resident: list[str] = []
        for kind, name in fake.events:
            if kind == "load":
                assert name not in resident
                resident.append(name)
                assert len({name.split("/")[0] for name in resident}) <= max_resident
            elif kind == "free":
                resident.remove(name)


def test_threads_that_come_while_an_engine_is_loading_wait_for_it(micro, fake, engines):
    open_engines(micro, engines)
    z = latents("32x32")
    exact = Reference(micro, "decode", z)
    loading, go = threading.Event(), threading.Event()
    fake.on_load = lambda: (loading.set(), go.wait(30))
    results = []
    arrived = threading.Barrier(5)

    def late() -> None:
        assert loading.wait(30)
        arrived.wait(30)
        results.append(decoded(micro, z))

    def release() -> None:
        arrived.wait(30)
        go.set()

    run_threads(lambda: results.append(decoded(micro, z)), late, late, late, late, release)
    assert fake.count("load") == 1 and len(results) == 5
    assert all(map(exact.holds, results))


def test_a_load_does_not_hold_up_other_engines(micro, fake, engines):
    handle = open_engines(micro, engines)
    decoded(micro, latents("32x32"))
    loading, go = threading.Event(), threading.Event()
    fake.on_load = lambda: (loading.set(), go.wait(30))

    def other() -> None:
        assert loading.wait(30)
        decoded(micro, latents("32x32"))
        go.set()

    run_threads(lambda: decoded(micro, latents("48x32")), other)
    assert handle.report().as_dict()["calls"]["decode"] == {"tensorrt": 3}


def test_an_engine_in_use_is_never_released(micro, fake, engines):
    """One size may stay; a thread on another size waits until the first is done with its engine."""
    open_engines(micro, engines, max_resident=1)
    decoded(micro, latents("32x32"))
    running, go, second = threading.Event(), threading.Event(), threading.Event()
    fake.on_run = lambda: (running.set(), go.wait(30))

    def other() -> None:
        assert running.wait(30)
        second.set()
        decoded(micro, latents("48x32"))

    def release() -> None:
        assert second.wait(30)
        assert fake.engines("free") == [] and fake.engines("load") == ["32x32/vae_decoder"]
        fake.on_run = None
        go.set()

    run_threads(lambda: decoded(micro, latents("32x32")), other, release)
    assert [kind for kind, _ in fake.events] == ["load", "free", "load"]


def test_first_requests_of_many_threads_build_once(micro, fake, tmp_path):
    exact = Reference(micro, "decode", latents("32x32"))
    handle = accelerate(micro, backend="tensorrt", engine_dir=tmp_path, sizes=["32x32"])
    barrier = threading.Barrier(6)

    def first() -> None:
        barrier.wait(30)
        exact.check(decoded(micro, latents("32x32")))

    run_threads(*[first] * 6)
    report = handle.report().as_dict()
    assert fake.count("build") == 1 and len(report["builds"]) == 1
    assert report["loads"] == 1
    assert report["calls"]["decode"] == {"tensorrt": 6}


def test_a_self_check_runs_once_for_many_threads(micro, fake, engines, monkeypatch):
    monkeypatch.setattr("platform.node", lambda: "another-host")
    handle = open_engines(micro, engines)
    barrier = threading.Barrier(6)

    def first() -> None:
        barrier.wait(30)
        decoded(micro, latents("32x32"))

    run_threads(*[first] * 6)
    assert len(handle.report().as_dict()["self_checks"]) == 1


@pytest.mark.parametrize("where", ["before its engine", "in its engine"])
def test_restore_while_another_thread_decodes(micro, fake, engines, monkeypatch, where):
    """The call under way finishes with its engine; then every engine goes, and none comes back."""
    z = latents("32x32")
    exact = Reference(micro, "decode", z)
    handle = open_engines(micro, engines)
    decoded(micro, z)
    running, go = threading.Event(), threading.Event()
    restored = threading.Event()
    if where == "in its engine":
        fake.on_run = lambda: (running.set(), go.wait(30))
    else:
        run = handle._dispatcher.run
        monkeypatch.setattr(handle._dispatcher, "run", lambda *args: (running.set(), go.wait(30), run(*args))[-1])

    def decode() -> None:
        exact.check(decoded(micro, z))

    def restore() -> None:
        assert running.wait(30)
        handle.restore()
        restored.set()

    def release() -> None:
        assert running.wait(30)
        while "decode" in vars(micro):  # until restore() has begun
            pass
        assert not restored.wait(0.1)
        assert not fake.engines("free")
        go.set()

    run_threads(decode, restore, release)
    gc.collect()
    assert handle.report().as_dict()["engines"] == []
    assert fake.count("load") == fake.count("free") == 1


def test_a_method_looked_up_before_restore(micro, fake, engines):
    z = latents("32x32")
    exact = decoded(micro, z)
    handle = open_engines(micro, engines)
    decode = micro.decode
    handle.restore()
    assert torch.equal(decode(z).sample, exact)
    assert torch.equal(handle._call("decode", z, False)[0], exact), "a thread between the look-up and the call"
    assert not fake.events


def test_threads_on_the_original_path(micro):
    """diffusers keeps the state of a call in the VAE: only one call at a time goes its way."""
    inputs = [randn(1, 4, 2, 4, 4 + i, seed=i) for i in range(3)]
    exact = [decoded(micro, z) for z in inputs]
    accelerate(micro)

    def decode(index: int):
        def run() -> None:
            assert torch.equal(decoded(micro, inputs[index]), exact[index])

        return repeat(run, 4)

    run_threads(*(decode(i) for i in range(3)))


# First come, first served.


def test_a_size_that_waits_for_room_is_served_beside_seven_busy_threads(micro, fake, engines):
    open_engines(micro, engines, max_resident=1)
    served, stop = threading.Event(), threading.Event()
    calls_after: list[int] = []
    busy_calls = [0]
    came = [0]
    fake.on_run = lambda: time.sleep(0.002)

    def busy() -> None:
        while not stop.is_set():
            decoded(micro, latents("32x32"))
            busy_calls[0] += 1

    def other() -> None:
        while busy_calls[0] < 20:
            time.sleep(0.001)
        for _ in range(3):
            came[0] = busy_calls[0]
            decoded(micro, latents("48x32"))
            calls_after.append(busy_calls[0] - came[0])
        served.set()
        stop.set()

    run_threads(*[busy] * 7, other)
    assert served.is_set()
    # Those that were inside finish, and each may have been on its way in; nobody passes twice.
    assert max(calls_after) <= 2 * 7, calls_after


def test_who_waits_for_the_same_engine_is_served_by_one_load(micro, fake, engines):
    """Two sizes, one place: the four threads of each share its load, though they came in turns."""
    open_engines(micro, engines, max_resident=1)
    running, go = threading.Event(), threading.Event()
    fake.on_run = lambda: (running.set(), go.wait(30))
    sizes = ["48x32", "64x32"] * 4
    arrived = threading.Semaphore(0)

    def first() -> None:
        decoded(micro, latents("32x32"))

    def later(size: str):
        def run() -> None:
            assert running.wait(30)
            arrived.release()
            decoded(micro, latents(size))

        return run

    def release() -> None:
        for _ in sizes:
            assert arrived.acquire(timeout=30)
        time.sleep(0.2)  # until all of them wait
        go.set()

    run_threads(first, *map(later, sizes), release)
    assert fake.count("load") == 3


def test_an_engine_inside_a_call_of_another_size_waits_for_nobody(micro, fake, engines):
    """With one place there is no room for it: the call inside is served another way."""
    handle = open_engines(micro, engines, max_resident=1, on_miss="fallback")
    nested = []

    def inside() -> None:
        fake.on_run = None
        nested.append(decoded(micro, latents("48x32")))

    fake.on_run = inside
    run_threads(lambda: decoded(micro, latents("32x32")))
    report = handle.report().as_dict()
    assert len(nested) == 1 and report["calls"]["decode"] == {"tensorrt": 1, "eager": 1}
    assert "inside a call" in report["fallbacks"][0]["reason"]


# Interrupts and forks.


@pytest.mark.skipif(sys.platform == "win32", reason="signals of Unix")
def test_an_interrupted_restore_can_be_repeated(tmp_path):
    assert processes.call(restore_and_interrupt, tmp_path) == ("interrupted", "restored", [], "plain")


def restore_and_interrupt(root):
    fake = FakeBackend()
    registry._BACKENDS = (fake, EagerBackend())
    vae = random_vae()
    handle = accelerate(vae, backend="tensorrt", engine_dir=root, sizes=["32x32"], verify=False)
    inside, go = threading.Event(), threading.Event()

    def call() -> None:
        with torch.no_grad():
            decoded(vae, latents("32x32"))

    call()
    fake.on_run = lambda: (inside.set(), go.wait(30))
    thread = threading.Thread(target=call)
    thread.start()
    inside.wait(30)
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        handle.restore()
        first = "restored"
    except KeyboardInterrupt:
        first = "interrupted"
    go.set()
    handle.restore()
    thread.join()
    plain = "decode" not in vars(vae) and accelerate(vae, backend="eager") is not handle
    return first, "restored", handle.report().as_dict()["engines"], "plain" if plain else "patched"


def test_accelerate_after_an_interrupted_restore_begins_anew(micro, fake, engines, monkeypatch):
    handle = open_engines(micro, engines)
    decoded(micro, latents("32x32"))
    with monkeypatch.context() as patch:
        patch.setattr(type(handle._callers), "wait", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            handle.restore()
    again = open_engines(micro, engines)
    assert again is not handle
    decoded(micro, latents("32x32"))
    handle.restore()
    assert fake.count("free") == 1 and again.report().as_dict()["calls"]["decode"] == {"tensorrt": 1}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks of Unix")
def test_a_child_forked_during_a_call_can_decode_and_restore(tmp_path):
    assert processes.call(fork_during_a_call, tmp_path) == 0


def fork_during_a_call(root):
    """The exit status of the child, which an alarm ends if it hangs."""
    fake = FakeBackend()
    registry._BACKENDS = (fake, EagerBackend())
    vae = random_vae()
    handle = accelerate(vae, backend="tensorrt", engine_dir=root, sizes=["32x32", "48x32"], max_resident=1, verify=False)
    inside, go = threading.Event(), threading.Event()
    torch.set_grad_enabled(False)
    decoded(vae, latents("48x32"))

    def call() -> None:
        with torch.no_grad():
            decoded(vae, latents("32x32"))

    fake.on_run = lambda: (inside.set(), go.wait(30))
    thread = threading.Thread(target=call)
    thread.start()
    inside.wait(30)
    with handle._journal._lock:  # and some other thread holds a lock
        blocked = threading.Thread(target=lambda: handle._dispatcher.runtime._residency._lock.acquire())
        blocked.start()
        blocked.join()
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        fake.on_run = None
        decoded(vae, latents("48x32"))
        handle.restore()
        os._exit(len(handle.report().as_dict()["engines"]))
    status = os.waitpid(child, 0)[1]
    fake.on_run = None
    go.set()
    return status

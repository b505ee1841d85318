"""The engine lifecycle with real files: AOTInductor packages, static and for a range of sizes."""

from __future__ import annotations

import gc
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from qwen_vae_accel import accelerate
from qwen_vae_accel.backends import inductor, unpacked
from qwen_vae_accel.backends.base import EngineImage
from qwen_vae_accel.engines.manifest import NAME
from qwen_vae_accel.errors import EngineMissingError
from tests.helpers import CPU, TINY_VAE, Reference, decoded, moments, picture, randn
from tests.processes import SECONDS

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.mark.slow
def test_real_engines_static(tiny, inductor_dir):
    z = randn(1, 16, 1, 8, 8)
    exact = Reference(tiny, "decode", z)
    config = {"backend": "inductor", "engine_dir": inductor_dir / "static", "sizes": ["64x64"], "on_miss": "error"}
    with accelerate(tiny, **config) as handle:
        image = decoded(tiny, z)
        report = handle.report().as_dict()
        batch = decoded(tiny, torch.cat([z, z.flip(4)]))
        # Its code reads memory: views are materialised, and what has no memory never gets there.
        assert torch.equal(decoded(tiny, torch._neg_view(-z)), image)
        assert torch.equal(decoded(tiny, z.transpose(3, 4).contiguous().transpose(3, 4)), image)
        assert torch.equal(decoded(tiny, TwoTensor(z, z)).a[:, :, 0], exact.theirs)
        compiled = torch.compile(lambda z: decoded(tiny, z * 2) / 2, backend="eager", fullgraph=True)
        assert torch.equal(compiled(z / 2) * 2, image)
        later = handle.report().as_dict()["calls"]["decode"]
    exact.check(image)
    assert torch.equal(batch[:1], image) and not torch.equal(batch[1:], image)
    assert later == {"inductor": 5, "diffusers": 1}
    assert report["calls"]["decode"] == {"inductor": 1} and report["loads"] == 1 and report["builds"] == []
    assert report["self_checks"] == [], "it was checked when it was built"
    assert (inductor_dir / "static" / "64x64" / "vae_decoder.pt2").is_file()
    document = json.loads((inductor_dir / "static" / NAME).read_text())
    (record,) = document["engines"]["64x64/vae_decoder.pt2"]
    assert record["identity"]["package:torch"] == torch.__version__
    (check,) = record["verification"].values()
    assert check["passed"] and check["relative_error"] <= check["relative_limit"] < 1e-4


@pytest.mark.slow
def test_real_engines_dynamic(tiny, inductor_dir):
    config = {"backend": "inductor", "engine_dir": inductor_dir / "dynamic", "on_miss": "error", "multi_profile": True}
    handle = accelerate(tiny, sizes=["48x48:64x64:96x128"], task="i2i", **config)
    for height, width in ((64, 64), (49, 77)):
        x = picture(1, 3, 1, height, width)
        Reference(tiny, "encode", x).check(moments(tiny, x))
    for height, width in ((8, 8), (6, 6), (16, 12), (7, 11)):
        z = randn(1, 16, 1, height, width)
        Reference(tiny, "decode", z).check(decoded(tiny, z))
    with pytest.raises(EngineMissingError, match="lies in no optimization profile"):
        decoded(tiny, randn(1, 16, 1, 17, 8))
    report = handle.report().as_dict()
    assert report["calls"] == {"encode": {"inductor": 2}, "decode": {"inductor": 4}} and report["loads"] == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "shapes"),
    [("64x64:64x128:64x256", ((64, 64), (256, 64))), ("16x16", ((16, 16), (23, 24)))],
    ids=["a fixed side", "the least size"],
)
def test_real_engines_of_special_ranges(micro, tmp_path, sizes, shapes):
    config = {"backend": "inductor", "on_miss": "build", "task": "i2i", "multi_profile": True}
    with accelerate(micro, sizes=[sizes], engine_dir=tmp_path, **config) as handle:
        for height, width in shapes:
            x, z = picture(1, 3, 1, height, width), randn(1, 4, 1, height // 8, width // 8)
            Reference(micro, "encode", x).check(moments(micro, x))
            Reference(micro, "decode", z).check(decoded(micro, z))
        report = handle.report().as_dict()
    assert report["calls"] == {"encode": {"inductor": 2}, "decode": {"inductor": 2}}


@pytest.mark.slow
def test_real_engines_are_refused_when_damaged(tiny, inductor_dir, tmp_path):
    folder = tmp_path / "engines"
    shutil.copytree(inductor_dir / "static", folder)
    path = folder / "64x64" / "vae_decoder.pt2"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    accelerate(tiny, backend="inductor", engine_dir=folder, sizes=["64x64"], on_miss="error")
    with pytest.raises(EngineMissingError, match="damaged"):
        decoded(tiny, randn(1, 16, 1, 8, 8))


# Packages in memory and on disk.


def resident() -> int:
    """Bytes of this process in memory."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc of Linux")
def test_loads_of_the_same_package_take_nothing_more(inductor_dir):
    """Its code cannot be unloaded, so each load must find it where it was."""
    image = EngineImage.read(inductor_dir / "static" / "64x64" / "vae_decoder.pt2")
    z = randn(1, 16, 8, 8)

    def load() -> tuple[torch.Tensor, int]:
        output = inductor.InductorProgram(image, CPU)(z)
        library = unpacked.unpack(image).library.name
        return output, Path("/proc/self/maps").read_text().count(library)

    exact, mapped = load()
    load()
    before, disk = resident(), shutil.disk_usage(tempfile.gettempdir()).used
    loads = int(50 * SECONDS)
    for _ in range(loads):
        output, now = load()
        assert torch.equal(output, exact) and now == mapped
    grown = resident() - before
    disk = shutil.disk_usage(tempfile.gettempdir()).used - disk
    print(f"{loads} loads: {grown / 1e6:+.1f} MB in memory, {disk / 1e6:+.1f} MB on disk")
    assert grown < len(image.data), "not even one more copy"


@pytest.mark.gpu
def test_loads_of_the_same_package_give_gpu_memory_back(tmp_path):
    from diffusers import AutoencoderKLQwenImage

    vae = AutoencoderKLQwenImage.from_pretrained(TINY_VAE).eval().to("cuda")
    options = {"backend": "inductor", "engine_dir": tmp_path, "sizes": ["64x64", "96x64"], "max_resident": 1}
    handle = accelerate(vae, dtype="bfloat16", **options)
    inputs = [randn(1, 16, 1, 8, width).to("cuda") for width in (8, 12)]
    free = []
    for _ in range(30):
        for z in inputs:
            decoded(vae, z)
        torch.cuda.synchronize()
        free.append(torch.cuda.mem_get_info()[0])
    assert handle.report().as_dict()["loads"] >= 60
    print([round((free[2] - later) / 1e6, 1) for later in free[2:]])
    assert free[2] - free[-1] < 32 << 20, "27 more loads of each"


def package(**files: bytes) -> EngineImage:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return EngineImage(Path("e.pt2"), data.getvalue(), str(hash(data.getvalue())))


MODEL = "p/data/aotinductor/model/"


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (EngineImage(Path("e.pt2"), b"junk", "junk"), "it is not a package"),
        (package(), "0 compiled libraries"),
        (package(**{MODEL + "a.cpp": b"", MODEL + "a.json": b"{}"}), "0 compiled libraries"),
        (
            package(**{MODEL + "../../../../a.so": b"", "a.so": b"", "p/data/aotinductor/other/a.so": b""}),
            "0 compiled libraries",
        ),
        (package(**{MODEL + "a.so": b"", MODEL + "b.so": b""}), "2 compiled libraries"),
    ],
)
def test_what_is_no_package_is_an_error(image, says):
    with pytest.raises(ValueError, match=says):
        unpacked.unpack(image)


def test_a_package_is_unpacked_once_and_again_where_it_was_tidied_up():
    image = package(**{MODEL + "a.so": b"code", MODEL + "a.cubin": b"more code", "p/archive_format": b"pt2"})
    first = unpacked.unpack(image)
    assert {path.name: path.read_bytes() for path in first.library.parent.iterdir()} == {
        "a.so": b"code",
        "a.cubin": b"more code",
    }
    assert first.library.parent.parent.stat().st_mode & 0o777 == 0o700
    assert unpacked.unpack(image) is first
    (first.library.parent / "a.cubin").unlink()
    second = unpacked.unpack(image)
    assert second.library != first.library and second.stands()


_UNPACK = """
import os, sys, zipfile
from pathlib import Path
from qwen_vae_accel.backends import unpacked
from qwen_vae_accel.backends.base import EngineImage
print(unpacked.unpack(EngineImage.read(Path(sys.argv[1]))).library.parent.parent, flush=True)
if sys.argv[2] == "dies":
    os.kill(os.getpid(), 9)
if sys.argv[2] == "stays":
    sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="locks of Unix")
def test_folders_go_with_their_process_and_those_of_killed_ones_with_the_next(tmp_path):
    file = tmp_path / "e.pt2"
    file.write_bytes(package(**{MODEL + "a.so": b"code"}).data)
    environment = {**os.environ, "TMPDIR": str(tmp_path)}

    def start(how: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", _UNPACK, str(file), how]
        return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def folder(process: subprocess.Popen[str]) -> Path:
        return Path(process.stdout.readline().strip())

    with start("stays") as living:
        stays = folder(living)
        with start("dies") as killed:
            left = folder(killed)
        assert killed.wait() == -signal.SIGKILL and left.exists()
        with start("ends") as next_one:
            mine = folder(next_one)
        assert next_one.wait() == 0
        assert not left.exists() and not mine.exists() and stays.exists()
        living.communicate()
    assert not stays.exists()


@pytest.mark.slow
def test_the_process_that_tries_a_package_imports_nothing_of_the_current_folder(inductor_dir, tmp_path, monkeypatch):
    for name in ("torch.py", "queue.py"):
        (tmp_path / name).write_text("open('was_run', 'w')\nraise SystemExit(name)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", ".", *(entry for entry in sys.path if entry)])
    inductor._load_elsewhere(inductor_dir / "static" / "64x64" / "vae_decoder.pt2")
    assert not (tmp_path / "was_run").exists()


def test_the_process_that_tries_a_package_imports_from_where_this_one_does(tmp_path, monkeypatch):
    file = tmp_path / "e.pt2"
    file.write_bytes(package(**{MODEL + "a.so": b"code"}).data)
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "torch.py").write_text("raise ImportError('the torch of this path')\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "packages"), *sys.path])
    with pytest.raises(RuntimeError, match="does not load.*the torch of this path"):
        inductor._load_elsewhere(file)

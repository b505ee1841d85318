"""One image over several processes: gloo on the CPU, NCCL on GPUs (marker gpu). Each process gets what one alone computes."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys

import pytest
import torch

from qwen_vae_accel.kernels.bands import Bands
from qwen_vae_accel.share import Share, divides
from tests.helpers import ROOT

# What every process runs: the parts of the network alone, then through accelerate().
PROGRAM = """
import sys
import torch, torch.distributed as dist
from qwen_vae_accel import accelerate
from qwen_vae_accel.errors import ConfigError
from qwen_vae_accel.model import ModelSource
from qwen_vae_accel.model.tiling import run_banded
from qwen_vae_accel.share import Share
from tests.conftest import random_vae

torch.set_num_threads(1)
torch.set_grad_enabled(False)
dist.init_process_group("gloo")
group, rank = dist.group.WORLD, dist.get_rank()
share = Share.of_group(group)
assert (share.rank, share.size) == (rank, dist.get_world_size())

def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))

for kind in ((), ("2.1",)):
    vae = random_vae(*kind)
    source = ModelSource(vae)
    latent, channels, scale = source.topology.z_dim, source.topology.image_channels, source.topology.scale
    for method in ("decode", "encode"):
        network = source.model(method, torch.float32, torch.device("cpu"))
        for height, width in ((7, 5), (2, 3), (4, 1)):  # uneven bands; fewer rows than processes
            x = draw(2, latent, height, width) if method == "decode" else draw(2, channels, height * scale, width * scale)
            alone = network(x)
            for tile_pixels in (None, scale):
                together = run_banded(network, x, tile_pixels, share)
                assert (together - alone).abs().max() < 1e-5 * alone.abs().max(), (kind, method, height, tile_pixels)
    z, image = draw(1, latent, 1, 7, 5), draw(1, channels, 1, 7 * scale, 4 * scale)
    plain = vae.decode(z).sample, vae.encode(image).latent_dist.mean
    with accelerate(vae, backend="eager", process_group=group) as handle:
        for _ in range(2):
            assert torch.allclose(vae.decode(z).sample, plain[0], atol=1e-4)
            assert torch.allclose(vae.encode(image).latent_dist.mean, plain[1], atol=1e-4)
        assert accelerate(vae, backend="eager", process_group=group) is handle
        assert "eager" in str(handle.report())

for config in ({"backend": "eager" if rank else "auto"}, {"backend": "inductor", "engine_dir": "nowhere"}):
    try:
        accelerate(vae, **config, process_group=group)
        raise AssertionError(config)
    except ConfigError as error:
        print("refused:", error)
dist.destroy_process_group()
print("all right")
"""


def torchrun(count: int, *command: str) -> list[str]:
    """Output of ``count`` processes of one machine, each run as ``python command``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(count),
        "OMP_NUM_THREADS": "1",
    }
    common["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    started = [
        subprocess.Popen(
            [sys.executable, *command], env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(count)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=240)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * count, "\n".join(outputs)
    return outputs


def test_every_process_gets_what_one_alone_computes():
    for output in torchrun(3, "-c", PROGRAM):
        assert output.rstrip().endswith("all right")
        assert "differ in config" in output and "compute an image on one device" in output


def test_the_example():
    for rank, output in enumerate(torchrun(2, str(ROOT / "examples" / "several_gpus.py"))):
        assert re.search(rf"rank {rank} of 2: largest difference \d\.\de-0[5-9]", output)


def test_shares_cover_all_rows_once():
    for size in (2, 3, 4, 7):
        for count in (7, 8, 64, 101):
            shares = [Share(None, rank, size) for rank in range(size)]
            assert [row for share in shares for row in share.rows(count)] == list(range(count))
            assert all(share.rows(count, other.rank) == other.rows(count) for share in shares for other in shares)
    assert divides(shares[0], 6) is None and divides(shares[0], 7) is shares[0] and divides(None, 9) is None
    assert [list(band) for band in Bands(0, 2).of(range(3, 8))] == [[3, 4], [5, 6, 7]]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_gpus():
    program = str(ROOT / "benchmarks" / "ranks.py")
    for output in torchrun(min(4, torch.cuda.device_count()), program, "--check"):
        assert output.rstrip().endswith("all right"), output

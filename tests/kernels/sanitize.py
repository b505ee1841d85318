"""A small decode and encode of the fused networks, to be run under compute-sanitizer (``make sanitize``).

Both sets of kernels run where the GPU has both, in bfloat16 and the decoder in float8: a batch of odd size, plainly, for a
capture, and from the graph where the third run is given the same memory.
"""

from __future__ import annotations

import torch

from qwen_vae_accel.kernels import FusedConfig, FusedDecoder, FusedEncoder
from qwen_vae_accel.kernels.float8 import calibrated_layers, input_scales
from qwen_vae_accel.kernels.layout import Grid
from qwen_vae_accel.kernels.network import published
from qwen_vae_accel.kernels.sm90.conv3x3 import Conv3x3
from qwen_vae_accel.kernels.sm90.schedules import Mode
from qwen_vae_accel.kernels.tuning.configs import AttentionConfig
from qwen_vae_accel.kernels.tuning.selection import Tuning
from tests.kernels.cases import image_state, random_vae
from tests.kernels.sm90.test_sm90 import Chain, Example


def overlapping_kernels() -> None:
    """Images as small as below have one round of tiles, and their kernels do not overlap: here they are told to."""
    for channels in (192, 384):
        example = Example(Mode.CONV, channels, channels, Grid(2, 33, 41), torch.bfloat16)
        chain = Chain(example, Conv3x3(example.weights), 4)
        if not torch.equal(chain.run(overlapped=True), chain.run(overlapped=False)):
            raise SystemExit(f"{channels} channels: launches that overlap differ")
        print(f"launches that overlap, {channels} channels: done", flush=True)


def main() -> None:
    if torch.cuda.get_device_capability() == (9, 0):
        overlapping_kernels()
    vae = random_vae()
    decoder, encoder = image_state(vae, "decoder"), image_state(vae, "encoder")
    scales = input_scales(decoder, dict.fromkeys(calibrated_layers(published("decode")).values(), 20.0))
    cuda = torch.device("cuda")
    runs, replays = 0, []
    replay = torch.cuda.CUDAGraph.replay
    torch.cuda.CUDAGraph.replay = lambda graph: replays.append(graph) or replay(graph)  # type: ignore[method-assign]
    for tuning in (Tuning(), Tuning(sm90=False, attention=AttentionConfig(128, 32, 8, 2))):
        config = FusedConfig(graph_after=1, tuning=tuning)
        networks = {
            "decoder": FusedDecoder(decoder, dtype=torch.bfloat16, device=cuda, config=config),
            "decoder float8": FusedDecoder(decoder, dtype=torch.bfloat16, device=cuda, config=config, float8=scales),
            "encoder": FusedEncoder(encoder, dtype=torch.bfloat16, device=cuda, config=config),
        }
        for name, network in networks.items():
            shape = (2, 3, 61, 75) if name == "encoder" else (2, 16, 7, 9)
            image = torch.randn(shape).to(cuda, torch.bfloat16)
            plain, captured, replayed = network.run_plain(image), network(image), network(image)
            torch.cuda.synchronize()
            if not torch.equal(plain, captured) or not torch.equal(plain, replayed) or plain.isnan().any():
                raise SystemExit(f"{name} {shape}: runs differ, or there are NaNs")
            runs += 3
            convolutions = "CUDA C++" if tuning.sm90 else "Triton"
            print(f"{name}, convolutions in {convolutions}: done", flush=True)
    print(f"{runs} runs of the fused networks, {len(replays)} of them replays, on {torch.cuda.get_device_name()}")


if __name__ == "__main__":
    main()

"""A small decode and encode of the fused networks, to be run under compute-sanitizer (``make sanitize``).

Both sets of convolutions run where the GPU has both, and a batch, an odd size and a graph with them.
"""

from __future__ import annotations

import torch

from qwen_vae_accel.kernels import FusedConfig, FusedDecoder, FusedEncoder
from qwen_vae_accel.kernels.tuning import Tuning
from tests.kernels.cases import image_state, random_vae


def main() -> None:
    vae = random_vae()
    runs = 0
    for hopper in (True, False):
        config = FusedConfig(graph_after=2, tuning=Tuning(hopper_convs=hopper))
        for part, cls, shapes in (
            ("decoder", FusedDecoder, [(1, 16, 8, 9), (2, 16, 7, 5)]),
            ("encoder", FusedEncoder, [(1, 3, 64, 72), (2, 3, 61, 47)]),
        ):
            network = cls(image_state(vae, part), dtype=torch.bfloat16, device=torch.device("cuda"), config=config)
            for shape in shapes:
                image = torch.randn(shape).cuda().bfloat16()
                plain, replayed = network(image), network(image)
                torch.cuda.synchronize()
                if not torch.equal(plain, replayed) or plain.isnan().any():
                    raise SystemExit(f"{part} {shape}: a graph's replay differs, or there are NaNs")
                runs += 2
    print(f"{runs} runs of the fused networks on {torch.cuda.get_device_name()}")


if __name__ == "__main__":
    main()

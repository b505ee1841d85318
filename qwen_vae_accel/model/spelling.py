"""The exact image networks, spelled for compilers: the same arithmetic in operations that they keep exact, small and fast.

Three layers need it. Head dimension 384 has no fused attention in a compiler: TensorRT would hold all N x N scores
(1.2 GB at 1664x928 in bfloat16), and AOTInductor multiplies matrices in float32 (8.4 of 20.5 ms of a 1024x1024 decode
on an H200); here the queries come in chunks of plain matrix products. The folded upsampling is a plain convolution and
an interleaving: TensorRT-RTX cannot build a bfloat16 deconvolution. Torch-TensorRT lowers a fused
RMS norm in the tensor's own dtype, where float16 overflows at 256 and its floor vanishes (a zero pixel becomes NaN);
here the norm says float32 itself.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen_vae_accel.model.layers import NORM_FLOOR, Attention, RMSNorm, Upsample

# Queries per run of the attention. Then the scores of a run are never more than one full-resolution feature map of the
# decoder holds: 96 channels on the 8 x 8 pixels of each latent pixel.
QUERY_LIMIT = 96 * 8 * 8


class PlainNorm(nn.Module):
    """RMS norm over the channels of ``x [B, C, H, W]``, optionally then SiLU: float32 inside, rounded once at the end."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.gamma = norm.gamma
        self.silu = norm.silu

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x [B, C, H, W]``; shape and dtype stay."""
        wide = x.float()
        power = wide.square().mean(dim=1, keepdim=True) + NORM_FLOOR**2 / x.shape[1]
        y = wide * torch.rsqrt(power) * self.gamma.float().view(1, -1, 1, 1)
        return (y * torch.sigmoid(y) if self.silu else y).to(x.dtype)


class ChunkedAttention(nn.Module):
    """Single-head attention over all N = h * w pixels of ``x [1, C, h, w]``, plus the input, in ``chunks`` runs of queries.

    A query's softmax needs all keys but no other query, so the runs change nothing but the peak: ``N * N / chunks``
    scores instead of ``N * N``. ``chunks`` is a constant of the graph. The last run is filled up with queries of zeros,
    whose results are dropped: then all runs have the one length that TensorRT can bound for every size of a profile
    (for the difference of two offsets it assumes the worst of both, which is N).
    """

    def __init__(self, attention: Attention, chunks: int) -> None:
        super().__init__()
        self.norm = PlainNorm(attention.norm)
        self.to_qkv = attention.to_qkv
        self.proj = attention.proj
        self.chunks = chunks

    def forward(self, x: Tensor) -> Tensor:
        """Mix the pixels of ``x [1, C, h, w]``; the shape stays."""
        q, k, v = self.to_qkv(self.norm(x)).flatten(2).chunk(3, dim=1)  # [1, C, N] each
        q = (q * q.shape[1] ** -0.5).transpose(1, 2)  # scaled first: float16 scores stay in range
        v = v.transpose(1, 2)
        pixels = q.shape[1]
        if self.chunks == 1:
            y = self._mix(q, k, v)
        else:
            length = (pixels + self.chunks - 1) // self.chunks
            filled = F.pad(q, (0, 0, 0, self.chunks - 1))[:, : self.chunks * length]
            runs = filled.unflatten(1, (self.chunks, length))
            mixed = [self._mix(runs[:, 0], k, v)]
            for index in range(1, self.chunks):
                # Zero, and known only when the run before is done: else TensorRT may batch the runs and hold all scores.
                after = mixed[-1][:, :1, :1].clamp(0.0, 0.0)
                mixed.append(self._mix(runs[:, index] + after, k, v))
            y = torch.cat(mixed, dim=1)[:, :pixels]
        return self.proj(y.transpose(1, 2).unflatten(2, x.shape[2:])) + x

    @staticmethod
    def _mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``q [1, M, C]``, ``k [1, C, N]``, ``v [1, N, C]`` -> ``[1, M, C]``."""
        return torch.matmul(torch.softmax(torch.matmul(q, k), dim=-1), v)


class ParityUpsample(nn.Module):
    """The folded upsampling (a transposed convolution, see ``fold_upsample``) as one 2x2 convolution to four images.

    Each image holds the output pixels of one parity of row and column; interleaved they are the output. Same sums of
    weights, same 4/9 of the arithmetic, ``[1, I, h, w]`` -> ``[1, O, 2h, 2w]``.
    """

    def __init__(self, upsample: Upsample) -> None:
        super().__init__()
        # Along one axis, with k the transposed kernel: even outputs are k3 s[i-1] + k1 s[i], odd ones k2 s[i] + k0 s[i+1].
        kernel = upsample.weight.detach().transpose(0, 1)  # [O, I, 4, 4]
        taps = [kernel[:, :, rows][..., columns] for rows in ((3, 1), (2, 0)) for columns in ((3, 1), (2, 0))]
        self.weight = nn.Parameter(torch.cat(taps).contiguous(), requires_grad=False)  # [4 * O, I, 2, 2]
        self.bias = nn.Parameter(upsample.bias.detach().repeat(4), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Double ``x [1, I, h, w]`` to ``[1, O, 2h, 2w]``."""
        height, width = x.shape[2:]
        y = F.conv2d(x, self.weight, self.bias, padding=1)  # [1, 4 * O, h + 1, w + 1]
        parts = [
            part[:, :, row : row + height, column : column + width]
            for part, (row, column) in zip(y.chunk(4, dim=1), ((0, 0), (0, 1), (1, 0), (1, 1)), strict=True)
        ]
        return F.pixel_shuffle(torch.stack(parts, dim=2).flatten(1, 2), 2)


def query_chunks(pixels: int, limit: int) -> int:
    """Runs of queries that keep each at ``limit`` or below, for up to ``pixels`` of them."""
    return max(1, -(-pixels // limit))


def spell(network: nn.Module, chunks: int) -> nn.Module:
    """A copy of ``network`` (an image encoder or decoder) over the same weights, with those three layers replaced."""
    shared = {id(parameter): parameter for parameter in network.parameters()}
    spelled = copy.deepcopy(network, shared)
    for parent in list(spelled.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Attention):
                setattr(parent, name, ChunkedAttention(child, chunks))
            elif isinstance(child, RMSNorm):
                setattr(parent, name, PlainNorm(child))
            elif isinstance(child, Upsample) and child.folded:
                setattr(parent, name, ParityUpsample(child))
    return spelled

"""The configurations that ship, measured on one NVIDIA H200. Other GPUs start from them, cut to their shared memory."""

from __future__ import annotations

from qwen_vae_accel.kernels.network import KernelLayer, Kind, stored_channels
from qwen_vae_accel.kernels.sm90.schedules import MODES, SCHEDULES, Mode
from qwen_vae_accel.kernels.tuning.configs import AttentionConfig, ConvConfig
from qwen_vae_accel.kernels.tuning.keys import KernelKey

_CONV, _UP, _DOWN = Kind.CONV, Kind.UP, Kind.DOWN

# Several configurations: the later ones have smaller tiles, for images too small to fill the GPU; ``wave`` is their time per
# wave of tiles, the first one's being 1.
H200_CONVS: dict[KernelKey, tuple[ConvConfig, ...]] = {
    KernelKey(Kind.IN, 16, 384): (ConvConfig(64, 32, 4, 4),),
    KernelKey(Kind.IN, 3, 96): (ConvConfig(128, 32, 4, 3),),
    KernelKey(Kind.IN, 4, 96): (ConvConfig(128, 32, 4, 3),),
    KernelKey(_CONV, 96, 96): (ConvConfig(128, 32, 4, 4),),
    KernelKey(_CONV, 96, 96, epilogue="norm"): (ConvConfig(256, 32, 8, 4),),
    KernelKey(_CONV, 96, 192): (ConvConfig(128, 32, 4, 4),),
    KernelKey(_CONV, 192, 192): (ConvConfig(128, 32, 4, 4),),
    KernelKey(_CONV, 192, 192, epilogue="norm"): (ConvConfig(256, 64, 8, 3),),
    KernelKey(_CONV, 192, 192, epilogue="shortcut x norm"): (ConvConfig(256, 64, 8, 3),),
    KernelKey(_CONV, 192, 384): (ConvConfig(128, 64, 8, 3), ConvConfig(64, 64, 4, 3, wave=0.57)),
    KernelKey(_CONV, 384, 384): (ConvConfig(128, 64, 8, 3), ConvConfig(64, 64, 4, 3, wave=0.57)),
    KernelKey(Kind.PROJ, 384, 384): (ConvConfig(64, 64, 4, 2),),
    KernelKey(Kind.QKV, 384, 1152): (ConvConfig(64, 64, 4, 2),),
    KernelKey(Kind.QKV, 768, 2304): (ConvConfig(64, 32, 8, 4),),
    KernelKey(Kind.QKV, 1152, 3456): (ConvConfig(64, 32, 8, 4),),
    KernelKey(_UP, 384, 192): (ConvConfig(128, 64, 8, 4),),
    KernelKey(_UP, 192, 96): (ConvConfig(128, 64, 8, 3),),
    KernelKey(_DOWN, 96, 96): (ConvConfig(128, 32, 4, 4),),
    KernelKey(_DOWN, 192, 192): (ConvConfig(64, 64, 4, 3),),
    KernelKey(_DOWN, 384, 384): (ConvConfig(128, 64, 8, 3), ConvConfig(64, 64, 4, 3, wave=0.6)),
    # Float8: not measured yet; the 16-bit choices with the same bytes per load where the width allows.
    KernelKey(_CONV, 96, 96, float8=True): (ConvConfig(128, 32, 4, 5),),
    KernelKey(_CONV, 192, 192, float8=True): (ConvConfig(128, 64, 4, 4),),
    KernelKey(_CONV, 192, 384, float8=True): (ConvConfig(128, 64, 8, 4), ConvConfig(64, 64, 4, 4, wave=0.57)),
    KernelKey(_CONV, 384, 384, float8=True): (ConvConfig(128, 128, 8, 3), ConvConfig(64, 128, 4, 3, wave=0.57)),
    KernelKey(_UP, 384, 192, float8=True): (ConvConfig(128, 128, 8, 4),),
    KernelKey(_UP, 192, 96, float8=True): (ConvConfig(128, 64, 8, 4),),
}
ATTENTION_KEY = KernelKey(Kind.ATTENTION, 384, 384)
H200_ATTENTION = AttentionConfig(128, 32, 8, 2, sm90=True, rate=615e12)

# The last convolutions have no configuration to choose, nor has the attention of many channels.
_UNTUNED = {
    (Kind.OUT, 384, 32), (Kind.OUT, 768, 128), (Kind.OUT, 96, 3), (Kind.OUT, 96, 4), (Kind.OUT, 144, 3), (Kind.OUT, 144, 4),
    (Kind.ATTENTION, 768, 768), (Kind.ATTENTION, 1152, 1152),
}  # fmt: skip
_EVERYWHERE = {(key.kind, key.in_channels, key.out_channels) for key in (*H200_CONVS, ATTENTION_KEY)} | _UNTUNED


def has_kernel(layer: KernelLayer, sm90: bool) -> bool:
    """Whether there is a kernel for a layer, those of ``sm90/`` included if they run.

    Shortcuts of any width that is a multiple of 32 come with the convolution.
    """
    kind, taken, given, shortcut = layer
    found = (kind, taken, given) in _EVERYWHERE
    if sm90 and kind is Kind.IN:
        found = found or (Mode.CONV, stored_channels(taken), given) in SCHEDULES
    elif sm90 and kind in MODES:
        found = found or (MODES[kind], taken, given) in SCHEDULES
    return found and shortcut % 32 == 0

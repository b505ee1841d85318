"""What a configuration is for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from qwen_vae_accel.kernels.network import Kind

if TYPE_CHECKING:
    from qwen_vae_accel.kernels.weights import ConvWeights, SmallConvWeights


@dataclass(frozen=True, slots=True)
class KernelKey:
    """A kernel that has a configuration of its own.

    Attributes:
        kind: what the layer computes.
        in_channels: of the layer.
        out_channels: of the layer.
        float8: whether its operands are float8 (e4m3) instead of 16 bits.
        epilogue: what follows the product, of ``residual shortcut x norm head`` in this order; empty where it is always the
            same, and for any that has no configuration of its own.
        sm90: whether it is a kernel of ``sm90/``, which one configuration serves whatever its epilogue, or Triton's.
    """

    kind: Kind
    in_channels: int
    out_channels: int
    float8: bool = False
    epilogue: str = ""
    sm90: bool = False

    @classmethod
    def of(
        cls, kind: Kind, weights: ConvWeights | SmallConvWeights, epilogue: str = "", *, sm90: bool = False
    ) -> KernelKey:  # fmt: skip
        """Make the key of a convolution with these weights."""
        float8 = weights.weight.element_size() == 1
        return cls(kind, weights.in_channels, weights.out_channels, float8, "" if sm90 else epilogue, sm90)

    @property
    def any_epilogue(self) -> KernelKey:
        """The key of the same kernel without its epilogue."""
        return replace(self, epilogue="")

    def __str__(self) -> str:
        words = (
            "sm90" if self.sm90 else "", self.kind.value, f"{self.in_channels}->{self.out_channels}",
            "float8" if self.float8 else "", self.epilogue,
        )  # fmt: skip
        return " ".join(filter(None, words))

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return {**asdict(self), "kind": self.kind.value}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> KernelKey:
        """Make a key from what :meth:`as_dict` returned.

        Raises:
            ValueError: other fields, or a value of another type.
        """
        expected = {"kind": str, "in_channels": int, "out_channels": int, "float8": bool, "epilogue": str, "sm90": bool}
        if not isinstance(values, Mapping) or set(values) != {field.name for field in fields(cls)}:
            raise ValueError(f"{values!r} is not the key of a kernel")
        for name, kind in expected.items():
            if type(values[name]) is not kind:
                raise ValueError(f"{name} of a kernel's key is {values[name]!r}, not of type {kind.__name__}")
        return cls(**{**values, "kind": Kind(values["kind"])})

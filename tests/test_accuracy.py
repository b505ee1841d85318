"""The criterion itself: rounding passes, and whatever is wrong in one place only does not."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qwen_vae_accel.accuracy import FACTOR, NOT_COMPARABLE, Error, measure
from qwen_vae_accel.model import ModelSource, inspect_vae
from qwen_vae_accel.model.source import build_model
from tests.conftest import random_vae
from tests.helpers import CPU, Reference, picture, randn

pytestmark = [pytest.mark.usefixtures("no_grad"), pytest.mark.numeric]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


# What is planted. In the weights of one layer:


def swap_two_taps(weight: Tensor) -> None:
    weight[..., 0, 0], weight[..., 0, 1] = weight[..., 0, 1].clone(), weight[..., 0, 0].clone()


def leave_out_a_tap(weight: Tensor) -> None:
    weight[..., 0, 1] = 0


# In an output:


def repeat_a_row(output: Tensor) -> None:
    output[:, :, 2] = output[:, :, 1]


def lose_the_last_row(output: Tensor) -> None:
    output[:, :, -1] = 0


def repeat_a_column(output: Tensor) -> None:
    output[..., 0] = output[..., 1]


def a_channel_off_by_one(output: Tensor) -> None:
    output[:, 1] = output[:, 0]


def shift_by_a_pixel(output: Tensor) -> None:
    output.copy_(output.roll(1, 3))


IN_WEIGHTS = [swap_two_taps, leave_out_a_tap]
IN_OUTPUT = [repeat_a_row, lose_the_last_row, repeat_a_column, a_channel_off_by_one, shift_by_a_pixel]


class Subject:
    """One network of a small random VAE, right or with a fault in it, and its reference in every dtype."""

    def __init__(self, name: str, method: str) -> None:
        vae = random_vae(name)
        topology = inspect_vae(vae)
        source = ModelSource(vae)
        self.method = method
        size = (48, 48) if method == "encode" else (48 // topology.scale, 48 // topology.scale)
        x = (picture if method == "encode" else randn)(
            1, topology.image_channels if method == "encode" else topology.z_dim, *size
        )
        # Values that every dtype holds.
        self.x = x.to(torch.bfloat16).to(torch.float16).float()
        self.references = {dtype: Reference(vae, method, self.x, dtype) for dtype in DTYPES}
        self.right = {dtype: source.model(method, dtype, CPU)(self.x.to(dtype)) for dtype in DTYPES}
        self.state = source.state(method)
        self.layers = [name for name, value in self.state.items() if value.dim() == 4 and value.shape[-1] == 3]

    def with_output_changed(self, dtype: torch.dtype, change: Callable[[Tensor], None]) -> Tensor:
        output = self.right[dtype].clone()
        change(output)
        return output

    def with_weights_changed(self, layer: str, change: Callable[[Tensor], None]) -> Tensor:
        """In float32: what a half type's rounding adds to the fault only makes it larger, and computing takes longer."""
        weight = self.state[layer].clone()
        change(weight)
        return build_model({**self.state, layer: weight}, self.method)(self.x)

    def times(self, dtype: torch.dtype, output: Tensor) -> float:
        """How many times diffusers' own error in ``dtype`` the one of ``output`` is."""
        return self.references[dtype].error(output).times(self.references[dtype].yardstick)

    def planted(self, dtype: torch.dtype) -> dict[str, float]:
        """Every fault and how many times diffusers' own error it is."""
        outputs = {change.__name__: self.times(dtype, self.with_output_changed(dtype, change)) for change in IN_OUTPUT}
        return outputs | {name: self.times(dtype, output) for name, output in self.weight_faults.items()}

    @functools.cached_property
    def weight_faults(self) -> dict[str, Tensor]:
        return {
            f"{change.__name__} of {layer}": self.with_weights_changed(layer, change)
            for layer in self.layers
            for change in IN_WEIGHTS
        }


@pytest.fixture(
    scope="module", params=[(name, method) for name in ("micro", "2.1") for method in ("encode", "decode")], ids=" ".join
)
def subject(request: pytest.FixtureRequest) -> Subject:
    with torch.no_grad():
        return Subject(*request.param)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_right_network_passes_and_a_fault_in_one_place_does_not(subject: Subject, dtype: torch.dtype) -> None:
    subject.references[dtype].check(subject.right[dtype])
    planted = subject.planted(dtype)
    assert len(planted) > 35
    assert not {fault: f"{times:.1f}" for fault, times in planted.items() if times <= FACTOR}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_noise_just_beyond_the_factor_fails(subject: Subject, dtype: torch.dtype) -> None:
    reference = subject.references[dtype]
    noise = torch.randn(reference.exact.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    noise *= reference.exact.square().mean().sqrt() * reference.yardstick.relative / noise.square().mean().sqrt()
    assert reference.holds(reference.exact + noise)
    assert not reference.holds(reference.exact + 1.01 * FACTOR * noise)


def test_a_more_lenient_factor_would_miss_planted_faults(subject: Subject) -> None:
    """In bfloat16, the dtype that hides most: faults are planted near enough to the limit to guard it."""
    assert FACTOR < min(subject.planted(torch.bfloat16).values()) < 4 * FACTOR


# The measure.


def test_a_local_fault_is_lost_in_the_average_but_not_in_its_line() -> None:
    exact = randn(1, 3, 512, 512).double()
    output = exact.clone()
    output[:, :, 100] += 1
    error = measure(output, exact)
    assert error.relative < 0.05 and error.line == pytest.approx(1, rel=0.01)


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_lines_are_rows_columns_and_channels_of_one_image(dim: int) -> None:
    exact = torch.ones(2, 4, 8, 8, dtype=torch.float64)
    output = exact.clone()
    output[1].select(dim - 1, 2).add_(0.5)
    assert measure(output, exact).line == pytest.approx(0.5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_number_that_is_not_finite_is_infinitely_wrong(value: float) -> None:
    exact = picture(1, 3, 8, 8)
    output = exact.clone()
    output[0, 0, 3, 3] = value
    assert measure(output, exact) == NOT_COMPARABLE
    assert not measure(output, exact).within(Error(1e9, 1e9))


def test_another_shape_is_infinitely_wrong() -> None:
    assert measure(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 16)) == NOT_COMPARABLE


def test_nothing_but_equality_passes_where_diffusers_is_exact() -> None:
    exact = torch.ones(1, 3, 8, 8, dtype=torch.float64)
    assert measure(exact, exact).within(Error(0, 0).allowed())
    assert not measure(exact + 1e-15, exact).within(Error(0, 0).allowed())

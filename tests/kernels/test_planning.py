"""Which bands are chosen, what a call is planned to take, and what happens where there is no room for it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from qwen_vae_accel.kernels import FusedConfig, FusedDecoder, FusedEncoder, bands, planning
from qwen_vae_accel.kernels.bands import Bands, Choice, choose_bands
from qwen_vae_accel.kernels.gpu import Gpu
from qwen_vae_accel.kernels.limits import MOST_COST, SOFT_LIMIT, mib
from tests.kernels.test_network import meta

H100 = Gpu(132, 232448, True, True)
MIB = 2**20

# ---- the choice -------------------------------------------------------------------------------------------------------


def listing(scratch: int, flops: int, band_flops: int = 0) -> SimpleNamespace:
    return SimpleNamespace(launches=SimpleNamespace(scratch_bytes=scratch, flops=flops), band_flops=band_flops)


WHOLE = listing(1000, 1000)
# Memory falls to a floor, which is lower where more is in bands; there a band costs more beside its share.
FLOORS, EXTRAS = (100, 300, 600), (40, 10, 2)


def pretend(part: Bands) -> SimpleNamespace:
    band = 900 // part.count + EXTRAS[part.level]
    return listing(max(FLOORS[part.level], 1000 // part.count + 50), 100 + band, band)


def choose(limit: int, images: int = 1, height: int = 4096, most_cost: float = 3.0) -> Choice:
    return choose_bands(limit, most_cost, 3, images, height, WHOLE, pretend)


def test_one_piece_that_fits_is_not_divided():
    assert choose(1000) == Choice(None, True)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(999, Bands(2, 2)), (600, Bands(2, 2)), (599, Bands(1, 2)), (549, Bands(1, 3)), (300, Bands(1, 4)), (299, Bands(0, 5)),
     (216, Bands(0, 6)), (215, Bands(0, 8)), (100, Bands(0, 20))],
)  # fmt: skip
def test_the_cheapest_division_that_fits_is_chosen(limit, expected):
    assert choose(limit) == Choice(expected, True)


def test_where_nothing_fits_the_least_is_chosen_that_few_bands_give():
    assert choose(99) == choose(1) == Choice(Bands(0, 20), False)


def test_no_limit_is_worth_three_times_the_operations(monkeypatch):
    monkeypatch.setattr("tests.kernels.test_planning.FLOORS", (1, 300, 600))
    found = choose(1)
    assert found == Choice(Bands(0, 48), False)
    one = pretend(Bands(0, 48))
    assert one.launches.flops + 47 * one.band_flops < 3000 < 100 + 64 * pretend(Bands(0, 64)).band_flops


def test_the_cost_that_a_limit_is_worth_is_the_callers():
    """Within 1.25 the earliest level affords 6 bands, 216 bytes, the next 16 and its floor."""
    assert choose(99, most_cost=1.25) == Choice(Bands(0, 6), False)
    assert choose(1, most_cost=1.0) == Choice(None, False)


def test_what_bands_do_not_make_smaller_stays_whole():
    assert choose_bands(10, 3.0, 3, 1, 4096, listing(600, 1000), lambda part: listing(600, 1100, 10)) == Choice(None, False)


def test_bands_have_rows_enough():
    assert choose(1, height=160) == choose(1, height=191) == Choice(Bands(0, 5), False)
    assert choose(600, height=16) == Choice(Bands(2, 2), True), "two there are always"


def published_on_meta(method: str, latents: int, limit: float | None) -> FusedDecoder | FusedEncoder:
    cls = FusedDecoder if method == "decode" else FusedEncoder
    weights = meta(method, 4 if latents == 64 else 3, latents)
    return cls(weights, dtype=torch.bfloat16, device=torch.device("meta"), config=FusedConfig(gpu=H100, memory_limit=limit))


@pytest.mark.parametrize(
    ("method", "latents", "shape"),
    [("decode", 16, (1, 16, 128, 130)), ("encode", 16, (2, 3, 1024, 1040)), ("decode", 64, (1, 64, 64, 66))],
)
def test_the_choice_is_the_cheapest_of_all(method, latents, shape):
    network = published_on_meta(method, latents, None)
    height = shape[2] * (network.description.scale if method == "decode" else 1)
    levels = len(network.description.levels) - 1
    whole = network._as_configured(shape, None, False)
    looks = {
        part: network._as_configured(shape, part, True)
        for part in (Bands(level, count) for level in range(levels) for count in bands._COUNTS if height // count >= 32)
    }
    asked = []

    def listed(part: Bands) -> bands.Listed:
        asked.append(part)
        return looks[part]

    def cost(part: Bands) -> int:
        return looks[part].launches.flops + (part.count * shape[0] - 1) * looks[part].band_flops

    for share in (0.9, 0.7, 0.5, 0.3, 0.2):
        limit = int(share * whole.launches.scratch_bytes)
        asked.clear()
        choice = choose_bands(limit, MOST_COST, levels, shape[0], height, whole, listed)
        fitting = [part for part, look in looks.items() if look.launches.scratch_bytes <= limit]
        assert choice.fits == bool(fitting)
        if fitting:
            assert choice.bands in fitting and cost(choice.bands) == min(map(cost, fitting))
        assert len(asked) <= 10 * levels and len(set(asked)) == len(asked), "each is listed once, and few are"


@pytest.mark.parametrize("part", [Bands(0, 3), Bands(0, 16), Bands(1, 4), Bands(2, 32)], ids=str)
@pytest.mark.parametrize(("method", "shape"), [("decode", (2, 16, 130, 128)), ("encode", (2, 3, 1042, 1024))])
def test_the_largest_band_alone_tells_what_all_take(method, shape, part):
    network = published_on_meta(method, 16, None)
    one, every = (network._as_configured(shape, part, sample) for sample in (True, False))
    assert one.launches.scratch_bytes <= every.launches.scratch_bytes <= 1.02 * one.launches.scratch_bytes
    estimate = one.launches.flops + (2 * part.count - 1) * one.band_flops
    assert every.launches.flops <= estimate <= 1.1 * every.launches.flops


# ---- plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "latents", "shape"), [
    ("decode", 16, (1, 16, 256, 256)), ("encode", 16, (1, 3, 2048, 2048)), ("decode", 64, (1, 64, 128, 128)),
])  # fmt: skip
@pytest.mark.parametrize("limit", [1200 * MIB, 700 * MIB, 500 * MIB])
def test_a_plan_keeps_the_limit_and_says_what_a_call_takes(method, latents, shape, limit):
    network = published_on_meta(method, latents, limit)
    plan, launches = network.plan(shape), network.launches(shape)
    assert plan.fits and plan.scratch_bytes == launches.scratch_bytes <= limit and plan.flops == launches.flops
    assert plan.bands > 1 and plan.level is not None and 1 < plan.cost < 1.8
    assert plan.reason == f"in one piece it would take more than memory_limit, {mib(limit)}"
    values = 3 * 2048 * 2048 if latents == 16 else 4 * 2048 * 2048
    output = values if method == "decode" else 32 * 256 * 256
    assert plan.output_bytes == 2 * output and plan.peak_bytes == plan.call_bytes == plan.scratch_bytes + plan.output_bytes
    whole = published_on_meta(method, latents, 2**40).plan(shape)
    assert (whole.bands, whole.level, whole.reason, whole.cost) == (1, None, "", 1.0)
    assert whole.scratch_bytes > limit and whole.flops == plan.whole_flops


def test_a_limit_holds_for_all_bands_together():
    """Between what the largest band alone takes and what all take there are a few MiB."""
    shape = (1, 16, 128, 130)
    network = published_on_meta("decode", 16, None)
    one, every = (network._as_configured(shape, Bands(1, 3), sample).launches.scratch_bytes for sample in (True, False))
    assert one < every
    for limit in (one, every - 1):
        plan = published_on_meta("decode", 16, limit).plan(shape)
        assert plan.fits and (plan.level, plan.bands) != (1, 3)
    assert published_on_meta("decode", 16, every).plan(shape).bands == 3


def test_without_a_limit_only_what_is_large_runs_in_bands():
    network = published_on_meta("decode", 16, None)
    assert network.plan((1, 16, 256, 256)).bands == 1
    large = network.plan((1, 16, 512, 512))
    assert large.bands > 1 and large.scratch_bytes <= SOFT_LIMIT and large.cost < 1.02 and large.limit_bytes == SOFT_LIMIT
    assert published_on_meta("decode", 16, 2 * SOFT_LIMIT + 2**31).plan((1, 16, 512, 512)).bands == 1, "a limit is a limit"


def test_a_share_is_of_what_is_free_when_a_size_is_first_seen(monkeypatch):
    free = [1000 * MIB]
    monkeypatch.setattr("qwen_vae_accel.kernels.limits.free_bytes", lambda device: free[0])
    network = published_on_meta("decode", 16, 0.5)
    first = network.plan((1, 16, 128, 130))
    assert first.limit_bytes == 500 * MIB and first.bands > 1
    free[0] = 8000 * MIB
    assert network.plan((1, 16, 128, 130)) is first
    assert network.plan((1, 16, 128, 128)).bands == 1


def test_a_limit_that_nothing_fits_into_is_told_once(caplog):
    network = published_on_meta("decode", 16, 100 * MIB)
    plan = network.plan((1, 16, 256, 256))
    network._listings._kept.clear()
    assert network.plan((1, 16, 256, 256)) == plan
    assert not plan.fits and 200 * MIB < plan.scratch_bytes < 250 * MIB and plan.cost < 1.5
    (told,) = caplog.messages
    assert told.startswith("memory_limit 100 MiB is too little for FusedDecoder at input [1, 16, 256, 256]: it takes 241 MiB")


def test_no_limit_lists_thousands_of_times_the_work():
    plan = published_on_meta("decode", 64, 500 * MIB).plan((1, 64, 256, 256))  # 4096x4096, of which the tokens take more
    assert not plan.fits and plan.cost < 3 and plan.bands <= 128


def test_rows_of_tiles_bound_the_memory():
    network = published_on_meta("decode", 16, None)
    strip = network._as_configured((1, 16, 32, 256), None, False).launches.scratch_bytes
    plan = network.plan((1, 16, 256, 256), 256)
    assert plan.scratch_bytes <= plan.limit_bytes == strip and plan.bands > 1 and "use_tiling is on" in plan.reason
    assert network.plan((1, 16, 256, 256)).bands == 1, "the same size without tiles is another list"
    small = published_on_meta("decode", 16, 250 * MIB).plan((1, 16, 256, 256), 256)
    assert small.limit_bytes == 250 * MIB and "memory_limit" in small.reason
    encoder = published_on_meta("encode", 64, None)
    assert encoder.plan((1, 4, 2048, 2048), 250).limit_bytes == encoder.plan((1, 4, 240, 2048)).scratch_bytes


def test_bands_need_no_kernel_that_was_not_compiled_ahead():
    for method, shape in (("decode", (1, 16, 200, 150)), ("encode", (2, 3, 1480, 1040))):
        network = published_on_meta(method, 16, None)
        compiled = network.kernels(network.usual_shapes())
        for limit in (600 * MIB, 400 * MIB, 300 * MIB):
            banded = published_on_meta(method, 16, limit)
            assert banded.plan(shape).bands > 1
            assert banded.kernels([shape]).keys() <= compiled.keys(), limit


# ---- no room ----------------------------------------------------------------------------------------------------------


class Crowded:
    """A device with ``room`` bytes, as far as a network on ``meta`` can see it."""

    def __init__(self, network: FusedDecoder, room: int, monkeypatch: pytest.MonkeyPatch, told: float = 1.0) -> None:
        self.room, self.asked = room, []
        monkeypatch.setattr(network, "_run", self._run)
        monkeypatch.setattr(planning, "free_bytes", lambda device: int(told * self.room))

    def _run(self, launches, image):
        self.asked.append(launches.scratch_bytes)
        if launches.scratch_bytes > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate too much.")
        return image.new_empty(launches.output_shape)


LATENT = (1, 16, 128, 130)


def test_what_has_no_room_is_taken_in_bands_from_then_on(monkeypatch, caplog):
    network = published_on_meta("decode", 16, None)
    whole = network.plan(LATENT).scratch_bytes
    device = Crowded(network, 400 * MIB, monkeypatch)
    z = torch.empty(LATENT, dtype=torch.bfloat16, device="meta")
    for _ in range(3):
        assert network(z).shape == (1, 3, 1024, 1040)
    first, *others = device.asked
    assert first == whole > device.room and len(others) == 3 and len(set(others)) == 1, "it is found out once"
    plan = network.plan(LATENT)
    assert plan.bands > 1 and plan.scratch_bytes <= 400 * MIB and f"no room for {mib(whole)}" in plan.reason
    (told,) = caplog.messages
    assert f"no room for {mib(whole)}" in told and f"{plan.bands} bands" in told
    assert network.plan((1, 16, 128, 128)).bands == 1, "other sizes are tried whole"


def test_where_free_memory_lies_in_fragments_half_of_it_is_tried(monkeypatch, caplog):
    network = published_on_meta("decode", 16, None)
    device = Crowded(network, 260 * MIB, monkeypatch, told=2)
    network(torch.empty(LATENT, dtype=torch.bfloat16, device="meta"))
    assert len(device.asked) == 3 and device.asked[0] > device.asked[1] > 260 * MIB >= device.asked[2]
    assert len(caplog.messages) == 1, "told once a size"


@pytest.mark.parametrize(("room", "told", "tries"), [(10 * MIB, 1.0, 1), (100 * MIB, 5.0, 3), (0, 0.0, 1)])
def test_where_nothing_fits_the_error_is_torchs_own(room, told, tries, monkeypatch):
    network = published_on_meta("decode", 16, None)
    device = Crowded(network, room, monkeypatch, told)
    z = torch.empty(LATENT, dtype=torch.bfloat16, device="meta")
    for _ in range(2):
        device.asked.clear()
        with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate too much"):
            network(z)
        assert len(device.asked) <= tries


def test_a_second_thread_takes_the_list_that_the_first_has_made(monkeypatch):
    network = published_on_meta("decode", 16, None)
    Crowded(network, 400 * MIB, monkeypatch)
    failed = network._listings.get(LATENT)
    assert network._listings.shrink(LATENT, 0, failed, 1.0)
    found = network._listings.get(LATENT)
    monkeypatch.setattr(network._listings, "listed", None)
    assert network._listings.shrink(LATENT, 0, failed, 1.0) and network._listings.get(LATENT) is found


def test_what_fails_leaves_no_frames_behind(monkeypatch):
    """A frame of the failed try would hold the scratch memory while the next one asks for its own."""
    network = published_on_meta("decode", 16, None)

    def run(launches, image):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(network, "_run", run)
    error = network._unless_no_room(network.launches(LATENT), torch.empty(LATENT, device="meta"))
    assert isinstance(error, torch.OutOfMemoryError) and error.__traceback__ is None and error.__context__ is None

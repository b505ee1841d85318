"""The kernels of sm90: packing, choice of schedule and reasons on the CPU; results against PyTorch on a GPU (marker gpu)."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from qwen_vae_accel.kernels.layout import Grid, from_flat, pixel_rows, to_flat
from qwen_vae_accel.kernels.sm90 import attention, conv3x3, driver, nvrtc
from qwen_vae_accel.kernels.sm90.conv3x3 import Conv3x3, unsupported
from qwen_vae_accel.kernels.sm90.packing import channel_order, pack
from qwen_vae_accel.kernels.sm90.room import room_of
from qwen_vae_accel.kernels.sm90.schedules import (
    SCHEDULES,
    SHARED_LIMIT,
    Mode,
    Room,
    Variant,
    choose_schedule,
    grid_blocks,
    rounds,
    tile_count,
)
from qwen_vae_accel.kernels.sm90.source import headers, kernel_source
from qwen_vae_accel.kernels.weights import ConvWeights, Packer
from tests.kernels.cases import check_schedule, lowers_of, shortcuts_of, variants_of

H200 = Room(132)
TOLERANCE = {torch.bfloat16: 3e-3, torch.float16: 4e-4}  # relative L2; rounding the output alone gives 1.7e-3 and 2e-4
CASES = [(*key, index) for key, schedules in SCHEDULES.items() for index in range(len(schedules))]


# ---- CPU ------------------------------------------------------------------------------------------------------------


def unpack(packed: torch.Tensor, columns: int, kc: int, split: int, parities: int) -> torch.Tensor:
    """Undo swizzle and permutation by address arithmetic, as the hardware does: ``[split, parity, step, column, kc]``."""
    blocks = packed.reshape(parities, -1, split, columns * kc).permute(2, 0, 1, 3)
    out = torch.empty(*blocks.shape[:3], columns, kc, dtype=packed.dtype)
    shift, mask = (7, 0x70) if kc == 64 else (7, 0x30)  # which address bits are flipped, by the bits `shift - 4` above
    for n in range(columns):
        for k in range(kc):
            address = (n * kc + k) * 2
            address ^= (address >> (shift - 4)) & mask
            out[..., channel_order(columns)[n], k] = blocks[..., address // 2]
    return out


@pytest.mark.parametrize(("kc", "split"), [(32, 1), (64, 2)])
def test_packed_weights_hold_every_tap_where_the_kernel_looks(kc, split):
    channels, out = 64, 64
    matrix = torch.arange(out * 9 * channels, dtype=torch.float32).reshape(out, -1)
    got = unpack(pack(matrix, Mode.CONV, channels, kc), out // split, kc, split, 1)
    taps = matrix.reshape(split, out // split, 9, channels // kc, kc)
    for chunk in range(channels // kc):
        for tap in range(9):
            assert torch.equal(got[:, 0, chunk * 9 + tap], taps[:, :, tap, chunk])


def test_packed_shortcut_follows_the_taps_padded_with_zeros():
    matrix = torch.randn(32, 9 * 64 + 96)
    got = unpack(pack(matrix, Mode.CONV, 64, 64), 32, 64, 1, 1)[0, 0]
    assert got.shape[0] == 9 + 2
    assert torch.equal(torch.cat([got[9], got[10]], 1)[:, :96], matrix[:, 576:])
    assert not got[10][:, 32:].any()


def test_packed_downsample_is_ordered_by_parity_plane():
    matrix = torch.randn(32, 9 * 32)
    got = unpack(pack(matrix, Mode.DOWNSAMPLE, 32, 32), 32, 32, 1, 1)[0, 0]
    taps = matrix.reshape(32, 3, 3, 32)
    order = [(0, 0), (0, 2), (2, 0), (2, 2), (0, 1), (2, 1), (1, 0), (1, 2), (1, 1)]
    for step, (ty, tx) in enumerate(order):
        assert torch.equal(got[step], taps[:, ty, tx])


def test_packed_upsample_keeps_parities_apart():
    matrix = torch.randn(32, 16 * 32)
    got = unpack(pack(matrix, Mode.UPSAMPLE, 32, 32), 32, 32, 1, 4)[0]
    assert torch.equal(got.permute(2, 0, 1, 3).reshape(32, -1), matrix)


def test_weights_are_packed_under_another_default_device():
    matrix = torch.arange(64 * 9 * 64, dtype=torch.float32).reshape(64, -1)
    packed = pack(matrix, Mode.CONV, 64, 64)
    with torch.device("meta"):
        assert torch.equal(pack(matrix, Mode.CONV, 64, 64), packed)


@pytest.mark.parametrize("columns", [96, 144, 192, 288, 576, 1152])
def test_channel_order_gives_each_thread_neighbours_in_every_group(columns):
    """Eight of 32, and four in the last group of a block of 144: what one thread loads and stores at once."""
    order = channel_order(columns)
    assert sorted(order.tolist()) == list(range(columns))
    share = 144 if columns % 144 == 0 else columns
    for block in range(0, columns, share):
        for group in range(0, share, 32):
            width = min(32, share - group)
            for quad in range(4):  # columns of one thread: 8 j + 2 quad + {0, 1}
                held = [block + group + 8 * j + 2 * quad + e for j in range(width // 8) for e in (0, 1)]
                first = block + group + width // 4 * quad
                assert order[held].tolist() == list(range(first, first + width // 4))


@pytest.mark.parametrize(("mode", "channels", "out"), SCHEDULES)
def test_packed_weights_of_every_layer_unpack_to_the_weights(mode, channels, out):
    """Numbers that 16 bits hold exactly; what the last chunk has too many of is zeros."""
    taps, parities = {Mode.CONV: (9, 1), Mode.DOWNSAMPLE: (9, 1), Mode.UPSAMPLE: (4, 4), Mode.POINTWISE: (1, 1)}[mode]
    draw = torch.Generator().manual_seed(0)
    matrix = torch.randint(-2048, 2048, (out, parities * taps * channels), generator=draw).to(torch.float16)
    for kc, split in {(schedule.kc, schedule.split) for schedule in SCHEDULES[mode, channels, out]}:
        packed = pack(matrix, mode, channels, kc).reshape(parities, -1, split, out // split, kc)
        assert packed.shape[1] == Variant(mode, channels, out, 0, False, True, 2, SCHEDULES[mode, channels, out][0]).steps()
        got = unswizzled(packed)
        if mode == Mode.DOWNSAMPLE:  # planes of taps, each with all chunks
            got = got.squeeze(0)
            begin, found = 0, {}
            for py, px in ((0, 0), (0, 1), (1, 0), (1, 1)):
                plane = [(ty, tx) for ty in range(py, 3, 2) for tx in range(px, 3, 2)]
                steps = channels // kc * len(plane)
                part = got[begin : begin + steps].reshape(channels // kc, len(plane), out, kc)
                found |= {3 * ty + tx: part[:, i] for i, (ty, tx) in enumerate(plane)}
                begin += steps
            unpacked = torch.stack([found[tap].permute(1, 0, 2).reshape(out, -1) for tap in range(9)], 1)
            assert torch.equal(unpacked.reshape(out, -1), matrix)
            continue
        chunks = -(-channels // kc)
        by_tap = got.reshape(parities, chunks, taps, out, kc).permute(3, 0, 2, 1, 4).reshape(out, parities * taps, -1)
        assert not by_tap[..., channels:].any()
        assert torch.equal(by_tap[..., :channels].reshape(out, -1), matrix)


def unswizzled(packed: torch.Tensor) -> torch.Tensor:
    """``[parity, step, split, column, kc]`` as the kernel's threads read it: ``[parity, step, channel, kc]``."""
    parities, steps, split, columns, kc = packed.shape
    shift, mask = (7, 0x70) if kc == 64 else (7, 0x30)
    address = (torch.arange(columns)[:, None] * kc + torch.arange(kc)) * 2
    address = (address ^ ((address >> (shift - 4)) & mask)) // 2
    read = packed.reshape(parities, steps, split, -1)[..., address]
    own = torch.empty_like(read)
    own[:, :, :, channel_order(columns)] = read
    return own.reshape(parities, steps, split * columns, kc)


def test_a_partial_chunk_is_filled_up_with_zeros():
    """80 channels, those of the latent of Qwen-Image 2.1: two chunks and a half."""
    matrix = 1 + torch.rand(1152, 9 * 80)
    blocks = unswizzled(pack(matrix, Mode.CONV, 80, 32).reshape(1, 27, 8, 144, 32))[0]
    assert not blocks[18:, :, 16:].any() and blocks[:18].all() and blocks[18:, :, :16].all()


def test_a_pointwise_convolution_has_one_tap():
    matrix = torch.arange(144 * 96, dtype=torch.float32).reshape(144, 96)
    blocks = unswizzled(pack(matrix, Mode.POINTWISE, 96, 32).reshape(1, 3, 1, 144, 32))[0]
    assert torch.equal(blocks.permute(1, 0, 2).reshape(144, 96), matrix)


@pytest.mark.parametrize("key", SCHEDULES, ids=str)
def test_every_schedule_fits_into_shared_memory_and_cannot_wait_forever(key):
    found = list(variants_of(*key))
    assert {variant.schedule.split for variant in found} == {schedule.split for schedule in SCHEDULES[key]}
    for variant in found:
        check_schedule(variant.fitted())
        assert variant.mode == Mode.CONV or variant.channels % 32 == 0  # only CONV reads a chunk that is not full


def test_fitting_gives_up_buffers_of_weights_alone_and_no_more_than_it_must():
    fewer = 0
    for variant in (v for key in SCHEDULES for v in variants_of(*key)):
        fitted, asked = variant.fitted(), variant.schedule.b_stages
        kept = fitted.schedule.b_stages
        assert dataclasses.replace(fitted, schedule=dataclasses.replace(fitted.schedule, b_stages=asked)) == variant
        if variant.shared_bytes() <= SHARED_LIMIT:
            assert fitted == variant
            continue
        more = dataclasses.replace(fitted, schedule=dataclasses.replace(fitted.schedule, b_stages=kept + 1))
        assert more.shared_bytes() > SHARED_LIMIT
        fewer += 1
    assert fewer


@pytest.mark.parametrize(("size", "clusters"), [(1, 132), (2, 66), (4, 33), (8, 16)])
def test_without_the_drivers_counts_clusters_lie_anywhere(size, clusters):
    assert Room(132).of(size) == clusters


def test_room_is_what_the_driver_counted_and_at_least_one_cluster():
    """An H100's partitions have room for fewer clusters than its multiprocessors would."""
    room = Room(132, ((2, 66), (4, 32), (8, 14), (16, 0)))
    assert [room.of(size) for size in (1, 2, 4, 8, 16)] == [132, 66, 32, 14, 1]
    assert Room(3).of(8) == 1
    wide = SCHEDULES[Mode.CONV, 1152, 1152][0]
    assert wide.split == 8
    tiles = tile_count(wide, Mode.CONV, 1, 64, 64)[2]
    assert grid_blocks(wide, Mode.CONV, tiles, room) == 14 * 8 and grid_blocks(wide, Mode.CONV, 5, room) == 5 * 8
    assert rounds(wide, Mode.CONV, 1, 64, 64, room) == tiles / 14


def test_the_driver_is_asked_for_every_size_of_clusters_that_a_schedule_has(monkeypatch):
    asked = []

    def count(cubin, name, size, threads, shared_bytes, device):
        asked.append((cubin, name, size, threads, shared_bytes, device))
        return 100 // size

    monkeypatch.setattr(nvrtc, "compile_cubin", lambda source, defines: source)
    monkeypatch.setattr(driver, "clusters_at_once", count)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=114))
    room_of.cache_clear()
    try:
        assert room_of(3) == Room(114, ((2, 50), (4, 25), (8, 12)))
        room_of(3)
    finally:
        room_of.cache_clear()
    probe = kernel_source("cluster_probe")
    assert asked == [(probe, "cluster_probe", size, 384, SHARED_LIMIT, 3) for size in (2, 4, 8)]
    assert 'extern "C" __global__ void cluster_probe()' in probe
    most = max(schedule.threads for choices in SCHEDULES.values() for schedule in choices)
    assert most == 384  # a probe of more room than a kernel needs would count too few


def test_counting_clusters_asks_for_the_dimension_of_a_cluster(monkeypatch):
    class Library:
        def cuOccupancyMaxActiveClusters(self, count, function, config):
            c = config._obj
            attribute = c.attributes[0]
            assert (tuple(c.grid), tuple(c.block), c.shared_bytes, c.attribute_count) == ((8, 1, 1), (384, 1, 1), 1000, 1)
            assert (attribute.id, list(attribute.value)[:3]) == (4, [8, 1, 1]) and function == "function"
            count._obj.value = 14
            return 0

    monkeypatch.setattr(driver, "_cuda", Library)
    monkeypatch.setattr(driver, "LoadedKernel", lambda *arguments: SimpleNamespace(function="function"))
    assert driver.clusters_at_once(b"cubin", "cluster_probe", 8, 384, 1000, 0) == 14


def test_small_images_get_narrow_tiles():
    narrow = choose_schedule(Mode.CONV, 384, 384, 1, 64, 64, H200)
    wide = choose_schedule(Mode.CONV, 384, 384, 1, 256, 256, H200)
    assert (narrow.mb, wide.mb) == (1, 2)


def test_tiles_cover_the_image_and_parities_share_the_grid_equally():
    schedule = SCHEDULES[Mode.UPSAMPLE, 192, 96][0]
    tiles_x, tiles_y, tiles = tile_count(schedule, Mode.UPSAMPLE, 2, 37, 43)
    assert (tiles_x, tiles_y, tiles) == (3, 5, 2 * 15 * 4)
    assert grid_blocks(schedule, Mode.UPSAMPLE, tiles, Room(131)) % 4 == 0
    assert grid_blocks(schedule, Mode.CONV, 1, H200) == 1


def test_reasons(monkeypatch):
    monkeypatch.setattr(nvrtc, "library", lambda: None)
    monkeypatch.setattr(driver, "library", lambda: None)
    reasons = unsupported((8, 0), Mode.CONV, 100, 96, torch.float32)
    assert [part for part in ("8.0", "100 -> 96", "float32", "NVRTC", "libcuda") if not any(part in r for r in reasons)] == []
    assert any("no CUDA device" in r for r in unsupported(None, Mode.CONV, 96, 96, torch.bfloat16))


def test_no_reasons_where_it_runs(monkeypatch):
    monkeypatch.setattr(nvrtc, "library", object)
    monkeypatch.setattr(driver, "library", object)
    assert unsupported((9, 0), Mode.CONV, 96, 96, torch.bfloat16) == []


def test_layer_on_the_cpu_is_refused_with_reasons():
    with pytest.raises(ValueError, match="no CUDA device"):
        Conv3x3(ConvWeights(torch.zeros(96, 864, dtype=torch.bfloat16), torch.zeros(96), 96, 9))


def test_missing_nvrtc_is_a_compile_error(monkeypatch, tmp_path):
    monkeypatch.setattr(nvrtc, "library", lambda: None)
    with pytest.raises(nvrtc.CompileError, match="not installed"):
        nvrtc.compile_cubin("int x;", {}, tmp_path)


def test_compiled_kernels_are_read_back_and_written_whole(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(nvrtc, "version", lambda: "13.0")
    monkeypatch.setattr(nvrtc, "_compile", lambda source, options: calls.append(options) or b"cubin")
    for _ in range(2):
        assert nvrtc.compile_cubin("source", {"A": 1}, tmp_path) == b"cubin"
    assert nvrtc.compile_cubin("source", {"A": 2}, tmp_path) == b"cubin"
    assert len(calls) == 2 and "-DA=1" in calls[0]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".cubin", ".cubin"]


def test_unwritable_cache_only_warns(monkeypatch, tmp_path, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setattr(nvrtc, "_compile", lambda source, options: b"cubin")
    assert nvrtc.compile_cubin("source", {}, blocked / "sub") == b"cubin"
    assert "cannot keep compiled kernels" in caplog.text


@pytest.mark.parametrize("name", ["conv", "attention"])
def test_a_kernel_includes_what_it_uses_by_name_and_has_its_entry_point_in_its_own_file(name):
    texts = {f"{name}.cu": kernel_source(name), **headers()}
    for file, text in texts.items():
        included = re.findall(r'#include "(.+)"', text)
        assert set(included) <= set(headers()) and (file.endswith(".cu") or text.count("#pragma once") == 1)
        assert text.count('extern "C"') == int(file == f"{name}.cu")
    assert re.search(rf'extern "C" __global__ .*\n{name}\(', kernel_source(name))


def test_the_matrix_instructions_name_every_accumulator():
    """An instruction of 2 * n columns names the sums 0 to n - 1, each once: its list begins with that of a narrower one."""
    lists = headers()["wgmma.cuh"]
    bodies = dict(re.findall(r"#define WGMMA_(\d+) ((?:.*\\\n)*.*)", lists[: lists.index("#define WGMMA_OUT_8")]))

    def named(count: str) -> list[int]:
        inner = re.search(r"WGMMA_(\d+)", bodies[count])
        return (named(inner[1]) if inner else []) + [int(place) for place in re.findall(r"%(\d+)", bodies[count])]

    assert set(bodies) == {"16", "48", "72", "96"}
    for count in bodies:
        assert named(count) == list(range(int(count)))
    for columns, sums in re.findall(r'WGMMA\("(\d+)", WGMMA_(\d+)', lists):
        assert int(columns) == 2 * int(sums)


SIZES = {"int": 4, "u32": 4, "float": 4, "i64": 8}


@pytest.mark.parametrize(
    ("text", "arguments"), [(headers()["conv_tile.cuh"], conv3x3._Args), (kernel_source("attention"), attention._Args)]
)
def test_arguments_are_the_same_on_both_sides(text, arguments):
    """Names, order and sizes; the kernel checks the size of the whole when it is compiled."""
    body = re.sub(r"//.*", "", re.search(r"struct Args \{(.*?)\n\};", text, re.DOTALL)[1])
    found = []
    for declaration in filter(None, map(str.strip, body.split(";"))):
        kind, names = re.fullmatch(r"(?:const )?(\w+\*?) (.+)", declaration, re.DOTALL).groups()
        found += [(name.strip(), 8 if kind.endswith("*") else SIZES[kind]) for name in names.split(",")]
    assert found == [(name, ctypes.sizeof(kind)) for name, kind in arguments._fields_]
    assert "static_assert(sizeof(Args) == ARGS_BYTES" in text


def test_headers_are_handed_over_by_name_and_tell_compiled_kernels_apart(monkeypatch, tmp_path):
    handed = []
    monkeypatch.setattr(nvrtc, "_compile", lambda source, options, headers: handed.append(headers) or b"cubin")
    for text in ("int a;", "int b;", "int a;"):
        nvrtc.compile_cubin('#include "a.cuh"', {}, tmp_path, headers={"a.cuh": text})
    assert handed == [{"a.cuh": "int a;"}, {"a.cuh": "int b;"}]


@pytest.mark.skipif(nvrtc.library() is None, reason="needs NVRTC")
def test_compiler_errors_name_the_header(tmp_path):
    with pytest.raises(nvrtc.CompileError, match=r"broken\.cuh"):
        nvrtc.compile_cubin('#include "broken.cuh"', {}, tmp_path, headers={"broken.cuh": "nonsense"})
    wrong = Variant(Mode.CONV, 96, 96, 0, False, True, 0, SCHEDULES[Mode.CONV, 96, 96][0]).defines()
    with pytest.raises(nvrtc.CompileError, match="_Args in conv3x3.py must agree"):
        nvrtc.compile_cubin(kernel_source("conv"), wrong | {"BF16": 1, "ARGS_BYTES": 7}, tmp_path, headers=headers())


def test_attention_fits_into_shared_memory():
    for split in (False, True):
        assert attention._defines(split, torch.float16)["SHARED_BYTES"] <= SHARED_LIMIT


def test_aligned_storage_is_aligned():
    assert ctypes.addressof(driver.aligned_storage(128, 64)) % 64 == 0


@pytest.mark.parametrize("current", [1, 0])
@pytest.mark.parametrize("version", [12020, 12030])
def test_a_launch_is_made_on_the_current_stream_of_the_kernels_device(monkeypatch, current, version):
    made, entered = [], []

    class Library:
        def cuDriverGetVersion(self, out):
            out._obj.value = version
            return 0

        def cuLaunchKernelEx(self, config, function, arguments, extra):
            c = config._obj
            parameters = [ctypes.cast(arguments[i], ctypes.POINTER(ctypes.c_int))[0] for i in range(2)]
            attribute = c.attributes[0]
            made.append((tuple(c.grid), tuple(c.block), c.shared_bytes, c.stream, c.attribute_count, parameters))
            assert (attribute.id, attribute.value[0]) == (6, 1) and function == "function" and extra is None
            return 0

    class Device:
        def __init__(self, index):
            entered.append(index)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(driver, "_cuda", Library)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 100 + index, raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device", Device)
    driver._overlaps.cache_clear()
    kernel = driver.LoadedKernel.__new__(driver.LoadedKernel)
    kernel.device, kernel.shared_bytes, kernel.function = 1, 5, "function"
    try:
        driver.PreparedLaunch(kernel, (2, 3, 4), 384, (ctypes.c_int(7), ctypes.c_int(8)))()
    finally:
        driver._overlaps.cache_clear()
    assert made == [((2, 3, 4), (384, 1, 1), 5, 101, int(version >= 12030), [7, 8])]
    assert entered == ([] if current == 1 else [1])


# ---- GPU ------------------------------------------------------------------------------------------------------------

_SM90 = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
on_sm90 = pytest.mark.skipif(not _SM90, reason="needs a GPU of compute capability 9.0")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache directory with every kernel of these tests compiled, in parallel."""
    from concurrent.futures import ThreadPoolExecutor

    folder = tmp_path_factory.mktemp("cubin")
    plain, added = ((1, 0), (0, 2), (1, 1)), ((1, 2), (1, 0))  # whether x is written, and which norm
    variants = {
        dataclasses.replace(variant, write_x=bool(write_x), norm=norm).fitted()
        for key in SCHEDULES
        for variant in variants_of(*key)
        for write_x, norm in (added if variant.residual else plain)
    }
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda variant: conv3x3.compile_variant(variant, torch.bfloat16, folder), variants))
    return folder


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.float() - want).norm() / want.norm()).item()


@dataclasses.dataclass
class Example:
    """Random input and weights of one layer, and what PyTorch makes of them in fp32."""

    mode: Mode
    channels: int
    out: int
    grid: Grid
    dtype: torch.dtype
    shortcut: int = 0
    lower: int = 0  # UPSAMPLE: what odd rows of the output skip of the residual's channels
    narrower: int = 0  # DOWNSAMPLE: channels that the residual lacks

    def __post_init__(self):
        def randn(*shape):
            return torch.randn(*shape, device="cuda")

        b, h, w = self.grid.batch, self.grid.height, self.grid.width
        grids = {Mode.UPSAMPLE: self.grid.doubled(), Mode.DOWNSAMPLE: self.grid.halved()}
        self.after = grids.get(self.mode, self.grid)
        self.image = randn(b, self.channels, h, w).to(self.dtype)
        self.second = randn(b, self.shortcut, h, w).to(self.dtype) if self.shortcut else None
        beside = self.grid if self.mode == Mode.UPSAMPLE else self.after
        self.addend = randn(b, self.out + self.lower - self.narrower, beside.height, beside.width).to(self.dtype)
        self.gamma = (torch.rand(self.out, device="cuda") + 0.5) * self.out**0.5
        side = torch.Size((1, 1) if self.mode == Mode.POINTWISE else (3, 3))
        state = {
            "c.weight": randn(self.out, self.channels, *side) / (side.numel() * self.channels) ** 0.5,
            "c.bias": randn(self.out),
            "s.weight": randn(self.out, max(self.shortcut, 1), 1, 1) / max(self.shortcut, 1) ** 0.5,
            "s.bias": torch.zeros(self.out, device="cuda"),
        }  # fmt: skip
        packer = Packer(state, self.dtype, torch.device("cuda"))
        if self.mode == Mode.UPSAMPLE:
            self.weights = packer.upsample("c")
        else:
            self.weights = packer.conv("c", "s" if self.shortcut else None)

    def value(self) -> torch.Tensor:
        """The convolution without residual, NCHW fp32, from the rounded weights."""
        matrix, image = self.weights.weight.float(), self.image.float()
        if self.mode == Mode.UPSAMPLE:
            kernels = matrix.view(self.out, 2, 2, 2, 2, self.channels)
            out = image.new_empty(self.grid.batch, self.out, self.after.height, self.after.width)
            padded = F.pad(image, (1, 1, 1, 1))
            for py in (0, 1):
                for px in (0, 1):
                    part = F.conv2d(padded, kernels[:, py, px].permute(0, 3, 1, 2), self.weights.bias)
                    out[:, :, py::2, px::2] = part[:, :, py : py + self.grid.height, px : px + self.grid.width]
            return out
        if self.mode == Mode.POINTWISE:
            return F.conv2d(image, matrix[:, :, None, None], self.weights.bias)
        kernel = matrix[:, : 9 * self.channels].view(self.out, 3, 3, self.channels).permute(0, 3, 1, 2)
        if self.mode == Mode.DOWNSAMPLE:
            return F.conv2d(F.pad(image, (0, 1, 0, 1)), kernel, self.weights.bias, stride=2)
        out = F.conv2d(image, kernel, self.weights.bias, padding=1)
        if self.shortcut:
            out = out + F.conv2d(self.second.float(), matrix[:, 9 * self.channels :, None, None])
        return out

    def with_addend(self, value: torch.Tensor) -> torch.Tensor:
        """``value`` plus the residual: of an upsampling each pixel to four, of a downsampling to the first channels."""
        addend = self.addend.float()
        if self.mode == Mode.UPSAMPLE:
            wide = addend.repeat_interleave(2, 3)
            rows = wide[:, : self.out], wide[:, self.lower : self.lower + self.out]  # even ones, odd ones
            addend = torch.stack(rows, 3).flatten(2, 3)
        return value + F.pad(addend, (0, 0, 0, 0, 0, self.narrower))

    def normed(self, value: torch.Tensor, silu: bool) -> torch.Tensor:
        out = value * torch.rsqrt(value.square().sum(1, keepdim=True).clamp_min(1e-24)) * self.gamma.view(1, -1, 1, 1)
        return F.silu(out) if silu else out

    def poisoned(self) -> torch.Tensor:
        return torch.full((self.after.rows, self.out), float("nan"), device="cuda", dtype=self.dtype)


def assert_matches(got: torch.Tensor, want: torch.Tensor, grid: Grid) -> None:
    assert not got[~pixel_rows(grid, "cuda")].any(), "halo must be zero"
    assert relative_error(from_flat(got, grid), want) < TOLERANCE[got.dtype]


class Chain:
    """Launches over two matrices in turn: each overwrites what the one before it reads, beside it."""

    def __init__(self, example: Example, layer: Conv3x3, length: int):
        self.example, self.layer, self.length = example, layer, length
        self.start, self.lines = to_flat(example.image), layer.lines(example.grid)
        self.matrices = [self.start.clone(), torch.empty_like(self.start)]
        count = example.grid.batch * self.lines.per_image
        self.counters = torch.zeros(length, 1, count, dtype=torch.int32, device="cuda")

    def run(self, overlapped: bool) -> torch.Tensor:
        self.matrices[0].copy_(self.start)
        self.counters.zero_()
        for i in range(self.length):
            a, normed = self.matrices[i % 2], self.matrices[1 - i % 2]
            done = self.counters[i] if overlapped else None
            ready = (self.counters[i - 1], self.lines) if overlapped and i else None
            self.layer(a, self.example.grid, normed=normed, gamma=self.example.gamma, done=done, ready=ready)
        return self.matrices[self.length % 2].clone()


@pytest.fixture(autouse=True)
def exact_fp32_reference(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def run_all_epilogues(example: Example, layer: Conv3x3, residual: bool = True) -> None:
    a = to_flat(example.image)
    more = {} if example.second is None else {"shortcut": to_flat(example.second)}
    value = example.value()

    x, normed = example.poisoned(), example.poisoned()
    layer(a, example.grid, x=x, **more)
    assert_matches(x, value, example.after)
    layer(a, example.grid, normed=normed, gamma=example.gamma, **more)
    assert_matches(normed, example.normed(value, True), example.after)
    x, normed = example.poisoned(), example.poisoned()
    layer(a, example.grid, x=x, normed=normed, gamma=example.gamma, silu=False, **more)
    assert_matches(x, value, example.after)
    assert_matches(normed, example.normed(value, False), example.after)
    if not residual:
        return
    value, addend = example.with_addend(value), to_flat(example.addend)
    if example.mode == Mode.UPSAMPLE:
        more["lower"] = example.lower
    x, normed = example.poisoned(), example.poisoned()
    layer(a, example.grid, x=x, normed=normed, gamma=example.gamma, residual=addend, **more)
    assert_matches(x, value, example.after)
    assert_matches(normed, example.normed(value, True), example.after)
    if addend.shape == x.shape:  # in place
        layer(a, example.grid, x=addend, residual=addend, **more)
        assert_matches(addend, value, example.after)


@on_sm90
@pytest.mark.gpu
@pytest.mark.parametrize(("mode", "channels", "out", "index"), CASES)
def test_every_kernel_matches_pytorch(mode, channels, out, index, cache):
    schedule = SCHEDULES[mode, channels, out][index]
    lowers = lowers_of(mode, out)
    example = Example(mode, channels, out, Grid(2, 37, 43), torch.bfloat16, lower=max(lowers, default=0))
    layer = Conv3x3(example.weights, mode, schedules=(schedule,), cache=cache)
    run_all_epilogues(example, layer, residual=bool(lowers) or mode in (Mode.CONV, Mode.POINTWISE))


@on_sm90
@pytest.mark.gpu
@pytest.mark.parametrize(("out", "narrower"), [(192, 96), (384, 192), (768, 384), (768, 0)])
def test_a_downsampling_adds_a_residual_to_its_first_channels(out, narrower, cache):
    example = Example(Mode.DOWNSAMPLE, out, out, Grid(2, 37, 43), torch.bfloat16, narrower=narrower)
    run_all_epilogues(example, Conv3x3(example.weights, Mode.DOWNSAMPLE, cache=cache))


@on_sm90
@pytest.mark.gpu
@pytest.mark.parametrize(
    ("channels", "shortcut", "index"),
    [(n, s, i) for n in (144, 192, 288, 384, 576, 768) for s in sorted(shortcuts_of(n)) if s
     for i in range(len(SCHEDULES[Mode.CONV, n, n]))],
)  # fmt: skip
def test_shortcut_matches_pytorch(channels, shortcut, index, cache):
    example = Example(Mode.CONV, channels, channels, Grid(1, 29, 35), torch.bfloat16, shortcut)
    schedule = SCHEDULES[Mode.CONV, channels, channels][index]
    run_all_epilogues(example, Conv3x3(example.weights, schedules=(schedule,), cache=cache))


@on_sm90
@pytest.mark.gpu
@pytest.mark.parametrize("channels", [96, 144, 384, 768, 1152])
def test_float16_matches_pytorch(channels, cache):
    example = Example(Mode.CONV, channels, channels, Grid(1, 20, 50), torch.float16)
    run_all_epilogues(example, Conv3x3(example.weights, cache=cache))


@on_sm90
@pytest.mark.gpu
@pytest.mark.parametrize("size", [(1, 1, 1), (3, 2, 7), (1, 16, 16), (1, 17, 129), (4, 64, 5)])
@pytest.mark.parametrize("channels", [96, 144, 192, 288, 384, 1152])
def test_sizes_around_tiles(size, channels, cache):
    example = Example(Mode.CONV, channels, channels, Grid(*size), torch.bfloat16)
    run_all_epilogues(example, Conv3x3(example.weights, cache=cache))


@on_sm90
@pytest.mark.gpu
@pytest.mark.parametrize("channels", [96, 144, 192, 384, 1152])
def test_repeats_graphs_streams_and_threads_agree_bit_for_bit(channels, cache):
    import threading

    example = Example(Mode.CONV, channels, channels, Grid(1, 200, 136), torch.bfloat16)
    layer, a, residual = Conv3x3(example.weights, cache=cache), to_flat(example.image), to_flat(example.addend)
    results = [(example.poisoned(), example.poisoned()) for _ in range(4)]

    def launch(pair):
        layer(a, example.grid, x=pair[0], normed=pair[1], gamma=example.gamma, residual=residual)

    launch(results[0])
    launch(results[1])
    torch.cuda.synchronize()
    for tensor in results[1]:
        tensor.fill_(float("nan"))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch(results[1])
    graph.replay()

    def in_thread():
        with torch.cuda.stream(torch.cuda.Stream()):
            launch(results[2])
        torch.cuda.synchronize()

    thread = threading.Thread(target=in_thread)
    thread.start()
    for _ in range(20):
        launch(results[3])
    thread.join()
    torch.cuda.synchronize()
    for pair in results[1:]:
        assert torch.equal(pair[0], results[0][0]) and torch.equal(pair[1], results[0][1])


@on_sm90
@pytest.mark.gpu
@pytest.mark.parametrize(("channels", "index"), [(n, i) for mode, c, n, i in CASES if mode == Mode.CONV and c == n])
def test_launches_that_wait_for_tiles_instead_of_kernels(channels, index, cache):
    example = Example(Mode.CONV, channels, channels, Grid(2, 150, 100), torch.bfloat16)
    layer = Conv3x3(example.weights, schedules=(SCHEDULES[Mode.CONV, channels, channels][index],), cache=cache)
    chain = Chain(example, layer, 9)
    want = chain.run(overlapped=False)
    assert all(torch.equal(chain.run(overlapped=True), want) for _ in range(10))
    assert (chain.counters == chain.lines.finished).all()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = chain.run(overlapped=True)
    for _ in range(20):
        graph.replay()
        assert torch.equal(result, want)


@on_sm90
@pytest.mark.gpu
def test_wrong_calls_are_refused(cache):
    example = Example(Mode.CONV, 96, 96, Grid(1, 8, 8), torch.bfloat16)
    layer, a = Conv3x3(example.weights, cache=cache), to_flat(example.image)
    with pytest.raises(ValueError, match="nothing to write"):
        layer(a, example.grid)
    with pytest.raises(ValueError, match="needs gamma"):
        layer(a, example.grid, normed=example.poisoned())
    with pytest.raises(ValueError, match="input: expected"):
        layer(a[:-1], example.grid, x=example.poisoned())
    with pytest.raises(ValueError, match="shortcut"):
        layer(a, example.grid, x=example.poisoned(), shortcut=a)
    counters = torch.zeros(1, 3, dtype=torch.int32, device="cuda")
    with pytest.raises(ValueError, match="done: expected"):
        layer(a, example.grid, x=example.poisoned(), done=counters)
    with pytest.raises(ValueError, match="ready: expected"):
        layer(a, example.grid, x=example.poisoned(), ready=(counters, layer.lines(example.grid)))

"""Tuning without a GPU: candidates, the choice among measured times, the file, who reads it. At the end, one with a GPU."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from qwen_vae_accel.backends.fused import backend as backend_module
from qwen_vae_accel.kernels import FusedConfig, FusedDecoder, FusedEncoder, compiling
from qwen_vae_accel.kernels.float8 import block_layers, calibrated_layers
from qwen_vae_accel.kernels.gpu import Gpu, describe_gpu
from qwen_vae_accel.kernels.layout import Grid
from qwen_vae_accel.kernels.network import QWEN_IMAGE, QWEN_IMAGE_21, Kind, describe, published
from qwen_vae_accel.kernels.sm90 import attention as attention_sm90
from qwen_vae_accel.kernels.sm90 import layers as layers_module
from qwen_vae_accel.kernels.sm90.layers import Sm90Layers
from qwen_vae_accel.kernels.sm90.schedules import FLOAT8_SCHEDULES, MODES, SCHEDULES, Mode, Room, Schedule, choose_schedule
from qwen_vae_accel.kernels.triton.attention import _qkv_kernel
from qwen_vae_accel.kernels.tuning import measure
from qwen_vae_accel.kernels.tuning.candidates import candidates
from qwen_vae_accel.kernels.tuning.choice import Problem, choose
from qwen_vae_accel.kernels.tuning.configs import AttentionConfig, ConvConfig, attention_fits, conv_fits, conv_waves
from qwen_vae_accel.kernels.tuning.keys import KernelKey
from qwen_vae_accel.kernels.tuning.measure import Tuner, random_networks
from qwen_vae_accel.kernels.tuning.selection import Tuning
from qwen_vae_accel.kernels.tuning.stored import Machine, Measured, TunedGpu, read_tuned, tuning_path, write_tuned
from qwen_vae_accel.kernels.tuning.tables import ATTENTION_KEY
from qwen_vae_accel.kernels.weights import ConvWeights
from qwen_vae_accel.model.topology import Topology
from tests.kernels.cases import check_schedule, variants_of
from tests.kernels.test_network import StandInLayers

H200 = Gpu(132, 232448, True, True)
ADA = Gpu(128, 101376, False, False)
RELATIVE = {ConvConfig: "wave", Schedule: "cost", AttentionConfig: "rate"}
MACHINE = Machine("NVIDIA H200", "9.0", 132, "3.6.0")
CONV_KEYS = [
    KernelKey(Kind.IN, 16, 384), KernelKey(Kind.IN, 3, 96), KernelKey(Kind.QKV, 384, 1152), KernelKey(Kind.QKV, 1152, 3456),
    KernelKey(Kind.PROJ, 384, 384, epilogue="residual x norm"), KernelKey(Kind.CONV, 96, 96, epilogue="norm"),
    KernelKey(Kind.CONV, 192, 192, epilogue="residual x norm"), KernelKey(Kind.CONV, 384, 384, epilogue="x"),
    KernelKey(Kind.UP, 384, 192), KernelKey(Kind.DOWN, 192, 192),
    KernelKey(Kind.CONV, 96, 96, float8=True, epilogue="norm"), KernelKey(Kind.CONV, 384, 384, float8=True, epilogue="norm"),
    KernelKey(Kind.UP, 192, 96, float8=True),
]  # fmt: skip
SCHEDULE_KEYS = [
    *(KernelKey(Kind.CONV, channels, channels, sm90=True) for channels in (96, 192, 384)),
    KernelKey(Kind.UP, 192, 96, sm90=True), KernelKey(Kind.DOWN, 384, 384, sm90=True),
    KernelKey(Kind.CONV, 192, 384, float8=True, sm90=True), KernelKey(Kind.UP, 384, 192, float8=True, sm90=True),
    # Qwen-Image 2.1
    *(KernelKey(Kind.CONV, channels, out, sm90=True) for channels, out in ((80, 1152), (1152, 576), (144, 144), (768, 768))),
    *(KernelKey(Kind.PROJ, channels, channels, sm90=True) for channels in (768, 1152)),
    *(KernelKey(Kind.UP, channels, channels, sm90=True) for channels in (288, 576, 1152)),
    KernelKey(Kind.DOWN, 768, 768, sm90=True),
    *(KernelKey(Kind.CONV, channels, channels, float8=True, sm90=True) for channels in (144, 1152)),
    *(KernelKey(Kind.UP, channels, channels, float8=True, sm90=True) for channels in (288, 576, 1152)),
]  # fmt: skip


def meta_networks(*, float8: bool = False, topology: Topology = QWEN_IMAGE) -> list:
    tuning = Tuning(sm90=topology == QWEN_IMAGE_21)
    config, device = FusedConfig(graphs=0, gpu=H200, tuning=tuning), torch.device("meta")
    decoder, encoder = (
        {name: torch.empty(shape, device="meta") for name, shape in describe(topology, method).parameters().items()}
        for method in ("decode", "encode")
    )
    networks = [
        FusedDecoder(decoder, dtype=torch.bfloat16, device=device, config=config),
        FusedEncoder(encoder, dtype=torch.bfloat16, device=device, config=config),
    ]
    if float8:
        network = describe(topology, "decode")
        scales = dict.fromkeys([*block_layers(network), *calibrated_layers(network)], 1.0)
        networks.append(FusedDecoder(decoder, dtype=torch.bfloat16, device=device, config=config, float8=scales))
    return networks


# ---- candidates -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", [H200, ADA], ids=["H200", "without bulk copies"])
@pytest.mark.parametrize("key", [*CONV_KEYS, ATTENTION_KEY], ids=str)
def test_candidates_fit_and_are_few(key, device):
    found = candidates(key, device)
    assert 2 <= len(found) == len(set(found)) <= 24
    for config in found:
        if isinstance(config, AttentionConfig):
            assert attention_fits(config, key, device)
        else:
            assert conv_fits(config, key, device) and config.wave == 1.0
            assert key.kind is Kind.IN or key.in_channels % config.block_k == 0
            assert config.per_sm == 0 or key.kind in (Kind.CONV, Kind.PROJ)


@pytest.mark.parametrize("key", SCHEDULE_KEYS, ids=str)
def test_schedules_to_try_keep_the_rules_of_the_kernel(key):
    """With every epilogue that a layer of these widths has; shipped ones are fitted to it when they run."""
    mode = MODES[key.kind]
    found = candidates(key, H200)
    assert 2 <= len(found) == len(set(found)) <= 24
    for variant in variants_of(mode, key.in_channels, key.out_channels, key.float8):
        for schedule in found:
            check_schedule(dataclasses.replace(variant, schedule=schedule).fitted())
            assert schedule.cost == 1.0


@pytest.mark.parametrize(
    "key",
    [
        KernelKey(Kind.CONV, 96, 100, epilogue="norm"), KernelKey(Kind.CONV, 96, 384, sm90=True), KernelKey(Kind.OUT, 96, 3),
        KernelKey(Kind.CONV, 96, 96, epilogue="norm", sm90=True), KernelKey(Kind.ATTENTION, 768, 768),
        KernelKey(Kind.QKV, 384, 1152, sm90=True), KernelKey(Kind.DOWN, 96, 96, float8=True),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_kernel_has_no_candidates(key):
    with pytest.raises(ValueError, match="no kernel"):
        candidates(key, H200)


# ---- the choice -----------------------------------------------------------------------------------------------------

PROBLEMS = [Problem("conv3x3 384->384 norm", f"1x{side}x{side}", Grid(1, side, side)) for side in (64, 128, 256)]
KEY = KernelKey(Kind.CONV, 384, 384, epilogue="norm")
WIDE, NARROW, OTHER = ConvConfig(128, 64, 8, 3), ConvConfig(64, 64, 4, 3), ConvConfig(64, 64, 8, 2)


def times(config: ConvConfig, wave: float) -> dict[Problem, float]:
    return {problem: conv_waves(config, problem.grid, H200) * wave for problem in PROBLEMS}


def test_the_fastest_wins_alone():
    spent = {config: dict.fromkeys(PROBLEMS, ms) for config, ms in ((WIDE, 1.0), (NARROW, 0.5), (OTHER, 2.0))}
    assert choose(KEY, spent, H200) == (NARROW,)


def test_small_tiles_for_small_images_with_their_relative_cost():
    spent = {WIDE: times(WIDE, 1.0), NARROW: times(NARROW, 0.57), OTHER: times(OTHER, 0.9)}
    first, second = choose(KEY, spent, H200)
    assert (first, dataclasses.replace(second, wave=1.0)) == (WIDE, NARROW) and second.wave == pytest.approx(0.57)
    tuning = Tuning(measured={KEY: (first, second)})
    for problem in PROBLEMS:
        taken = tuning.conv(KEY, problem.grid, H200)
        assert spent[dataclasses.replace(taken, wave=1.0)][problem] == min(found[problem] for found in spent.values())


def test_what_failed_anywhere_is_not_chosen():
    spent = {WIDE: times(WIDE, 1.0), NARROW: {PROBLEMS[0]: 0.001, PROBLEMS[1]: math.inf}, OTHER: {}}
    assert choose(KEY, spent, H200) == (WIDE,)
    assert choose(KEY, {WIDE: {}}, H200) == ()


def test_schedules_are_chosen_by_their_load():
    wide, narrow = candidates(SCHEDULE_KEYS[2], H200)[:2]
    large, small = PROBLEMS[2], PROBLEMS[0]
    spent = {wide: {large: 1.0, small: 0.1}, narrow: {large: 1.4, small: 0.06}}
    found = choose(SCHEDULE_KEYS[2], spent, H200)
    assert {dataclasses.replace(schedule, cost=1.0) for schedule in found} == {wide, narrow}
    for problem, expected in ((large, wide), (small, narrow)):
        taken = choose_schedule(Mode.CONV, 384, 384, 1, problem.grid.height, problem.grid.width, Room(132), schedules=found)
        assert dataclasses.replace(taken, cost=1.0) == expected


def test_attention_gets_the_rate_it_was_measured_at():
    config = AttentionConfig(128, 32, 8, 2)
    problem = Problem("attention 384", "1x128x128", Grid(1, 128, 128))
    (found,) = choose(ATTENTION_KEY, {config: {problem: 2.0}}, H200)
    assert dataclasses.replace(found, rate=config.rate) == config
    assert found.rate == pytest.approx(4 * 128 * 128**2 * 384 * 132 / 2e-3, rel=0.01)  # one wave of 128 tiles


# ---- measuring, with a clock that knows who is fastest --------------------------------------------------------------


class FakeClock:
    """A kernel's last candidate takes half the time of anything else."""

    def __init__(self, device: Gpu, broken: tuple = ()):
        self.device, self.broken, self.calls = device, broken, 0

    def prepare(self, program, memory) -> None:
        pass

    def __call__(self, trial, fastest: float = math.inf) -> float:
        self.calls += 1
        choices = trial.tuning.measured.get(trial.key, ())
        if self.broken and choices and choices[0] in self.broken:
            return math.inf
        best = candidates(trial.key, self.device)[-1]
        neutral = {RELATIVE[type(best)]: getattr(best, RELATIVE[type(best)])}
        return 0.5 if choices and dataclasses.replace(choices[0], **neutral) == best else 1.0


def sm90_layers(self, tuning: Tuning) -> Sm90Layers | None:
    return StandInLayers(torch.device("meta"), tuning) if tuning.sm90 else None


@pytest.mark.parametrize("sm90", [False, True])
def test_every_kernel_of_the_networks_gets_its_fastest(monkeypatch, sm90):
    if sm90:
        monkeypatch.setattr(FusedDecoder, "_sm90_layers", sm90_layers)
        monkeypatch.setattr(FusedEncoder, "_sm90_layers", sm90_layers)
    steps = []
    clock = FakeClock(H200)
    networks = meta_networks(float8=True)
    tuner = Tuner(networks, [(64, 64), (512, 512)], H200, clock=clock, progress=lambda *step: steps.append(step))
    kinds = {str(key.any_epilogue).replace(f" {key.in_channels}->{key.out_channels}", "") for key in tuner.candidates}
    layers = {"sm90 conv", "sm90 up", "sm90 down", "sm90 conv float8", "sm90 up float8", "conv float8"}
    triton = {"conv", "up", "down", "conv float8", "up float8"}
    assert kinds == {"in", "qkv", "proj", "attention"} | (layers if sm90 else triton)
    measured = tuner.run()
    assert [kernel.key for kernel in measured] == list(tuner.candidates)
    for kernel in measured:
        (choice,) = kernel.choices
        best = candidates(kernel.key, H200)[-1]
        assert dataclasses.replace(choice, rate=best.rate) == best if kernel.key == ATTENTION_KEY else choice == best
        assert kernel.milliseconds == pytest.approx(kernel.shipped_milliseconds / 2)
    assert all(done <= total for _, done, total in steps) and {text for text, *_ in steps} >= {"measure candidates"}


def test_every_kernel_of_qwen_image_21_gets_its_fastest(monkeypatch):
    """Encoder, decoder and the decoder in float8; where Triton does not have all kernels."""
    monkeypatch.setattr(FusedDecoder, "_sm90_layers", sm90_layers)
    monkeypatch.setattr(FusedEncoder, "_sm90_layers", sm90_layers)
    monkeypatch.setattr(StandInLayers, "to_host", lambda self, weights: weights)
    networks = meta_networks(float8=True, topology=QWEN_IMAGE_21)
    tuner = Tuner(networks, [(64, 64), (512, 512)], H200, clock=FakeClock(H200))
    places = {(key.kind, key.in_channels, key.out_channels, key.float8) for key in tuner.candidates if key.sm90}
    modes = {(MODES[kind], *widths, float8) for kind, *widths, float8 in places}
    wanted = {(*key, False) for key in SCHEDULES} | {(*key, True) for key in FLOAT8_SCHEDULES}
    first = {(layer.kind, layer.in_channels, layer.out_channels)
             for method in ("encode", "decode") for layer in published(method).kernel_layers()}  # fmt: skip
    kinds = {mode: kind for kind, mode in MODES.items()}
    assert modes <= wanted
    assert {place for place in wanted - modes if (kinds[place[0]], *place[1:3]) not in first} == set()
    rest = {str(key) for key in tuner.candidates if not key.sm90}
    assert rest == {"in 4->96", "qkv 768->2304", "qkv 1152->3456"}
    for kernel in tuner.run():
        (choice,) = kernel.choices
        assert choice == candidates(kernel.key, H200)[-1]


@pytest.mark.parametrize(("topology", "sm90"), [(QWEN_IMAGE, False), (QWEN_IMAGE_21, True)], ids=["Qwen-Image", "2.1"])
def test_random_networks_are_of_the_vae_that_is_asked_for(monkeypatch, topology, sm90):
    """Made without the kernels of sm90 where those are not needed: then weights stay where packing takes least."""
    made = []

    def network(cls):
        return lambda state, *, config, float8=None, **_: made.append((cls, state, config.tuning.sm90, float8))

    monkeypatch.setattr(measure, "FusedDecoder", network("decoder"))
    monkeypatch.setattr(measure, "FusedEncoder", network("encoder"))
    monkeypatch.setattr(measure, "input_scales", lambda state, peaks: dict(peaks))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    narrow = dataclasses.replace(
        topology,
        encoder_widths=tuple(width // 48 for width in topology.encoder_widths),
        decoder_widths=tuple(width // 48 for width in topology.decoder_widths),
    )
    monkeypatch.setattr(measure, "network_reasons", lambda network, sm90: [] if topology == QWEN_IMAGE else ["a reason"])
    random_networks(torch.bfloat16, torch.device("cpu"), narrow)
    assert [(cls, given) for cls, _, given, _ in made] == [("decoder", sm90), ("encoder", sm90), ("decoder", sm90)]
    shapes = {name: tuple(value.shape) for name, value in made[0][1].items()}
    assert shapes == describe(narrow, "decode").parameters()
    assert set(made[2][3]) == set(calibrated_layers(describe(narrow, "decode")).values())


def test_a_candidate_that_cannot_run_is_tried_once_and_left_out():
    key = KernelKey(Kind.QKV, 384, 1152)
    clock = FakeClock(H200, broken=(candidates(key, H200)[-1],))
    tuner = Tuner(meta_networks(), [(64, 64), (128, 128)], H200, only=lambda k: k == key, clock=clock)
    (kernel,) = tuner.run()
    assert kernel.key == key and kernel.choices == () and kernel.milliseconds == kernel.shipped_milliseconds
    # Each of the others at both sizes, the broken one at the first; then twice the shipped one: nothing is to be compared.
    assert clock.calls == 2 * len(candidates(key, H200)) - 1 + 2 * 2 * 2


def test_what_does_not_compile_is_not_measured(monkeypatch):
    key = KernelKey(Kind.QKV, 384, 1152)

    def task(kernel, stages):
        if kernel is _qkv_kernel and stages == 3:
            raise RuntimeError("ptxas")

    def listed(self, tasks, grid, *args, **options):
        name = (id(self), *sorted(options.items()))
        tasks.setdefault(name, lambda: task(self, options.get("num_stages")))

    monkeypatch.setattr(compiling.TritonKernel, "_list", listed)
    monkeypatch.setattr(attention_sm90, "_load", lambda split, dtype: None)
    monkeypatch.setattr(compiling, "run", lambda tasks, device, progress: [task() for task in tasks.values()])
    seen = set()

    class Recorder(FakeClock):
        def __call__(self, trial, fastest=math.inf):
            seen.update(trial.tuning.measured.get(trial.key, ()))
            return super().__call__(trial, fastest)

    tuner = Tuner(meta_networks(), [(64, 64)], H200, only=lambda k: k == key, clock=Recorder(H200))
    tuner.compile(torch.device("meta"))
    tuner.measure()
    assert seen == {config for config in candidates(key, H200) if config.stages != 3} != set(candidates(key, H200))


# ---- the file -------------------------------------------------------------------------------------------------------

positive = st.floats(min_value=1e-6, max_value=1e16, allow_nan=False)


@st.composite
def measured_kernels(draw):
    kernels = []
    for key in draw(st.lists(st.sampled_from([*CONV_KEYS, *SCHEDULE_KEYS, ATTENTION_KEY]), unique=True)):
        choices = []
        most = 1 if key == ATTENTION_KEY else 2
        for config in draw(st.lists(st.sampled_from(candidates(key, H200)), max_size=most)):
            choices.append(dataclasses.replace(config, **{RELATIVE[type(config)]: draw(positive)}))
        kernels.append(Measured(key, tuple(choices), draw(positive), draw(positive)))
    return tuple(kernels)


def tuned_gpu(kernels: tuple[Measured, ...] = (), machine: Machine = MACHINE) -> TunedGpu:
    return TunedGpu(machine, "2.11.0", "bfloat16", ("512x512",), "2026-01-01T00:00:00+00:00", kernels)


EXAMPLE = tuned_gpu((Measured(KEY, (WIDE, dataclasses.replace(NARROW, wave=0.6)), 1.0, 1.5), Measured(ATTENTION_KEY, (), 1, 1)))


@given(measured_kernels())
def test_round_trip(kernels):
    tuned = tuned_gpu(kernels)
    assert TunedGpu.loads(tuned.dumps(), MACHINE, H200) == tuned


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(st.data())
def test_a_damaged_file_is_refused_or_harmless(data):
    """One value replaced anywhere: nothing but ValueError, and what is read holds only configurations that are tried."""
    document = json.loads(EXAMPLE.dumps())
    owner, name = document, data.draw(st.sampled_from(sorted(document)))
    while isinstance(owner[name], dict | list) and owner[name] and data.draw(st.booleans()):
        owner = owner[name]
        name = data.draw(st.sampled_from(sorted(owner) if isinstance(owner, dict) else range(len(owner))))
    owner[name] = data.draw(json_values)
    try:
        tuned = TunedGpu.loads(json.dumps(document), MACHINE, H200)
    except ValueError:
        return
    for kernel in tuned.kernels:
        assert {dataclasses.replace(c, wave=1.0) for c in kernel.choices} <= set(candidates(kernel.key, H200))


def replaced(old: str, new: str) -> str:
    text = EXAMPLE.dumps()
    assert old in text
    return text.replace(old, new)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (EXAMPLE.dumps()[:100], "line"),
        ("", "line"),
        ("[]", "not a tuning"),
        ("[" * 100_000, ""),
        ('{"version": 3}', "version 3 of the schema"),
        (
            '{"version": 1}',
            "version 1 of the schema, this release reads 2: qwen-vae-accel tune --engine-dir DIR measures again",
        ),
        (replaced('"version": 2', '"version": "2"'), "version '2'"),
        (replaced("H200", "H100"), "gpu NVIDIA H100, here NVIDIA H200"),
        (replaced('"triton": "3.6.0"', '"triton": "3.5.1"'), "triton 3.5.1, here 3.6.0"),
        (replaced('"block_rows": 128', '"block_rows": 112'), "not among the configurations"),
        (replaced('"block_rows": 128', '"block_rows": true'), "not among the configurations"),
        (replaced('"wave": 0.6', '"wave": NaN'), "NaN is not JSON"),
        (replaced('"stages": 3', '"steps": 3'), "other fields"),
        (replaced('"conv"', '"comv"'), "valid Kind"),
        (replaced('"in_channels": 384', '"in_channels": 385'), "no kernel conv 385->384 norm"),
        (replaced('"float8": false', '"float8": 0'), "float8 of a kernel's key is 0, not of type bool"),
        ("\x00\xff", "line"),
    ],
)
def test_a_file_that_does_not_serve_is_named_and_left(tmp_path, caplog, text, reason):
    path = tuning_path(tmp_path, MACHINE.gpu)
    path.write_text(text)
    assert read_tuned(tmp_path, MACHINE, H200) is None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and str(path) in record.message and reason in record.message


def test_writing_replaces_whole_files(tmp_path, monkeypatch, caplog):
    folder = tmp_path / "engines"
    assert read_tuned(folder, MACHINE, H200) is None and not caplog.records
    path = write_tuned(folder, EXAMPLE)
    assert path.name == "tuning_nvidia_h200.json" and read_tuned(folder, MACHINE, H200) == EXAMPLE
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space"):
        write_tuned(folder, tuned_gpu())
    assert read_tuned(folder, MACHINE, H200) == EXAMPLE and list(folder.iterdir()) == [path]


def test_measured_configurations_come_first_key_by_key():
    key = KernelKey(Kind.CONV, 96, 96, epilogue="norm")
    other = dataclasses.replace(key, epilogue="x")
    chosen = candidates(key, H200)[-1]
    attention = candidates(ATTENTION_KEY, H200)[-1]
    kernels = (Measured(key, (chosen,), 1, 2), Measured(ATTENTION_KEY, (attention,), 1, 2))
    tuning, shipped = tuned_gpu(kernels).tuning(), Tuning()
    grid = Grid(1, 64, 64)
    assert tuning.conv(key, grid, H200) == chosen != shipped.conv(key, grid, H200)
    assert tuning.conv(other, grid, H200) == shipped.conv(other, grid, H200)
    assert tuning.attention_on(ATTENTION_KEY, H200) == attention != shipped.attention_on(ATTENTION_KEY, H200)
    # Where the table does not serve, because there are no bulk copies, what was measured there does.
    assert tuning.conv(key, grid, ADA) == chosen != shipped.conv(key, grid, ADA)
    assert tuned_gpu((Measured(KEY, (), 1, 1),)).tuning() == shipped


def test_weights_given_to_the_schedules_are_not_planned_for_triton(monkeypatch):
    (decoder, _) = meta_networks()
    monkeypatch.setattr(decoder, "_sm90", object())
    with pytest.raises(ValueError, match="sm90=True"):
        decoder.tuned_launches((1, 16, 8, 8), Tuning(sm90=False))


def test_measured_schedules_reach_the_layers(monkeypatch):
    chosen = candidates(SCHEDULE_KEYS[1], H200)[-1]
    tuning = tuned_gpu((Measured(SCHEDULE_KEYS[1], (chosen,), 1, 2),)).tuning()
    made = {}

    def make(weights, mode, device, schedules, keep):
        made[weights.in_channels] = schedules

    monkeypatch.setattr(layers_module, "unsupported", lambda *_: [])
    layers = Sm90Layers(torch.device("cpu"), tuning, make)
    for channels in (192, 384):
        matrix = torch.empty(channels, 9 * channels, dtype=torch.bfloat16)
        layers.layer(ConvWeights(matrix, torch.empty(channels), channels, 9), Kind.CONV)
    assert made == {192: (chosen,), 384: ()}


def test_the_backend_reads_the_engine_directory(tmp_path, monkeypatch):
    write_tuned(tmp_path, EXAMPLE)
    monkeypatch.setattr(Machine, "of", classmethod(lambda cls, device: MACHINE))
    monkeypatch.setattr(backend_module, "describe_gpu", lambda device: H200)
    assert backend_module._tuning(tmp_path, torch.device("cuda")) == EXAMPLE.tuning() != Tuning()
    assert backend_module._tuning(tmp_path / "other", torch.device("cuda")) == Tuning()
    assert backend_module._tuning(None, torch.device("cuda")) == Tuning()


# ---- GPU ------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("only", ["qkv", "attention", "conv 96", "sm90 conv 192"])
def test_tuned_on_the_gpu(tmp_path: Path, only: str):
    """One kernel at one small size; the result is stored, read and decodes as before."""
    device = torch.device("cuda", torch.cuda.current_device())
    if only.startswith("sm90") and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    base = Tuning(sm90=only.startswith("sm90"))
    networks = random_networks(torch.bfloat16, device)[:1]
    tuner = Tuner(
        networks, [(256, 320)], describe_gpu(device), base=base,
        only=lambda key: str(key).startswith(only),
    )  # fmt: skip
    assert tuner.candidates
    tuner.compile(device)
    found = tuner.measure()
    choices = {key: choose(key, times, describe_gpu(device)) for key, times in found.items()}
    assert all(choices.values())
    measured = tuner.compare(choices)
    for kernel in measured:
        print(kernel)
        assert 0 < kernel.milliseconds <= kernel.shipped_milliseconds < 10
    # The choices decode, whether they were faster or not.
    forced = tuple(Measured(key, chosen, 1.0, 1.0) for key, chosen in choices.items())
    tuner.check(forced)
    machine = Machine.of(device)
    write_tuned(tmp_path, tuned_gpu(forced, machine))
    tuned = read_tuned(tmp_path, machine, describe_gpu(device))
    assert tuned is not None and tuned.kernels == forced
    launches = networks[0].tuned_launches((1, 16, 32, 40), tuned.tuning(base))
    memory = launches.memory(torch.randn(1, 16, 32, 40, device=device).bfloat16())
    launches.run(memory)
    assert memory.output.isfinite().all()

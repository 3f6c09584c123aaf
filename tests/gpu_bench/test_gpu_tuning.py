"""The tuner of the GPU kernels: what it tries, how it ranks, what it prints."""

import dataclasses
import json

import pytest
from typer.testing import CliRunner

from benchmarks.gpu import cli, clock, judging, ours, steps, tuning
from benchmarks.gpu.static.measuring import COMPILED, REFUSED, Compiled
from benchmarks.gpu.static.ptxas import Resources
from benchmarks.gpu.static.reading import KernelFigures
from benchmarks.gpu.static.sass import Code, Kernel, Loop
from benchmarks.work import Work
from pallas_kernels import gpu_chip
from pallas_kernels.dense import mosaic_gpu_tiles as dense_tiles
from pallas_kernels.mla import mosaic_gpu_tiles as latent_tiles
from pallas_kernels.paged import mosaic_gpu_tiles as paged_tiles

H200 = gpu_chip.CHIPS["h200"]
DENSE = tuning.target_of(tuning.work_of("dense", 128, backward=False, cache_dtype=""))
DECODE_WORK = tuning.work_of("paged", 128, backward=False, cache_dtype="bfloat16")
DECODE = tuning.target_of(DECODE_WORK, phase="decode")


def found(overlapped, alone, faults=(), name="attnsel_dense_forward_0", verdict=COMPILED):
    code = Code(100, {"HGMMA.64x128x16": 8}, 1 << 20, {})
    kernel = Kernel(code, (Loop(code, overlapped, alone),))
    figures = KernelFigures(name, "mosaic", Resources("sm_90a"), 0, 384, (1,), kernel, faults)
    return Compiled("w", "ours", {}, "h200", verdict, "too large", (figures,))


def test_candidates_fit_shared_memory_and_hold_what_the_table_has():
    tried = list(DENSE.candidates(H200))
    assert all(2 * s["stages"] * s["block_kv"] * 256 <= H200.smem_bytes for s in tried)
    more = {"turns": True, "tied": False}
    assert {"block_kv": 128, "stages": 3, "walking": None} | more in tried
    assert {"block_kv": 128, "stages": 2, "walking": (2, 2)} | more in tried
    assert all(s["walking"] is None or s["walking"][0] == s["stages"] for s in tried)
    assert not any(s["block_kv"] == 192 and s["stages"] == 4 for s in tried)


def test_a_fault_comes_last_and_the_better_loop_first():
    sizes = next(DENSE.candidates(H200))
    good, better, spills, refused = (
        tuning.judged(DENSE, sizes, compiled)
        for compiled in (found(1.0, 0.6), found(1.0, 0.66), found(1.0, 0.9, ("spills",)),
                         found(1.0, 0.9, verdict=REFUSED))
    )  # fmt: skip
    order = tuning.ranked([spills, good, refused, better], waits_for_bytes=False)
    assert order[:2] == [better, good]
    assert refused.faults == ("too large",)
    other = tuning.judged(DENSE, sizes, found(1.0, 1.0, name="another"))
    assert other.faults, "a kernel that is not the entry's says nothing of it"


def test_decoding_needs_bytes_in_flight_before_a_better_loop():
    few = tuning.Candidate({}, (), 1.0, 0.9, tuning.IN_FLIGHT - 1)
    enough = dataclasses.replace(few, alone=0.5, in_flight=tuning.IN_FLIGHT)
    assert tuning.ranked([few, enough], waits_for_bytes=True) == [enough, few]
    assert tuning.ranked([few, enough], waits_for_bytes=False) == [few, enough]


def test_a_row_reads_as_the_table_s_and_is_used_in_its_place(monkeypatch):
    sizes = {"block_kv": 64, "stages": 2, "walking": (2, 1), "turns": False, "tied": True}
    assert tuning.row(DENSE, sizes) == (
        "TILES[(9, 0)][(128, 128)]['plain']: "
        "Tiles(block_kv=64, stages=2, walking=(2, 1), turns=False, tied=True)"
    )
    classes = dense_tiles.TILES[9, 0][128, 128]
    monkeypatch.setitem(classes, "plain", classes["plain"])
    DENSE.use(json.loads(json.dumps(sizes)))
    used = dense_tiles.forward_tiles(H200, 128, 128, capped=False, segmented=False)
    assert used == dense_tiles.Tiles(**sizes)
    monkeypatch.setitem(paged_tiles.HOPPER[2], 128, paged_tiles.HOPPER[2][128])
    DECODE.use({"keys": 64, "stages": 6})
    with gpu_chip.for_chip("h200"):
        assert paged_tiles.tiles_for_chip(128, 2, added=False).decode.stages == 6


def test_what_is_decoded_has_enough_bytes_in_flight_in_the_table():
    for itemsize, of_size in paged_tiles.HOPPER.items():
        for size, tiles in of_size.items():
            phase = tiles.decode
            in_flight = 2 * itemsize * size * phase.keys * phase.stages
            assert in_flight >= tuning.IN_FLIGHT, (itemsize, size, in_flight)


def test_candidates_at_head_size_256_hold_what_the_table_has():
    work = tuning.work_of("paged", 256, backward=False, cache_dtype="bfloat16")
    of_table = paged_tiles.HOPPER[2][256]
    for phase in ("decode", "prefill"):
        tried = list(tuning.target_of(work, phase=phase).candidates(H200))
        entry = getattr(of_table, phase)._asdict()
        assert any(all(entry[name] == value for name, value in s.items()) for s in tried), phase


def test_time_comes_before_all_but_faults():
    some = {"waves": 1}
    slow, quick, broken, spills = (
        tuning.Candidate(some | {"least_pairs": i}, ("spills",) * (i == 3), 0.5, 0.5, 0)
        for i in range(4)
    )
    found = [{"seconds": 2e-5}, {"seconds": 1e-5}, {"reason": "hung: stopped after 2 s"}]
    tried = tuning.timed([slow, spills, quick, broken], found)
    order = tuning.ranked(tried, waits_for_bytes=False)
    assert [c.sizes["least_pairs"] for c in order[:2]] == [1, 0]
    assert {c.faults for c in order[2:]} == {("spills",), ("hung: stopped after 2 s",)}


LATENT_WORK = tuning.work_of("sparse_mla", 576, backward=False, cache_dtype="bfloat16")


def test_latent_entries_are_used_and_need_a_gpu(monkeypatch):
    target = tuning.target_of(LATENT_WORK)
    entry = ("h200", 16, "sparse")
    monkeypatch.setitem(latent_tiles.TILES, entry, latent_tiles.TILES[entry])
    sizes = {"waves": 2, "least_pairs": 16}
    assert sizes in list(target.candidates(H200))
    target.use(sizes)
    assert latent_tiles.TILES[entry] == latent_tiles.Tiles(**sizes)
    assert tuning.row(target, sizes) == "('h200', 16, 'sparse'): Tiles(2, 16)"
    with pytest.raises(ValueError, match="op is sparse_mla, must be dense or paged where nothing"):
        cli.check_tunable(target, measure=False)
    with pytest.raises(ValueError, match="measure is True, must be False on cpu"):
        cli.check_tunable(target, measure=True)
    of_float8 = tuning.work_of("mla", 576, backward=False, cache_dtype="float8_e4m3fn")
    assert tuning.target_of(of_float8, chip="h100").path == ("TILES", ("h100", 8, "decode"))


def test_a_whole_tuning_by_a_clock_that_is_fake(monkeypatch):
    """XLA's kernel stands for ours: what is measured is which entry was put in the table."""
    used = []

    def seconds_of(work, name, options):
        tuning.target_of(work).use(options["tiles"])
        used.append(latent_tiles.TILES["h200", 16, "decode"])
        if used[-1].waves == 3:
            raise RuntimeError("too many blocks")
        return 1e-5 * (used[-1].waves + abs(used[-1].least_pairs - 4))

    def in_this_process(todo, ends, say):
        for step in todo:
            try:
                yield from steps.take(step)
            except RuntimeError as error:
                yield from steps.broken(step, str(error))

    entry = ("h200", 16, "decode")
    monkeypatch.setitem(latent_tiles.TILES, entry, latent_tiles.TILES[entry])
    monkeypatch.setattr(cli, "check_tunable", lambda target, measure: None)
    monkeypatch.setattr(steps.racing, "seconds_of", seconds_of)
    monkeypatch.setattr(cli.watching, "taken", in_this_process)
    monkeypatch.setenv("COLUMNS", "160")
    done = CliRunner().invoke(cli.app, ["tune", "--op", "mla", "--measure"])
    assert done.exit_code == 0, done.output
    assert len(used) == 15
    assert "('h200', 16, 'decode'): Tiles(1, 4)" in done.output
    assert "too many blocks" in done.output


def test_one_call_is_timed_with_the_sizes_that_are_asked_for(monkeypatch):
    work = Work("paged", "", "paged", 4, 2, 16, 16, (1, 20), (40, 50), 16)
    asked = []
    fake = dataclasses.replace(DECODE, module="m")
    monkeypatch.setattr(ours, "BACKENDS", {"paged": "XLA"})
    monkeypatch.setattr(type(fake), "use", lambda target, sizes: asked.append(sizes))
    monkeypatch.setattr(tuning, "target_of", lambda work, phase: fake)
    monkeypatch.setattr(judging, "poison", lambda: None)
    monkeypatch.setattr(clock, "wall_seconds", lambda call, calls, rounds: (call(), 0.25)[1])
    monkeypatch.setattr(clock, "calls_for", lambda seconds: 2)
    (step,) = steps.tuning_steps(work, [{"keys": 64}], "decode")
    assert list(steps.take(step)) == [("tuned", {"seconds": 0.25})]
    assert asked == [{"keys": 64}]


def test_an_op_without_a_choice_is_refused():
    with pytest.raises(ValueError, match="op is 'indexer', must be one of dense, paged"):
        tuning.work_of("indexer", 576, backward=False, cache_dtype="")

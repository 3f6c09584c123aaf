"""The static instrument: what it reads off a schedule, how it replays it, what it says of a chip.

`schedule/` holds what libtpu 0.0.52 wrote for v5e of a kernel that doubles a float32 [96, 256] in
six blocks of [16, 256], which `pallas_call` pipelines: 16 KiB a block, in and out.
"""

import importlib.util
import json
import pathlib
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from typer.testing import CliRunner

from attnsel_jax.envs import environment_for_compiling
from attnsel_jax.platforms import CHIPS as DATASHEETS
from benchmarks.tpu_static import child, cli, ours, page, results, running, tuning
from benchmarks.tpu_static.chips import CHIPS, chip_named
from benchmarks.tpu_static.contenders import CONTENDERS, contender
from benchmarks.tpu_static.dump import KernelDump, read_bundles, read_kernels
from benchmarks.tpu_static.measuring import MEASURED, REFUSED, Measurement, measure
from benchmarks.tpu_static.replay import Transfers, _words, replay
from benchmarks.tpu_static.scalar_code import Operation, ScalarCode, arguments, split
from benchmarks.tpu_static.schedule import figures
from benchmarks.tpu_static.stand_ins import number_of, recorded, traced_as
from benchmarks.tpu_static.works import WORKS
from benchmarks.work import Work, named
from pallas_kernels import tpu_chip
from pallas_kernels.dense import mosaic_tpu_tiles as dense_tiles

SCHEDULE = pathlib.Path(__file__).parent / "schedule"
BLOCK = 16 * 256 * 4


@pytest.fixture(scope="module")
def kernel() -> KernelDump:
    return read_kernels(SCHEDULE, ["double.1"])["double.1"]


def test_dump_is_read(kernel):
    assert len(kernel.bundles) == len(kernel.rows) == 77
    assert kernel.capacity["MATMUL"] == 4
    assert kernel.memory["vmem"] == 4 * BLOCK  # two buffers in, two out
    assert "loop_header" in kernel.kinds.values()


def test_replay_follows_the_pipeline(kernel):
    chip = CHIPS["v5e"]
    replayed = replay(kernel, chip)
    assert replayed.complete
    assert (replayed.dmas, replayed.bytes_in, replayed.bytes_out) == (12, 6 * BLOCK, 6 * BLOCK)
    assert replayed.unmatched_waits == 0
    assert replayed.unmodelled == {}
    # Two blocks are in flight, so every second one waits for a whole latency; so does the last out.
    waited = 3 * chip.latency_in + chip.latency_out
    assert waited < replayed.cycles < 1.25 * waited
    executed = sum(replayed.runs)
    assert replayed.cycles == executed + replayed.dma_wait


def test_figures_count_every_execution(kernel):
    found = figures("double", kernel, replay(kernel, CHIPS["v5e"]))
    registers = BLOCK // 4096  # of 8 x 128 words of 4 bytes
    assert found.use["VSTORE"] * found.cycles == pytest.approx(6 * registers, abs=0.5)
    assert found.tile.passes == 8  # the loop's frame: six steps, one before and one after
    assert found.vreg_spills == 0
    assert found.doubts == []


def test_a_replay_that_is_stopped_says_so(kernel):
    found = figures("double", kernel, replay(kernel, CHIPS["v5e"], limit=1000))
    assert found.doubts[0].startswith("stopped after")


def by_hand(*bundles: str) -> list[str]:
    """A schedule's text, one bundle a line."""
    head = [f"{hex(i) if i else '0'}   :  {{ {bundle} }}" for i, bundle in enumerate(bundles)]
    return read_bundles("\n".join(head))[0]


def run_by_hand(bundles, starts, ends, branches):
    count = len(bundles)
    kernel = KernelDump(bundles, starts, ends, {}, branches, {"SALU": 2}, [[1]] * count, {})
    return replay(kernel, CHIPS["v5e"])


def test_a_loop_by_hand():
    """Counts to five: the branch acts when its region ends, after its delay slot."""
    bundles = by_hand(
        "%s1_s0 = smov 0",
        "%s2_s0 = sphi %s1_s0, %s3_s0",
        "%s3_s0 = sadd.s32 1, %s2_s0",
        "%p4_p0 = scmp.ge.s32.totalorder %s3_s0, 5",
        "%5 = sbr.rel (!%p4_p0) target region = 1",
        "",
        "%6 = sst [smem:[#allocation0]] %s3_s0",
    )
    replayed = run_by_hand(bundles, {1: 1}, {1: 5}, [(1, 1)])
    assert replayed.runs == [1, 5, 5, 5, 5, 5, 1]
    assert replayed.cycles == 2 + 5 * 5
    assert replayed.complete


def test_what_is_not_understood_is_counted():
    bundles = by_hand("%s1_s0 = sfrobnicate.s32 1, 2", "%p2_p0 = scmp.eq.s32.totalorder %s1_s0, 0")
    assert run_by_hand(bundles, {}, {}, []).unmodelled == {"sfrobnicate.s32": 1}


def test_operations_are_split():
    text = "0x1 : { %s1_s2 = sadd.s32 4, %s0_s0 /* a, b */ ;; %9 = vst [vmem:[#allocation2]] %v1 }"
    assert split(text)[0] == Operation("1", "sadd.s32", "4, %s0_s0")
    assert arguments("[a, b], (c, d), e") == ["[a, b]", "(c, d)", "e"]


def test_strided_dmas_say_where_they_go_in_a_comment():
    text = "0 : { %1 = dma.general /*src=*/%s1_s1, /*n=*/8, %s2_s2, %s3_s3 /* vmem-to-hbm */ }"
    assert split(text)[0].name == "dma.vmem_to_hbm"


@pytest.mark.parametrize(
    ("operation", "value"),
    [
        ("sadd.s32 4294967295, 3", 2),
        ("sshra.s32 4294967288, 1", 0xFFFFFFFC),
        ("smin.u32 7, 3", 3),
        ("scmp.lt.s32.totalorder 4294967295, 0", True),
        ("scmp.lt.u32.totalorder 4294967295, 0", False),
        ("scalar_lea 16, 4, 2", 22),
        ("sld [smem:[#allocation0 + $0x8]]", 0),
    ],
)
def test_scalar_operations(operation, value):
    code = ScalarCode(by_hand(f"%s1_s0 = {operation}"), {}, {}, [])
    machine = {"V": [None], "P": [0], "M": {}, "M32": 0xFFFFFFFF}
    machine["S"] = lambda word: word - (1 << 32) if word >> 31 else word
    exec(code.source, machine)
    machine["b0"](0)
    assert machine["V"][0] == value


def test_transfers_share_one_pipe():
    chip = CHIPS["v5e"]
    transfers = Transfers(chip, cores_busy=1)
    granules = 1 << 20 >> 5
    for semaphore in (1, 2):
        transfers.start(0, "hbm_to_vmem", granules, semaphore)
    once = (1 << 20) / chip.pipe
    assert transfers.wait(0, 1, granules) == int(chip.latency_in + once)
    assert transfers.wait(0, 2, granules) == int(chip.latency_in + 2 * once)
    assert transfers.bytes_in == 2 << 20
    transfers.start(0, "vmem_to_vmem", granules, 3)  # waits for nobody
    assert transfers.wait(0, 3, granules) < chip.latency_in + 2 * once
    transfers.wait(0, 4, 1)
    assert transfers.unmatched == 1


def test_two_cores_halve_the_pipe():
    chip = CHIPS["v5p"]
    alone, both = (Transfers(chip, cores) for cores in (1, 2))
    for transfers in (alone, both):
        transfers.start(0, "hbm_to_vmem", 1 << 20, 0)
    waits = [t.wait(0, 0, 1 << 20) - chip.latency_in for t in (alone, both)]
    assert waits[1] == pytest.approx(2 * waits[0], rel=1e-3)


@pytest.mark.parametrize("generation", CHIPS)
def test_chips_agree_with_their_datasheets(generation):
    chip = CHIPS[generation]
    assert chip.hertz * chip.cores * chip.flops_per_cycle == DATASHEETS[generation].peak_flops
    assert 0.7 < chip.reachable <= 1.0
    assert 0.9e9 < chip.hertz < 2.5e9


def test_an_unknown_chip_is_named():
    with pytest.raises(ValueError, match="generation is 'v3', must be one of v4, v5e"):
        chip_named("v3")


def test_works_by_hand():
    dense = Work("w", "", "dense", 2, 1, 64, 32, (3,), (3,))
    assert dense.logits == 6
    assert dense.flops == 2 * 2 * 6 * (64 + 32)
    assert dense.floor_bytes() == 2 * (3 * 2 * 96 + 3 * 96)
    paged = Work("w", "", "paged", 4, 2, 8, 8, (1, 2), (5, 2), 16)
    assert paged.logits == 5 + (1 + 2)
    row, queries = 2 * 8 * 2, 3 * 4 * 16
    # Four rows are read; three new ones are read from this step's and written to the cache.
    assert paged.floor_bytes() == 2 * (queries + row * (4 + 6))
    assert paged.floor_bytes(writes_cache=False) == 2 * (queries + row * 7)
    sparse = Work("w", "", "sparse_mla", 4, 1, 576, 512, (1,), (100,), 16, topk=10)
    assert sparse.logits == 10
    assert sparse.floor_bytes() == 2 * (4 * (576 + 512) + 576 * (10 + 2))
    indexer = Work("w", "", "indexer_scores", 4, 1, 128, 0, (2, 1), (100, 20), 16)
    assert indexer.flops == 2 * 4 * 128 * (99 + 100 + 20)
    # Bfloat16 queries, float32 weights; every key; a score of each of 7 pages for 3 tokens.
    assert indexer.floor_bytes() == 3 * 4 * (2 * 128 + 4) + 2 * 128 * 120 + 4 * 3 * 112
    topk = Work("w", "", "topk_positions", 1, 1, 0, 0, (2, 1), (100, 20), 16, topk=5)
    assert (topk.flops, topk.floor_bytes()) == (0, 4 * 3 * (112 + 5))
    assert dense.shape_class == "prefill"
    assert sparse.shape_class == "decode"


def test_the_stated_floors():
    """Of the project's targets: 41 us and 175 us on v5e for the dense work."""
    work, chip = WORKS["dense_causal"], CHIPS["v5e"]
    assert work.floor_bytes() / chip.bandwidth == pytest.approx(41.0e-6, rel=0.01)
    assert work.flops / chip.peak == pytest.approx(174.7e-6, rel=0.01)


def test_works_are_named_by_their_beginning():
    assert [work.name for work in named(WORKS, ["topk"])] == ["topk_decode", "topk_prefill"]
    with pytest.raises(ValueError, match="work is 'conv', must be, or begin, one of dense_causal"):
        named(WORKS, ["conv"])


def test_a_peer_says_which_caches_it_is_not_given():
    refusals = [
        contender(name).refuses(WORKS["paged_decode_d128_page64_int8"]) for name in CONTENDERS
    ]
    said = [reason for reason in refusals if reason and "cache_dtype is int8, must be" in reason]
    assert len(said) == 3
    float8 = WORKS["mla_decode_float8_e4m3fn"]
    assert contender("tpu-inference mla v2").refuses(float8) is None
    assert ours.refuses(float8) is None


@pytest.mark.parametrize("name", CONTENDERS)
def test_every_contender_serves_some_work_and_refuses_with_a_reason(name):
    module = contender(name)
    reasons = [module.refuses(work) for work in WORKS.values()]
    assert name == "ours" or None in reasons
    assert all(reason is None or len(reason) > 10 for reason in reasons)
    for work in WORKS.values():
        if module.refuses(work) is None:
            assert module.choices(work, "v5e")


def test_what_is_not_installed_is_said(monkeypatch):
    monkeypatch.setattr(running, "is_installed", lambda name: False)
    found = list(running.rows([WORKS["dense_causal"]], ["tokamax splash"], "v5e"))
    row = found[0]
    assert row["verdict"] == "not installed"
    assert row["reason"] == "tokamax is not installed: `pip install --no-deps tokamax`"
    assert page.cells(row)[2] == "not installed"


def scaled(x, factors):
    """Multiplies each block by a prefetched factor, as often as a dynamic grid says."""

    def kernel(factors, x, out):
        out[...] = x[...] * factors[pl.program_id(0)].astype(jnp.float32)

    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(jnp.sum(factors > 0),),
        in_specs=[pl.BlockSpec((8, 128), lambda i, factors: (i, 0))],
        out_specs=pl.BlockSpec((8, 128), lambda i, factors: (i, 0)),
    )
    return pl.pallas_call(kernel, grid_spec=spec, out_shape=x, interpret=True)(factors, x)


def test_stand_ins_learn_the_batch_and_make_its_grid_static():
    x, factors = jax.ShapeDtypeStruct((32, 128), jnp.float32), np.array([3, 5, 0], np.int32)
    given = recorded(scaled, (x, factors))
    assert given[0].dynamic_sizes == [2]
    np.testing.assert_array_equal(given[0].scalars[0], factors)
    with traced_as(given, 1 << 20) as calls:
        program = str(jax.make_jaxpr(scaled)(jnp.ones((32, 128)), factors))
    assert calls[0].grid == (2,)
    assert calls[0].to_json()["scalars"] == [([3], 4, [3, 5, 0])]
    assert "grid=(2,)" in program.replace(" ", "")
    assert "call0_kernel" in program


def test_kernels_are_told_apart_by_their_number():
    assert number_of("jvp_call12_attend.3") == 12
    with pytest.raises(ValueError, match="kernel is 'fusion', must be named call<number>_"):
        number_of("fusion")


@pytest.mark.parametrize(
    ("scalar", "size", "expected"),
    [
        (([3], 4, [7, -1, 9]), 512, {0: 7, 1: 0xFFFFFFFF, 2: 9}),
        (([2, 2], 4, [1, 2, 3, 4]), 1024, {0: 1, 1: 2, 128: 3, 129: 4}),  # a row of lanes each
        (([2, 2], 4, [1, 2, 3, 4]), 16, {0: 1, 1: 2, 2: 3, 3: 4}),
        # Five rows are padded to eight, three to four; a tile of all rows after 128 columns.
        (([5, 1], 4, [1, 2, 3, 4, 5]), 4096, {0: 1, 128: 2, 256: 3, 384: 4, 512: 5}),
        (([3, 1], 4, [1, 2, 3]), 2048, {0: 1, 128: 2, 256: 3}),
        (([2, 130], 4, [1, *[0] * 128, 2, 3, *[0] * 129]), 2048, {0: 1, 257: 2, 128: 3}),
        # Bytes: elements 0 and 128 share a word.
        (([130], 1, [5, *[0] * 127, 6, 7]), 512, {0: 5 | 6 << 8, 1: 7 << 8}),
    ],
)
def test_scalars_lie_in_smem_as_the_kernel_reads_them(scalar, size, expected):
    words = _words(scalar, size)
    assert {at: word for at, word in words.items() if word} == expected


def test_a_prefetched_length_decides_how_often_a_loop_runs():
    bundles = by_hand(
        "%s1_s0 = smov 0",
        "%s2_s0 = sphi %s1_s0, %s3_s0",
        "%s3_s0 = sadd.s32 1, %s2_s0 ;; %s6_s1 = sld [smem:[#allocation4 + $0x1]]",
        "%p4_p0 = scmp.ge.s32.totalorder %s3_s0, %s6_s1",
        "%5 = sbr.rel (!%p4_p0) target region = 1",
        "",
    )
    rows, prefetched = [[1]] * len(bundles), {0: ("#allocation4", 512)}
    kernel = KernelDump(bundles, {1: 1}, {1: 5}, {}, [(1, 1)], {"SALU": 2}, rows, {}, prefetched)
    replayed = replay(kernel, CHIPS["v5e"], scalars=[([2], 4, [99, 3])])
    assert replayed.runs == [1, 3, 3, 3, 3, 3]


def test_results_are_kept_by_work_and_contender(tmp_path):
    old = {"work": "dense_causal", "contender": "a", "verdict": "not installed", "options": {}}
    new = old | {"verdict": "refused by the compiler", "reason": "no"}
    other = old | {"work": "mla_decode"}
    results.written("v5e", [other, old], "first", tmp_path)
    path = results.written("v5e", [new], "second", tmp_path)
    data = json.loads(path.read_text())
    assert data["rows"] == [new, other]
    assert data["command"] == "second"


def test_the_page_says_which_command_only_added_last(tmp_path):
    of_row = {"verdict": "refused by the compiler", "reason": "no", "options": {}}
    old = of_row | {"work": "dense_causal", "contender": "a", "date": "2026-01-02T03:04:05+00:00"}
    new = old | {"work": "mla_decode", "date": "2026-03-04T05:06:07+00:00"}
    results.written("v5e", [old], "first", tmp_path)
    said = page.section(results.written("v5e", [new], "second", tmp_path))
    assert "Last added to by `second`" in said
    assert "earlier runs, from 2026-01-02 on" in said


def test_what_a_clock_stopped_replaces_no_measured_row(tmp_path):
    measured = {"work": "mla_decode", "contender": "a", "verdict": "measured"}
    late = measured | {"verdict": "refused by the compiler", "reason": "stopped after 300 s"}
    results.written("v5e", [measured], "first", tmp_path)
    path = results.written("v5e", [late], "second", tmp_path)
    assert json.loads(path.read_text())["rows"] == [measured]


def test_a_run_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    made_of = {"versions": results.versions(), "sources": results.sources("jax flash")}
    row = {"work": "dense_causal", "contender": "jax flash", "reason": "no"} | made_of
    old = row | {"work": "dense_causal_grad", "sources": "of another tree"}
    other = row | {"work": "mla_decode", "versions": {"jax": "0.0"}}
    late = row | {"work": "mla_prefill", "reason": "stopped after 300 s"}
    results.written("v5e", [row, old, other, late], "first", tmp_path)
    known = results.current("v5e", tmp_path)
    assert known == {("dense_causal", "jax flash"): row}
    monkeypatch.setattr(running, "is_installed", lambda name: False)
    works = [WORKS["dense_causal"], WORKS["dense_causal_grad"]]
    found = list(running.rows(works, ["jax flash"], "v5e", known))
    assert found[0] is known["dense_causal", "jax flash"]
    assert found[1]["verdict"] == "not installed"


def test_ours_depends_on_the_kernels_and_nothing_on_how_it_is_shown(monkeypatch, tmp_path):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    for name in ("benchmarks/arguments.py", "pallas_kernels/masks.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")

    def of_both():
        results.sources.cache_clear()
        return [results.sources(name) for name in ("ours", "jax flash")]

    before = of_both()
    (tmp_path / "pallas_kernels/masks.py").write_text("2")
    after = of_both()
    results.sources.cache_clear()
    assert before[0] != after[0]
    assert before[1] == after[1]


def test_a_call_that_is_traced_and_never_runs_has_no_grid_of_its_own():
    """As the first trace of a differentiated call."""
    with traced_as([], 1 << 20) as calls:
        jax.make_jaxpr(lambda *given: scaled(*given))(
            jnp.ones((32, 128)), np.array([3, 5, 0], np.int32)
        )
    assert calls[0].grid == (1,)
    assert not calls[0].is_known


def test_kernels_in_loops_are_told():
    kernel = 'custom-call(), custom_call_target="tpu_custom_call"'
    text = f"""
%body.1 (x: f32[8]) -> f32[8] {{
  %call1_a.4 = f32[8] {kernel}
}}
ENTRY %main.8 (x: f32[8]) -> f32[8] {{
  %call0_b.1 = f32[8] {kernel}
  %while.1 = f32[8] while(%x), condition=%cond.2, body=%body.1, metadata={{}}
}}
"""
    assert child.in_loops(text) == ["call1_a.4"]
    assert child.instructions(text)[0] == ["call1_a.4", "call0_b.1"]


TABLE = """
class Tiles(NamedTuple):
    rows: int


TILES: dict = {
    "v5e": Tiles(rows=1, num_buffers=2),
    ("v6e", "bfloat16", "decode"): Tiles(
        rows=1,
        num_buffers=2,
    ),
}
"""


def test_the_tuner_rewrites_one_entry():
    new = tuning.rewritten(TABLE, ("v6e", "bfloat16", "decode"), {"rows": 64, "num_buffers": 3})
    assert '("v6e", "bfloat16", "decode"): Tiles(rows=64, num_buffers=3),' in new
    assert '"v5e": Tiles(rows=1, num_buffers=2),' in new
    with pytest.raises(ValueError, match="key is 'v4', must be one of TILES"):
        tuning.rewritten(TABLE, "v4", {})


def test_the_tuner_writes_the_dense_table():
    path = pathlib.Path(dense_tiles.__file__)
    table = tuning.table_of(WORKS["dense_causal_grad"], "v6e")
    assert table.key == ("v6e", "bfloat16", "backward")
    assert tuning.table_of(WORKS["dense_causal"], "7x").key == ("7x", "bfloat16", "forward")
    new = tuning.rewritten(path.read_text(), table.key, table.sizes | {"major_q": 2048})
    entries: dict = {}
    exec(new, entries)
    assert entries["TILES"][table.key].major_q == 2048
    same = tuning.rewritten(path.read_text(), table.key, table.sizes)
    assert same == path.read_text()


@pytest.mark.parametrize("name", [name for name in WORKS if WORKS[name].op == "sparse_mla"])
def test_the_tuner_writes_no_tiles_of_another_cache(monkeypatch, name):
    """Rows of fp8_ds_mla take bfloat16's tiles, which their own ranking must not replace."""
    work, measured = WORKS[name], []
    found = Measurement(name, "ours", {}, REFUSED, "not compiled here")
    monkeypatch.setattr(cli, "check_compiler", lambda: None)
    monkeypatch.setattr(cli, "measure", lambda *given: measured.append(given) or found)
    said = CliRunner().invoke(cli.app, ["tune", "--generation", "v6e", "--work", name])
    assert said.exit_code == 0, said.output
    is_bfloat16 = work.cache_dtype == "bfloat16"
    assert bool(measured) == is_bfloat16
    assert ("left out: pallas_kernels.sparse_mla" in said.output) != is_bfloat16
    if not is_bfloat16:
        needed = rf"must have \('v6e', 'uint8', '{work.shape_class}'\), the entry of {name}"
        with pytest.raises(ValueError, match=needed), tpu_chip.for_generation("v6e"):
            ours.program(work, tiles={"block_kv": 256, "buffers": 2})


def test_the_tuner_goes_downhill_and_never_takes_what_is_refused_or_doubtful():
    def measured(sizes):
        if sizes["rows"] > 256:
            return Measurement("w", "ours", sizes, REFUSED, "too large")
        if sizes["num_buffers"] > 3:
            kernel = types.SimpleNamespace(doubts=["read as 0: spop (1)"])
            return Measurement("w", "ours", sizes, MEASURED, kernels=(kernel,))
        time = abs(sizes["rows"] - 256) + abs(sizes["num_buffers"] - 3)
        return Measurement("w", "ours", sizes, MEASURED, replayed_us=1.0 + time)

    tried = list(tuning.search({"rows": 64, "num_buffers": 2}, measured, most=16))
    assert len(tried) <= 16
    best = tuning.ranked(tried)
    assert best[0][0] == {"rows": 256, "num_buffers": 3}
    assert best[-1][1].verdict == REFUSED
    assert len(list(tuning.search({"rows": 64, "num_buffers": 2}, measured, most=3))) == 3


def test_the_tuner_tries_once_what_changes_nothing():
    def measured(sizes):
        return Measurement("w", "ours", sizes, MEASURED, replayed_us=1.0 + abs(sizes["keys"] - 256))

    tried = [sizes for sizes, _ in tuning.search({"rows": 64, "keys": 64}, measured, most=16)]
    assert [sizes["rows"] for sizes in tried] == [64, 128, 64, 64, 64]
    assert [sizes["keys"] for sizes in tried] == [64, 64, 128, 256, 512]


def test_an_op_without_a_table_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pallas_kernels.dense.mosaic_tpu_tiles", types.ModuleType("t"))
    with pytest.raises(ValueError, match="mosaic_tpu_tiles has no TILES, must have"):
        tuning.table_of(WORKS["dense_causal"], "v5e")


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)
TINY = Work("tiny", "", "dense", 1, 1, 128, 128, (256,), (256,))


@needs_libtpu
@pytest.mark.parametrize("generation", ["v4", "v6e"])
def test_a_tiny_kernel_is_measured(generation):
    found = measure(TINY, "jax flash", generation, {"block": 128})
    assert found.verdict == MEASURED, found.reason
    assert found.main_kernel.doubts == []
    # q and out once; k and v of three tiles of four: causal.
    tile = 128 * 128 * 2
    assert 8 * tile <= found.bytes_moved <= 12 * tile
    assert found.estimated_us > max(found.bytes_floor_us, found.flops_floor_us)
    assert found.to_json()["bytes_over_floor"] >= 1.0


@needs_libtpu
def test_what_the_compiler_refuses_is_an_answer():
    found = measure(TINY, "jax flash", "v5e", {"block": 100})
    assert found.verdict == REFUSED
    assert "100" in found.reason


def test_the_child_s_environment_keeps_libtpu_quiet():
    assert environment_for_compiling()["TPU_LOG_DIR"] == "disabled"

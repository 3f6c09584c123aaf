"""Compiled for meshes that are not here: it compiles, and sends what its form should."""

import json
import pathlib
import runpy

import pytest
from typer.testing import CliRunner

from attnsel_jax.aot import MeshCall, compile_for, target_for
from attnsel_jax.aot.arguments import dense_arguments, mla_arguments, paged_arguments
from attnsel_jax.aot.collectives import Collective, collectives_of, sent_bytes
from attnsel_jax.aot.targets import slice_for
from attnsel_jax.cache_layouts import layout_named
from attnsel_jax.cli import app

ROOT = pathlib.Path(__file__).parents[2]
XLA = "attnsel_jax.backends.xla:XlaBackend"
DENSE = "attnsel_jax.xla.dense:dense_attention"


def dense_call(length=512, heads=4, **more):
    return dense_arguments(batch=2, q_len=length, kv_len=length, num_heads=heads,
                           num_kv_heads=heads, head_size=16, dtype="float32", causal=True,
                           **more)  # fmt: skip


def needs_compiler(chip):
    missing = target_for(chip).missing()
    if missing:
        pytest.skip(f"no compiler for {chip} here: {missing}")


LOCAL = 2 * 128 * 4 * 16 * 4  # bytes of a device's q, of k, and of v: float32
LSE = 2 * 128 * 4 * 4
SENT = {  # of 4 devices; lse is sent too where a kernel is followed by an exchange
    "ring": {"collective-permute": 3 * 2 * LOCAL + 4 * LOCAL + LSE},
    "all_gather": {"all-gather": 3 * 2 * LOCAL},
    "all_to_all": {"all-to-all": (4 * LOCAL + LSE) * 3 / 4},
}


@pytest.mark.parametrize("form", SENT)
def test_what_a_device_sends_is_what_the_form_says(form):
    over = MeshCall(XLA, "dense", {"seq": 4}, context="seq", form=form)
    report = compile_for("cpu", DENSE, dense_call(), over=over)
    assert report.compiled, report.refusal
    assert report.sent == pytest.approx(SENT[form])


def test_heads_and_batch_send_nothing_on_a_tpu_slice():
    needs_compiler("v5e")
    over = MeshCall(XLA, "dense", {"data": 2, "model": 4}, ("data",), ("model",))
    report = compile_for("v5e", DENSE, dense_call(), over=over, gradients=True)
    assert report.compiled, report.refusal
    assert report.sent == {}
    alone = compile_for("v5e", DENSE, dense_call(), gradients=True)
    assert report.memory["arguments"] == pytest.approx(alone.memory["arguments"] / 8, rel=0.3)


def test_gradients_of_gathered_keys_are_scattered_and_not_sent_to_all():
    needs_compiler("v5e")
    over = MeshCall(XLA, "dense", {"seq": 4}, context="seq", form="all_gather")
    report = compile_for("v5e", DENSE, dense_call(), over=over, gradients=True)
    assert report.compiled, report.refusal
    kv = 3 * 2 * LOCAL
    assert report.sent == pytest.approx({"all-gather": kv, "reduce-scatter": kv})


def test_a_pallas_kernel_with_heads_cut_and_pages_spread():
    """Opaque to XLA, and it need not know: what is sent is the merge of partial results."""
    needs_compiler("v5e")
    kernel = "pallas_kernels.mla.mosaic_tpu:mla_attention"
    arguments = mla_arguments(
        batch=8, q_len=1, kv_len=4096, num_heads=64, kv_lora_rank=512, rope_dim=64,
        dtype="bfloat16", cache_dtype="bfloat16", cache_shape=(512, 9, 32, 128), page_size=64,
        scale=0.1,
    )  # fmt: skip
    backend = "attnsel_jax.backends.mosaic_tpu_mla:MosaicTpuMlaBackend"
    over = MeshCall(backend, "mla", {"seq": 2, "model": 4}, (), ("model",), "seq")
    report = compile_for("v5e", kernel, arguments, over=over)
    assert report.compiled, report.refusal
    assert set(report.sent) == {"all-reduce"}
    merged = 8 * 16 * (512 + 2) * 4  # out, weight and maximum of 8 tokens and 16 heads
    assert report.sent["all-reduce"] == pytest.approx(merged, rel=0.05)


def test_a_window_over_spread_pages_of_a_pallas_kernel():
    """Two calls of the kernel, over whole pages and over those within which the window begins."""
    needs_compiler("v5e")
    arguments = paged_arguments(
        batch=4, q_len=1, kv_len=512, num_heads=4, num_kv_heads=2, head_size=128, page_size=16,
        dtype="bfloat16", cache_dtype="bfloat16", scale=0.1, sliding_window=100,
        cache_shape=layout_named("side_by_side").shape(128, 16, 2, 128),
    )  # fmt: skip
    backend = "attnsel_jax.backends.mosaic_tpu:MosaicTpuBackend"
    over = MeshCall(backend, "paged", {"seq": 4}, context="seq")
    kernel = "pallas_kernels.paged.mosaic_tpu:paged_attention"
    report = compile_for("v5e", kernel, arguments, over=over)
    assert report.compiled, report.refusal
    merged = 2 * 3 / 4 * 4 * 4 * (128 + 2) * 4
    assert report.sent == {"all-reduce": pytest.approx(merged, rel=0.05)}


def test_a_slice_for_so_many_devices():
    names = {"v5e": "v5e:4x4", "v6e": "v6e:4x4", "7x": "tpu7x:2x2x2", "v5p": "v5p:2x2x4"}
    for chip, name in names.items():
        assert slice_for(target_for(chip), 16).topology == {"topology_name": name}
    with pytest.raises(ValueError, match=r"mesh has 6 devices, must have one of 4, 8, 16, 32"):
        slice_for(target_for("v5e"), 6)
    for devices, hosts in ((1, "1x1x1"), (4, "1x1x4"), (16, "1x2x8")):
        target = slice_for(target_for("h200"), devices)
        assert target.topology["topology"] == hosts
        assert target.topology["target_config"] == target_for("h200").topology["target_config"]
    with pytest.raises(ValueError, match=r"mesh has 12 devices, must have at most 8, or a multip"):
        slice_for(target_for("h200"), 12)


TEXT = """HloModule jit_f

%body.1 (p: (s32[], f32[2,8])) -> (s32[], f32[2,8]) {
  %x = f32[2,8]{1,0} collective-permute(%y), source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
}

%cond.1 (p: (s32[], f32[2,8])) -> pred[] {
  %three = s32[]{:T(128)} constant(3)
}

%branch (p: f32[4]) -> f32[4] {
  %r = (f32[4]{0}, bf16[6]{0}) all-reduce(%a, %b), replica_groups=mesh['s'=2,'m'=4] {'m'}
}

%offloaded (p: f32[8]) -> f32[32] {
  ROOT %g.2 = f32[32]{0} all-gather(%p), replica_groups=mesh['s'=8] {'s'}
}, execution_thread="sparsecore"

%start.1 (p: f32[8]) -> f32[32] {
  ROOT %g.3 = f32[32]{0} all-gather(%p), channel_id=1, replica_groups=mesh['s'=4] {'s'}, frontend_attributes={chain_id="0"}
}

%done.1 (p: f32[8]) -> f32[32] {
  ROOT %g.4 = f32[32]{0} all-gather(%p), channel_id=1, replica_groups=mesh['s'=4] {'s'}, frontend_attributes={chain_id="0"}
}

%all-reduce-scatter.1 (p: f32[32]) -> f32[8] {
  %r.2 = f32[32]{0} all-reduce(%p), channel_id=2, replica_groups={{0,1,2,3}}
  ROOT %d = f32[8]{0} dynamic-slice(%r.2, %i), dynamic_slice_sizes={8}
}

ENTRY %main (q: f32[2,8]) -> f32[2,8] {
  %while.1 = (s32[], f32[2,8]) while(%t), condition=%cond.1, body=%body.1
  %while.2 = (s32[], f32[2,8]) while(%t), condition=%cond.2, body=%body.1, backend_config={"known_trip_count":{"n":"5"}}
  %g = (f32[8]{0}, f32[32]{0}) all-gather-start(%z), replica_groups=[2,4]<=[8]
  %m = ((bf16[4]{0}, bf16[2,2]{1,0:T(8,128)(2,1)}), (bf16[4]{0}, bf16[2,2]{1,0:T(8,128)(2,1)}), u32[]) collective-permute-start(%z, %z), source_target_pairs={{0,1},{1,0}}
  %t = ((bf16[8]{0}), bf16[8]{0}) all-to-all-start(%z), replica_groups=mesh['s'=8] {'s'}
  %n = (bf16[4], f32[2]) collective-permute(%z, %z), source_target_pairs={{0,1},{1,0}}
  %s = f32[8]{0} reduce-scatter(%z), replica_groups={{0,1,2,3},{4,5,6,7}}
  %c = f32[4] conditional(%w), branch_computations={%branch, %other}
  %o = ((), ()) custom-call-start(), called_computations={%offloaded}
  %u = f32[32] custom-call-update(%o)
  %f.1 = f32[32] fusion(%z), kind=kCustom, calls=%start.1
  %f.2 = f32[32] fusion(%f.1), kind=kCustom, calls=%done.1
  %f.3 = f32[8] fusion(%z), kind=kCustom, calls=%all-reduce-scatter.1
}
"""  # noqa: E501


def test_collectives_are_read_off_a_program_s_text():
    found = collectives_of(TEXT)
    assert found == [
        Collective("collective-permute", 4, 3, 64),
        Collective("collective-permute", 4, 5, 64),
        Collective("all-gather", 4, 1, 96),
        Collective("collective-permute", 2, 1, 16),
        Collective("all-to-all", 8, 1, 14),
        Collective("collective-permute", 2, 1, 16),
        Collective("reduce-scatter", 4, 1, 96),
        Collective("all-reduce", 4, 1, 42),
        Collective("all-gather", 8, 1, 112),
        Collective("all-gather", 4, 1, 96),
        Collective("reduce-scatter", 4, 1, 96),
    ]
    assert sent_bytes(found)["collective-permute"] == 8 * 64 + 2 * 16
    assert collectives_of("") == []


def test_the_committed_table_keeps_to_its_formulas():
    """Bytes sent are the formula's, and every case has its row."""
    script = runpy.run_path(str(ROOT / "benchmarks" / "compile_over_meshes.py"))
    rows = json.loads(script["OUTPUT"].read_text())["rows"]
    for row in rows:
        if row["too_much"]:
            continue
        expected = script["formula"](**row)
        assert sum(row["sent"].values()) == pytest.approx(expected, rel=0.02), row
    assert {tuple(row[name] for name in script["NAMES"]) for row in rows} == set(script["cases"]())


RINGS = [("XLA", "v5e", False), ("XLA", "v6e", True), ("MOSAIC_TPU", "v5e", False)]


@pytest.mark.parametrize(("backend", "chip", "gradients"), RINGS)
def test_the_memory_of_a_ring_falls_with_the_number_of_devices(backend, chip, gradients):
    """As one over it: arguments, outputs and temporaries of one device; gradients too."""
    rows = json.loads((ROOT / "benchmarks" / "meshes.json").read_text())["rows"]
    same = {"form": "ring", "length": 2**20, "backend": backend, "chip": chip,
            "gradients": gradients}  # fmt: skip
    chosen = [row for row in rows if same.items() <= row.items() and not row["too_much"]]
    assert {row["devices"] for row in chosen} == {4, 8, 16}
    for part in ("arguments", "outputs", "temporaries"):
        whole = [row["memory"][part] * row["devices"] for row in chosen]
        assert max(whole) < 1.1 * min(whole), (part, whole)


def test_the_command_line_takes_a_mesh():
    command = ["compile", "--device", "cpu", "--q-len", "32", "--mesh"]
    done = CliRunner().invoke(app, [*command, "data=2,model=2", "--heads-axis", "model", "--json"])
    assert done.exit_code == 0, done.output
    assert '"sent": {}' in done.stdout
    for options, said in [
        (["data"], "--mesh is data, must be axes and sizes, such as data=2,model=4"),
        (["data=2", "--heads-axis", "model"], "--heads-axis is model, must be one of data"),
    ]:
        done = CliRunner().invoke(app, [*command, *options])
        assert done.exit_code == 2
        assert said in " ".join(done.output.split())

import json
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnsel_jax.bench import CASES, Settings, named
from attnsel_jax.bench.attention_cases import dense_causal, paged_decode
from attnsel_jax.bench.memory_case import memory_at
from attnsel_jax.bench.race import Rival, Target, jitted_call
from attnsel_jax.bench.report import to_json
from attnsel_jax.bench.results import CaseResult, Row, Verdict, at_least, at_most, missed
from attnsel_jax.bench.rivals import jax_nn_dense, torch_dense
from attnsel_jax.bench.roofline import Roofline, Work, roofline_of
from attnsel_jax.bench.selector_cases import import_time, selector_call
from attnsel_jax.bench.timing import interleaved
from attnsel_jax.platforms import Device

TINY = {"length": 64, "num_heads": 2, "head_size": 16}
FEW = Settings(rounds=3)
UNIT = Roofline(flops=1e9, bandwidth=1e9, source="made up")


def no_roofline(device):
    return None


def rival_that(change, name="rival"):
    """jax.nn, with its output changed."""

    def attend(q, k, v):
        return change(jax.nn.dot_product_attention(q, k, v, is_causal=True))

    return Rival(name, lambda sets: jitted_call(attend, sets))


def slowed(rival, seconds):
    def prepare(sets):
        call = rival.prepare(sets)

        def slow(number):
            time.sleep(seconds)
            return call(number)

        return slow

    return Rival(rival.name, prepare)


def targets_of(result):
    """reached, by what stands before the colon of the target."""
    return {verdict.target.split(":")[0]: verdict.reached for verdict in result.verdicts}


def test_a_race_times_backends_and_rivals_side_by_side():
    result = dense_causal(**TINY).run(FEW, lambda device: UNIT)
    names = [row.name for row in result.rows]
    assert names[0] == "XLA"
    assert "jax.nn" in names
    assert all(row.samples == 3 and row.low <= row.value <= row.high for row in result.rows)
    # 2 products of 2 heads x 64 x 64 x 16, causal half.
    assert result.limit == pytest.approx(2 * 2 * 2 * 64 * 64 * 16 / 2 / 1e9)
    assert result.rows[0].share == pytest.approx(result.limit / result.rows[0].value)
    assert "XLA_REFERENCE builds every logit: timed only when named" in result.notes
    json.dumps(result.to_json(), allow_nan=False)


def test_gradients_race():
    result = dense_causal(**TINY, gradients=True).run(FEW, no_roofline)
    assert result.verdicts[0].reached, result.verdicts[0]
    assert result.rows[0].share is None


@pytest.mark.parametrize("page_size", [4, 16])
def test_paged_race(page_size):
    race = paged_decode(
        page_size=page_size, num_seqs=3, kv_len=50, num_heads=4, num_kv_heads=2, head_size=8
    )
    result = race.run(FEW, no_roofline)
    assert [row.name for row in result.rows] == ["XLA", "gather + jax.nn"]
    assert result.verdicts[0].reached, result.verdicts[0]


def test_torch_races_where_it_is_installed():
    pytest.importorskip("torch")
    rivals = (jax_nn_dense(gradients=True), torch_dense(gradients=True))
    race = dense_causal(**TINY, gradients=True, rivals=rivals)
    result = race.run(FEW, no_roofline)
    assert "torch" in [row.name for row in result.rows]
    assert result.verdicts[0].reached, result.verdicts[0]


def test_a_missing_rival_is_a_note_and_no_failure(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = dense_causal(**TINY).run(FEW, no_roofline)
    assert "torch is not timed: not installed (pip install torch)" in result.notes
    assert targets_of(result)["XLA against torch, speed"] is None
    assert torch_dense(gradients=False).missing(Device.named("h200"))


@pytest.mark.parametrize(
    "fault",
    [
        lambda out: out * 1.001,
        lambda out: jnp.roll(out, 1, axis=1),
        lambda out: out.at[0, 0, 0, 0].set(jnp.nan),
        lambda out: out.at[0, -1, 0, 0].add(0.01),
    ],
    ids=["scaled", "shifted", "nan", "one-element"],
)
def test_a_wrong_answer_turns_the_check_red(fault):
    rivals = (jax_nn_dense(gradients=False), rival_that(fault, "faulty"))
    result = dense_causal(**TINY, rivals=rivals, targets=()).run(FEW, no_roofline)
    (verdict,) = result.missed
    assert "every contender's answer" in verdict.target
    assert "faulty" in verdict.measured
    right = dense_causal(**TINY, rivals=rivals[:1], targets=()).run(FEW, no_roofline)
    assert right.missed == []


def test_targets_are_reached_against_a_slow_rival_and_missed_against_a_fast_one():
    slow = slowed(rival_that(lambda out: out, "slow"), 0.05)
    result = dense_causal(**TINY, rivals=(slow,), targets=(Target("slow", 3.0),)).run(
        FEW, no_roofline
    )
    assert targets_of(result)["XLA against slow, speed"] is True
    fast = rival_that(lambda out: out, "fast")
    result = dense_causal(**TINY, rivals=(fast,), targets=(Target("fast", 1e4),)).run(
        FEW, no_roofline
    )
    assert targets_of(result)["XLA against fast, speed"] is False
    assert missed([result]) == result.missed != []


def test_backends_by_name_and_their_refusals():
    settings = Settings(rounds=1, backends=("XLA_REFERENCE", "CUDNN"))
    result = dense_causal(**TINY, targets=()).run(settings, no_roofline)
    assert "XLA_REFERENCE" in [row.name for row in result.rows]
    assert any(note.startswith("CUDNN refuses: platform is cpu") for note in result.notes)


def test_rounds_are_interleaved_and_begin_in_turn():
    order = []
    contenders = {
        name: lambda number, name=name: order.append((name, number)) for name in ("a", "b")
    }
    samples = interleaved(contenders, rounds=4, budget_s=60, num_sets=3)
    assert order == [
        ("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2), ("b", 0), ("a", 0),
    ]  # fmt: skip
    assert {name: len(times) for name, times in samples.items()} == {"a": 4, "b": 4}


def test_a_spent_budget_ends_the_rounds_after_three():
    samples = interleaved({"a": lambda _: time.sleep(0.01)}, rounds=9, budget_s=0.0, num_sets=1)
    assert len(samples["a"]) == 3
    assert min(samples["a"]) >= 0.01


def test_the_data_are_fresh_for_each_set_and_seed():
    race = dense_causal(**TINY)
    sets = race.make_inputs(np.random.default_rng(0), 2)
    assert not np.array_equal(sets[0]["q"], sets[1]["q"])
    other = race.make_inputs(np.random.default_rng(1), 1)
    assert not np.array_equal(sets[0]["q"], other[0]["q"])


def test_memory_compares_compiled_programs():
    result = memory_at(FEW, length=1024, num_heads=1, head_size=16)
    assert [row.unit for row in result.rows] == ["B"] * 4
    ours, jax_nn = result.rows[0].value, result.rows[1].value
    assert jax_nn >= 4 * 1024 * 1024  # its logits
    assert ours > 0
    assert len(result.verdicts) == 2
    # At this length a hundredth may be out of reach: the verdict must say so.
    assert result.verdicts[0].reached is (jax_nn / ours >= 100)


def test_selector_and_import_cases():
    result = selector_call(FEW, batches=2)
    assert [row.name for row in result.rows] == [
        "automatic", "environment variable set", "forced",
    ]  # fmt: skip
    assert all(0 < row.value < 1e-3 for row in result.rows)
    result = import_time(FEW, processes=1)
    assert 0 < result.rows[0].value <= result.rows[1].value < 30


def test_rooflines():
    h200 = roofline_of(Device.named("h200"))
    assert (h200.flops, h200.bandwidth) == (989e12, 4.8e12)
    assert roofline_of(Device("tpu", "TPU v99", None, "v99")) is None
    assert UNIT.limit(Work(flops=2e9, bytes=1e9)) == 2.0
    assert UNIT.limit(Work(flops=1e9, bytes=3e9)) == 3.0


def test_verdicts_print():
    assert str(at_least("speed", 2.0, 3.0)) == "NOT REACHED: speed: at least 3x (2x)"
    reached = at_most("call", 4e-6, 5e-6, "us", 1e6)
    assert str(reached) == "reached: call: at most 5 us (4 us)"
    assert str(Verdict("t", "why", None)) == "not measured: t (why)"
    assert at_least("speed", math.nan, 3.0).reached is False


def test_a_report_says_by_what_and_when():
    row = Row("XLA", 1.0, "s", 0.9, 1.1, 3, 0.5)
    result = CaseResult("case", "what", (row,), (at_least("speed", 1.0, 3.0),))
    said = to_json([result], FEW, Device("cpu", "cpu"), UNIT, ["attnsel", "bench"])
    assert said["command"] == "attnsel bench"
    assert {"python", "jax", "jaxlib", "numpy"} <= set(said["versions"])
    assert said["device"]["cores"] >= 1
    assert said["missed"] == ["NOT REACHED: speed: at least 3x (1x)"]
    assert "/" not in json.dumps(said["device"]["kind"])


def test_case_names():
    assert named(()) == tuple(CASES)
    assert named(["dense_causal_4096"]) == ("dense_causal_4096",)
    assert named(["dense", "*call"]) == (
        "dense_causal_4096", "dense_causal_4096_grad", "selector_call",
    )  # fmt: skip
    with pytest.raises(ValueError, match="case is 'zz', must be one of dense_causal_4096"):
        named(["zz"])

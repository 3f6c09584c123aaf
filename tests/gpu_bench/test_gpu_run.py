"""The run on a GPU, rehearsed on a processor: XLA's kernels stand for ours, on small works."""

import concurrent.futures
import dataclasses
import importlib.util
import json

import jax
import numpy as np
import pytest
from typer.testing import CliRunner

from attnsel_jax.backends.xla import XlaBackend
from benchmarks.gpu import cli, clock, inputs, measured, ours, page, racing
from benchmarks.gpu.contenders import CONTENDERS, OURS
from benchmarks.work import Work

DENSE = Work("dense", "", "dense", 4, 2, 16, 16, (48,) * 2, (48,) * 2)
WORKS = {
    "dense": DENSE,
    "gradients": dataclasses.replace(DENSE, name="gradients", backward=True, causal=False),
    "paged": Work("paged", "", "paged", 4, 2, 16, 16, (1, 20), (40, 50), 16),
    "fp8": Work("fp8", "", "paged", 4, 2, 16, 16, (1,), (33,), 16, cache_dtype="float8_e4m3fn"),
    "mla": Work("mla", "", "mla", 2, 1, 576, 512, (1, 3), (20, 20), 16),
    "sparse": Work("sparse", "", "sparse_mla", 2, 1, 576, 512, (2,), (20,), 16, topk=8,
                   cache_dtype="fp8_ds_mla"),
}  # fmt: skip
STAND_INS = {"dense": "XLA", "paged": "XLA", "mla": "XLA_MLA", "sparse_mla": "XLA_MLA_SPARSE"}


@pytest.fixture(autouse=True)
def _rehearsal(monkeypatch):
    monkeypatch.setattr(ours, "BACKENDS", STAND_INS)
    monkeypatch.setattr(clock, "calls_for", lambda seconds, window=0: 2)
    monkeypatch.setattr(racing, "poison", lambda: None)
    monkeypatch.setattr(inputs, "PAST_CACHE", 0)


def raced(work, names=(OURS,)):
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return {t.contender: t for t in racing.race(work, names, pool, rounds=2)}


@pytest.mark.parametrize("work", WORKS.values(), ids=WORKS)
def test_ours_is_held_to_the_oracle_and_timed(work):
    timing = raced(work)[OURS]
    assert timing.verdict == racing.TIMED, timing.reason
    assert timing.samples == 2
    assert 0 < timing.error < 1e-2
    assert timing.tflops == pytest.approx(work.flops / timing.seconds / 1e12)


@pytest.mark.parametrize("work", [WORKS["dense"], WORKS["gradients"]], ids=lambda work: work.name)
def test_rivals_are_timed_beside_it_or_say_why_not(work):
    timings = raced(work, CONTENDERS)
    assert timings["jax.nn xla"].verdict == racing.TIMED, timings["jax.nn xla"].reason
    assert timings["jax.nn cudnn"].verdict == racing.FAILED
    assert timings["jax paged (triton)"].verdict == racing.LEFT_OUT
    assert "must be" in timings["jax paged (triton)"].reason


@pytest.mark.parametrize(
    ("work", "fault"),
    [("dense", lambda out: out.at[-1, -1].multiply(1.1)),
     ("paged", lambda out: out.at[-1, 0, 0].add(0.5)),
     ("sparse", lambda out: out.at[-1, 0, 0].add(0.5))],
)  # fmt: skip
def test_a_wrong_kernel_is_not_timed(monkeypatch, work, fault):
    backend = ours.backend_of(WORKS[work])
    kernel = backend.get_kernel(WORKS[work].op)

    def spoilt(**arguments):
        out, *rest = kernel(**arguments)
        return fault(out), *rest

    monkeypatch.setattr(backend, "get_kernel", lambda op: spoilt)
    timing = raced(WORKS[work])[OURS]
    assert timing.verdict == racing.WRONG
    assert "out" in timing.reason


def test_a_wrong_gradient_shows_against_a_rival_s(monkeypatch):
    kernel = XlaBackend.get_kernel("dense")

    def spoilt(q, k, v, **more):
        out, lse = kernel(q=q, k=k, v=v, **more)
        return out + 0.1 * (k - jax.lax.stop_gradient(k)).sum(), lse

    monkeypatch.setattr(XlaBackend, "get_kernel", lambda op: spoilt)
    timings = raced(WORKS["gradients"], [OURS, "jax.nn xla"])
    assert timings["jax.nn xla"].verdict == racing.WRONG
    assert "against ours" in timings["jax.nn xla"].reason


def test_bits_that_change_are_a_fault(monkeypatch):
    answers = iter(np.float32([1, 1, 2]))
    runner = racing._Runner(OURS, {}, None, lambda: None, 0.0)
    one, two = jax.numpy.full(3, next(answers)), jax.numpy.full(3, 2.0)
    assert "other bits" in racing._own_fault(DENSE, runner, (), [one], [two])


def test_a_whole_run_writes_what_it_found(monkeypatch, tmp_path):
    quick = [p for p in measured.checks.QUICK if p.name.startswith("quick.dense")][:2]
    monkeypatch.setattr(measured.checks, "SETS", {"quick": quick})
    monkeypatch.setattr(measured.calibration, "calibrated", lambda: {"tflops": 1.0, "gbytes": 1.0})
    works = [WORKS["dense"], WORKS["paged"]]
    said = []
    data = measured.run(works, [OURS, "jax.nn xla"], tmp_path, 900.0, seed=3, say=said.append)
    kept = json.loads((tmp_path / "gpu.json").read_text())
    assert kept["seed"] == 3
    verdicts = {(row["work"], row["contender"]): row["verdict"] for row in kept["timings"]}
    left_out = verdicts.pop(("paged", "jax.nn xla"))
    assert (left_out, set(verdicts.values()), len(verdicts)) == ("left out", {"timed"}, 3)
    assert {row["backend"] for row in kept["checks"]} == {"XLA", "XLA_MLA", "XLA_MLA_SPARSE"}
    assert not measured.failed(data)
    assert len(page.timed_rows(data)) >= 4
    assert [row[0] for row in page.check_rows(data)] == ["XLA", "XLA_MLA", "XLA_MLA_SPARSE"]


def test_no_time_left_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(measured.calibration, "calibrated", dict)
    data = measured.run([WORKS["dense"]], [OURS], tmp_path, 0.0, seed=0, say=lambda text: None)
    assert data["timings"] == [{"work": "dense", "verdict": "not run: no time was left"}]
    assert {row["verdict"] for row in data["checks"]} == {"not run"}
    assert page.timed_rows(data)


def test_something_wrong_of_ours_fails_the_run():
    row = {"work": "w", "contender": OURS, "verdict": racing.WRONG}
    assert measured.failed({"checks": [], "timings": [row]})
    assert measured.failed({"checks": [{"verdict": "fail"}], "timings": []})
    assert not measured.failed({"checks": [{"verdict": "refused"}], "timings": []})


def test_torch_s_own_process():
    answer = measured.in_torch([DENSE], 120.0)
    if importlib.util.find_spec("torch") is None:
        assert answer["verdict"] == "failed"
        assert "torch" in answer["reason"]
        return
    assert {row["contender"] for row in answer["rows"]} == {"torch flash", "torch cudnn"}


def test_the_command_line_refuses_what_it_does_not_know():
    done = CliRunner().invoke(cli.app, ["run", "--work", "nothing"])
    assert done.exit_code == 2
    assert "work is 'nothing', must be" in done.output + (done.stderr or "")

"""The run on a GPU, rehearsed on a processor: XLA's kernels stand for ours, on small works."""

import concurrent.futures
import dataclasses
import importlib.util
import json
import sys
import time

import jax
import numpy as np
import pytest
from typer.testing import CliRunner

from attnsel_jax.backends.xla import XlaBackend
from benchmarks.gpu import (
    calibration,
    checks,
    cli,
    clock,
    inputs,
    judging,
    measured,
    ours,
    page,
    racing,
    runners,
    steps,
    watching,
)
from benchmarks.gpu.contenders import CONTENDERS, OURS
from benchmarks.gpu.works import WORKS as WORKS_OF_A_RUN
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
    monkeypatch.setattr(judging, "poison", lambda: None)
    monkeypatch.setattr(inputs, "PAST_CACHE", 0)


def raced(work, names=(OURS,)):
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return {t.contender: t for t in racing.race(work, names, pool, rounds=2)}


@pytest.mark.parametrize("work", WORKS.values(), ids=WORKS)
def test_ours_is_held_to_the_oracle_and_timed(work):
    timing = raced(work)[OURS]
    assert timing.verdict == runners.TIMED, timing.reason
    assert timing.samples == 2
    assert 0 < timing.error < 1e-2
    assert timing.tflops == pytest.approx(work.flops / timing.seconds / 1e12)


@pytest.mark.parametrize("work", [WORKS["dense"], WORKS["gradients"]], ids=lambda work: work.name)
def test_rivals_are_timed_beside_it_or_say_why_not(work):
    timings = raced(work, CONTENDERS)
    assert timings["jax.nn xla"].verdict == runners.TIMED, timings["jax.nn xla"].reason
    assert timings["jax.nn cudnn"].verdict == runners.FAILED
    assert timings["jax paged (triton)"].verdict == runners.LEFT_OUT
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
    assert timing.verdict == runners.WRONG
    assert "out" in timing.reason


def spoil_gradients(monkeypatch):
    """Ours: the output is right, k's gradient is not."""
    kernel = XlaBackend.get_kernel("dense")

    def spoilt(q, k, v, **more):
        out, lse = kernel(q=q, k=k, v=v, **more)
        return out + 0.1 * (k - jax.lax.stop_gradient(k)).sum(), lse

    monkeypatch.setattr(XlaBackend, "get_kernel", lambda op: spoilt)


def test_a_wrong_gradient_shows_against_a_rival_s(monkeypatch):
    spoil_gradients(monkeypatch)
    timings = raced(WORKS["gradients"], [OURS, "jax.nn xla"])
    assert timings["jax.nn xla"].verdict == runners.WRONG
    assert "against ours" in timings["jax.nn xla"].reason


def test_ours_is_wrong_where_rivals_agree_with_each_other(monkeypatch):
    spoil_gradients(monkeypatch)
    monkeypatch.setitem(racing.contenders.CONTENDERS, "another", CONTENDERS["jax.nn xla"])
    timings = raced(WORKS["gradients"], [OURS, "jax.nn xla", "another"])
    assert timings[OURS].verdict == runners.WRONG
    assert "jax.nn xla and another agree with each other" in timings[OURS].reason
    assert {timings[name].verdict for name in ("jax.nn xla", "another")} == {runners.TIMED}


def test_a_wrong_answer_of_ours_judges_no_rival(monkeypatch):
    monkeypatch.setattr(judging, "_own_fault", lambda *args: "wrong")
    spoil_gradients(monkeypatch)
    timings = raced(WORKS["gradients"], [OURS, "jax.nn xla"])
    verdicts = {name: timing.verdict for name, timing in timings.items()}
    assert verdicts == {OURS: runners.WRONG, "jax.nn xla": runners.TIMED}


def test_bits_that_change_are_a_fault(monkeypatch):
    answers = iter(np.float32([1, 1, 2]))
    runner = runners.Runner(OURS, {}, None, lambda: None, lambda seed: (), 0.0)
    one, two = jax.numpy.full(3, next(answers)), jax.numpy.full(3, 2.0)
    assert "other bits" in judging._own_fault(DENSE, runner, (), [one], [two])


def in_this_process(todo, ends, say):
    for step in todo:
        on_time = time.perf_counter() <= ends(step)
        yield from steps.take(step) if on_time else steps.left(step)


@pytest.mark.once
def test_a_whole_run_writes_what_it_found(monkeypatch, tmp_path):
    quick = [p for p in checks.QUICK if p.name.startswith("quick.dense")][:2]
    monkeypatch.setattr(checks, "SETS", {"quick": quick})
    monkeypatch.setattr(calibration, "calibrated", lambda: {"tflops": 1.0, "gbytes": 1.0})
    works = [WORKS["dense"], WORKS["paged"]]
    data = measured.run(
        works, [OURS, "jax.nn xla"], tmp_path, 900.0, 3, lambda text: None, in_this_process
    )
    kept = json.loads((tmp_path / "gpu.json").read_text())
    assert kept["seed"] == 3
    assert kept["calibration"] == {"tflops": 1.0, "gbytes": 1.0}
    verdicts = {(row["work"], row["contender"]): row["verdict"] for row in kept["timings"]}
    left_out = verdicts.pop(("paged", "jax.nn xla"))
    assert (left_out, set(verdicts.values()), len(verdicts)) == ("left out", {"timed"}, 3)
    assert {row["backend"] for row in kept["checks"]} == {"XLA", "XLA_MLA", "XLA_MLA_SPARSE"}
    assert not measured.failed(data)
    assert [row[0] for row in page.timed_rows(data)] == ["dense", "paged"]
    assert [row[0] for row in page.check_rows(data)] == ["XLA", "XLA_MLA", "XLA_MLA_SPARSE"]


def test_a_work_s_row_has_ours_its_best_rival_and_who_failed():
    def timed(who, seconds, **more):
        row = {"work": "w", "contender": who, "verdict": "timed", "seconds": seconds}
        return row | {"tflops": 1.0, "gbytes": 2.0, "error": 3e-3} | more

    failed = {"work": "w", "contender": "slow", "verdict": runners.FAILED}
    left_out = {"work": "w", "contender": "other", "verdict": runners.LEFT_OUT}
    data = {"timings": [timed(OURS, 2e-3, clocks_differ=True), timed("a", 4e-4), failed, left_out],
            "torch": {"rows": [timed("torch", 1e-3)]}}  # fmt: skip
    (row,) = page.timed_rows(data)
    assert row == [
        "w",
        "2,000*",
        "1",
        "2",
        "3.0e-03",
        "a 400.0",
        "0.20",
        "torch 1,000, slow failed",
    ]
    wrong = timed(OURS, 1e-3) | {"verdict": runners.WRONG, "reason": "out"}
    (row,) = page.timed_rows({"timings": [wrong, timed("a", 1e-3)], "torch": {}})
    assert row[1:2] + row[5:7] == ["WRONG: out", "a 1,000", ""]
    refused = {"work": "w", "contender": OURS, "verdict": runners.LEFT_OUT}
    (row,) = page.timed_rows({"timings": [refused, timed("a", 1e-3)], "torch": {}})
    assert row[1:2] + row[5:7] == ["not run: ", "a 1,000", ""], "a rival's time is not ours"


def test_no_time_left_is_said(monkeypatch, tmp_path):
    data = measured.run(
        [WORKS["dense"]], [OURS], tmp_path, 0.0, 0, lambda text: None, in_this_process
    )
    assert data["timings"] == [{"work": "dense", "verdict": "not run: no time was left"}]
    assert {row["verdict"] for row in data["checks"]} == {"not run"}
    assert page.timed_rows(data)
    monkeypatch.setattr(page, "FOLDER", tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "gpu.json").rename(tmp_path / "run" / "gpu.json")
    assert "no device" in page.measured_sections(tmp_path)


CHILD = """
import json, os, sys, time
name = json.loads(sys.stdin.readline()).get("work", {}).get("name")
print(json.dumps({"place": "timings", "value": [name, os.getpid()]}), flush=True)
print("noise of a library")
print("{not: json}")
if name == "hangs":
    time.sleep(60)
if name == "crashes":
    os._exit(3)
print(json.dumps({"done": True}), flush=True)
"""


def test_a_step_that_crashes_or_hangs_costs_itself_only():
    names = ("one", "crashes", "two", "hangs", "three", "late")
    todo = [{"kind": "race", "work": {"name": name}, "names": [OURS]} for name in names]

    def ends(step):
        return time.perf_counter() + (-1 if step["work"]["name"] == "late" else 60)

    found = list(
        watching.taken(
            todo, ends, lambda text: None, command=[sys.executable, "-c", CHILD], step_s=2.0
        )
    )
    assert {place for place, _ in found} == {"timings"}
    rows = [row for _, row in found]
    named, (crashed, hung, late) = [rows[at] for at in (0, 1, 3, 4, 6)], [rows[2], rows[5], rows[7]]
    assert [name for name, _ in named] == ["one", "crashes", "two", "hangs", "three"]
    assert len({process for _, process in named}) == 5, "a process for each"
    assert (crashed["verdict"], crashed["reason"]) == (runners.FAILED, "its process ended with 3")
    assert (hung["verdict"], hung["reason"]) == (runners.FAILED, "hung: stopped after 2 s")
    assert late == {"work": "late", "verdict": "not run: no time was left"}
    assert measured.failed({"checks": [], "timings": [crashed]})


WAITS = """
import json, sys, time
from benchmarks.gpu import turns
alone = json.loads(sys.stdin.readline())["work"]["alone"]
with turns.turn(alone=alone):
    began = time.time()
    time.sleep(0.5)
    print(json.dumps({"place": "timings", "value": [alone, began, time.time()]}))
print(json.dumps({"done": True}), flush=True)
"""


def test_what_is_measured_runs_alone():
    todo = [{"kind": "race", "work": {"alone": alone}} for alone in (False, False, True, True)]
    found = watching.taken(todo, lambda step: time.perf_counter() + 60, lambda text: None,
                           command=[sys.executable, "-c", WAITS])  # fmt: skip
    spans = [value for _, value in found]
    for alone, begin, end in spans:
        others = [span for span in spans if span != [alone, begin, end]]
        meanwhile = [span for span in others if span[1] < end and begin < span[2]]
        assert not meanwhile or not (alone or any(span[0] for span in meanwhile))


@pytest.mark.once
def test_the_processes_take_steps_and_say_what_raised():
    work = dataclasses.asdict(WORKS["dense"])
    todo = [
        {"kind": "device"},
        {"kind": "race", "work": work, "names": ["nobody"]},
        {"kind": "race", "work": work, "names": ["jax.nn xla"]},
    ]
    found = list(watching.taken(todo, lambda step: time.perf_counter() + 200, lambda text: None))
    assert [place for place, _ in found] == ["device", "timings", "timings"]
    assert found[0][1]["kind"] == "cpu"
    assert "contender is 'nobody', must be one of" in found[1][1]["reason"]
    assert found[2][1]["verdict"] == runners.TIMED


def test_a_contender_that_fails_while_it_is_timed_stops_nobody_else(monkeypatch):
    real = racing._time_once

    def once(runner, sets):
        if runner.name == OURS and runner.wall:
            raise RuntimeError("out of memory")
        real(runner, sets)

    monkeypatch.setattr(racing, "_time_once", once)
    timings = raced(DENSE, [OURS, "jax.nn xla"])
    assert timings["jax.nn xla"].verdict == runners.TIMED
    assert (timings[OURS].verdict, "out of memory" in timings[OURS].reason) == ("failed", True)


def test_what_a_stopped_process_of_torch_had_said_counts():
    said = '{"calibration": {"tflops": 1}}\nnoise\n{"work": "a", "verdict": "timed"}\n{"work": "b'
    assert measured._said(said) == {
        "calibration": {"tflops": 1}, "rows": [{"work": "a", "verdict": "timed"}],
    }  # fmt: skip


def test_the_first_works_have_one_of_each_kind():
    first = list(WORKS_OF_A_RUN.values())[:4]
    assert [(work.op, work.backward) for work in first] == [
        ("dense", False), ("paged", False), ("dense", True), ("mla", False),
    ]  # fmt: skip


def test_something_wrong_of_ours_fails_the_run():
    row = {"work": "w", "contender": OURS, "verdict": runners.WRONG}
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

"""Problems drawn at random: the same each time, refused aloud, and on demand held to the oracle.

On demand the kernels of chips that are not here run in their interpreters, with races and NaN.
"""

import contextlib
import dataclasses
import itertools

import numpy as np
import pytest
from gpu_interpreter import gpu_interpreter
from mosaic_gpu.gpu_latents import with_raw_rows_apart
from tpu_interpreter import tpu_interpreter

from attnsel_jax.compare.deviations import deviation
from attnsel_jax.compare.expected import expected
from attnsel_jax.compare.kernel_runs import run
from attnsel_jax.platforms import Device
from attnsel_jax.problems import named, random_problem, random_problems
from attnsel_jax.problems.random_set import MOST_MISSED, TURNS
from attnsel_jax.registry import AttentionBackendEnum
from pallas_kernels.dense import mosaic_tpu_tiles
from pallas_kernels.paged import mosaic_tpu as paged_tpu
from pallas_kernels.paged import mosaic_tpu_tiles as paged_tiles

FEW = 3 * len(TURNS)
CHIPS_OF = {
    "XLA": ("cpu",),
    "MOSAIC_TPU": ("v5e", "v6e", "7x", "v5p", "v4"),
    "MOSAIC_GPU": ("h200", "h200", "a100", "b200"),
}


def same(left, right):
    return left.keys() == right.keys() and all(
        np.array_equal(left[x], right[x], equal_nan=np.asarray(left[x]).dtype.kind in "fV")
        if isinstance(left[x], np.ndarray)
        else left[x] == right[x]
        for x in left
    )


@pytest.mark.parametrize("number", range(FEW))
def test_a_number_is_a_problem_that_some_backend_serves(number):
    problem = random_problem(number)
    assert (problem.name, problem.op) == (f"random.{number}", TURNS[number % len(TURNS)][0])
    (again,) = named([problem.name])
    assert again.options == problem.options
    assert again.gradients == problem.gradients
    assert same(again.make(), problem.make())
    serving = [
        backend.name
        for backend in (member.get_class() for member in AttentionBackendEnum)
        if problem.op in backend.kernels
        and not backend.validate_configuration(problem.config, Device.named("cpu"))
    ]
    assert serving, problem.description


def test_other_seeds_give_other_problems():
    assert [p.name for p in random_problems(2, seed=3)] == ["random.3000000", "random.3000001"]
    drawn = [str(p.options) for p in (*random_problems(20), *random_problems(20, seed=1))]
    assert len(set(drawn)) == 40


def test_what_is_not_accepted_is_left_out():
    assert {p.op for p in random_problems(5, accepts=lambda p: p.op == "mla")} == {"mla"}
    with pytest.raises(ValueError, match=rf"accepts is False for {MOST_MISSED} problems one after"):
        random_problems(1, accepts=lambda p: False)
    with pytest.raises(ValueError, match="count is 0, must be at least 1"):
        random_problems(0)
    with pytest.raises(ValueError, match="seed is -1, must be at least 0"):
        random_problems(1, seed=-1)


def test_other_spellings_of_a_number_are_the_same_problem():
    assert [p.name for p in named(["random.7", "random.007"])] == ["random.7"]


def test_a_number_stays_what_it_was():
    """NumPy may change how it draws: then numbers that somebody noted are other problems."""
    assert random_problem(2).description == (
        "q_lens (1, 17, 1, 15, 5, 1, 40, 0, 0), kv_lens (15, 17, 2, 15, 33, 31, 63, 258, 5), "
        "pad_tokens 0, page_size 128, num_heads 16, dtype float32"
    )


@pytest.mark.parametrize("name", ["random.x", "random.-1", "random.", "random"])
def test_names_that_are_no_number(name):
    with pytest.raises(ValueError, match=r"must be"):
        named([name])


def small_tiles(monkeypatch):
    """Tiles of TPUs, so small that small problems have several of each kind."""
    dense, paged = mosaic_tpu_tiles.Tiles, paged_tiles.Tiles
    for key in mosaic_tpu_tiles.TILES:
        longest = 7 if key[2].startswith("backward") else 0
        tiles = dense(128, 128, 128, 256, 256, longest=longest)
        monkeypatch.setitem(mosaic_tpu_tiles.TILES, key, tiles)
    tiles = paged(tile_tokens=32, block_tokens=256, chunk_tokens=128, num_buffers=3)
    monkeypatch.setattr(paged_tpu, "tiles_for", lambda *_: tiles)


def interpreter(backend, chip):
    if backend.startswith("MOSAIC_TPU"):
        return tpu_interpreter(chip)
    return gpu_interpreter(chip) if backend.startswith("MOSAIC_GPU") else contextlib.nullcontext()


def serving(problem, backend, chip):
    """The backend of that name, or of its latent kin, if it serves the problem on the chip."""
    asked = dataclasses.replace(problem.config, needs_grad=problem.gradients)
    for kin in (backend, f"{backend}_MLA", f"{backend}_MLA_SPARSE"):
        kin = AttentionBackendEnum[kin].get_class()
        if problem.op in kin.kernels and not kin.validate_configuration(asked, chip):
            return kin
    return None


def check(problem, backend, chip, *, seed=0):
    """Every result, gradients too, within the oracle's budget."""
    arguments, cotangents = problem.make(seed), None
    if problem.gradients:
        rng = np.random.default_rng(seed)
        out = (*arguments["q"].shape[:3], arguments["v"].shape[-1])
        cotangents = (rng.standard_normal(out, np.float32).astype(arguments["q"].dtype),
                      rng.standard_normal(out[:3], np.float32))  # fmt: skip
    layout = backend.latent_layout if backend.is_mla() else backend.layout
    with interpreter(backend.name, chip):
        results = run(backend.get_kernel(problem.op), problem.op, arguments, cotangents,
                      layout=layout)  # fmt: skip
    answers = expected(problem.op, arguments, cotangents)
    found = [deviation(name, results[name], answer) for name, answer in answers.items()]
    assert all(d.passed for d in found), f"{problem.description}: {', '.join(map(str, found))}"


@pytest.mark.sweep
@pytest.mark.parametrize("number", range(400))
@pytest.mark.parametrize("backend", CHIPS_OF)
def test_kernels_agree_with_the_oracle(backend, number, monkeypatch):
    with_raw_rows_apart(monkeypatch)
    if number % 2:
        small_tiles(monkeypatch)
    problem = random_problem(number)
    chips = CHIPS_OF[backend]
    turn = number // len(TURNS) % len(chips)
    for chip in itertools.islice(itertools.cycle(chips), turn, turn + len(chips)):
        served = serving(problem, backend, Device.named(chip))
        if served is not None:
            check(problem, served, chip, seed=number)
            return
    pytest.skip("no chip of these serves it")

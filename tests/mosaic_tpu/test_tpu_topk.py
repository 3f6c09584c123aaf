"""Top-k positions on TPU, interpreted with race detection and NaN; and compiled."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tpu_interpreter import tpu_interpreter

import attnsel_jax
from attnsel_jax import oracle
from attnsel_jax.aot import compile_for, target_for
from attnsel_jax.backends.mosaic_tpu_mla_sparse import TPU_TILED, MosaicTpuMlaSparseBackend
from attnsel_jax.problems.indexer_inputs import topk_inputs
from attnsel_jax.xla import indexer
from pallas_kernels.sparse_mla import mosaic_tpu_topk
from pallas_kernels.sparse_mla.mosaic_tpu_topk import topk_positions

MORE = {
    "registers-1": (9, 300, 100),
    "registers-2": (33, 300, 130),
    "one": (3, 200, 1),
    "fewer-positions-than-named": (3, 50, 200),
    "many-chunks": (5, 1500, 128),
    "registers-4": (40, 1000, 500),
    "eight-tokens-at-once": (11, 9000, 8200),
}


def scores_of(num_tokens, num_positions, topk):
    rng = np.random.default_rng(0)
    shape = {"num_tokens": num_tokens, "num_positions": num_positions}
    return topk_inputs(rng, **shape, topk=min(topk, 40))["scores"]


def interpreted(scores, topk):
    with tpu_interpreter():
        return np.asarray(jax.jit(topk_positions, static_argnums=1)(jnp.asarray(scores), topk))


@pytest.mark.sweep
@pytest.mark.parametrize("shape", MORE.values(), ids=MORE)
def test_it_names_what_the_oracle_names_on_more_shapes(shape):
    scores = scores_of(*shape)
    np.testing.assert_array_equal(
        interpreted(scores, shape[2]), oracle.topk_positions(scores, shape[2])
    )


@pytest.mark.once
def test_ties_zeros_infinities_and_nans_of_either_sign_are_ordered_as_xla_orders_them():
    """Over two registers and three chunks, of which the last is cut."""
    negative_nan = np.frombuffer(np.uint32(0xFFC00000).tobytes(), np.float32)[0]
    scores = np.concatenate([scores_of(5, 600, 130), np.zeros((4, 600), np.float32)])
    scores[0, [3, 9]], scores[0, 5], scores[0, 4] = np.nan, np.inf, negative_nan
    scores[5, ::2], scores[6], scores[7] = -0.0, np.nan, -np.inf
    want = indexer.topk_positions(jnp.asarray(scores), 130)
    np.testing.assert_array_equal(interpreted(scores, 130), want)


def _ties_as_they_come(keys, positions, other_keys, other_positions):
    return keys > other_keys


def _best_first_throughout(entries, apart, size):
    return _PASS(entries, apart, 0)


_PASS = mosaic_tpu_topk._pass
FAULTS = {
    "ties as they come": ("_is_before", _ties_as_they_come),
    "chunks not merged": ("_merged", lambda best, other: best),
    "runs all sorted alike": ("_pass", _best_first_throughout),
    "lanes not shuffled": ("_shuffled", lambda x, lane, apart: x),
    "zeros of two kinds": ("_key_of", lambda scores: scores.view(jnp.int32)),
}
# One at every push, the others on demand.
PLANTED = [
    pytest.param(*planted, id=name, marks=() if name.startswith("ties") else pytest.mark.sweep)
    for name, planted in FAULTS.items()
]


@pytest.mark.once
@pytest.mark.parametrize(("name", "fault"), PLANTED)
def test_a_planted_fault_is_found(monkeypatch, name, fault):
    monkeypatch.setattr(mosaic_tpu_topk, name, fault)
    scores = scores_of(3, 200, 20)
    scores[0, ::3] = -0.0
    want = oracle.topk_positions(scores, 20)
    assert not np.array_equal(interpreted(scores, 20), want)


def test_nothing_to_choose_from_names_nothing():
    assert topk_positions(jnp.zeros((0, 7)), 3).shape == (0, 3)
    np.testing.assert_array_equal(topk_positions(jnp.zeros((2, 0)), 3), np.full((2, 3), -1))


def test_what_it_does_not_take_is_refused():
    with pytest.raises(ValueError, match="topk is 0, must be at least 1"):
        topk_positions(jnp.zeros((1, 4)), 0)
    with pytest.raises(ValueError, match="scores has dtype bfloat16"):
        topk_positions(jnp.zeros((1, 4), jnp.bfloat16), 2)


@pytest.mark.once
def test_the_op_takes_it_where_the_backend_is_a_tpu_s(monkeypatch):
    scores = scores_of(3, 40, 20)
    best = functools.partial(attnsel_jax.topk_positions, scores, 5)
    with tpu_interpreter():
        got = best(backend="MOSAIC_TPU_MLA_SPARSE", device="v5e")
    np.testing.assert_array_equal(got, oracle.topk_positions(scores, 5))
    monkeypatch.setattr(mosaic_tpu_topk, "_kernel", None)  # none else comes to it
    np.testing.assert_array_equal(best(), got)


def compiles(chip, num_positions, topk):
    """Lets the chip's own compiler have the kernel."""
    missing = target_for(chip).missing()
    if missing:
        pytest.skip(f"no compiler for {chip} here: {missing}")
    path = MosaicTpuMlaSparseBackend.kernels["topk_positions"]
    scores = jnp.zeros((40, num_positions), jnp.float32)
    report = compile_for(chip, path, {"scores": scores, "topk": topk})
    assert report.compiled, report.refusal


@pytest.mark.parametrize("chip", ["v5e", "7x"])
def test_a_sample_compiles(chip):
    compiles(chip, 300, 100)


@pytest.mark.sweep
@pytest.mark.parametrize("chip", TPU_TILED.generation.values)
@pytest.mark.parametrize("topk", [100, 2048, 4096])
def test_more_shapes_compile(chip, topk):
    compiles(chip, 9000, topk)

"""Paged attention on Blackwell: Hopper's kernels with mma's products, interpreted and compiled.

No Blackwell GPU has run it.
"""

import jax.numpy as jnp
import pytest
from gpu_interpreter import needs_gpu_interpreter
from test_gpu_paged import (
    DECLARED,
    EVERYTHING,
    FAULTS,
    LONG,
    PAGED,
    batch,
    check,
    compiled,
    few_cores,
    quick_problem,
)

from pallas_kernels import gpu_mma

needs_gpu_interpreter()
__all__ = ["few_cores"]  # a fixture

CHIP = "b200"


def test_a_mixed_batch_with_everything():
    check(batch(*LONG, heads=(2, 1), **EVERYTHING), CHIP)


@pytest.mark.sweep
@pytest.mark.parametrize("problem", PAGED, ids=lambda problem: problem.name)
def test_every_quick_problem(problem):
    quick_problem(problem, CHIP)


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("heads", "options"),
    [
        ((3, 1), {"sliding_window": 20, "sinks": True, "page_size": 32}),
        ((2, 2), {"causal": False, "sliding_window": (30, 3), "page_size": 128}),
        ((2, 1), {"attention_chunk_size": 24, "head_size": 128, "page_size": 64}),
        ((1, 1), {"cache_dtype": "float8_e4m3fn", "scales": "head", "alibi": True}),
        ((2, 1), {"cache_dtype": "float8_e5m2", "scales": "tensor", "dtype": "float16"}),
        ((2, 1), {"cache_dtype": "float16", "head_size": 80, "page_size": 256}),
    ],
    ids=["window", "two-sided", "chunked", "e4m3", "e5m2", "float16"],
)
def test_mixed_batches(heads, options):
    check(batch(*LONG, heads=heads, **options), CHIP)


@pytest.mark.sweep
@pytest.mark.parametrize("head_size", DECLARED.head_size.values)
@pytest.mark.parametrize("page_size", DECLARED.block_size.values)
def test_every_size(head_size, page_size):
    check(batch(*LONG, heads=(2, 1), head_size=head_size, page_size=page_size), CHIP)


PLANTED = FAULTS | {
    "a sixteenth of the keys' products": (
        gpu_mma, "weighted_sum",
        lambda acc, p, v, seen, add=gpu_mma.weighted_sum: add(
            acc, p * (jnp.arange(p.shape[1]) >= 4), v, seen
        ),
    ),
}  # fmt: skip


@pytest.mark.sweep
@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_goes_red(monkeypatch, fault):
    monkeypatch.setattr(*PLANTED[fault])
    with pytest.raises(AssertionError, match="outside the budget"):
        check(batch((1, 3), (150, 61), heads=(2, 1)), CHIP)


def test_a_sample_compiles(monkeypatch):
    compiled(monkeypatch, chip=CHIP, heads=(8, 2), head_size=128, **EVERYTHING)


@pytest.mark.sweep
@pytest.mark.parametrize("head_size", DECLARED.head_size.values)
@pytest.mark.parametrize("page_size", DECLARED.block_size.values)
@pytest.mark.parametrize("dtype", DECLARED.dtype.values)
def test_every_size_compiles(monkeypatch, head_size, page_size, dtype):
    compiled(monkeypatch, chip=CHIP, head_size=head_size, page_size=page_size, dtype=dtype)


@pytest.mark.sweep
@pytest.mark.parametrize("cache_dtype", ["float8_e4m3fn", "float8_e5m2", "float16"])
@pytest.mark.parametrize("page_size", DECLARED.block_size.values)
@pytest.mark.parametrize("head_size", [64, 80, 96, 128])
def test_every_cache_compiles(monkeypatch, cache_dtype, page_size, head_size):
    compiled(
        monkeypatch, chip=CHIP, head_size=head_size, page_size=page_size,
        cache_dtype=cache_dtype, **EVERYTHING,
    )  # fmt: skip

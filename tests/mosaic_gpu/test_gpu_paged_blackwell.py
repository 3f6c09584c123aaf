"""Paged attention on Blackwell, by its door: Hopper's kernels with mma's products, interpreted.

It is not declared: ptxas spills at head size 128. No Blackwell GPU has run it.
"""

import jax.numpy as jnp
import pytest
from gpu_interpreter import needs_gpu_interpreter
from test_gpu_paged import EVERYTHING, FAULTS, LONG, batch, check, few_cores

from pallas_kernels import gpu_mma

needs_gpu_interpreter()
__all__ = ["few_cores"]  # a fixture

pytestmark = pytest.mark.sweep
CHIP = "b200"


@pytest.mark.parametrize(
    ("heads", "options"),
    [
        ((2, 1), EVERYTHING),
        ((3, 1), {"sliding_window": 20, "sinks": True, "page_size": 32}),
        ((2, 2), {"causal": False, "sliding_window": (30, 3), "page_size": 128}),
        ((2, 1), {"attention_chunk_size": 24, "head_size": 128, "page_size": 64}),
        ((1, 1), {"cache_dtype": "float8_e4m3fn", "scales": "head", "alibi": True}),
        ((2, 1), {"cache_dtype": "float8_e5m2", "scales": "tensor", "dtype": "float16"}),
        ((2, 1), {"cache_dtype": "float16", "head_size": 80, "page_size": 256}),
    ],
    ids=["everything", "window", "two-sided", "chunked", "e4m3", "e5m2", "float16"],
)
def test_mixed_batches(heads, options):
    check(batch(*LONG, heads=heads, **options), CHIP)


PLANTED = FAULTS | {
    "four keys of a tile": (
        gpu_mma, "weighted_sum",
        lambda acc, p, v, seen, add=gpu_mma.weighted_sum: add(
            acc, jnp.where(jnp.arange(p.shape[1]) >= 4, p, 0.0), v, seen
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_goes_red(monkeypatch, fault):
    monkeypatch.setattr(*PLANTED[fault])
    with pytest.raises(AssertionError, match="outside the budget"):
        check(batch((1, 3), (150, 61), heads=(2, 1)), CHIP)

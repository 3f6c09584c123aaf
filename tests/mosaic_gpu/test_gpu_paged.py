"""Paged attention's GPU kernels in the Mosaic GPU interpreter, against the float64 oracle."""

import dataclasses

import numpy as np
import pytest
from gpu_interpreter import gpu_interpreter, needs_gpu_interpreter

from attnsel_jax.backends.mosaic_gpu import MosaicGpuBackend
from attnsel_jax.compare.deviations import deviation
from attnsel_jax.compare.expected import expected
from attnsel_jax.compare.kernel_runs import run
from attnsel_jax.platforms import Device
from attnsel_jax.problems import QUICK
from attnsel_jax.problems.paged_inputs import paged_inputs
from pallas_kernels import gpu_chip

needs_gpu_interpreter()

KERNEL = MosaicGpuBackend.get_kernel("paged")
PAGED = [problem for problem in QUICK if problem.op == "paged"]


@pytest.fixture(autouse=True)
def few_cores(monkeypatch):
    """Three cores: sequences are cut where they would be on a chip with many and long ones."""
    chip = dataclasses.replace(gpu_chip.CHIPS["h200"], num_cores=3)
    monkeypatch.setitem(gpu_chip.CHIPS, "h200", chip)


def results_of(arguments):
    with gpu_interpreter("h200"):
        return run(KERNEL, "paged", arguments, layout="by_head")


def check(arguments):
    """Out, lse and the written cache, each within the oracle's budget."""
    results = results_of(arguments)
    for name, answer in expected("paged", arguments).items():
        found = deviation(name, results[name], answer)
        assert found.passed, str(found)
    return results


def batch(q_lens, kv_lens, *, seed=0, **options):
    """Arguments of a ragged batch, NaN wherever nothing may be read."""
    shape = {"heads": (4, 2), "head_size": 64, "page_size": 16, "pad_tokens": 3}
    shape["dtype"] = "bfloat16"
    rng = np.random.default_rng(seed)
    return paged_inputs(rng, q_lens=q_lens, kv_lens=kv_lens, **shape | options)


@pytest.mark.parametrize("problem", PAGED, ids=lambda problem: problem.name)
def test_quick_problems(problem):
    """In bfloat16 where they ask for float32, and without what is not declared."""
    options = dict(problem.options)
    if options.get("dtype") == "float32":
        options["dtype"] = "bfloat16"
    problem = dataclasses.replace(problem, options=options)
    reasons = MosaicGpuBackend.validate_configuration(problem.config, Device.named("h200"))
    if reasons:
        pytest.skip("; ".join(map(str, reasons)))
    check(problem.make())


# A decode, a prompt over two tiles, nothing, a speculative decode, a prompt that ends a tile.
LONG = ((1, 70, 0, 3, 64), (150, 131, 7, 60, 64))
EVERYTHING = {"sinks": True, "alibi": True, "soft_cap": 8.0, "sliding_window": 37}


@pytest.mark.parametrize(
    ("heads", "options"),
    [
        ((4, 2), EVERYTHING),
        ((3, 1), {"sliding_window": 20, "sinks": True, "page_size": 32}),
        ((2, 2), {"causal": False, "sliding_window": (30, 3), "page_size": 128}),
        ((2, 1), {"attention_chunk_size": 24, "head_size": 128, "page_size": 64}),
        ((3, 3), {"cache_dtype": "float8_e4m3fn", "scales": "head", "alibi": True}),
        ((2, 1), {"cache_dtype": "float8_e5m2", "scales": "tensor", "dtype": "float16"}),
        ((2, 1), {"cache_dtype": "float16", "head_size": 96, "page_size": 256}),
    ],
    ids=["everything", "window", "two-sided", "chunked", "e4m3", "e5m2", "float16"],
)
def test_mixed_batches(heads, options):
    check(batch(*LONG, heads=heads, **options))


def test_more_queries_than_keys_see_nothing():
    arguments = batch((5, 1, 70), (7, 3, 72), writes=False)
    arguments["kv_lens"] = np.array([2, 0, 9, 10**6], np.int32)
    lse = check(arguments)["lse"]
    assert np.isneginf(lse[[0, 1, 2, 5]]).all()
    check(arguments | {"sinks": np.array([0, -np.inf, 1, 2], np.float32)})

"""The contract test: every registered backend on every quick problem, against the oracle.

A backend that refuses a problem is skipped with its own reasons. What it declares, it must honour:
each finite value of its capabilities has a problem here that it accepted, or this fails.
"""

import dataclasses

import chex
import jax
import numpy as np
import pytest

from attnsel_jax.capabilities import Capabilities
from attnsel_jax.compare import compare
from attnsel_jax.compare.comparison import PASS, REFUSED
from attnsel_jax.platforms import current_device
from attnsel_jax.problems import QUICK, named
from attnsel_jax.registry import BUILT_IN, AttentionBackendEnum

# Fields that are not the question's, or that no single problem can show.
NOT_SHOWN = {"platform", "compute_capability", "generation", "jax_version"}
# What the problems ask of every backend that declares it, beside their config.
ALWAYS_ASKED = {"needs_lse": {True, False}}


# One kind of batch and all features at once; the others once, on the newest jax.
ON_OLD_JAX_TOO = ("causal", "mixed", "everything", "indexer", "topk", "fp8-ds-mla", "materialized")


def when(problem):
    """The marks of a quick problem."""
    return () if problem.name.split(".")[-1] in ON_OLD_JAX_TOO else pytest.mark.once


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize(
    "problem", [pytest.param(problem, id=problem.name, marks=when(problem)) for problem in QUICK]
)
def test_a_backend_agrees_with_the_oracle_or_says_why_it_refuses(problem, name):
    (row,) = compare([problem], [name]).rows
    if row.verdict == REFUSED:
        assert row.reasons
        pytest.skip("; ".join(map(str, row.reasons)))
    assert row.verdict == PASS, str(row)


def runs_here(backend) -> bool:
    platform = current_device().platform
    return any(platform in c.platform for c in backend.capabilities.values())


def declared():
    """(backend, op, field, value) for every finite value that a backend running here declares."""
    for name in BUILT_IN:
        backend = AttentionBackendEnum[name].get_class()
        if not runs_here(backend):
            continue
        for op, capabilities in backend.capabilities.items():
            for field in dataclasses.fields(Capabilities):
                constraint = getattr(capabilities, field.name)
                if field.name in NOT_SHOWN or constraint is None:
                    continue
                if field.name == "has_lens" and op != "dense":
                    continue
                for value in constraint.samples():
                    yield name, op, field.name, value


def shown(name: str, op: str, field: str) -> set:
    """The values that accepted problems ask of a field."""
    backend = AttentionBackendEnum[name].get_class()
    values = set(ALWAYS_ASKED.get(field, ()))
    for problem in QUICK:
        config = problem.config
        if problem.op != op or backend.validate_configuration(config):
            continue
        value = config.cache_dtype if field == "kv_cache_dtype" else getattr(config, field)
        values.add(value)
        if field == "needs_grad" and problem.gradients:
            values.add(True)
        if field == "head_size_v" and value is None:
            values.add(config.head_size)
    return values


@pytest.mark.parametrize(("name", "op", "field", "value"), list(declared()))
def test_every_declared_value_has_a_problem(name, op, field, value):
    values = shown(name, op, field)
    if field in ("head_size", "head_size_v", "block_size") and value == 1:
        assert len(values) > 1, "any size is declared: several must be shown"
    else:
        assert value in values, f"{name} declares {field}={value} for {op}; no problem asks for it"


ONE_OF_EACH = ["quick.dense.everything", "quick.paged.everything", "quick.mla.mixed",
               "quick.sparse_mla.mixed"]  # fmt: skip


@pytest.mark.parametrize("problem", named(ONE_OF_EACH), ids=lambda problem: problem.name)
def test_a_kernel_gives_the_same_bits_twice_and_needs_no_more_than_one_trace(problem):
    for member in AttentionBackendEnum:
        backend = member.get_class()
        if backend.validate_configuration(problem.config):
            continue
        arguments = problem.make()
        arrays = {n: x for n, x in arguments.items() if isinstance(x, np.ndarray)}
        static = {n: x for n, x in arguments.items() if n not in arrays}
        kernel = backend.get_kernel(problem.op)

        def call(arrays, kernel=kernel, static=static):
            return kernel(**arrays, **static)

        chex.clear_trace_counter()  # it counts by the name of the function
        once = jax.jit(chex.assert_max_traces(call, n=1))
        chex.assert_trees_all_equal(once(arrays), once(arrays))

"""Dense problems and meshes, both drawn at random: the oracle's numbers, or a refusal."""

import re

import jax
import numpy as np
import pytest
from meshes import mesh, on_mesh

from attnsel_jax import AttentionBackendEnum, MeshAxes, use_mesh_axes
from attnsel_jax.compare import compare
from attnsel_jax.compare.comparison import ERROR, PASS
from attnsel_jax.mesh.mesh_axes import FORMS
from attnsel_jax.problems import Problem, random_problem
from attnsel_jax.problems.random_set import TURNS

DENSE = [number for number in range(900) if TURNS[number % len(TURNS)][0] == "dense"]
MESHES = ((1, 1, 4), (1, 1, 3), (2, 1, 2), (1, 2, 2), (2, 2, 2), (1, 1, 8), (2, 4, 1), (1, 4, 2))


def whole(length, shards):
    """A length near that which the shards share evenly, small enough for a test."""
    return max(shards, min(length, 48) // shards * shards)


def cut(problem, data, model, seq):
    """The problem with sizes that a mesh shares evenly, and small heads."""
    options = dict(problem.options)
    q_len, kv_len = (whole(options[name], seq) for name in ("q_len", "kv_len"))
    batch = data * options["batch"]
    group = options["heads"][0] // options["heads"][1]
    kv_heads = model * min(options["heads"][1], 2)
    options |= {"batch": batch, "q_len": q_len, "kv_len": kv_len, "head_size": 16,
                "heads": (kv_heads * min(group, 4), kv_heads)}  # fmt: skip
    options.pop("head_size_v", None)
    for name, most in (("q_lens", q_len), ("kv_lens", kv_len)):
        if name in options:
            options[name] = tuple(min(n, most) for n in np.resize(options[name], batch).tolist())
    if isinstance(options.get("q_offset"), tuple):
        options["q_offset"] = tuple(np.resize(options["q_offset"], batch).tolist())
    if min(q_len, kv_len) < 2:
        options.pop("segments", None)
    return Problem(problem.name, "dense", str(options), problem.build, options, problem.gradients)


@pytest.mark.sweep
@pytest.mark.parametrize("number", DENSE)
def test_dense_agrees_with_the_oracle_or_says_why_not(number):
    rng = np.random.default_rng(number)
    sizes = MESHES[rng.integers(len(MESHES))]
    form, name = FORMS[rng.integers(3)], ("XLA", "XLA_REFERENCE")[rng.integers(2)]
    problem = cut(random_problem(number), *sizes)
    on = mesh(data=sizes[0], model=sizes[1], seq=sizes[2])
    cuts = {"batch": "data", "heads": "model", "kv_heads": "model", "q_len": "seq", "kv_len": "seq"}
    kernel = on_mesh(AttentionBackendEnum[name].get_class(), "dense", on, **cuts)
    with jax.set_mesh(on), use_mesh_axes(MeshAxes(form=form)):
        (row,) = compare([problem], {name: kernel}, seed=number).rows
    if row.verdict == ERROR:
        said = f"{sizes} {form} {problem.description}: {row.error}"
        assert re.match("ValueError: .* must ", row.error), said
        pytest.skip(row.error)
    assert row.verdict == PASS, f"{sizes} {form} {problem.description}: {row}"

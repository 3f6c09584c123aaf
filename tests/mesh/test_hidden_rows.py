"""Parts of the keys that lie on several devices, all of them hidden from some rows by a bias.

What each part holds float32 has no room for in its lse: parts are of several sizes, and say so.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hidden_rows import check_hidden_rows
from meshes import mesh, on_mesh
from tpu_interpreter import tpu_interpreter

from attnsel_jax import AttentionBackendEnum, MeshAxes, use_mesh_axes
from attnsel_jax.mesh.merging import Partial, merged, merged_along, merged_over, share_of

PARTS = Partial(
    out=jnp.asarray([[[3.0]], [[6.0]]]),
    lse=jnp.full((2, 1), -1e9),
    correction=1 / jnp.asarray([[2.0], [4.0]]),  # of two keys, of four
)


@pytest.mark.parametrize("merge", ["merged", "merged_along", "merged_over"])
def test_parts_weigh_what_they_hold(merge):
    one, other = (jax.tree.map(lambda x, i=i: x[i], PARTS) for i in range(2))
    by_axis = jax.vmap(lambda part: merged_over(part, "parts"), axis_name="parts")
    whole = {
        "merged": lambda: merged(one, other),
        "merged_along": lambda: merged_along(PARTS, 0),
        "merged_over": lambda: jax.tree.map(lambda x: x[1], by_axis(PARTS)),
    }[merge]()
    np.testing.assert_allclose(whole.out, [[5.0]], rtol=1e-6)
    np.testing.assert_allclose(whole.correction, [1 / 6], rtol=1e-6)
    np.testing.assert_array_equal(whole.lse, [-1e9])
    np.testing.assert_allclose(share_of(one, whole), [1 / 3], rtol=1e-6)


def agree(name, form, devices, **options):
    backend, on = AttentionBackendEnum[name].get_class(), mesh(seq=devices)
    with jax.set_mesh(on), use_mesh_axes(MeshAxes(form=form)):
        kernel = on_mesh(backend, "dense", on, q_len="seq", kv_len="seq")
        shape = {"head_size": 16, "heads": (2, 1), "dtype": "float32"}
        check_hidden_rows(kernel, atol=1e-5, **shape | options)


CASES = {
    "ring, odd shares": ("ring", 3, {"q_len": 9, "hidden": 7}),
    "ring, a sink": ("ring", 3, {"q_len": 9, "hidden": 7, "sinks": True}),
    "ring, zig-zag": ("ring", 2, {"q_len": 12, "hidden": 7}),
    "ring, a bias of every logit": (
        "ring", 2, {"q_len": 12, "hidden": 7, "bias": (False, True, True, True)},
    ),
    "all-gather": ("all_gather", 2, {"q_len": 10, "hidden": 7}),
    "all-to-all": ("all_to_all", 2, {"q_len": 10, "hidden": 7}),
}  # fmt: skip
ON_EACH_PUSH = (("XLA_REFERENCE", "ring, odd shares"), ("XLA", "ring, zig-zag"))
EVERY = itertools.product(("XLA", "XLA_REFERENCE", "MOSAIC_TPU"), CASES)


@pytest.mark.parametrize(
    ("name", "case"),
    [
        pytest.param(*at, marks=pytest.mark.once if at in ON_EACH_PUSH else pytest.mark.sweep)
        for at in EVERY
    ],
)
def test_rows_that_a_bias_hides_whole(name, case):
    form, devices, options = CASES[case]
    if name != "MOSAIC_TPU":
        agree(name, form, devices, **options)
        return
    with tpu_interpreter():
        agree(name, form, devices, **options | {"head_size": 64})

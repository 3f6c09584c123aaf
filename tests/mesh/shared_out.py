"""A ragged call of a backend's kernel shared out over a mesh, each group against the oracle.

    check_shared_out("MOSAIC_TPU", "paged", parts, mesh(data=2), data="data")

`parts` are the arguments of one group each, as `attnsel_jax.problems` draws them: NaN wherever
nothing may be read. They are laid side by side as shards of a data-parallel mesh hold them.
"""

import jax
import jax.numpy as jnp
import numpy as np
from meshes import put

from attnsel_jax import AttentionBackendEnum
from attnsel_jax.cache_layouts import LATENT_LAYOUTS, LAYOUTS, in_layouts
from attnsel_jax.compare.deviations import deviation
from attnsel_jax.compare.expected import expected
from attnsel_jax.compare.kernel_runs import RESULTS
from attnsel_jax.mesh import kernel_over_mesh, plan_call
from attnsel_jax.mesh.dimensions import CACHES, dimensions
from attnsel_jax.mesh.groups import TOKENS
from attnsel_jax.problems.paged_inputs import unused

WHOLE = ("sinks", "alibi_slopes", "k_scale", "v_scale", "kv_scale")


def check_shared_out(name, op, parts, on, data=None, model=None, pages=None):
    """Out, lse, scores and the written cache, within the oracle's budget.

    Args:
        name: the backend's.
        op: a key of `CACHES`.
        parts: each group's arguments; one, where `data` is None.
        on: the mesh.
        data, model, pages: the axis over which groups, heads, and the pages of a sequence lie.
    """
    backend = AttentionBackendEnum[name].get_class()
    layout = backend.latent_layout if backend.is_mla() else backend.layout
    shards = on.shape[data] if data else 1
    shards *= on.shape[pages] if pages else 1
    whole = {n: x for n, x in parts[0].items() if n in WHOLE}  # of the model, so of every group
    parts = [_padded(op, part | whole, shards) for part in parts]
    arrays, static = _side_by_side(op, parts)
    arrays = {n: _placed(x, dims, on, data, model, pages)
              for (n, x), dims in _with_dims(op, arrays, layout)}  # fmt: skip
    with jax.set_mesh(on):
        plan = plan_call(op, arrays, layout=layout)
        assert (plan.batch, plan.heads, plan.context) == (
            (data,) if data else (), (model,) if model else (), pages
        )  # fmt: skip
        results = kernel_over_mesh(backend, op, plan)(**arrays, **static)
    named = dict(zip(RESULTS[op], map(np.asarray, results), strict=True))
    if op != "indexer_scores":
        size = arrays["q_pe" if "q_pe" in arrays else "q"].shape[-1]
        named[CACHES[op]] = _as_the_oracle(named[CACHES[op]], layout, size)
    for i, part in enumerate(parts):
        for quantity, answer in expected(op, part).items():
            axis = int(quantity == "kv_pages")
            mine = np.array_split(np.asarray(named[quantity]), len(parts), axis)[i]
            found = deviation(quantity, mine, answer)
            assert found.passed, f"group {i}: {found}"


def _padded(op, part, shards):
    """As many pages as the shards share evenly; what is added is as empty as the rest."""
    pages, axis = part[CACHES[op]], int(op == "paged")
    shape = list(pages.shape)
    shape[axis] = -pages.shape[axis] % shards
    empty = unused(tuple(shape), pages.dtype.name)
    return part | {CACHES[op]: np.concatenate([pages, empty], axis)}


def _side_by_side(op, parts):
    """(arrays, static arguments): page ids and slots are of the whole cache."""
    cache, axis = CACHES[op], int(op == "paged")
    static = {n: x for n, x in parts[0].items() if not isinstance(x, np.ndarray) and x is not None}
    names = [n for n, x in parts[0].items() if isinstance(x, np.ndarray)]
    num_pages, page_size = parts[0][cache].shape[axis : axis + 2]
    columns = {n: [part[n] for part in parts] for n in names}
    for n, each in (("page_table", num_pages), ("slot_mapping", num_pages * page_size)):
        columns[n] = [np.where(x < 0, x, x + i * each) for i, x in enumerate(columns.get(n, []))]
    arrays = {}
    for n in names:
        if n in WHOLE:
            arrays[n] = parts[0][n]
        elif n == "num_seqs":
            arrays[n] = np.array([part[n] for part in parts]) if len(parts) > 1 else parts[0][n]
        else:
            arrays[n] = np.concatenate(columns[n], axis if n == cache else 0)
    assert all(n in WHOLE or n in TOKENS or n in arrays for n in names)
    return {n: jnp.asarray(x) for n, x in arrays.items()}, static


def _with_dims(op, arrays, layout):
    stored = in_layouts(arrays, *((layout,) if layout in LAYOUTS else ("stacked", layout)))
    dims = dimensions(op, stored, layout)
    return [((n, x), dims[n]) for n, x in stored.items()]


def _placed(array, dims, on, data, model, pages):
    whole = tuple(axis for axis in (data, pages) if axis)
    cut = {"heads": model, "cache_heads": model, "kv_heads": model, "pages": whole or None}
    cut |= dict.fromkeys(("tokens", "seqs", "starts", "groups"), data)
    return put(array, on, *(cut.get(dim) for dim in dims))


def _as_the_oracle(pages, layout, size):
    """Size: of a latent cache's rotary key, of another's heads."""
    pages = jnp.asarray(pages)
    if layout in LATENT_LAYOUTS:
        return LATENT_LAYOUTS[layout].to_rows(pages, size)
    return LAYOUTS["stacked"].join(*LAYOUTS[layout].split(pages))[..., :size]

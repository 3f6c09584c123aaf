"""The mesh layer with a fault planted in it, for the process that compiles (`test_planted_bytes`).

`PLANTED_FAULT` says which; importing this plants it, and gives the backend's class as it is.
"""

import os

import jax

from attnsel_jax.backends.mosaic_tpu import MosaicTpuBackend as MosaicTpuBackend
from attnsel_jax.backends.mosaic_tpu_mla_sparse import (
    MosaicTpuMlaSparseBackend as MosaicTpuMlaSparseBackend,
)
from attnsel_jax.mesh import forms, groups, over_mesh, ring, spread_pages, whole_keys


def _averaged_keys(arrays, *_):
    """Every shard's keys in the place of its own: heads need not speak with one another."""
    return arrays | {"k": jax.lax.all_gather(arrays["k"], "model").mean(0)}


def _gathered_onward(self, tree):
    """Everybody's keys, to pick one neighbour's."""
    before = (jax.lax.axis_index(self.axis) - 1) % self.n
    return jax.tree.map(lambda x: jax.lax.all_gather(x, self.axis)[before], tree)


def _gathered_queries(kernel, arrays, static, axis, n):
    """The keys as they should be, and all queries, of which the kernel has no need."""
    q = jax.lax.all_gather(arrays["q"], axis).mean(0)
    return _ALL_GATHER(kernel, arrays | {"q": q}, static, axis, n)


def _gathered_parts(part, axis):
    """One device's part, after all have been sent to all."""
    return jax.tree.map(lambda x: jax.lax.all_gather(x, axis).max(0), part)


def _not_summed(kernel, op, arrays, plan, layout):
    return groups.attend(kernel, op, groups.with_own_pages(op, arrays, plan, layout))


_ALL_GATHER = whole_keys.all_gather_attention
FAULTS = {
    "keys averaged over shards of heads": (over_mesh, "with_own_kv_heads", _averaged_keys),
    "keys gathered in a ring": (ring.Ring, "onward", _gathered_onward),
    "each key exchanged twice": (whole_keys, "copies_of_kv_heads", lambda *_: 2),
    "queries gathered too": (forms, "all_gather_attention", _gathered_queries),
    "parts not merged": (spread_pages, "merged_over", lambda part, axis: part),
    "parts gathered": (spread_pages, "merged_over", _gathered_parts),
    "scores not summed": (over_mesh, "score_ragged", _not_summed),
}

setattr(*FAULTS[os.environ["PLANTED_FAULT"]])

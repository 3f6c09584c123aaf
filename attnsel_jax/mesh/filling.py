"""A cache filled without attending, over a mesh: each device fills its share, and sends nothing."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from attnsel_jax.cache_layouts import layout_named
from attnsel_jax.mesh.dimensions import CACHES, Dims, dimensions
from attnsel_jax.mesh.groups import with_own_pages
from attnsel_jax.mesh.over_mesh import placed
from attnsel_jax.mesh.plan import Plan

Arrays = dict[str, jax.Array]


def filled(
    fill: Callable[[Arrays], jax.Array], op: str, arrays: Arrays, plan: Plan | None, layout: str
) -> jax.Array:
    """The cache as `fill` leaves it.

    Args:
        fill: takes the arrays of one device by name, and gives its cache.
        op: a key of `FILLING`.
        arrays: the call's.
        plan: how it is shared out; None = it is not.
        layout: of the cache.

    Raises:
        ValueError: pages would be copied between devices.
    """
    dims = dimensions(op, arrays, layout)
    if op == "write_kv":
        arrays = _with_cached_heads(arrays, dims, plan, layout)
    if plan is None:
        return fill(arrays)
    axes = plan.axes("pages")
    if "source" in arrays and axes:
        raise ValueError(
            f"cache.pages is sharded by pages over mesh axis {axes[0]!r}, must be whole or sharded "
            f"by heads: reshard it, or use copy_pages inside jax.shard_map on one device's pages, "
            f"with ids counted from its first page"
        )
    specs = {name: plan.spec(_of_cached_heads(dims[name])) for name in arrays}

    def share(mine: Arrays) -> jax.Array:
        return fill(with_own_pages(op, mine, plan, layout))

    over_mesh = jax.shard_map(
        share, mesh=plan.mesh, in_specs=(specs,), out_specs=specs[CACHES[op]],
        axis_names=plan.manual, check_vma=False,
    )  # fmt: skip
    return over_mesh(
        {name: placed(array, plan.mesh, specs[name]) for name, array in arrays.items()}
    )


def _with_cached_heads(
    arrays: Arrays, dims: dict[str, Dims], plan: Plan | None, layout: str
) -> Arrays:
    """K and v as often as the cache holds each; before that each device has all of their heads."""
    copies = layout_named(layout).dims(arrays["kv_pages"].shape)[2] // arrays["k"].shape[1]
    if copies == 1:
        return arrays
    rows = {name: arrays[name] for name in "kv"}
    if plan is not None:
        whole = plan.spec(tuple("-" if dim == "kv_heads" else dim for dim in dims["k"]))
        rows = {name: placed(array, plan.mesh, whole) for name, array in rows.items()}
    return arrays | {name: jnp.repeat(array, copies, axis=1) for name, array in rows.items()}


def _of_cached_heads(dims: Dims) -> Dims:
    """Keys and values have been repeated: their heads are the cache's."""
    return tuple("cache_heads" if dim == "kv_heads" else dim for dim in dims)

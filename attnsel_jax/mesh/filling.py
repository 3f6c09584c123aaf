"""A cache filled without attending, over a mesh: each device fills its share, and sends nothing."""

from collections.abc import Callable

import jax

from attnsel_jax.cache_layouts import layout_named
from attnsel_jax.mesh.dimensions import CACHES, dimensions
from attnsel_jax.mesh.groups import with_own_pages
from attnsel_jax.mesh.over_mesh import placed, with_cached_heads, with_own_kv_heads
from attnsel_jax.mesh.plan import Plan

Arrays = dict[str, jax.Array]


def fill_over_mesh(
    fill: Callable[[Arrays], jax.Array], op: str, arrays: Arrays, plan: Plan | None, layout: str
) -> jax.Array:
    """The cache as `fill` leaves it.

    Args:
        fill: takes the arrays of one device by name, k and v of as many heads as its cache has, and
            gives its cache.
        op: a key of `FILLING`.
        arrays: the call's.
        plan: how it is shared out; None = it is not.
        layout: of the cache.

    Raises:
        ValueError: pages would be copied between devices, or heads cannot be shared out so.
    """
    if plan is None:
        return fill(with_cached_heads(arrays, layout))
    axes = plan.axes("pages")
    if "source" in arrays and axes:
        raise ValueError(
            f"cache.pages is sharded by pages over mesh axis {axes[0]!r} (by its sharding, or by "
            f"mesh_axes), must be whole or sharded by heads: reshard it, pass mesh_axes that name "
            f"heads alone, or use copy_pages inside jax.shard_map on one device's pages"
        )
    dims = dimensions(op, arrays, layout)
    specs = {name: plan.spec(dims[name]) for name in arrays}
    cached_heads = None
    if op == "write_kv":
        cached_heads = layout_named(layout).dims(arrays["kv_pages"].shape)[2]

    def share(mine: Arrays) -> jax.Array:
        mine = with_own_kv_heads(mine, dims, plan, cached_heads)
        return fill(with_own_pages(op, with_cached_heads(mine, layout), plan, layout))

    over_mesh = jax.shard_map(
        share, mesh=plan.mesh, in_specs=(specs,), out_specs=specs[CACHES[op]],
        axis_names=plan.manual, check_vma=False,
    )  # fmt: skip
    return over_mesh(
        {name: placed(array, plan.mesh, specs[name]) for name, array in arrays.items()}
    )

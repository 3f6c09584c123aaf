"""One call of a backend's kernel by a plan: each device runs the kernel on its share.

The share is cut by `jax.shard_map` over every axis of the mesh, so a kernel meets plain arrays of
one device, whatever it is made of. Cutting batch and heads needs no communication: what goes over
the mesh is only what positions, spread over devices, have to exchange, and the sum of gradients of
what several devices read.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from attnsel_jax.backend import AttentionBackend
from attnsel_jax.cache_layouts import layout_named
from attnsel_jax.jitted_kernels import guarded, jitted_kernel, static_names
from attnsel_jax.kernel_results import check_results
from attnsel_jax.mesh import groups
from attnsel_jax.mesh.dimensions import ARGUMENTS, POSITIONAL, RESULTS, by_name, dimensions
from attnsel_jax.mesh.forms import attend_dense, attend_ragged, check_context, score_ragged
from attnsel_jax.mesh.plan import Mesh, Plan
from attnsel_jax.mesh.shares import own_heads
from attnsel_jax.symbolic_sizes import refused_where_compared
from pallas_kernels.jax_settings import under_default_rules

Arrays = dict[str, jax.Array]
Kernel = Callable[..., tuple[jax.Array, ...]]


def kernel_over_mesh(
    backend: type[AttentionBackend], op: str, plan: Plan | None
) -> Callable[..., Any]:
    """The backend's kernel for the op, under `jit`, its work shared out as the plan says.

    Args:
        backend: the backend.
        op: a key of `ARGUMENTS`.
        plan: of the call that follows; None = no mesh.

    Raises:
        ValueError: partial results would be merged by lse, and the backend returns none.
    """
    merges = plan is not None and plan.merges(op)
    if merges and op in backend.capabilities and True not in backend.capabilities[op].needs_lse:
        raise ValueError(
            f"needs_lse is True, must be {backend.capabilities[op].needs_lse} with backend "
            f"{backend.name}: mesh axis {plan.context!r} spreads a sequence's keys, and partial "
            f"results are merged by lse; "
            + ("use form='all_gather' or 'all_to_all'" if op == "dense" else "cut heads or groups")
            + ", or another backend"
        )
    if plan is None and op in ("dense", "topk_positions"):
        return jitted_kernel(backend, op)
    layout = backend.latent_layout if backend.is_mla() else backend.layout
    call = guarded(backend, op, _jitted(backend.get_kernel(op), op, layout, backend))
    return functools.partial(call, plan=plan)


@functools.cache
def _jitted(
    kernel: Kernel, op: str, layout: str, backend: type[AttentionBackend]
) -> Callable[..., Any]:
    @under_default_rules
    def call(*args: Any, plan: Plan | None, **kwargs: Any) -> tuple[jax.Array, ...]:
        given = by_name(op, args, kwargs)
        arrays = {n: a for n, a in given.items() if n in ARGUMENTS[op] and a is not None}
        static = {n: value for n, value in given.items() if n not in ARGUMENTS[op]}
        of_arrays = _by_arrays(kernel, op, static, backend)
        if plan is None:
            return groups.attend(of_arrays, op, with_cached_heads(arrays, layout))
        return _shared_out(of_arrays, op, layout, arrays, static, plan)

    call.__name__ = f"{op}_over_mesh"
    return jax.jit(call, static_argnames=(*static_names(kernel), "plan"))


def _by_arrays(
    kernel: Kernel, op: str, static: dict[str, Any], backend: type[AttentionBackend]
) -> Kernel:
    """The kernel as a function of its arrays by name; its results are held to the contract.

    Asked for a `correction`, it gives that beside them: None of a kernel that knows of none.
    """
    names = list(ARGUMENTS[op])[: POSITIONAL[op]]

    def of_arrays(
        arrays: Arrays, *, correction: bool = False, **changed: Any
    ) -> tuple[jax.Array, ...]:
        others = {name: array for name, array in arrays.items() if name not in names}
        leading = (arrays.get(name) for name in names)
        with refused_where_compared(backend, op, arrays):
            known = getattr(kernel, "with_correction", None) if correction else None
            results = (known or kernel)(*leading, **others, **{**static, **changed})
            results, more = (results[:2], results[2:]) if known else (results, (None,))
            check_results(backend, op, results, {**static, **arrays})
        results = results if isinstance(results, tuple) else (results,)
        return (*results, *more) if correction else results

    return of_arrays


def _shared_out(
    of_arrays: Kernel, op: str, layout: str, arrays: Arrays, static: dict[str, Any], plan: Plan
) -> tuple[jax.Array, ...]:
    """The call under `shard_map`; `of_arrays` is the kernel."""
    dims = dimensions(op, arrays, layout)
    specs = {name: plan.spec(dims[name]) for name in arrays}
    results = tuple(
        specs[said] if said in specs else plan.spec(tuple(said.split())) for said in RESULTS[op]
    )
    check_context(op, plan, arrays, static)
    num_heads = arrays["q"].shape[dims["q"].index("heads")] if "q" in arrays else None

    def share(mine: Arrays) -> tuple[jax.Array, ...]:
        mine = with_own_kv_heads(mine, dims, plan, num_heads)
        if op == "dense":
            return attend_dense(of_arrays, mine, static, plan)
        if op == "topk_positions":
            return of_arrays(mine)
        if op == "indexer_scores":
            return score_ragged(of_arrays, op, mine, plan, layout)
        mine = with_cached_heads(mine, layout)
        return attend_ragged(of_arrays, op, mine, static, plan, layout)

    # Kernels make arrays of their own, which are not marked as varying over the mesh: no check.
    over_mesh = jax.shard_map(
        share, mesh=plan.mesh, in_specs=(specs,), out_specs=results, axis_names=plan.manual,
        check_vma=False,
    )  # fmt: skip
    return over_mesh(
        {name: placed(array, plan.mesh, specs[name]) for name, array in arrays.items()}
    )


def placed(array: jax.Array, mesh: Mesh, spec: jax.P) -> jax.Array:
    """The array cut as the spec says; what is whole is cut where it lies, without communication."""
    if jax.sharding.AxisType.Explicit not in mesh.axis_types:  # shard_map sees to it
        return array
    return jax.sharding.reshard(array, jax.NamedSharding(mesh, spec))


def with_own_kv_heads(
    arrays: Arrays, dims: dict[str, tuple[str, ...]], plan: Plan, num_heads: int | None
) -> Arrays:
    """K and v with the kv heads that this shard's query heads use, where they came with more."""
    further = plan.heads[len(plan.kv_heads) :]
    if "k" not in arrays or not further:
        return arrays
    axis = dims["k"].index("kv_heads")
    parts = plan.size(plan.kv_heads)
    here = arrays["k"].shape[axis]
    mine = own_heads(plan, num_heads, here * parts)
    # Shards that use the same kv head stand next to each other along the further axes.
    shard = jax.lax.axis_index(further)
    first = shard * here // math.prod(plan.mesh.shape[a] for a in further)
    return arrays | {
        name: jax.lax.dynamic_slice_in_dim(arrays[name], first, mine, axis) for name in ("k", "v")
    }


def with_cached_heads(arrays: Arrays, layout: str) -> Arrays:
    """K and v as often as the cache holds each: more shards than kv heads need copies."""
    if "kv_pages" not in arrays or "k" not in arrays:
        return arrays
    cached = layout_named(layout).dims(arrays["kv_pages"].shape)[2]
    copies = cached // arrays["k"].shape[1]
    if copies == 1:
        return arrays
    return arrays | {name: jnp.repeat(arrays[name], copies, axis=1) for name in ("k", "v")}

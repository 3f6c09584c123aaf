"""How one call is shared out over a mesh: read off its arrays' shardings, or as the caller said."""

import dataclasses
from collections.abc import Mapping

import jax
from jax.sharding import NamedSharding

from attnsel_jax.mesh.dimensions import Dims, dimensions
from attnsel_jax.mesh.mesh_axes import Axes, MeshAxes, said_by
from attnsel_jax.mesh.plan import BATCH, CONTEXT, HEADS, Mesh, Plan
from attnsel_jax.mesh.shares import check_shares


def plan_call(
    op: str,
    arrays: Mapping[str, jax.Array | None],
    mesh_axes: MeshAxes | None = None,
    layout: str = "stacked",
) -> Plan | None:
    """How a call is shared out; None where no mesh is in sight.

    Args:
        op: a key of `dimensions.ARGUMENTS` or of its `FILLING`.
        arrays: the kernel's array arguments by the contract's names.
        mesh_axes: what the caller says; None = what `use_mesh_axes` says.
        layout: of the paged cache.

    Raises:
        ValueError: shardings that cannot work: an axis, its size, and what it must divide.
    """
    said = said_by(mesh_axes)
    if set(jax.sharding.get_abstract_mesh().manual_axes) & set(said.named):
        said = MeshAxes(form=said.form)  # inside a shard_map of the caller's over these axes
    given = {name: array for name, array in arrays.items() if array is not None}
    dims = dimensions(op, given, layout)
    mesh, specs = _placements(given)
    if mesh is None or said.says_axes:
        mesh = said.mesh or mesh or _ambient_mesh(said)
    if mesh is None:
        return None
    plan = _with_kv_heads(_read(op, mesh, dims, specs, said), given, dims)
    check_shares(op, plan, given, dims, layout)
    return plan


def _placements(arrays: Mapping[str, jax.Array]) -> tuple[Mesh | None, dict[str, tuple[Axes, ...]]]:
    """The mesh that arrays lie on, and the axes that cut each dimension of each, where it shows."""
    traced = any(isinstance(array, jax.core.Tracer) for array in arrays.values())
    mesh, specs = None, {}
    for name, array in arrays.items():
        if isinstance(array, jax.ShapeDtypeStruct):  # no array yet: it lies nowhere
            continue
        placed = getattr(array, "sharding", None)
        if traced or not isinstance(placed, NamedSharding):
            placed = jax.typeof(array).sharding
        if placed.mesh.empty or not _free_axes(placed.mesh):
            continue
        mesh = mesh or placed.mesh
        specs[name] = tuple(_axes_of(entry) for entry in placed.spec)
    # Automatic axes of a traced array show nothing: then nothing is known of this mesh.
    if traced and not any(map(any, specs.values())) and not _has_explicit(mesh):
        return None, {}
    return mesh, specs


def _free_axes(mesh: Mesh) -> list[str]:
    manual = jax.sharding.AxisType.Manual
    return [a for a, t in zip(mesh.axis_names, mesh.axis_types, strict=True) if t != manual]


def _has_explicit(mesh: Mesh | None) -> bool:
    return mesh is not None and jax.sharding.AxisType.Explicit in mesh.axis_types


def _axes_of(entry) -> Axes:
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def _ambient_mesh(said: MeshAxes) -> Mesh | None:
    """The mesh of `jax.set_mesh`, for axes that were said without one."""
    if not said.says_axes:
        return None
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        raise ValueError(
            "mesh_axes names axes and no mesh, and the arrays show none, must have one: pass "
            "MeshAxes(mesh=...), or call under jax.set_mesh(mesh)"
        )
    return mesh


def _read(
    op: str, mesh: Mesh, dims: dict[str, Dims], specs: dict[str, tuple[Axes, ...]], said: MeshAxes
) -> Plan:
    """The plan that the arrays agree on, and that the caller did not deny."""
    cuts: dict[str, dict[Axes, str]] = {}
    for name, spec in specs.items():
        for dim, axes in zip(dims[name], spec, strict=False):
            if axes:
                cuts.setdefault(dim, {}).setdefault(axes, name)
    uncut = set(cuts) - {*BATCH, *HEADS, *CONTEXT, "kv_heads", "pages"}
    for dim in uncut:
        axes, name = next(iter(cuts[dim].items()))
        raise ValueError(
            f"{name} is sharded over {_axes_text(mesh, axes)} in a dimension that is never shared "
            f"out, must be sharded over {_allowed(op)} only: jax.sharding.reshard it"
        )
    batch = _agreed(mesh, cuts, BATCH, said.batch, "batch")
    heads = _agreed(mesh, cuts, HEADS, said.heads, "heads")
    kv_heads = _agreed(mesh, cuts, ("kv_heads",), (), "kv_heads")
    context = _agreed(mesh, cuts, CONTEXT, (said.context,) if said.context else (), "context")
    pages = _agreed(mesh, cuts, ("pages",), (), "pages")
    if pages[: len(batch)] == batch and not context:
        context = pages[len(batch) :]
    if len(context) > 1:
        raise ValueError(
            f"positions are sharded over {_axes_text(mesh, context)}, must be over one mesh axis: "
            f"make one axis of these, or cut batch or heads by the others"
        )
    heads = heads or kv_heads
    if kv_heads and heads[: len(kv_heads)] != kv_heads:
        raise ValueError(
            f"k's heads are sharded over {_axes_text(mesh, kv_heads)}, must be over the first of "
            f"{_axes_text(mesh, heads)}, as q's are, or over none: "
            f"jax.sharding.reshard k and v"
        )
    return Plan(mesh, batch, heads, kv_heads, context[0] if context else None, said.form)


def _with_kv_heads(plan: Plan, arrays: Mapping[str, jax.Array], dims: dict[str, Dims]) -> Plan:
    """The plan with k's heads cut by as many of the heads' axes as divide them."""
    if "kv_heads" not in dims.get("k", ()):
        return plan
    count, axes = arrays["k"].shape[dims["k"].index("kv_heads")], len(plan.heads)
    while count % plan.size(plan.heads[:axes]):
        axes -= 1
    return dataclasses.replace(plan, kv_heads=plan.heads[:axes])


def _agreed(
    mesh: Mesh, cuts: dict[str, dict[Axes, str]], dims: tuple[str, ...], said: Axes, what: str
) -> Axes:
    """The one cut of a group of dimensions; () where none of them is cut."""
    found: dict[Axes, str] = {said: "mesh_axes"} if said else {}
    for dim in dims:
        for axes, name in cuts.get(dim, {}).items():
            found.setdefault(axes, f"{name} ({dim})")
    for axis in said:
        if axis not in mesh.shape:
            raise ValueError(
                f"mesh_axes.{what} names {axis!r}, must be one of {', '.join(mesh.axis_names)}, "
                f"the mesh's axes: name one of these, or pass MeshAxes(mesh=...) with that axis"
            )
    if len(found) > 1:
        (first, where), (other, there) = list(found.items())[:2]
        raise ValueError(
            f"{there} is sharded over {_axes_text(mesh, other)}, must be over "
            f"{_axes_text(mesh, first)}, as {where}, or over none: "
            f"jax.sharding.reshard it"
        )
    return next(iter(found), ())


def _allowed(op: str) -> str:
    return "batch, heads and positions" if op == "dense" else "groups of sequences, heads and pages"


def _axes_text(mesh: Mesh, axes: Axes) -> str:
    return " and ".join(f"mesh axis {axis!r} of size {mesh.shape[axis]}" for axis in axes)

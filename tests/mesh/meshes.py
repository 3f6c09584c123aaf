"""Meshes of virtual CPU devices, arrays placed on them, and compiled programs read."""

import re

import jax
import pytest
from jax.sharding import AxisType, NamedSharding

from attnsel_jax.mesh import kernel_over_mesh, plan_call
from attnsel_jax.mesh.dimensions import by_name, dimensions

COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")


def mesh(explicit=True, **axes):
    """A mesh of named sizes: `mesh(data=2, model=4)`."""
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices: XLA_FLAGS=--xla_force_host_platform_device_count=8")
    kind = AxisType.Explicit if explicit else AxisType.Auto
    return jax.make_mesh(tuple(axes.values()), tuple(axes), (kind,) * len(axes),
                         devices=jax.devices()[: _product(axes.values())])  # fmt: skip


def _product(sizes):
    total = 1
    for size in sizes:
        total *= size
    return total


def put(array, on, *spec):
    return jax.device_put(array, NamedSharding(on, jax.P(*spec)))


def collectives(function, *arguments):
    """The collectives of the compiled program, in a list of their kinds."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    kinds = "|".join(COLLECTIVES)
    return sorted(re.findall(rf"= [^=]*? ({kinds})(?:-start)?\(", text))


def on_mesh(backend, op, on, **cuts):
    """The backend's kernel with its arguments cut: `cuts` says what cuts each dimension.

    A function of the contract's arguments, for `attnsel_jax.compare`.
    """

    def kernel(*args, **kwargs):
        given = by_name(op, args, kwargs)
        arrays = {name: x for name, x in given.items() if hasattr(x, "shape")}
        placed = dict(given)
        for name, dims in dimensions(op, arrays, backend.layout).items():
            spec = jax.P(*(cuts.get(dim) for dim in dims))
            placed[name] = jax.sharding.reshard(arrays[name], NamedSharding(on, spec))
        arrays = {name: placed[name] for name in arrays}
        plan = plan_call(op, arrays, layout=backend.layout)
        results = kernel_over_mesh(backend, op, plan)(**placed)
        return tuple(jax.sharding.reshard(x, NamedSharding(on, jax.P())) for x in results)

    return kernel

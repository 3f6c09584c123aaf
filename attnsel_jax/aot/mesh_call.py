"""A call over a mesh that is compiled and not run: its axes, and what they share out."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from attnsel_jax.mesh import MeshAxes, kernel_over_mesh, plan_call
from attnsel_jax.mesh.dimensions import dimensions
from attnsel_jax.qualnames import resolve_obj_by_qualname


@dataclasses.dataclass(frozen=True)
class MeshCall:
    """Over which mesh a call is compiled.

    Attributes:
        backend: dotted path of the backend's class.
        op: a key of `attnsel_jax.mesh.dimensions.ARGUMENTS`.
        axes: the mesh's axes and their sizes.
        batch, heads, context, form: as in `MeshAxes`.
    """

    backend: str
    op: str
    axes: Mapping[str, int]
    batch: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    context: str | None = None
    form: str = "ring"

    @property
    def devices(self) -> int:
        """Devices of the mesh."""
        return math.prod(self.axes.values())


def shared_out(
    over: MeshCall, devices: Any, arrays: dict[str, jax.ShapeDtypeStruct], static: dict[str, Any]
) -> tuple[Callable[..., Any], dict[str, jax.ShapeDtypeStruct]]:
    """The backend's kernel over the mesh, a function of arrays by name, and its arrays on it."""
    explicit = (jax.sharding.AxisType.Explicit,) * len(over.axes)
    shape = tuple(over.axes.values())
    mesh = jax.sharding.Mesh(np.array(devices).reshape(shape), tuple(over.axes), explicit)
    backend = resolve_obj_by_qualname(over.backend)
    layout = backend.latent_layout if backend.is_mla() else backend.layout
    said = MeshAxes(over.batch, over.heads, over.context, over.form, mesh)
    arrays = _in_groups(arrays, math.prod(over.axes[axis] for axis in over.batch))
    plan = plan_call(over.op, arrays, said, layout)
    dims = dimensions(over.op, arrays, layout)
    placed = {
        name: jax.ShapeDtypeStruct(
            array.shape, array.dtype, sharding=jax.NamedSharding(mesh, plan.spec(dims[name]))
        )
        for name, array in arrays.items()
    }

    def call(**given: jax.Array) -> Any:
        read = plan_call(over.op, given, MeshAxes(form=over.form), layout)
        return kernel_over_mesh(backend, over.op, read)(**given, **static)

    return call, placed


def _in_groups(
    arrays: dict[str, jax.ShapeDtypeStruct], groups: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """A ragged batch as so many groups; of anything else, the arrays as they are."""
    if "num_seqs" not in arrays or groups == 1:
        return arrays
    starts = arrays["kv_lens"].shape[0] + groups
    changed = {"num_seqs": (groups,), "cu_q_lens": (starts,)}
    return arrays | {
        name: jax.ShapeDtypeStruct(shape, arrays[name].dtype) for name, shape in changed.items()
    }

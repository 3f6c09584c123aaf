"""Which mesh axes cut which dimensions of one call."""

import dataclasses
import math

import jax

from attnsel_jax.mesh.dimensions import Dims
from attnsel_jax.mesh.mesh_axes import Axes

Mesh = jax.sharding.Mesh | jax.sharding.AbstractMesh
# What is shared out together: the dimensions that the batch's axes cut, and so on.
BATCH = ("batch", "tokens", "seqs", "starts", "groups")
HEADS = ("heads", "cache_heads")
POSITIONS = ("q_len", "kv_len")
CONTEXT = (*POSITIONS, "keys")  # an array that comes cut by keys is made whole


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which mesh axes cut which dimensions of one call.

    Attributes:
        mesh: the mesh.
        batch: axes that cut the batch, or a ragged batch's groups with their pages.
        heads: axes that cut query heads and the cache's heads.
        kv_heads: axes that cut the heads of k and v; the first of `heads`, or all of them.
        context: the axis that cuts a sequence's positions, or its pages; None = none does.
        form: see `MeshAxes`.
    """

    mesh: Mesh
    batch: Axes = ()
    heads: Axes = ()
    kv_heads: Axes = ()
    context: str | None = None
    form: str = "ring"

    def merges(self, op: str) -> bool:
        """Whether partial results are merged by lse."""
        return self.context is not None and (op != "dense" or self.form == "ring")

    def size(self, axes: Axes | str | None) -> int:
        """Devices along some axes."""
        names = (axes,) if isinstance(axes, str) else axes or ()
        return math.prod(self.mesh.shape[axis] for axis in names)

    def axes(self, dim: str) -> Axes:
        """The axes that cut a dimension."""
        context = (self.context,) if self.context else ()
        if dim == "pages":
            return self.batch + context
        if dim in POSITIONS:
            return context
        if dim == "kv_heads":
            return self.kv_heads
        return self.batch if dim in BATCH else self.heads if dim in HEADS else ()

    def spec(self, dims: Dims) -> jax.P:
        """The partition of an array of these dimensions."""
        return jax.P(*(self.axes(dim) or None for dim in dims))

    @property
    def manual(self) -> frozenset[str]:
        """Every axis of the mesh that a `shard_map` around this call has not taken already."""
        taken = jax.sharding.get_abstract_mesh().manual_axes
        return frozenset(self.mesh.axis_names) - frozenset(taken)

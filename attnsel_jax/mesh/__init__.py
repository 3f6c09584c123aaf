"""Attention over a device mesh: one call of any backend's kernel, shared out among devices.

A call's `Plan` says which mesh axes share out its batch, its heads and its keys. It is read off the
arrays' own shardings where these show (explicit axes, and arrays outside `jit`), or said by the
caller (`MeshAxes`). By it, `kernel_over_mesh` runs the kernel on each device's share, under
`jax.shard_map`. Kernels know nothing of it, so any kernel works, however opaque it is to XLA.
"""

from attnsel_jax.mesh.filling import fill_over_mesh as fill_over_mesh
from attnsel_jax.mesh.forms import asked_of_kernel as asked_of_kernel
from attnsel_jax.mesh.mesh_axes import MeshAxes as MeshAxes
from attnsel_jax.mesh.mesh_axes import use_mesh_axes as use_mesh_axes
from attnsel_jax.mesh.over_mesh import kernel_over_mesh as kernel_over_mesh
from attnsel_jax.mesh.plan import Plan as Plan
from attnsel_jax.mesh.planning import plan_call as plan_call

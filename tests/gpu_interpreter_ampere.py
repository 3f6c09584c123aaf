"""What the Mosaic GPU interpreter lacks of Ampere: mma, cp.async, and a cast of layouts.

A group of `cp.async` is performed when it is waited for, and until then its target is poisoned: a
read before the wait, and a slot that is still read when the next group is sent for, both give NaN.
A source that is not inside its array is an error: nothing clips there.
"""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import callback
from jax._src.pallas.mosaic_gpu import primitives as gpu
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks as callbacks
from jax._src.pallas.mosaic_gpu.interpret import jaxpr_interpret
from jax._src.pallas.mosaic_gpu.interpret import shared_memory as memory

INLINED = ("rounded_as_left_operand",)  # functions that keep values, but for their dtype
_sent_for = collections.defaultdict(collections.deque)  # thread -> copies, the oldest first


def forget() -> None:
    """Drops what a kernel that failed had still in flight."""
    _sent_for.clear()


def missing(eqn):
    """The function for an equation of Ampere's, or None."""
    primitive = eqn.primitive
    if primitive is gpu.mma_p:
        return _mma
    if primitive is gpu.copy_gmem_to_smem_p and not eqn.params["has_barrier"]:
        return _send_for
    if primitive is gpu.wait_gmem_to_smem_p:
        return _wait
    if primitive is gpu.inline_mgpu_p and eqn.params["mgpu_fn"].__name__ in INLINED:
        return _keep_values
    if primitive is gpu.inline_mgpu_p and eqn.params["mgpu_fn"].__name__ == "above_0_in_any_row":
        return _vote
    return None


def _mma(self, eqn, token, values):
    acc, a, b = values
    product = jnp.matmul(a.astype(acc.dtype), b.astype(acc.dtype), precision="highest")
    return token, [acc + product]


def _vote(self, eqn, token, values):
    return token, [(values[0] > 0).any().astype(eqn.outvars[0].aval.dtype)]


def _keep_values(self, eqn, token, values):
    return token, [values[0].astype(eqn.outvars[0].aval.dtype)]


def _send_for(self, eqn, token, values):
    source, target, *leaves = values
    trees = (eqn.params["src_transforms_treedef"], eqn.params["dst_transforms_treedef"])
    transforms = jax.tree.unflatten(jax.tree_util.treedef_tuple(trees), leaves)
    source, target, transforms = _of_unions(eqn, source, target, transforms)
    return callback.io_callback(
        functools.partial(_sent, source_info=eqn.source_info),
        callbacks.TOKEN_SHAPE_DTYPE, token, self.thread, self.mesh_location, source, target,
        *(tuple(t) for t in transforms),
    ), []  # fmt: skip


def _of_unions(eqn, source, target, transforms):
    """Source and target where they are members of a `plgpu.RefUnion`."""
    ends = zip(eqn.invars[:2], (source, target), transforms, strict=True)
    found = [jaxpr_interpret.resolve_ref(var.aval, key, tuple(t)) for var, key, t in ends]
    (source, of_source), (target, of_target) = found
    return source, target, (of_source, of_target)


@callbacks.fail_on_exception
def _sent(token, thread, location, source, target, source_steps, target_steps, source_info=None):
    shared = callbacks._get_shared_memory()

    def read(key, steps):
        key = callbacks.HostAllocationKey.from_array(key)
        place = shared.access(key, jax.tree.map(int, callbacks._remove_noop_transforms(steps)))
        logging = memory.GPULoggingInfo(location, thread, source_info)
        return *shared.get_buffer_content(key, place, thread, logging_info=logging)[:1], place

    def write(value):  # under race detection
        callbacks._swap(
            token, location, thread, target, target_steps, value, None, source_info=source_info
        )

    old, _ = read(target, target_steps)
    poison = np.nan if jnp.issubdtype(old.dtype, jnp.floating) else np.iinfo(old.dtype).max
    write(np.full(old.shape, poison, old.dtype))

    def arrive():
        value, place = read(source, source_steps)
        before = any(part.start < 0 for part in place.range if isinstance(part, slice))
        if before or value is None or value.shape != old.shape:
            raise IndexError(f"cp.async reads outside its array: {place}")
        write(value)

    _sent_for[thread].append(arrive)
    return token


def _wait(self, eqn, token, values):
    done = functools.partial(_arrived, allowed=eqn.params["n"])
    return callback.io_callback(done, callbacks.TOKEN_SHAPE_DTYPE, token, self.thread), []


@callbacks.fail_on_exception
def _arrived(token, thread, allowed):
    while len(_sent_for[thread]) > allowed:
        _sent_for[thread].popleft()()
    return token

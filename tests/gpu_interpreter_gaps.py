"""Teaches the Mosaic GPU interpreter what attention kernels need and it lacks.

`fill_gaps()` makes `plgpu.InterpretGPUParams` (jax 0.11.2 to 0.12) run: `pl.run_state` with
`plgpu.ACC.init`, stores to wgmma accumulators, wgmma with its left operand in registers, predicates
on copies, and TMA reductions to GMEM. It reaches into `jax._src`: `tests/mosaic_gpu` says loudly
when something has moved.
"""

import functools

import gpu_interpreter_ampere
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src import callback, core
from jax._src.pallas.mosaic_gpu import core as gpu_core
from jax._src.pallas.mosaic_gpu import primitives as gpu
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks as callbacks
from jax._src.pallas.mosaic_gpu.interpret import jaxpr_interpret
from jax._src.pallas.mosaic_gpu.interpret import shared_memory as memory
from jax._src.state import discharge
from jax._src.state import types as state_types

_interpret = jaxpr_interpret.JaxprInterpreter.interpret
COPIES = (gpu.copy_gmem_to_smem_p, gpu.copy_smem_to_gmem_p)
REDUCTIONS = {"add": jnp.add, "max": jnp.maximum, "min": jnp.minimum}


def fill_gaps() -> None:
    """Replaces the interpreter's loop over equations; once is enough."""
    jaxpr_interpret.JaxprInterpreter.interpret = interpret
    gpu_interpreter_ampere.forget()


def interpret(self, jaxpr, token, *args):
    """Equation after equation, the missing ones here and the others as the interpreter does."""
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], args, strict=True))

    def read(var):
        return var.val if isinstance(var, core.Literal) else env[var]

    for eqn in jaxpr.eqns:
        values = [read(var) for var in eqn.invars]
        token, out = _missing(eqn)(self, eqn, token, values)
        env.update(zip(eqn.outvars, out, strict=True))
    return token, [read(var) for var in jaxpr.outvars]


def _missing(eqn):
    """The function for an equation that the interpreter lacks, or `_as_it_does`."""
    primitive, params = eqn.primitive, eqn.params
    if (found := gpu_interpreter_ampere.missing(eqn)) is not None:
        return found
    if primitive is discharge.run_state_p:
        return _run_state
    if primitive is gpu.wgmma_ref_p and not _is_ref(eqn.invars[1]):
        return _wgmma_from_registers
    if primitive is gpu.wgmma_accumulator_store_p:
        return _store_accumulator
    if primitive in COPIES and params["has_user_predicate"]:
        return _copy_if
    if primitive is gpu.copy_smem_to_gmem_p and params["reduction_op"] is not None:
        return _reduce
    return _as_it_does


def _is_ref(var) -> bool:
    return isinstance(var.aval, state_types.AbstractRef)


def _place(self):
    return {"mesh_location": self.mesh_location, "thread": self.thread}


def _as_it_does(self, eqn, token, values):
    """One equation, by the interpreter itself."""
    free, args = [], []
    for var, value in zip(eqn.invars, values, strict=True):
        if not isinstance(var, core.Literal) and var not in free:
            free.append(var)
            args.append(value)
    info = core.DebugInfo("one", "", tuple("x" for _ in free), tuple("y" for _ in eqn.outvars))
    return _interpret(
        self, core.Jaxpr([], free, eqn.outvars, [eqn], eqn.effects, info), token, *args
    )


# Unchecked reads and writes, as the interpreter's own wgmma does them: registers are one thread's,
# and wgmma's reads of shared memory are not under race detection.


@callbacks.fail_on_exception
def _get(token, thread, location, key, transforms, source_info=None):
    shared, key = callbacks._get_shared_memory(), callbacks.HostAllocationKey.from_array(key)
    transforms = jax.tree.map(int, callbacks._remove_noop_transforms(transforms))
    logging = memory.GPULoggingInfo(location, thread, source_info)
    value, _, _ = shared.get_buffer_content(
        key, shared.access(key, transforms), thread, logging_info=logging
    )
    return token, value


@callbacks.fail_on_exception
def _set(token, thread, location, key, value, source_info=None):
    shared, key = callbacks._get_shared_memory(), callbacks.HostAllocationKey.from_array(key)
    logging = memory.GPULoggingInfo(location, thread, source_info)
    shared.store_buffer_content(
        key, shared.access(key, ()), np.asarray(value), thread, logging_info=logging
    )
    return token


def _unchecked_read(self, token, key, aval, info, transforms=()):
    shapes = callbacks.TOKEN_SHAPE_DTYPE, jax.ShapeDtypeStruct(aval.shape, aval.dtype)
    return callback.io_callback(
        functools.partial(_get, source_info=info),
        shapes, token, self.thread, self.mesh_location, key, tuple(transforms),
    )  # fmt: skip


def _unchecked_write(self, token, key, value, info):
    return callback.io_callback(
        functools.partial(_set, source_info=info),
        callbacks.TOKEN_SHAPE_DTYPE, token, self.thread, self.mesh_location, key, value,
    )  # fmt: skip


def _run_state(self, eqn, token, values):
    """`pl.run_state`: a register allocation for each state, read back at the end."""
    params, info, values = eqn.params, eqn.source_info, list(values)
    body, outer = params["jaxpr"], [var.aval for var in eqn.invars]
    keys, owned = [], []
    for ref, is_given in zip(body.invars, params["is_initialized"], strict=True):
        aval = outer.pop(0) if is_given else None
        if isinstance(aval, state_types.AbstractRef):  # a ref from outside
            keys.append(values.pop(0))
            owned.append(None)
            continue
        inner = ref.aval.inner_aval
        value = values.pop(0) if is_given else jnp.zeros(inner.shape, inner.dtype)
        token, key = _allocate(self, token, value, info)
        keys.append(key)
        owned.append(inner)
    inside, consts = getattr(body, "jaxpr", body), getattr(body, "consts", ())
    token, _ = self.interpret(inside, token, *consts, *keys)
    out = []
    for key, inner in zip(keys, owned, strict=True):
        if inner is not None:
            token, value = _unchecked_read(self, token, key, inner, info)
            token = callbacks.call_deallocate_buffer(
                token=token, allocation_key_as_array=key, source_info=info, **_place(self)
            )
        out.append(key if inner is None else value)
    return token, out


def _allocate(self, token, value, info):
    registers = memory.get_memory_space_idx(gpu_core.MemorySpace.REGS)
    token, request = callbacks.call_make_allocation_request_array(
        token=token, compute_unit=self.thread, memory_space_id=registers, initial_ref_count=1
    )
    return callbacks.call_allocate_buffer(
        token=token, allocation_request_as_array=request, value=value, source_info=info,
        **_place(self),
    )  # fmt: skip


def _store_accumulator(self, eqn, token, values):
    token = _unchecked_write(self, token, values[0], values[1], eqn.source_info)
    return token, [values[1]]


def _wgmma_from_registers(self, eqn, token, values):
    """acc += a @ b, with a as a value."""
    acc, a, b, *leaves = values
    trees = tuple(
        eqn.params[f"{name}_transforms_tree"] or jax.tree.structure([])
        for name in ("acc", "a", "b")
    )
    acc_transforms, _, b_transforms = jax.tree.unflatten(jax.tree_util.treedef_tuple(trees), leaves)
    if acc_transforms:
        raise NotImplementedError("wgmma into part of an accumulator")
    b, b_transforms = jaxpr_interpret.resolve_ref(eqn.invars[2].aval, b, b_transforms)
    info, acc_aval = eqn.source_info, eqn.invars[0].aval
    b_aval = jax.ShapeDtypeStruct((a.shape[1], acc_aval.shape[1]), eqn.invars[2].aval.dtype)
    token, b_value = _unchecked_read(self, token, b, b_aval, info, b_transforms)
    token, sum_ = _unchecked_read(self, token, acc, acc_aval, info)
    product = jnp.matmul(a.astype(sum_.dtype), b_value.astype(sum_.dtype), precision="highest")
    return _unchecked_write(self, token, acc, sum_ + product, info), []


def _copy_if(self, eqn, token, values):
    """A copy under a predicate; where it is false, one into SMEM arrives without bytes."""
    *values, predicate = values
    params = eqn.params | {"has_user_predicate": False}
    bare = eqn.replace(invars=eqn.invars[:-1], params=params)

    def skip(token):
        if eqn.primitive is not gpu.copy_gmem_to_smem_p:
            return token
        trees = (eqn.params["src_transforms_treedef"], eqn.params["dst_transforms_treedef"])
        key = jaxpr_interpret._get_barrier_allocation_key_from_inval(
            values[2], eqn.params["barrier_transforms_treedef"],
            values[3 + sum(tree.num_leaves for tree in trees) :],
        )  # fmt: skip
        return callbacks.call_barrier_arrive(
            token, self.mesh_location, self.thread, key, eqn.source_info
        )

    def copy(token):
        return _as_it_does(self, bare, token, values)[0]

    return lax.cond(predicate, copy, skip, token), []


def _reduce(self, eqn, token, values):
    """A TMA copy to GMEM that adds (or takes the larger, or smaller)."""
    params, info = eqn.params, eqn.source_info
    source, target, *leaves = values
    trees = (params["src_transforms_treedef"], params["dst_transforms_treedef"])
    source_transforms, target_transforms = jax.tree.unflatten(
        jax.tree_util.treedef_tuple(trees), leaves
    )
    aval = eqn.invars[1].aval
    if target_transforms:
        aval = state_types.TransformedRef(aval, target_transforms).type

    def read(token, key, transforms):
        return callbacks.call_get(
            token=token, result_shape_and_dtype=jax.ShapeDtypeStruct(aval.shape, aval.dtype),
            allocation_key_as_array=key, transforms=tuple(transforms), source_info=info,
            **_place(self),
        )  # fmt: skip

    token, new = read(token, source, source_transforms)
    token, old = read(token, target, target_transforms)
    value = REDUCTIONS[params["reduction_op"]](new, old)
    token, _ = callbacks.call_swap(
        token=token, result_shape_and_dtype=core.ShapedArray(value.shape, value.dtype),
        allocation_key_as_array=target, transforms=tuple(target_transforms), val=value, mask=None,
        source_info=info, **_place(self),
    )  # fmt: skip
    return token, []

"""Where copies of TMA begin in shared memory, by the code that Mosaic GPU emits for them.

CUDA wants multiples of 128 bytes. Neither Mosaic nor ptxas asks: on a chip it is an error, or what
the chip makes of it. What an address is a multiple of is read off its computation.
"""

import math

from jax.experimental.mosaic.gpu import launch_context, utils
from jaxlib.mlir import ir

TMA_BYTES = 128
ANY = 1 << 20  # what 0 is a multiple of
SAME = ("arith.index_cast", "arith.index_castui", "arith.extui", "arith.extsi", "arith.trunci")
SHARED = ("arith.addi", "arith.subi", "arith.remsi", "arith.remui", "arith.minsi", "arith.maxsi")
DYNAMIC = ir.ShapedType.get_dynamic_stride_or_offset()


def misaligned(patch):
    """A list that says of each copy which may begin elsewhere; `patch` is pytest's."""
    real, found = launch_context.LaunchContext.async_copy, []

    def recorded(self, *, src_ref, dst_ref, **how):
        is_store = utils.is_smem_ref(ir.MemRefType(src_ref.type))
        smem = src_ref if is_store else dst_ref
        is_tma = how.get("implementation") is not launch_context.AsyncCopyImplementation.CP_ASYNC
        if is_tma and (begins := multiple_of(smem)) % TMA_BYTES:
            kind = "store" if is_store else "load"
            found.append(f"a {kind} of {smem.type} begins at a multiple of {begins} bytes")
        return real(self, src_ref=src_ref, dst_ref=dst_ref, **how)

    patch.setattr(launch_context.LaunchContext, "async_copy", recorded)
    return found


def multiple_of(ref):
    """What the address of a memref in shared memory is known to be a multiple of, in bytes."""
    op = ref.owner.opview
    source, *operands = op.operation.operands
    if op.operation.name == "memref.view":  # of all shared memory
        return _number(operands[0])
    if op.operation.name != "memref.subview":  # the same address, seen otherwise
        return multiple_of(source)
    kind = ir.MemRefType(source.type)
    strides, _ = kind.get_strides_and_offset()
    size, dynamic = utils.bitwidth(kind.element_type) // 8, iter(operands)
    begins = multiple_of(source)
    for offset, stride in zip(op.operation.attributes["static_offsets"], strides, strict=True):
        known = _number(next(dynamic)) if offset == DYNAMIC else offset
        begins = math.gcd(begins, known * stride * size)
    return begins


def _number(value):
    """What a number is known to be a multiple of; 1 where nothing is known."""
    if isinstance(value.owner, ir.Block):
        return 1
    op = value.owner.opview.operation
    if op.name == "arith.constant":
        return abs(ir.IntegerAttr(op.attributes["value"]).value) or ANY
    if op.name in SAME:
        return _number(op.operands[0])
    parts = [_number(part) for part in op.operands[op.name == "arith.select" :]]
    if op.name == "arith.muli":
        return min(math.prod(parts), ANY)
    return math.gcd(*parts) if op.name in (*SHARED, "arith.select") else 1

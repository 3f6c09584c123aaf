"""Four ways to insist on a backend: for one call, for a block, for everything, from outside.

Whatever is insisted on is used, or refused with its reasons; it is never replaced by another.

    python examples/force_a_backend.py
"""

import os

import jax
import numpy as np

import attnsel_jax
from attnsel_jax import NoAttentionBackendError
from attnsel_jax import global_force_attn_backend_context_manager as forced

q, k, v = np.random.default_rng(0).standard_normal((3, 1, 96, 4, 32), np.float32)
traces = []


def attend(q, k, v):
    """Attention, and a note of the backend that was chosen for it."""
    chosen = attnsel_jax.get_attn_backend(32, q.dtype, "auto", None, op="dense").name
    traces.append(chosen)
    return attnsel_jax.dot_product_attention(q, k, v, is_causal=True)


def show(what):
    print(f"{what:<58} {traces[-1] if traces else 'no new trace'}")
    traces.clear()


attend(q, k, v)
show("nothing is insisted on")

# 1. One call. A name in any case, a member of AttentionBackendEnum, or a class.
out = attnsel_jax.dot_product_attention(q, k, v, is_causal=True)
reference = attnsel_jax.dot_product_attention(q, k, v, is_causal=True, backend="XLA_REFERENCE")
print(f"backend='XLA_REFERENCE': differs by {np.abs(out - reference).max():.1e}")

# 2. A block of code, in this thread only. Under jit too: what is forced is part of jit's key.
jitted = jax.jit(attend)
jitted(q, k, v)
show("jit, nothing forced: traces")
with forced("XLA_REFERENCE"):
    jitted(q, k, v)
    show("jit inside the context manager: traces again")
    with forced(None):
        jitted(q, k, v)
        show("jit, automatic again inside: the first trace is found")
jitted(q, k, v)
show("jit after it: the first trace is found")

# 3. Everything, until changed.
attnsel_jax.global_force_attn_backend("XLA_REFERENCE")
attend(q, k, v)
show("global_force_attn_backend('XLA_REFERENCE')")
attnsel_jax.global_force_attn_backend(None)

# 4. The environment. It takes effect at the next call; but JAX cannot see it, so a function that
#    is already traced keeps the backend that it was traced with.
os.environ["ATTNSEL_BACKEND"] = "xla_reference"
attend(q, k, v)
show("ATTNSEL_BACKEND=xla_reference")
jitted(q, k, v)
show("the same, a function jitted before it was set")
del os.environ["ATTNSEL_BACKEND"]

# What was insisted on is validated. cuDNN does not run on a CPU, and nothing runs in its place.
try:
    attnsel_jax.dot_product_attention(q, k, v, backend="CUDNN", device="cpu")
except NoAttentionBackendError as error:
    print(f"\n{error}")
try:
    attnsel_jax.global_force_attn_backend("XLA_REFRENCE")
except ValueError as error:
    print(f"\n{error}")

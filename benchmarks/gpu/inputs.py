"""Arrays for a program: fresh random numbers on the device, in sets larger than its cache."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.arguments import LATENT, ROPE
from benchmarks.batches import Program
from pallas_kernels import fp8_ds_mla

PAST_CACHE = 256 << 20  # bytes: several times the second-level cache of any of these chips
MOST_SETS = 4


def made(program: Program, seed: int) -> tuple[jax.Array, ...]:
    """The arguments as arrays: standard normal where the program names a shape only."""

    def array(key: jax.Array, given: Any) -> jax.Array:
        is_given = isinstance(given, np.ndarray)
        return jnp.asarray(given) if is_given else _normal(key, given.shape, given.dtype)

    keys = jax.random.split(jax.random.key(seed), len(program.arguments))
    return tuple(array(*each) for each in zip(keys, program.arguments, strict=True))


def num_sets(program: Program) -> int:
    """How many sets it takes to be past the cache; one if a single set is."""
    size = sum(math.prod(a.shape) * np.dtype(a.dtype).itemsize for a in program.arguments)
    return max(1, min(MOST_SETS, -(-PAST_CACHE // max(size, 1))))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    if np.dtype(dtype) != np.uint8:
        return jax.random.normal(key, shape, jnp.bfloat16).astype(dtype)
    rows = jax.random.normal(key, (*shape[:-1], LATENT + ROPE), jnp.bfloat16)
    return fp8_ds_mla.pack(rows[..., :LATENT], rows[..., LATENT:])

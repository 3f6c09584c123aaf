"""Arrays for a program: fresh random numbers on the device, in sets larger than its cache."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.arguments import LATENT, ROPE
from benchmarks.batches import Program
from pallas_kernels import fp8_ds_mla

PAST_CACHE = 256 << 20  # bytes: several times the second-level cache of any of these chips
MOST_SETS = 4


def maker(program: Program) -> Callable[[int], tuple[jax.Array, ...]]:
    """A function of a seed, compiled here: the arguments as arrays.

    Standard normal where the program names a shape only.
    """
    drawn = [given for given in program.arguments if not isinstance(given, np.ndarray)]

    def draw(seed: jax.Array) -> list[jax.Array]:
        keys = jax.random.split(jax.random.key(seed), len(drawn))
        return [_normal(key, each.shape, each.dtype) for key, each in zip(keys, drawn, strict=True)]

    compiled = jax.jit(draw).lower(np.uint32(0)).compile()

    def made(seed: int) -> tuple[jax.Array, ...]:
        arrays = iter(compiled(np.uint32(seed)))
        return tuple(
            jnp.asarray(given) if isinstance(given, np.ndarray) else next(arrays)
            for given in program.arguments
        )

    return made


def num_sets(program: Program) -> int:
    """How many sets it takes to be past the cache; one if a single set is."""
    size = sum(math.prod(a.shape) * np.dtype(a.dtype).itemsize for a in program.arguments)
    return max(1, min(MOST_SETS, -(-PAST_CACHE // max(size, 1))))


def _normal(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    if np.dtype(dtype) != np.uint8:
        return jax.random.normal(key, shape, jnp.bfloat16).astype(dtype)
    rows = jax.random.normal(key, (*shape[:-1], LATENT + ROPE), jnp.bfloat16)
    return fp8_ds_mla.pack(rows[..., :LATENT], rows[..., LATENT:])

"""What this GPU gives at best, measured in the same run: a large product, a large copy."""

import statistics

import jax
import jax.numpy as jnp

from benchmarks.gpu import clock

SIZE, COPY = 8192, 4 << 30
ROUNDS = 5


def calibrated(size: int = SIZE, copy: int = COPY) -> dict[str, float]:
    """TFLOP/s of a bfloat16 product on random numbers, GB/s of a copy (read and written)."""
    keys = jax.random.split(jax.random.key(0), 3)
    a, b = (jax.random.normal(key, (size, size), jnp.bfloat16) for key in keys[:2])
    block = jax.random.normal(keys[2], (copy // 4,), jnp.float32)
    product = _seconds(lambda a, b: a @ b, a, b)
    copied = _seconds(lambda x: x + 1, block)
    return {"tflops": 2 * size**3 / product / 1e12, "gbytes": 2 * copy / copied / 1e9}


def _seconds(function, *arguments) -> float:
    compiled = jax.jit(function).lower(*arguments).compile()
    wall = clock.wall_seconds(lambda: compiled(*arguments), calls=4, rounds=1)
    found = clock.device_seconds(compiled, [arguments], clock.calls_for(wall))
    return statistics.median(found or [wall])

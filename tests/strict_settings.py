"""The strictest of jax's settings, under which kernels are to be traced as under the defaults."""

import contextlib

import jax


@contextlib.contextmanager
def strict_settings():
    """64-bit numbers, no promotion of dtypes or of ranks, products at the highest precision."""
    with (
        jax.enable_x64(True),
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
        jax.default_matmul_precision("highest"),
    ):
        yield

"""What differs between the jax versions supported (0.10.2 to 0.12), in one place."""

import jax


def jax_version() -> tuple[int, ...]:
    """The installed jax as numbers, (0, 10, 2)."""
    return tuple(int(part) for part in jax.__version__.split(".") if part.isdigit())


def is_tracing() -> bool:
    """Whether a `jax.jit` (or another staging transformation) is tracing this thread's code."""
    import jax.extend.core  # at first use: it imports Pallas, some 40 ms

    return jax.extend.core.unsafe_am_i_under_a_jit_DO_NOT_USE()

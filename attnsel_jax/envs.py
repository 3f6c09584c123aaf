"""The environment variables this library reads; nothing else reads `os.environ`.

`ATTNSEL_BACKEND`: the backend to use, by name (`XLA`), in any case. Empty or unset: automatic; so
is `auto`. An unknown name is an error that lists the known ones. `VLLM_ATTENTION_BACKEND` is read
when `ATTNSEL_BACKEND` is unset, and vLLM's names are understood (`attnsel_jax.backend_names`).

A change takes effect at the next call of `get_attn_backend`. JAX cannot see the environment: a
function already traced by `jax.jit` keeps the backend that it was traced with. To switch under
`jit`, use `global_force_attn_backend_context_manager`, which is part of `jit`'s key.
"""

import contextlib
import os
from collections.abc import Iterator

BACKEND_VARIABLES = ("ATTNSEL_BACKEND", "VLLM_ATTENTION_BACKEND")
_ENCODED = {variable: os.environ.encodekey(variable) for variable in BACKEND_VARIABLES}


def backend_text() -> tuple[str, str] | None:
    """(variable, its text) of the first backend variable that is set and not blank."""
    for variable in BACKEND_VARIABLES:
        text = os.environ.get(variable) if _may_be_set(variable) else None
        if text and not text.isspace():
            return variable, text
    return None


def _may_be_set(variable: str) -> bool:
    """False where a look at the environment's own table shows that a variable is not set.

    `os.environ.get` takes over 1 µs to find nothing (it raises and catches), the table 0.1 µs.
    """
    table = getattr(os.environ, "_data", None)
    return table is None or _ENCODED[variable] in table


def environment_for_compiling(devices: int | None = None) -> dict[str, str]:
    """The environment of a process that compiles for a chip, or `devices`, that are not here.

    jax itself runs on the CPU; libtpu asks no metadata server, writes no logs (they grow without
    bound in the temporary folder otherwise), and does not mind another process that compiles.
    """
    several = f" --xla_force_host_platform_device_count={devices}" if devices else ""
    return {
        **os.environ,
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + several,
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_LOG_DIR": "disabled",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }


@contextlib.contextmanager
def backend_variable(text: str) -> Iterator[None]:
    """Sets `ATTNSEL_BACKEND` inside a `with`, for measurements."""
    variable = BACKEND_VARIABLES[0]
    before = os.environ.get(variable)
    os.environ[variable] = text
    try:
        yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before

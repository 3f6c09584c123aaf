"""Temporary memory of the compiled programs at a length that nobody here could run."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from attnsel_jax.aot.report import memory_of
from attnsel_jax.bench.attention_cases import dense_causal
from attnsel_jax.bench.results import CaseResult, Row, Settings, at_least
from attnsel_jax.bench.rivals import with_gradients
from attnsel_jax.platforms import current_device
from attnsel_jax.selector import select

RATIO = 100.0


def memory_at(
    settings: Settings, *, length: int = 32768, num_heads: int = 8, head_size: int = 128
) -> CaseResult:
    """Compiles dense causal attention, forward and backward, ours and jax.nn's; runs nothing."""
    shape = jax.ShapeDtypeStruct((1, length, num_heads, head_size), jnp.float32)
    rows, verdicts = [], []
    for gradients in (False, True):
        race = dense_causal(gradients=gradients, num_heads=num_heads, head_size=head_size)
        insisted = settings.backends and settings.backends[0]
        chosen = select(race.config, current_device(), insisted).required()
        pass_name = "forward and backward" if gradients else "forward"
        ours = _temporaries(race.of_backend(chosen), shape, gradients)
        jax_nn = _temporaries(_jax_nn(gradients), shape, gradients)
        rows += [
            Row(f"{chosen.name}, {pass_name}", ours, "B"),
            Row(f"jax.nn, {pass_name}", jax_nn, "B"),
        ]
        what = f"jax.nn's temporaries over {chosen.name}'s, {pass_name}"
        verdicts.append(at_least(what, jax_nn / max(ours, 1), RATIO))
    description = (
        f"compiled temporary memory, dense causal: float32, batch 1, {num_heads} heads, length "
        f"{length}, head size {head_size}; compiled, never run"
    )
    return CaseResult(f"memory_{length}", description, tuple(rows), tuple(verdicts))


def _jax_nn(gradients: bool) -> Callable[..., Any]:
    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)

    return with_gradients(attend) if gradients else attend


def _temporaries(function: Callable[..., Any], shape: Any, gradients: bool) -> float:
    """Bytes of temporaries of the program for q, k, v (and dout) of this shape."""
    compiled = jax.jit(function).lower(*[shape] * (4 if gradients else 3)).compile()
    return float(memory_of(compiled)["temporaries"])

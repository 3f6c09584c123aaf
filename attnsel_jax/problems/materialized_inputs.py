"""Arguments of materialised MLA: those of MLA, aimed at the keys that each head makes."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnsel_jax import oracle
from attnsel_jax.oracle.attend import visible
from attnsel_jax.oracle.ragged import sequences
from attnsel_jax.problems.aim import aim
from attnsel_jax.problems.mla_inputs import mla_inputs

BATCH = ("page_table", "kv_lens", "cu_q_lens", "num_seqs")


def materialized_inputs(
    rng: np.random.Generator, *, qk_nope_head_dim: int = 128, v_dim: int = 128, **options: Any
) -> dict[str, Any]:
    """Arguments of materialised MLA.

    Args:
        rng: source of everything drawn.
        qk_nope_head_dim: of a head's key without its rotary part.
        v_dim: of a head's value.
        **options: those of `mla_inputs`; no fp8_ds_mla.
    """
    arguments = mla_inputs(rng, qk_nope_head_dim=qk_nope_head_dim, **options)
    ql_nope, q_pe = arguments.pop("ql_nope"), arguments.pop("q_pe")
    _, num_heads, rank = ql_nope.shape
    step = {name: arguments[name] for name in ("kv_c", "k_pe", "latent_pages", "slot_mapping")}
    written = oracle.write_latents(**step, kv_scale=arguments.get("kv_scale"))
    weights = [
        (rng.standard_normal((rank, num_heads, size), dtype=np.float32) * rank**-0.5).astype(
            ql_nope.dtype
        )
        for size in (qk_nope_head_dim, v_dim)
    ]
    q = np.full((*q_pe.shape[:2], qk_nope_head_dim + q_pe.shape[-1]), np.nan, np.float32)
    for seq in sequences(written.shape[1], *(arguments[name] for name in BATCH)):
        latents = written[seq.pages, seq.offsets].astype(np.float32)
        keys = _keys(latents * np.float32(arguments.get("kv_scale", 1)), weights[0])
        see = visible(seq.q_pos, seq.kv_pos, True, None, None)
        q[seq.tokens] = aim(rng, keys, see, num_heads, arguments["scale"])
    q = q.astype(ql_nope.dtype)
    parts = {"q_nope": q[..., :qk_nope_head_dim], "q_pe": q[..., qk_nope_head_dim:]}
    parts = {name: np.ascontiguousarray(x) for name, x in parts.items()}
    return parts | arguments | dict(zip(("w_uk", "w_uv"), weights, strict=True))


def _keys(latents: NDArray[np.float32], w_uk: NDArray) -> NDArray[np.float32]:
    """[positions, num_heads, nope_dim + rope_dim]."""
    rank, num_heads, _ = w_uk.shape
    nope = np.einsum("sr,rnd->snd", latents[:, :rank], w_uk.astype(np.float32), optimize=True)
    rope = np.repeat(latents[:, None, rank:], num_heads, axis=1)
    return np.concatenate([nope, rope], axis=-1)

"""What every op means: float64 NumPy, written apart from every kernel.

Each function takes its contract's arguments (`pallas_kernels/*/__init__.py`) as anything that
`np.asarray` takes, and returns what the contract says, in float64. Nothing that the contract calls
unseen is read: it may be NaN. `attend_*` return, besides, what an error budget needs (`Attended`).
"""

from attnsel_jax.oracle.attend import Attended
from attnsel_jax.oracle.cache import quantise
from attnsel_jax.oracle.dense import attend_dense, dense_attention
from attnsel_jax.oracle.fp8_ds_mla import decode_fp8_ds_mla, encode_fp8_ds_mla
from attnsel_jax.oracle.gradients import Gradients, attend_dense_gradients, dense_gradients
from attnsel_jax.oracle.indexer import indexer_score_sizes, indexer_scores, topk_positions
from attnsel_jax.oracle.mla import (
    attend_mla,
    attend_sparse_mla,
    mla_attention,
    sparse_mla_attention,
    write_latents,
)
from attnsel_jax.oracle.mla_materialized import attend_mla_materialized
from attnsel_jax.oracle.paged import attend_paged, paged_attention, write_kv

__all__ = [
    "Attended",
    "Gradients",
    "attend_dense",
    "attend_dense_gradients",
    "attend_mla",
    "attend_mla_materialized",
    "attend_paged",
    "attend_sparse_mla",
    "decode_fp8_ds_mla",
    "dense_attention",
    "dense_gradients",
    "encode_fp8_ds_mla",
    "indexer_score_sizes",
    "indexer_scores",
    "mla_attention",
    "paged_attention",
    "quantise",
    "sparse_mla_attention",
    "topk_positions",
    "write_kv",
    "write_latents",
]
